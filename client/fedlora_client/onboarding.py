"""fedlora-client join: from the coordinator's kit to a running client. All is checked before a server is called.

Steps that do not need each other are all made, so that their owner learns of everything at once. The options that were
given and asked are then written to a file, and the client starts with that file, as it will later.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from rich.console import Console

from fedlora import data
from fedlora.config import ClientConfig, read_config, values
from fedlora.config.client import JoinConfig
from fedlora.files import replace_file
from fedlora.identity.certificates import grouped
from fedlora.identity.folder import CERTIFICATE
from fedlora.kit import Kit, read_kit
from fedlora.plan import ROW, Proposal
from fedlora.privacy import DatasetPolicy, Policy, nominal_size
from fedlora.wire import is_loopback

from . import paths
from .admission import Cost, ask_size, ask_whether, panel, what_is_trained
from .data_holder import DataHolder, read_data
from .installed import find_kit_model
from .kit_identity import ask_for_certificate, check_authority, check_certificate, requested_name
from .kit_options import labels_to_take, with_kit
from .labels import check_with_kit
from .options_file import command, options_text
from .privacy_gate import PrivacyGate, limits_of, unit_count
from .questions import ask
from .steps import Awaiting, NotReady, Steps
from .tls import tls_of


def join(options: JoinConfig, given: Collection[str], console: Console, *, asks: bool) -> ClientConfig | None:
    """Check a kit and all that it needs here, ask what is the owner's to decide, and write the options.

    Args:
        options: the options of `fedlora-client join`.
        given: names of the options that are given and so not asked.
        console: where the data holder is told what happens, and asked.
        asks: whether someone sits at a terminal who wants to be asked.

    Returns:
        The options to start the client with; None if it is not to be started.

    Raises:
        NotReady: something has to be done first.
        Awaiting: the certificate has not come back yet.
        ValueError: the file is no kit that this FedLoRA can use, or an option contradicts it.
    """
    assert options.kit is not None, "checked where the command line is read"
    joining, steps = _Joining(options, given, read_kit(options.kit), console, asks), Steps(console)
    joining.check_given()
    steps.make("kit", joining.kit, needed=True)
    for name, step in (("model", joining.model), ("identity", joining.identity), ("data", joining.data),
                       ("privacy", joining.privacy)):
        steps.make(name, step)
    joining.close()
    steps.check()
    if steps.awaits:
        raise Awaiting(f"a certificate is awaited. Start the same command again when it is in {joining.options.tls}")
    if options.check_only:
        console.print("All is well. Nothing was written, and no server was called.")
        return None
    steps.make("policy", joining.pin)
    steps.make("options", joining.write, needed=True)
    return read_config(ClientConfig, ["--config", str(options.write.absolute())]) if options.start else None


class _Joining:
    """The steps of one client, each of which may ask its owner for what was not given.

    Args:
        options: the options of `fedlora-client join`.
        given: names of the options that are given.
        kit: the kit.
        console: where the data holder is told what happens, and asked.
        asks: whether someone may be asked.

    Attributes:
        options: the options with the kit's values and the owner's answers.
    """

    def __init__(self, options: JoinConfig, given: Collection[str], kit: Kit, console: Console, asks: bool) -> None:
        self._kit, self._plan, self._console, self._asks = kit, kit.plan, console, asks
        self._given = {*given, "kit", "server", "task"}
        self.options = with_kit(options, given, kit)
        self._policy = Policy.read(paths.named_policy(options.policy, options.simulated_ledger))
        self._holder: DataHolder | None = None
        self._name: str | None = None
        """This client's name, once its identity is there."""

    def check_given(self) -> None:
        """Check, where nobody can be asked, that nothing needs to be.

        Raises:
            NotReady: options are missing; the message names them.
        """
        if self._asks:
            return
        options, known = self.options, self._known
        needs = {"--yes": not (options.yes or options.check_only),
                 "--data DIR_OR_FILE (your records)": options.data is None,
                 "--epsilon X (the most that this run may spend)": "epsilon" not in self._given,
                 "--declared-size N (the public number of records)": self._plan.private and not (
                     options.declared_size or (known and known.declared_size)),
                 "--tls DIR (the folder for key and certificate)": bool(self._kit.authority) and options.tls is None}
        if lacking := [name for name, lacks in needs.items() if lacks]:
            raise NotReady("without a terminal, or with --yes, nothing is asked, and these options are missing: "
                           f"{', '.join(lacking)}")

    @property
    def _known(self) -> DatasetPolicy | None:
        """The policy's table of the data set; None if it has none, or the data are not named yet."""
        return self._policy.dataset_at(self.options.data) if self.options.data else None

    def _decide(self, name: str, value: Any) -> None:
        """Take a value into the options, to be written to the file."""
        self.options = dataclasses.replace(self.options, **{name: value})
        self._given.add(name)

    def _ask(self, name: str, question: str, default: object = None,
             parse: Callable[[str], Any] = values.text) -> None:
        """Ask for an option that is not given, if someone can be asked."""
        if self._asks and name not in self._given:
            self._decide(name, ask(self._console, question, None if default is None else str(default), parse))

    def kit(self) -> str:
        """Show the kit's fingerprint, and have its owner compare it.

        Raises:
            ValueError: the owner has not compared it.
        """
        self._console.print(f"{self.options.kit} is for the server at {self._kit.address}. Its fingerprint:\n"
                            f"  {self._kit.fingerprint}\n"
                            "Compare it with the coordinator by telephone, at a number that you know.", soft_wrap=True)
        if self._asks and not self.options.check_only and not ask_whether(
                self._console, "Does the coordinator read the same to you?"):
            raise ValueError("the kit decides whom this client trusts, so call the coordinator first. Should the "
                             "fingerprints differ, have the kit sent again")
        return f"undamaged; its FedLoRA {self._plan.fedlora_version} speaks the same protocol as this one"

    def model(self) -> str:
        """Find the base model here, and compare its hashes with the kit's."""
        model = self._plan.model
        if model.name == "local":
            self._ask("model", "Folder with your copy of the base model", parse=_folder)
        find_kit_model(self.options, self._plan)
        return f"{model.title}; weights, configuration and tokenizer are the kit's"

    def identity(self) -> str:
        """Check key and certificate.

        Raises:
            Awaiting: there is no certificate; a request for one was made.
        """
        if not self._kit.authority:
            return self._without_tls()
        self._ask("tls", "Folder for this client's key and certificate", "tls", values.path)
        folder = self.options.tls
        assert folder is not None, "given or asked"
        check_authority(self._kit, folder, write=not self.options.check_only)
        if not (folder / CERTIFICATE).exists():
            if self.options.check_only:
                raise ValueError(f"there is no {folder / CERTIFICATE} yet. Without --check-only, a key and a request "
                                 "for a certificate are made")
            raise ask_for_certificate(folder, self._name_to_ask_for(folder))
        self._name, until = check_certificate(self._kit, self.options, self._policy)
        return f"{self._name}; the certificate is of the kit's authority, and {until}"

    def _without_tls(self) -> str:
        if (tls := tls_of(self.options, self._policy)) is not None:
            self._name = tls.identity().certificate.name
        else:
            if not (is_loopback(self.options.server) or self.options.insecure):
                raise ValueError(f"the kit names no authority, so that the connection to {self.options.server} would "
                                 "not be encrypted. Ask for a kit that was made with --tls; or accept that with "
                                 "--insecure, in a network that you trust")
            self._ask("name", "Name of this client at the server", socket.gethostname())
            self._name = self.options.name or socket.gethostname()
        return f"{self._name}; the kit names no authority, so that nothing proves who the server is"

    def _name_to_ask_for(self, folder: Path) -> str:
        """Return this client's name: the given one, that of an earlier request, or the answer."""
        before = requested_name(folder)
        if self.options.name is None and self._asks:
            return ask(self._console, "Name of this client at the server", before or socket.gethostname(), values.text)
        if name := self.options.name or before:
            return name
        raise ValueError("--name NAME is missing: this client's name at the server and in its certificate")

    def data(self) -> str:
        """Read the data as the client will, with the kit's columns and labels."""
        if self._name is None and self.options.data is None:
            return ""
        self._ask("data", "Folder or file with your records", parse=_there)
        assert self.options.data is not None, "given or asked"
        if self._known is None:
            self._ask("privacy_unit", "What is protected as a whole: row, or column:NAME for all rows with the same "
                                      "value there, a patient's say", ROW, values.unit)
        if labels := labels_to_take(self.options, self._known, self._kit):
            self._decide("labels", labels)
        if self._name is None:  # a DataHolder needs the certificate
            gate = PrivacyGate(self.options, trial=self.options.check_only)
            rows = read_data(self.options, self._console, unit_column=gate.unit_column, labels=gate.labels)
            gate.ledger.close()
            if gate.labels is not None:
                data.check_labels(rows, gate.labels)
        else:
            self._ask("state", "Folder for uploads and reports", paths.default_state(self._name), values.path)
            self._holder = DataHolder.of(self.options, self._console, asks=True, trial=self.options.check_only)
            check_with_kit(self._holder.gate.labels, self._plan, self._holder.rows)
        return "can be read with the kit's columns and labels"

    def privacy(self) -> str:
        """Check the kit's plan against the policy and the lifetime budget, and show what the run would cost."""
        holder, plan = self._holder, self._plan
        if holder is None:
            return ""
        holder.limits.check(plan)
        holder.gate.check_proposal(Proposal(plan))
        if not plan.private:
            return ("none: the kit's run is without privacy, as --epsilon inf accepts. It trains "
                    f"{what_is_trained(plan)}")
        gate, count = holder.gate, unit_count(holder.rows)
        units = "records" if gate.unit == ROW else f"values of {gate.unit_column}"
        if gate.declared_size is None:
            gate.declared_size = ask_size(self._console, nominal_size(count), units)
            self._decide("declared_size", gate.declared_size)
        self._ask("epsilon", "ε, the most that anybody can learn from this run about one of the "
                             f"{units}; smaller is more private", f"{self.options.epsilon:g}", values.positive)
        limits = dataclasses.replace(limits_of(self.options, gate), declared_size=gate.declared_size)
        limits.check(plan)
        self._ask("delta", "δ, the slack on that", f"{limits.budget(count).delta:g}", values.probability)
        limits = dataclasses.replace(limits, delta=self.options.delta)
        budget = limits.budget(count)
        terms, book = gate.terms_for(limits, budget, plan)
        cost = Cost.of(book, gate.dataset, terms, pinned=gate.policy.members is not None)
        assert cost is not None, "what was settled fits"
        self._console.print(panel(cost, gate.dataset, f"{budget.declared_size:,} {units}", plan))
        return (f"within policy and budget: ε {budget.epsilon:g} at δ {budget.delta:g} for the whole run. Each step "
                f"draws each of the {units} with probability {terms.sampling_rate:.4g}, clips its gradient to "
                f"{terms.clip_norm:g}, and adds noise of {terms.noise_multiplier:.3f} × that")

    def close(self) -> None:
        """Release the ledger and the state folder, which the client opens again when it starts."""
        if self._holder is not None:
            self._holder.close()

    def pin(self) -> str:
        """Write the server's fingerprint into the policy, if its owner wants that."""
        key = self._kit.server_fingerprint
        if not key or self._policy.server_fingerprints is not None:
            return ""
        wanted = self.options.pin
        if self._asks and "pin" not in self._given:
            self._console.print(f"The key of the server has the fingerprint\n  {grouped(key)}", soft_wrap=True)
            wanted = ask_whether(self._console, "Allow no server with another key, in this and all later runs "
                                                f"(server-fingerprints in {self._policy.path})?")
        if not wanted:
            return ""
        try:
            self._policy.pin_server(key)
        except ValueError as error:
            self._console.print(f"The server's key is not pinned: {error}.", style="yellow", soft_wrap=True)
            return ""
        return f"{self._policy.path} now allows no server but the one with this key (server-fingerprints)"

    def write(self) -> str:
        """Write the options that were given and asked to a file, and say how to start with it.

        Raises:
            ValueError: another file is there, and nobody says that it may be replaced.
        """
        path = self.options.write.absolute()
        text = options_text(self.options, self._given | {"column"}, path,
                            f"the kit with the fingerprint {self._kit.fingerprint}").encode()
        if path.exists() and path.read_bytes() != text and not (
                self._asks and ask_whether(self._console, f"{path} is there already. Replace it?")):
            raise ValueError(f"{path} is there already, with other content; name another file with --write, or remove "
                             "it")
        replace_file(path, text)
        return f"written. This starts the client, now and later:\n  {command(path)}"


def _folder(given: str) -> str:
    if not Path(given).is_dir():
        raise ValueError(f"{given} is no folder")
    return given


def _there(given: str) -> str:
    data.check_there(given)
    return given
