"""The data holder's policy, ledger and data, opened and checked before a server is called."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fedlora import data
from fedlora.config import ClientConfig
from fedlora.data import Overview, Rows
from fedlora.identity.certificates import utc_now
from fedlora.kit import Kit, read_kit
from fedlora.privacy import (
    INSECURE_SEED_VARIABLE,
    Policy,
    RunStreams,
    run_streams,
)
from fedlora.tasks import read, task_named
from fedlora.training import check_computing

from .paths import default_state
from .privacy_gate import PrivacyGate, limits_of, unit_count
from .state import FolderState
from .terms import Limits
from .tls import Tls, tls_of


@dataclass(frozen=True)
class DataHolder:
    """All that a client brings to any run: its data, what may be done with them and what was done before.

    Attributes:
        options: the options of fedlora-client.
        gate: the policy and the ledger.
        rows: the rows of --data.
        limits: what the options and the policy allow together.
        state: the folder of uploads and reports, held by this process alone.
        streams: the source of this client's random numbers.
        console: where the data holder is told what happens.
        tls: this client's certificate and the servers it trusts; None for a connection that is not encrypted.
        kit: what the coordinator told before the run; None without --kit.
        asks: whether the data holder is asked before a run begins: someone sits at a terminal, and a real budget is
            charged.
    """

    options: ClientConfig
    gate: PrivacyGate
    rows: Rows
    limits: Limits
    state: FolderState
    streams: RunStreams
    console: Console
    tls: Tls | None
    kit: Kit | None
    asks: bool

    @classmethod
    def of(cls, options: ClientConfig, console: Console, *, asks: bool = False, trial: bool = False) -> DataHolder:
        """Open the policy, the ledger and the state, read and check the data, and warn where privacy is off.

        Args:
            options: the options of fedlora-client.
            console: where the data holder is told what happens.
            asks: whether someone sits at a terminal.
            trial: work on a copy of the ledger in memory; no run can be charged.

        Raises:
            ValueError: an option or the data is wrong, or a file cannot be used.
        """
        check_named(options)
        check_model_named(options)
        kit = read_kit(options.kit) if options.kit is not None else None
        check_computing(options.device, options.precision, options.compile)  # now, rather than in round 1
        gate = PrivacyGate(options, trial=trial)
        tls, name = identified(options, gate.policy, console)
        limits, streams = limits_of(options, gate), run_streams(name)
        check_noise(options, streams, console)
        charged = limits.private and not gate.ledger.simulated
        if charged and not asks and not (options.yes and gate.declared_size):
            raise ValueError("there is no terminal to ask at, and the run would be charged to a real ledger. Add --yes "
                             "to take part without being asked, and give the public size of the data with "
                             f"--declared-size N (or declared-size in {gate.policy.path})")
        rows = read_data(options, console, unit_column=gate.unit_column, labels=gate.labels)
        check_size(limits)
        for line in gate.recognise(rows):
            console.print(line, soft_wrap=True)
        return cls(options, gate, rows, limits, FolderState(options.state or default_state(name)), streams, console,
                   tls, kit, asks and charged)

    @property
    def name(self) -> str:
        """This client's name at the server."""
        return self.streams.name

    def close(self) -> None:
        """Release the ledger's runs and the state folder, so that another process can use them."""
        self.gate.ledger.close()
        self.state.close()


def check_named(options: ClientConfig) -> None:
    """Check that --data is given and there.

    Raises:
        ValueError: it is not.
    """
    if options.data is None:
        raise ValueError("--data is missing: give the folder or file with your training rows")
    data.check_there(options.data)


def check_model_named(options: ClientConfig) -> None:
    """Check that --model is a folder if it is a path.

    Raises:
        ValueError: it is not.
    """
    if options.model and options.model.startswith(("/", ".")) and not Path(options.model).is_dir():
        raise ValueError(f"--model {options.model} is no folder; give the folder of the base model, or leave the "
                         "option out")


def identified(options: ClientConfig, policy: Policy, console: Console) -> tuple[Tls | None, str]:
    """Return this client's certificate and the servers it trusts (None without --tls), and its name at the server.

    Args:
        options: the options of fedlora-client.
        policy: the owner's policy, which may name the servers' keys.
        console: where a certificate that will soon end is told.

    Raises:
        ValueError: key or certificate cannot be used, or do not fit the options or the policy.
    """
    tls = tls_of(options, policy)
    certificate = tls.identity().certificate if tls else None
    if certificate and (warning := certificate.expiry_warning(utc_now())):
        console.print(warning, style="yellow")
    return tls, options.name or (certificate.name if certificate else socket.gethostname())


def check_noise(options: ClientConfig, streams: RunStreams, console: Console) -> None:
    """Say where there is no privacy or no budget, and check that a real budget is charged for real noise alone.

    Args:
        options: the options of fedlora-client.
        streams: the source of this client's random numbers.
        console: where the data holder is told.

    Raises:
        ValueError: the noise is predictable, and the ledger is a real one.
    """
    if options.epsilon == float("inf"):
        console.print("PRIVACY IS OFF (--epsilon inf): what this client sends can reveal its records.",
                      style="bold red")
    if streams.predictable:
        console.print(f"THE NOISE IS PREDICTABLE ({INSECURE_SEED_VARIABLE}, for tests only, is set): no ε holds "
                      "for this run.", style="bold red")
    if streams.predictable and options.simulated_ledger is None:
        raise ValueError(f"{INSECURE_SEED_VARIABLE} is set: whoever knows the seed can subtract the noise, so no "
                         "real budget covers this run. Unset it, or add --simulated-ledger DIR for made-up data")
    if options.simulated_ledger is not None:
        console.print("The ledger is a simulated one (--simulated-ledger): no lifetime budget protects these data. "
                      "Use it for made-up data only.", style="yellow")


def read_data(options: ClientConfig, console: Console, *, unit_column: str | None, labels: Sequence[str] | None,
              overview: Overview | None = None) -> Rows:
    """Read and check --data, and say in a line what was read.

    Args:
        options: the options of fedlora-client; they name the data.
        console: where the data holder is told what happens.
        unit_column: the column with the unit of privacy; None if each row is a unit.
        labels: the declared label names; None if there are none.
        overview: takes facts about the files.

    Raises:
        ValueError: the data have faults; the message lists them and quotes no row.
    """
    assert options.data is not None, "checked by the caller"
    rows = read(options.data, options.task, columns=options.column, unit=unit_column,
                allow_download=options.allow_download, declared=labels or (), options=options.read_options(),
                overview=overview)
    task_named(options.task).check_answered(rows, f"--data {options.data}", options.task)
    console.print(_what_was_read(rows, unit_column), soft_wrap=True)
    return rows


def check_size(limits: Limits) -> None:
    """Check that the declared size, if there is one, and δ make a budget.

    Raises:
        ValueError: they do not.
    """
    if limits.declared_size is not None and limits.private:
        limits.budget(limits.declared_size)


def _what_was_read(rows: Rows, unit_column: str | None) -> str:
    """Say in one line what was read, in counts alone, so that its owner notices a misunderstood file."""
    files = data.shown(rows.files[0]) if len(rows.files) == 1 else f"{len(rows.files)} files"
    told = [f"rows: {len(rows):,}"]
    if rows.labels is not None:
        told.append(f"different labels: {len(data.label_names(rows)):,}")
    if lacking := (rows.answers or ()).count(None):
        told.append(f"rows without {'a label' if rows.labels is not None else 'an answer'}: {lacking:,}")
    if unit_column is not None:
        told.append(f"different values of {data.shown(unit_column)}: {unit_count(rows):,}")
    return f"Read {files}: {'; '.join(told)}."
