"""The owner's policy file, policy.toml: the limits that no server's proposal and no command line can exceed.

    min-noise-multiplier = 0.5            # every setting is optional
    max-rounds = 100                      # the most trainings that a run may ask for
    max-sampling-rate = 0.2               # the highest probability with which a step may sample a unit
    strategies = ["fed-sb", "fedsvd"]     # as the server names its way of combining uploads; a client cannot check it
    families = ["frozen-a", "bra"]        # kinds of adapter, which decide what tensors are trained here and sent
    models = ["<SHA-256 of the weights>"]
    servers = ["127.0.0.1:9092"]
    server-fingerprints = ["<SHA-256 of the server's public key>"]    # no server without --tls and one of these keys
    announce-labels = false               # refuse servers that ask for the label names
    announce-size = false                 # leave sigma and delta out of uploads: they tell about the declared size
    private-start = false                 # refuse servers that ask for gradients to start the adapters from
    trust = "aggregate"                   # charge the noise of secure sums, which relies on other members; default: own
    members = ["<SHA-256 of a member's public key>"]    # the only ones with whom this site takes part in secure sums
    least-members = 6                     # ... and the fewest of them
    least-colluding = 1                   # ... of whom so many may tell what they know without harm

    [dataset.north]                       # one table for each data set, under an id of the owner's choice
    data = "/records/north"
    epsilon = 8.0                         # lifetime budget, over all runs
    delta = 1e-5
    unit = "column:patient_id"            # or "row", the default
    declared-size = 1300                  # public number of units; the noise is computed from it
    labels = ["routine", "urgent"]        # names that a server may be told; each labelled row must have one of them
    distinct = ["south"]                  # data sets about other people, even if some rows look the same
    witness = "/backed-up/folder"         # folder of the ledger's witness file; default: beside the data
    purpose = "triage of referral notes"  # for the privacy report alone, like controller, processor, legal-basis,
                                          # retention and recipient (`fedlora.privacy.about`)

The client reads this file before the data. A server whose proposal is forbidden receives only a code; the reason goes
to this machine's own log.
"""

from __future__ import annotations

import fcntl  # Linux and macOS; Windows through WSL
import json
import math
import re
import stat
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.data.rows import normalize_label
from fedlora.files import replace_file
from fedlora.places import expanded
from fedlora.plan import LONGEST_LABEL, MOST_ANNOUNCED, ROW, Proposal, check_unit
from fedlora.plan.limits import LEAST_MEMBERS, MOST_MEMBERS
from fedlora.privacy.about import KEYS, NOTHING, About
from fedlora.privacy.accounting import MOST_SAMPLING_RATE

TRUSTS = ("local", "aggregate")
"""Whose noise a run with secure sums is charged for: the client's own, or that of the sums."""


class Forbidden(ValueError):
    """The policy does not allow a proposal or its terms. The message is for the owner and is never sent."""


@dataclass(frozen=True)
class DatasetPolicy:
    """One data set's table in policy.toml: where the data are, their lifetime budget and their unit of privacy.

    Attributes:
        id: the owner's name for the data set, under which the ledger charges it.
        data: the folder or file as an absolute path, or the name of a hub data set.
        epsilon: limit on epsilon for everything that is ever released from the data, for one unit under the zero-out
            relation; positive, infinite for no limit.
        delta: the delta of that limit, in (0, 1).
        unit: "row", or "column:NAME" if all rows that share a value of that column are one unit of privacy.
        declared_size: the public number of units; None if the command line or a prompt supplies it.
        labels: the label names, normalised; None if they are not declared.
        distinct: ids of data sets that share nobody with this one.
        witness: folder of the ledger's witness file; None puts the file beside the data.
        about: what the owner states about the data's use, for the privacy report.
    """

    id: str
    data: str
    epsilon: float
    delta: float
    unit: str = ROW
    distinct: tuple[str, ...] = ()
    witness: Path | None = None
    declared_size: int | None = None
    labels: tuple[str, ...] | None = None
    about: About = NOTHING

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", self.id):
            raise ValueError(f"{self.id!r} is no id of a data set; use 1 to 64 letters, digits, - and _, with a letter "
                             "or digit first")
        if not self.epsilon > 0:
            raise ValueError(f"[dataset.{self.id}] epsilon is {self.epsilon!r}; it must be positive")
        if not 0 < self.delta < 1:
            raise ValueError(f"[dataset.{self.id}] delta is {self.delta!r}; it must be between 0 and 1")
        check_unit(self.unit)
        if self.declared_size is not None and self.declared_size < 1:
            raise ValueError(f"[dataset.{self.id}] declared-size is {self.declared_size}; it must be at least 1")
        if self.labels is not None:
            object.__setattr__(self, "labels", tuple(normalize_label(name) or "" for name in self.labels))
            check_label_names(self.labels or (), f"[dataset.{self.id}] labels")

    def toml(self) -> str:
        """Return this data set's table as it stands in policy.toml."""
        lines = [f"[dataset.{self.id}]", f"data = {_string(self.data)}",
                 f"epsilon = {self.epsilon!r}  # lifetime, over all runs; raise it to allow more. Raising is recorded",
                 f"delta = {self.delta!r}", f"unit = {_string(self.unit)}"]
        if self.declared_size is not None:
            lines.append(f"declared-size = {self.declared_size}  # public; the noise is computed from it")
        if self.labels is not None:
            lines.append(f"labels = [{', '.join(map(_string, self.labels))}]")
        if self.distinct:
            lines.append(f"distinct = [{', '.join(map(_string, self.distinct))}]")
        lines += [f"{key} = {_string(text)}" for key, text in self.about.stated().items()]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Policy:
    """The contents of policy.toml, or the defaults if there is no such file.

    Attributes:
        path: the file.
        min_noise_multiplier: smallest allowed noise standard deviation / clip norm.
        max_rounds: the most trainings that a run may ask of this client, a private start included.
        max_sampling_rate: highest allowed probability with which a step samples each unit.
        strategies: allowed strategies, as servers name them; None allows any. So do the next three.
        families: allowed adapter families.
        models: allowed base models, by the SHA-256 of their weights.
        servers: allowed servers, as host:port.
        server_fingerprints: allowed keys of servers, as 64 hexadecimal digits; in the file they may stand in groups.
        announce_labels: whether a server may ask for the label names.
        announce_size: whether uploads state the noise multiplier and delta, which tell about the declared size.
        private_start: whether a server may ask for gradients, noised in private runs, from which the adapters start.
        trust: whose noise a run with secure sums is charged for: "local" for this client's own, or "aggregate" for that
            of the sums, which relies on the other members.
        members: the only keys with which this site takes part in secure sums, as `server_fingerprints`; None takes
            whomever the certificate authority knows.
        least_members: the fewest members of a roster of secure sums; None for as few as there can be.
        least_colluding: how many members, alone or with the server, the promise of secure sums must withstand; a server
            may propose more.
        datasets: id → the data set's own table.
    """

    path: Path
    min_noise_multiplier: float = 0.0
    max_rounds: float = math.inf
    max_sampling_rate: float = MOST_SAMPLING_RATE
    strategies: tuple[str, ...] | None = None
    families: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    servers: tuple[str, ...] | None = None
    server_fingerprints: tuple[str, ...] | None = None
    announce_labels: bool = True
    announce_size: bool = True
    private_start: bool = True
    trust: str = TRUSTS[0]
    members: tuple[str, ...] | None = None
    least_members: int | None = None
    least_colluding: int = 0
    datasets: Mapping[str, DatasetPolicy] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("min_noise_multiplier", 0.0), ("max_rounds", 0.0), ("max_sampling_rate", 0.0),
                            ("least_colluding", 0)):
            if not getattr(self, name) >= least:  # not a number is no limit either
                raise ValueError(f"{name.replace('_', '-')} is {getattr(self, name)!r}; it must be at least 0")
        if math.isinf(self.min_noise_multiplier):
            raise ValueError("min-noise-multiplier is infinite, which allows no run; give a number")
        for name in ("server_fingerprints", "members"):
            if (given := getattr(self, name)) is not None:
                keys = tuple("".join(key.split()).lower() for key in given)
                if wrong := [key for key in keys if not re.fullmatch(r"[0-9a-f]{64}", key)]:
                    raise ValueError(f"{name.replace('_', '-')} holds {wrong[0]!r}; a fingerprint has 64 hexadecimal "
                                     "digits")
                object.__setattr__(self, name, keys)
        self._check_members()

    def _check_members(self) -> None:
        """Check what is said about secure sums."""
        if self.trust not in TRUSTS:
            raise ValueError(f"trust is {self.trust!r}; it must be {' or '.join(TRUSTS)}")
        least = self.least_members
        if least is not None and not LEAST_MEMBERS <= least <= MOST_MEMBERS:
            raise ValueError(f"least-members is {least}; it must be {LEAST_MEMBERS} to {MOST_MEMBERS}")
        if self.trust == "aggregate" and (self.members is None or least is None):
            raise ValueError('trust is "aggregate", and members and least-members must then be set: without them '
                             "whoever runs the certificate authority could make up the members on whose noise this "
                             "site relies. Name the fingerprints of their keys, and the fewest that must take part")
        if self.members is not None and len(set(self.members)) < (self.fewest_members - 1):
            raise ValueError(f"members names {len(set(self.members))} keys, with which no roster of "
                             f"{self.fewest_members} members can be made; name more, or lower least-members")

    @property
    def fewest_members(self) -> int:
        """The fewest members of a roster of secure sums with which this site takes part."""
        return self.least_members or LEAST_MEMBERS

    def pins(self, own: str) -> frozenset[str] | None:
        """Return the fingerprints of the keys that a roster may hold; None if the owner named none.

        Args:
            own: the fingerprint of this site's own key, which need not be named.
        """
        return None if self.members is None else frozenset((*self.members, own))

    @classmethod
    def read(cls, path: Path) -> Policy:
        """Read a policy file. A missing file gives the defaults.

        Raises:
            ValueError: the file cannot be read, or has an unknown setting or a value of the wrong type.
        """
        if not path.exists():
            return cls(path)
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
            return _parse(path, table)
        except OSError as error:
            raise ValueError(f"the policy {path} cannot be read: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"the policy {path} is not TOML: {error}") from None
        except ValueError as error:
            raise ValueError(f"the policy {path}: {error}") from None

    def dataset_at(self, data: str) -> DatasetPolicy | None:
        """Return the data set that is declared for exactly this --data; None if there is none."""
        place = absolute(data)
        return next((known for known in self.datasets.values() if known.data == place), None)

    def dataset_around(self, data: str) -> DatasetPolicy | None:
        """Return a data set whose place is this --data, contains it or lies inside it; None if there is none."""
        place = Path(absolute(data))
        return next((known for known in self.datasets.values()
                     if place.is_relative_to(known.data) or Path(known.data).is_relative_to(place)), None)

    def free_id(self, data: str, taken: Collection[str] = ()) -> str:
        """Return an unused id for a data set, made from the name of its folder or file.

        Args:
            data: the --data of the data set.
            taken: further ids that must not be used.
        """
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(absolute(data)).stem).strip("-_")[:48] or "data"
        number = 1
        while (name := stem if number == 1 else f"{stem}-{number}") in self.datasets or name in taken:
            number += 1
        return name

    def check_proposal(self, proposal: Proposal, *, server: str) -> None:
        """Check a server's proposal against the limits, before anything is disclosed or charged.

        Args:
            proposal: the run as the server proposes it to a client that joins.
            server: the server's address, as host:port.

        Raises:
            Forbidden: the proposal exceeds a limit; the message names the limit, the value and the policy's file.
        """
        run = proposal.plan
        for key, value, allowed in (("strategies", run.strategy, self.strategies),
                                    ("families", run.family, self.families),
                                    ("models", run.model.weights_sha256, self.models),
                                    ("servers", server, self.servers)):
            if allowed is not None and value not in allowed:
                self._forbid(f"{key} = {list(allowed)}", f"{value!r} is not among them")
        if run.most_trainings > self.max_rounds:
            self._forbid(f"max-rounds = {self.max_rounds:g}", f"the server may ask for {run.most_trainings}")
        if run.secure_aggregation and run.colluding < self.least_colluding:
            self._forbid(f"least-colluding = {self.least_colluding}",
                         f"the promise of this run's sums withstands {run.colluding}; ask the coordinator for "
                         f"--colluding {self.least_colluding}")
        if proposal.announce_labels and not self.announce_labels:
            self._forbid("announce-labels = false", "the server asks for the label names; ask the coordinator to name "
                                                    "them with fedlora-server --labels")
        if run.private_start and not self.private_start:
            asked = ("noised gradients" if run.private else
                     "gradients without noise, whole ones," if run.whole_gradients else "gradients without noise")
            self._forbid("private-start = false", f"the server asks for {asked} of these records, from which the "
                                                  "adapters would start")

    def check_terms(self, noise_multiplier: float | None) -> None:
        """Check the run's noise against the policy, before any record is trained on.

        Args:
            noise_multiplier: the run's noise standard deviation / clip norm; None if privacy is off.

        Raises:
            Forbidden: there is less noise than the policy demands; the message names the limit and the value.
        """
        if noise_multiplier is not None and noise_multiplier < self.min_noise_multiplier:
            self._forbid(f"min-noise-multiplier = {self.min_noise_multiplier:g}",
                         f"the noise multiplier of this run would be only {noise_multiplier:.4g}; a lower --epsilon "
                         "raises it")
        if noise_multiplier is None and self.min_noise_multiplier > 0:
            self._forbid(f"min-noise-multiplier = {self.min_noise_multiplier:g}", "this run adds no noise")

    def _forbid(self, limit: str, found: str) -> None:
        raise Forbidden(f"the policy {self.path} has {limit}, and {found}. Change that line if you want to allow it")

    def adopt(self, data: str, *, epsilon: float, delta: float, unit: str, declared_size: int | None = None,
              taken: Collection[str] = ()) -> DatasetPolicy:
        """Append a table for a data set that the file does not name yet, with the first run's ε as its lifetime budget.

        The file is replaced under a lock. If two processes adopt the same data, the first one decides.

        Args:
            data: the --data of the data set.
            epsilon: lifetime limit on epsilon.
            delta: the delta of that limit.
            unit: "row" or "column:NAME".
            declared_size: public number of units; None leaves it out of the file.
            taken: ids that the ledger holds for other data.

        Returns:
            The data set as the file declares it now; if another process was first, that one's declaration.

        Raises:
            ValueError: the file cannot be read or written.
        """
        path = self.path.resolve()
        try:
            with _locked(path):
                current = Policy.read(path)
                if (known := current.dataset_at(data)) is not None:
                    return known
                declared = DatasetPolicy(current.free_id(data, taken), absolute(data), epsilon, delta, unit,
                                         declared_size=declared_size)
                before, mode = (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) if path.exists() else (b"", 0o600)
                replace_file(path, before + f"\n{declared.toml()}".encode(), mode)
        except OSError as error:
            raise ValueError(f"the policy {self.path} cannot be written: {error.strerror}; make it writable, or name "
                             "another file with --policy") from None
        return declared

    def pin_server(self, fingerprint: str) -> None:
        """Write the key of a server into the file as the only one that is allowed, where the file names none yet.

        The line is put before all others, which stay as they are. A file that names keys already is its owner's to
        edit.

        Args:
            fingerprint: the key's, 64 hexadecimal digits.

        Raises:
            ValueError: the file names other keys, or cannot be read or written. The message has the line to write.
        """
        path, line = self.path.resolve(), f'server-fingerprints = ["{fingerprint}"]'
        try:
            with _locked(path):
                current = Policy.read(path)
                if fingerprint in (current.server_fingerprints or ()):
                    return
                if current.server_fingerprints is not None:
                    raise ValueError(f"the policy {self.path} names other keys; add \"{fingerprint}\" to its "
                                     "server-fingerprints")
                before, mode = (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) if path.exists() else (b"", 0o600)
                replace_file(path, f"{line}\n".encode() + before, mode)
        except OSError as error:
            raise ValueError(f"the policy {self.path} cannot be written: {error.strerror}; have this line put before "
                             f"its first table: {line}") from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the policy file's lock, so that one process at a time changes the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def check_label_names(names: Sequence[str], source: str) -> None:
    """Check that label names can be announced to a server.

    Args:
        names: the label names.
        source: where they were written, for the message.

    Raises:
        ValueError: there is no name, or one is empty, repeated, too long or not printable, or there are too many.
    """
    if not names or "" in names or len(set(names)) < len(names):
        raise ValueError(f"{source} must name at least one label, none twice, and none empty")
    if wrong := [name for name in names if len(name) > LONGEST_LABEL or not name.isprintable()]:
        raise ValueError(f"{source} holds {wrong[0][:LONGEST_LABEL]!r}; a label name has at most {LONGEST_LABEL} "
                         "printable characters")
    if len(names) > MOST_ANNOUNCED:
        raise ValueError(f"{source} holds {len(names)} names; a server takes at most {MOST_ANNOUNCED}")


def absolute(data: str) -> str:
    """Return a data set's place as it is written down: an absolute path without links, or a hub name unchanged."""
    path = expanded(data)
    return str(path.resolve()) if path.exists() else data


_FIELDS: Mapping[str, tuple[type, ...]] = {
    "min-noise-multiplier": (int, float), "max-rounds": (int,), "max-sampling-rate": (int, float),
    "strategies": (list,), "families": (list,), "models": (list,), "servers": (list,),
    "server-fingerprints": (list,), "announce-labels": (bool,), "announce-size": (bool,), "private-start": (bool,),
    "trust": (str,), "members": (list,), "least-members": (int,), "least-colluding": (int,)}

_DATASET_FIELDS: Mapping[str, tuple[type, ...]] = {
    "data": (str,), "epsilon": (int, float), "delta": (int, float), "unit": (str,), "distinct": (list,),
    "witness": (str,), "declared-size": (int,), "labels": (list,), **dict.fromkeys(KEYS, (str,))}


def _parse(path: Path, table: Mapping[str, Any]) -> Policy:
    entries = dict(table)
    declared = entries.pop("dataset", {})
    if not isinstance(declared, dict) or not all(isinstance(entry, dict) for entry in declared.values()):
        raise ValueError("dataset must be tables, one for each data set, as in [dataset.north]")
    datasets = {}
    for name, entry in declared.items():
        values = _typed(entry, _DATASET_FIELDS, f"[dataset.{name}] ")
        if missing := {"data", "epsilon", "delta"} - values.keys():
            raise ValueError(f"[dataset.{name}] lacks {', '.join(sorted(missing))}")
        if "witness" in values:
            values["witness"] = expanded(values["witness"])
        try:
            values["about"] = About(**{field: values.pop(field) for field in KEYS.values() if field in values})
        except ValueError as error:
            raise ValueError(f"[dataset.{name}] {error}") from None
        datasets[name] = DatasetPolicy(name, absolute(values.pop("data")), float(values.pop("epsilon")),
                                       float(values.pop("delta")), **values)
    places = [known.data for known in datasets.values()]
    if twice := next((place for place in places if places.count(place) > 1), None):
        raise ValueError(f"two data sets have data = {twice!r}; one place has one budget")
    return Policy(path, datasets=datasets, **_typed(entries, _FIELDS, ""))


def _typed(entries: Mapping[str, Any], known: Mapping[str, tuple[type, ...]], where: str) -> dict[str, Any]:
    """Return a table's entries under their Python names, after checking that each is known and of the right type.

    Args:
        entries: the table.
        known: setting → its allowed types.
        where: the table's name, as a prefix of messages.

    Raises:
        ValueError: a setting is unknown or has a value of another type.
    """
    values: dict[str, Any] = {}
    for key, value in entries.items():
        if key not in known:
            raise ValueError(f"{where}{key} is not known; known are {', '.join(known)}")
        kinds = known[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{where}{key} is {value!r}; it must be {' or '.join(kind.__name__ for kind in kinds)}")
        if isinstance(value, list):
            if not all(isinstance(item, str) for item in value):
                raise ValueError(f"{where}{key} must be a list of strings")
            value = tuple(value)
        values[key.replace("-", "_")] = value
    return values
