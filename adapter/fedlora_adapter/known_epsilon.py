"""What is known of the privacy of finished adapters, from the privacy reports of the clients that trained them.

A run's server knows no ε, because each client accounts for its own. Whoever has the clients' signed reports
(privacy.dsse.json) puts them into the adapter's folder, as `ADAPTER/privacy/*.json`. They are verified, and what they
state is handed on to every adapter that is made of this one, in its `fedlora_adapter.json`.

Everything done to a finished adapter is post-processing: it costs no ε. An adapter made of several others has, for each
data set of a ledger, the sum of its ε over different runs (basic composition; δ adds up too), because the runs may have
used the same records. Data sets that a report calls overlapping count as one. Over different data sets it is the
largest ε: their records are of different people, or someone has records at several and the sum of their ε.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .peft_folder import RECORD, Adapter


@dataclass(frozen=True)
class Statement:
    """What one client's privacy report states about one run.

    Attributes:
        client: the client's name in the run.
        ledger: id of the client's ledger, or else its signing key.
        dataset: the data set's name in the ledger.
        overlapping: the ledger's other data sets that share records with it.
        run: id of the run.
        unit: the unit of privacy.
        epsilon: the run's ε at its maximum; infinite if there is no guarantee.
        delta: δ.
    """

    client: str
    ledger: str
    dataset: str
    overlapping: tuple[str, ...]
    run: str
    unit: str
    epsilon: float
    delta: float


@dataclass(frozen=True)
class Known:
    """What is known of an adapter's privacy.

    Attributes:
        statements: those of all adapters that it was made of, each once.
        unknown: names of adapters that came without a statement.
    """

    statements: tuple[Statement, ...]
    unknown: tuple[str, ...]

    def epsilon(self) -> tuple[float, float] | None:
        """Return ε and δ, the largest over data sets of the sums over runs; None if they are unknown."""
        if self.unknown or not self.statements:
            return None
        groups = self._groups()
        return (max(sum(one.epsilon for one in group) for group in groups),
                max(sum(one.delta for one in group) for group in groups))

    def _groups(self) -> list[list[Statement]]:
        """Return the statements about each data set, those that overlap together."""
        groups: list[tuple[set[tuple[str, str]], list[Statement]]] = []
        for one in self.statements:
            names, members = {(one.ledger, name) for name in (one.dataset, *one.overlapping)}, [one]
            apart = []
            for others, found in groups:
                if names & others:
                    names, members = names | others, found + members
                else:
                    apart.append((others, found))
            groups = [*apart, (names, members)]
        return [members for _, members in groups]

    def sentence(self) -> str:
        """Return what a card says."""
        found = self.epsilon()
        if found is None:
            lacking = ", ".join(self.unknown) or "it"
            return (f"The ε of this adapter is unknown: no client's privacy report is in the folder privacy of "
                    f"{lacking}.")
        if math.isinf(found[0]):
            none = sorted({one.client for one in self.statements if math.isinf(one.epsilon)})
            return f"This adapter has no differential privacy guarantee for the records of {', '.join(none)}."
        groups = self._groups()
        runs = {one.run for one in self.statements}
        units = sorted({one.unit for one in self.statements})
        text = (f"ε = {found[0]:.2f} at δ = {found[1]:.1e} for each {' or '.join(units)}, by the privacy reports of "
                f"{len(groups)} data set{'s' * (len(groups) > 1)} in {len(runs)} run{'s' * (len(runs) > 1)}")
        if len(groups) > 1:
            text += ": the largest over the data sets. Someone with records at several has the sum of their ε"
        if len(self.statements) > len(groups):
            text += ". Where a data set was trained on in several runs, its ε were added"
        return f"{text}. It does not cover clients whose report is not among them."

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; an infinite ε becomes null."""
        found = self.epsilon()
        return {"epsilon": None if found is None or math.isinf(found[0]) else found[0],
                "delta": None if found is None else found[1],
                "statements": [asdict(one) | {"epsilon": None if math.isinf(one.epsilon) else one.epsilon}
                               for one in self.statements],
                "unknown": list(self.unknown)}


def known(adapters: Iterable[Adapter]) -> Known:
    """Return what is known of an adapter that is made of these.

    Raises:
        ValueError: a privacy report does not verify, or a record of how an adapter was made is damaged.
    """
    statements: dict[tuple[str, str, str], Statement] = {}
    unknown: list[str] = []
    for adapter in adapters:
        found, lacking = _of(adapter)
        unknown += lacking
        for one in found:
            key = one.ledger, one.dataset, one.run
            before = statements.get(key)
            if before is None or one.epsilon > before.epsilon:
                statements[key] = one
    return Known(tuple(statements[key] for key in sorted(statements)), tuple(dict.fromkeys(unknown)))


def _of(adapter: Adapter) -> tuple[Sequence[Statement], Sequence[str]]:
    """Return an adapter's statements, and the names of the adapters of which it lacks them."""
    reports = sorted((adapter.path / "privacy").glob("*.json"))
    if reports:
        return [_stated(file, adapter) for file in reports], ()
    record = adapter.path / RECORD
    if not record.is_file():
        return (), (adapter.name,)
    try:
        privacy = json.loads(record.read_text(encoding="utf-8"))["privacy"]
        return ([Statement(**one | {"epsilon": math.inf if one["epsilon"] is None else float(one["epsilon"]),
                                    "overlapping": tuple(one["overlapping"])})
                 for one in privacy["statements"]], [str(name) for name in privacy["unknown"]])
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{record} is damaged; make the adapter again, or remove the file, whereupon its ε counts as "
                         "unknown") from None


def _stated(file: Path, adapter: Adapter) -> Statement:
    """Verify a privacy report and return what it states."""
    from fedlora.privacy.report import read_signed, verify

    try:
        verified = verify(read_signed(file))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no valid privacy report: {error}. The folder privacy of an adapter is for the "
                         "signed reports of its clients alone") from error
    report, run = verified.report, adapter.origin.get("run")
    if run is not None and run != report["run"]["id"]:
        raise ValueError(f"{file} is about run {report['run']['id']}, and {adapter.path} is of run {run}; take it out "
                         "of the folder")
    lifetime = report["lifetime"] or {}
    return Statement(client=str(report["run"]["client"]), run=str(report["run"]["id"]),
                     ledger=str(lifetime.get("ledger") or verified.public_key),
                     dataset=str(report["run"]["dataset"]),
                     overlapping=tuple(map(str, lifetime.get("overlapping") or ())),
                     unit=str(report["unit"]["name"]), delta=verified.delta or 0.0,
                     epsilon=math.inf if verified.epsilon is None else verified.epsilon)
