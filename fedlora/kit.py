"""The kit: one file from the coordinator with all that a client needs to take part in a run, and no secret.

    kit = 1                                        # format of this file
    fingerprint = "3f6a 91c0 5d2e 88b7 1a40"       # to be read aloud by telephone
    fedlora-version = "0.1.0"                      # both sides must speak this protocol
    address = "fl.example.org:9092"
    server-fingerprint = "<SHA-256 of the server's public key>"
    authority = <certificates in PEM>
    [columns], [model]                             # what the data and the base model must be
    [plan]                                         # a client refuses a server whose plan differs in one of these
    [tuning]                                       # the server may still change these

A client holds the plan that the server proposes against the kit (`Kit.differences`). So what an institution has agreed
to beforehand, with the file in its hands, is what it takes part in.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

import fedlora
from fedlora.config.toml import as_toml
from fedlora.files import replace_file
from fedlora.identity import parse_certificate
from fedlora.identity.certificates import grouped
from fedlora.plan import PROTOCOL, ModelRef, RunPlan, from_scalars, to_scalars
from fedlora.plan.schema import PAIRS
from fedlora.wire import SCHEMA, SPOKEN, clean, is_loopback

FORMAT = 1
"""Number of the file's format. It is raised with each change of its keys or of their meaning."""

NO_RUN = "0" * 16
"""The run id of a kit's plan: the run is still to come."""

MOST_BYTES = 1 << 20
"""A larger file is not read: no kit is so long."""

FINGERPRINT_DIGITS = 20
"""Hexadecimal digits of a kit's fingerprint: few enough to be read aloud; 80 bits, so that no other kit can be made
that has the same."""

COMMENTS: Mapping[str, str] = {
    "private": "every client must add noise, so that its own ε holds",
    "task": "what the model learns to do",
    "labels": "in the order of the classifier's outputs; empty: the clients name theirs",
    "strategy": "how the server combines what clients send",
    "family": "kind of the adapter: which tensors are trained and sent",
    "rank": "rank of the adapter's matrices",
    "targets": "adapted layers of the base model",
    "train_head": "whether the classifier's last layer is trained and sent too",
    "rounds": "rounds of the run",
    "max_participations": "most rounds that one client may start; its noise is computed for these",
    "private_start": "whether clients send gradients before round 1, noised if the run is private",
    "whole_gradients": "whether they send these whole, as large as the layers; only without privacy",
    "local_steps": "steps of training in each round",
    "expected_batch": "records drawn in a step; at most a fifth of a client's declared size, unless its policy says "
                      "otherwise",
    "clip_norm": "L2 norm to which each record's part is clipped; the noise is a multiple of it",
    "max_length": "tokens kept of each record",
    "weight_by_examples": "whether clients tell how many records they have",
    "mechanism": "dp-sgd: each client's own noise; distributed-gaussian: the server sees secure sums alone",
    "least_members": "fewest clients of which a secure sum is made; 0 without secure sums",
    "colluding": "clients that may tell the server what they know without the promise of the sums changing",
    "hold_out": "share of the records on which no one trains, and whose scores are in the secure sums",
    "least_noise": "least noise that each client adds to a secure sum, as a multiple of the clip norm",
}

_FREE = frozenset({"alpha", "optimizer", "lr", "lr_schedule", "adjustment", "adapter_scale", "head_scale",
                   "wire_dtype"})
"""Fields of a private plan that the server may still change: they scale a gradient before it is clipped, or use it
after it was noised. Neither ε nor the shape of what leaves depends on them. Without privacy nothing is free."""
_ELSEWHERE = frozenset({"run_id", "fedlora_version", "protocol", "model"})
"""Fields of the plan that do not stand in the tables [plan] and [tuning]."""

_HEADER: Mapping[str, type] = {"kit": int, "fingerprint": str, "fedlora-version": str, "protocol": int, "schema": str,
                               "address": str, "server-fingerprint": str, "authority": str, "columns": dict,
                               "model": dict, "plan": dict, "tuning": dict}


@dataclass(frozen=True)
class Kit:
    """What a coordinator tells each institution before a run.

    Attributes:
        address: the server's address as clients call it, host:port.
        plan: the plan of the run to come, with the run id `NO_RUN`.
        columns: field → the column of the data that holds it, where it is not the usual one.
        authority: certificates in PEM, of the authority that signs for both sides; "" for a run without TLS.
        server_fingerprint: the fingerprint of the server's key; "" for a run without TLS.
    """

    address: str
    plan: RunPlan
    columns: Mapping[str, str] = field(default_factory=dict)
    authority: str = ""
    server_fingerprint: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "plan", dataclasses.replace(self.plan, run_id=NO_RUN))
        is_loopback(self.address)  # raises where it is not host:port
        if not self.address.isprintable() or " " in self.address:
            raise ValueError(f"the address {self.address!r} is not of the form host:port")
        if wrong := [name for name in (*self.columns, *self.columns.values()) if not name.isprintable()]:
            raise ValueError(f"columns holds {wrong[0]!r}, which is not printable")
        if bool(self.authority) != bool(self.server_fingerprint):
            raise ValueError("a kit has both an authority and the server's fingerprint, or neither")
        if self.authority:
            object.__setattr__(self, "authority", _normal(self.authority))
            if not re.fullmatch("[0-9a-f]{64}", self.server_fingerprint):
                raise ValueError(f"server-fingerprint is {self.server_fingerprint[:80]!r}; it must be 64 lower-case "
                                 "hexadecimal digits")

    @property
    def fingerprint(self) -> str:
        """The kit's fingerprint in groups of four digits. It depends on every value, and on no comment or blank."""
        content = {**dataclasses.asdict(self), "plan": to_scalars(self.plan), "kit": FORMAT, "schema": SCHEMA.hex()}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return grouped(digest[:FINGERPRINT_DIGITS])

    @property
    def held(self) -> tuple[str, ...]:
        """The fields of the plan in which a server's plan must equal the kit's."""
        return tuple(one.name for one in dataclasses.fields(RunPlan)
                     if one.name not in _ELSEWHERE | (_FREE if self.plan.private else frozenset()))

    def differences(self, plan: RunPlan) -> list[str]:
        """Return a text for each value of a server's plan that is not the kit's; [] if the plan is the kit's.

        Where the kit leaves the labels to the clients, the plan may name any.

        Args:
            plan: the plan that the server proposes.
        """
        compared = [name for name in self.held if self.plan.labels or name != "labels"]
        found = [f"{_key(name)} is {_shown(theirs)}, and the kit says {_shown(ours)}" for name in compared
                 if (ours := getattr(self.plan, name)) != (theirs := getattr(plan, name))]
        parts = ("weights_sha256", "config_sha256", "tokenizer_sha256")
        return found + [f"the model's {_key(part)} is {theirs}, and the kit says {ours}" for part in parts
                        if (ours := getattr(self.plan.model, part)) != (theirs := getattr(plan.model, part))]

    def text(self) -> str:
        """Return the kit as a file's text, in TOML, with a comment for those who read it."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        yield from (
            "# A FedLoRA kit: what a client needs to take part in one run, and what the run may ask of it.",
            "# Start on the data holder's machine: fedlora-client join and the name of this file.",
            "# It holds no secret. Do not edit it: a changed kit is refused. What a data holder decides stands in its",
            "# own client.toml and policy.toml.", "",
            f"kit = {FORMAT}",
            f"fingerprint = {as_toml(self.fingerprint)}  # coordinator and data holder compare it by telephone", "",
            f"fedlora-version = {as_toml(self.plan.fedlora_version)}  # the server's; clients need one that speaks the "
            "same protocol",
            f"protocol = {PROTOCOL}", f"schema = {as_toml(SCHEMA.hex())}", "",
            f"address = {as_toml(self.address)}  # of the server, as clients call it")
        if self.authority:
            yield f"server-fingerprint = {as_toml(self.server_fingerprint)}  # SHA-256 of the server's public key"
            yield f'authority = """\n{self.authority}"""  # who signs for server and clients; a client\'s ca.pem'
        if self.columns:
            yield from ("", "[columns]  # field = column of the data; --column says otherwise")
            yield from (f"{as_toml(name)} = {as_toml(column)}" for name, column in self.columns.items())
        yield from ("", "[model]  # the base model, by its content; local: a folder of the coordinator's")
        yield from (f"{_key(name)} = {as_toml(value)}" for name, value in dataclasses.asdict(self.plan.model).items())
        yield from ("", "[plan]  # a client refuses a server whose plan differs in one of these")
        yield from map(self._line, self.held)
        if self.plan.private:
            yield from ("", "[tuning]  # the server may still change these: no ε depends on them")
            yield from map(self._line, sorted(_FREE))

    def _line(self, name: str) -> str:
        value = getattr(self.plan, name)
        comment = f"  # {COMMENTS[name]}" if name in COMMENTS else ""
        return f"{_key(name)} = {as_toml(dict(value) if name in PAIRS else value)}{comment}"

    def write(self, path: Path) -> None:
        """Write the kit to a file that everybody on this machine can read.

        Raises:
            OSError: the file cannot be written.
        """
        replace_file(path, self.text().encode(), mode=0o644)


def read_kit(path: Path) -> Kit:
    """Read a kit, and check that this FedLoRA speaks the protocol of the server that it is for.

    Raises:
        ValueError: the file cannot be read, is no kit, is of another version, was changed or is damaged. The message
            says what to do.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"the kit {path} cannot be read: {error.strerror}") from None
    try:
        if len(content) > MOST_BYTES:
            raise ValueError(f"it has {len(content):,} bytes, and no kit is so long")
        table = tomllib.loads(content.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a kit: {error}. {_AGAIN}") from None
    if type(table.get("kit")) is not int:
        raise ValueError(f"{path} is not a kit: it has no line `kit = {FORMAT}`. Name the file that the coordinator "
                         "made with fedlora-server kit")
    try:
        _check_versions(table)
        kit = _parse(table)
    except ValueError as error:
        raise ValueError(f"the kit {path}: {error}") from None
    if (said := "".join(table["fingerprint"].split())) != kit.fingerprint.replace(" ", ""):
        raise ValueError(f"the kit {path} was changed since it was made, or damaged on its way: its fingerprint is "
                         f"{kit.fingerprint}, and it says {grouped(clean(said[:64]))}. {_AGAIN}")
    return kit


def is_kit(path: Path) -> bool:
    """Return whether a file is a kit, of any format, damaged or not."""
    try:
        return path.stat().st_size <= MOST_BYTES and bool(re.search(rb"^kit = \d", path.read_bytes(), re.MULTILINE))
    except OSError:
        return False


_AGAIN = "Ask the coordinator to send it again, as an attachment that no program rewrites"


def _check_versions(table: Mapping[str, Any]) -> None:
    """Raise ValueError unless this FedLoRA reads the format and speaks the protocol."""
    by = table.get("fedlora-version")
    made_by = f"FedLoRA {by[:40]}" if isinstance(by, str) and by.isprintable() else "another FedLoRA"
    if table["kit"] != FORMAT:
        raise ValueError(f"it is of format {table['kit']}, by {made_by}, and this FedLoRA ({fedlora.__version__}) "
                         f"reads format {FORMAT}; install the server's version")
    protocol, schema = table.get("protocol"), table.get("schema")
    ours = fedlora.__version__.split(".")[:2]
    if (protocol, schema) != (PROTOCOL, SCHEMA.hex()) or not isinstance(by, str) or by.split(".")[:2] != ours:
        theirs = f"protocol {clean(str(protocol)[:8])}, schema {clean(str(schema)[:8])}"
        raise ValueError(f"the server runs {made_by} ({theirs}), and this is FedLoRA {fedlora.__version__} ({SPOKEN}); "
                         "install the server's version")


def _parse(table: Mapping[str, Any]) -> Kit:
    """Make a kit of a file's table.

    Raises:
        ValueError: a key is unknown or missing, or a value has the wrong type or is out of range.
    """
    _check_keys(table, set(_HEADER), "", optional={"server-fingerprint", "authority", "columns", "tuning"})
    for key, kind in _HEADER.items():
        if key in table and type(table[key]) is not kind:
            wanted = {int: "a whole number", str: "a text", dict: "a table"}[kind]
            raise ValueError(f"{key} is {_shown(table[key])}; it must be {wanted}")
    plan, tuning, columns = table["plan"], table.get("tuning", {}), table.get("columns", {})
    free = _FREE if plan.get("private") is True else frozenset()
    held = {one.name for one in dataclasses.fields(RunPlan)} - _ELSEWHERE - free
    _check_keys(plan, {_key(name) for name in held}, "[plan] ")
    _check_keys(tuning, {_key(name) for name in free}, "[tuning] ")
    _check_keys(table["model"], {_key(one.name) for one in dataclasses.fields(ModelRef)}, "[model] ")
    if wrong := [name for name, column in columns.items() if not isinstance(column, str)]:
        raise ValueError(f"[columns] {_shown(wrong[0])} is {_shown(columns[wrong[0]])}; it must be a text")
    flat: dict[str, object] = {"run_id": NO_RUN, "fedlora_version": table["fedlora-version"],
                               "protocol": table["protocol"]}
    flat |= {f"model_{key.replace('-', '_')}": value for key, value in table["model"].items()}
    for key, value in {**plan, **tuning}.items():
        name = key.replace("-", "_")
        if name not in PAIRS:
            flat[name] = value
        elif isinstance(value, dict):
            names, numbers, _ = PAIRS[name]
            flat |= {names: list(value), numbers: list(value.values())}
        else:
            raise ValueError(f"[plan] {key} is {_shown(value)}; it must be a table of names and numbers")
    return Kit(table["address"], from_scalars(flat), columns, table.get("authority", ""),
               table.get("server-fingerprint", ""))


def _check_keys(table: Mapping[str, Any], known: set[str], where: str,
                optional: set[str] | frozenset[str] = frozenset()) -> None:
    if unknown := sorted(table.keys() - known):
        raise ValueError(f"{where}{_shown(unknown[0])} is not known; {_AGAIN[0].lower()}{_AGAIN[1:]}")
    if lacking := sorted(known - table.keys() - optional):
        raise ValueError(f"{where}{lacking[0]} is missing; {_AGAIN[0].lower()}{_AGAIN[1:]}")


def certificates(pem: str) -> frozenset[bytes]:
    """Return the certificates in a PEM text, each in DER, so that two files can be compared by what they hold.

    Raises:
        ValueError: there is none, or one is damaged.
    """
    return frozenset(one.public_bytes(Encoding.DER) for one in x509.load_pem_x509_certificates(pem.encode()))


def _normal(pem: str) -> str:
    """Return the certificates of a PEM text and nothing beside them, each once, in their order.

    Raises:
        ValueError: there is none, one is damaged, or the first one's key is not ECDSA on P-256.
    """
    try:
        found = x509.load_pem_x509_certificates(pem.encode())
        parse_certificate(pem.encode())
    except ValueError as error:
        raise ValueError(f"authority holds no certificate in PEM that can be used: {error}") from None
    return "".join(dict.fromkeys(one.public_bytes(Encoding.PEM).decode() for one in found))


def _key(name: str) -> str:
    return name.replace("_", "-")


def _shown(value: object) -> str:
    """Return a value of a plan as it is told to people, not longer than a line."""
    if isinstance(value, tuple):
        parts = [f"{one[0]}={one[1]}" if isinstance(one, tuple) else str(one) for one in value]
        text = ", ".join(parts) or "empty"
    elif isinstance(value, bool):
        text = "true" if value else "false"
    else:
        text = str(value) or "empty"
    return clean(text if len(text) <= 100 else f"{text[:100]}…")
