"""What follows from the facts of a privacy report. Its author and whoever verifies it both compute with this.

The facts are plain JSON, see `fedlora.privacy.report.privacy_report`. A unit is whom one guarantee covers, a row or
all rows with one value of a column; the relation is zero-out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from fedlora.privacy.accounting import Accountant, Spend, four_digits, pld_epsilon, prv_epsilon
from fedlora.privacy.ledger.lifetime_budget import filter_epsilon
from fedlora.privacy.spend import rdp_epsilon

SCHEMA, VERSION = "fedlora privacy report", 2
READABLE = (1, 2)
"""Versions that can be verified. In the first, more noise covered what rounding was measured to add in bf16
(`rounding_cover`); since the second, a record's arithmetic is shown to depend on no other (`batch_invariance`)."""

RELATION = "zero-out: one unit is replaced by one that contributes nothing (accounts like adding or removing it)"
LABELS = {"guarantee": "guarantee at the run's maximum", "spent": "spent so far"}
STATES = ("reserved", "stored", "released", "voided")

Steps = tuple[float | None, float | None, int]
"""Noise multiplier and sampling rate, None where there is none or it is withheld, and steps."""


def stated(epsilon: float | None) -> float | str | None:
    """As JSON can hold it: an infinite epsilon becomes "infinite"."""
    return "infinite" if epsilon is not None and math.isinf(epsilon) else epsilon


def why_no_guarantee(report: Mapping) -> str | None:
    """None if the report's facts allow a guarantee, else the reason why no epsilon may be stated."""
    source = report["randomness"]
    if source["predictable"]:
        return (f"PREDICTABLE: sampling and noise follow from a seed ({source['why']}). Whoever knows it can subtract "
                "the noise, so no epsilon holds for this run")
    if report["mechanism"]["noise_multiplier"] is None or any(s[0] is None for s in begun(report)):
        return "privacy was off: no noise was added, so no finite epsilon holds for this run"
    return None


def whom(unit: Mapping) -> str:
    """Whom one guarantee covers, in words; no article, no number of records."""
    name = unit["name"]
    return "one row" if name == "row" else f"all rows with one value of {name.removeprefix('column:')}"


def planned_history(report: Mapping) -> tuple[Spend, ...]:
    """What the run's maximum consists of, as one unit pays for it; () without noise or sampling rate."""
    return _spends(planned(report))


def spent_history(report: Mapping) -> tuple[Spend, ...]:
    """Every training that was begun and not voided, as one unit pays for it; () without noise or sampling rate."""
    return _spends(begun(report))


def lifetime_spent(report: Mapping) -> float:
    """Epsilon of everything charged to the dataset's lifetime, at the lifetime's delta, by the ledger's own rule."""
    account = report["lifetime"]
    if any(c["noise_multiplier"] is None and c["steps"] for c in account["charges"]):
        return math.inf
    spends = [_spends([(c["noise_multiplier"], c["sampling_rate"], c["steps"])]) for c in account["charges"]]
    filtered = filter_epsilon(spends, account["delta"], tuple(account["orders"]))
    if account["closed_by"] is None or {c["run"] for c in account["charges"]} != {account["closed_by"]}:
        return filtered
    return min(filtered, Accountant(tuple(spend for part in spends for spend in part)).epsilon(account["delta"]))


def figures(label: str, steps: int, history: tuple[Spend, ...], delta: float | None) -> dict:
    """One row of the report; no figure at all if `delta` is None."""
    if delta is None:
        return {"label": label, "steps": steps, "epsilon": None, "accountant": None,
                "accountants": {"PRV": None, "RDP": None, "PLD": None}, "note": "no epsilon is stated for this run"}
    found = accountants(history, delta)
    prv, rdp, pld = found["PRV"], found["RDP"], found["PLD"]
    assert rdp is not None
    best = "PRV" if prv is not None and prv <= rdp else "RDP"
    note = [] if prv is not None else ["PRV gives no finite figure here, RDP's is the statement"]
    if pld is None:
        note.append("PLD is not computed for figures this large")
    return {"label": label, "steps": steps, "epsilon": stated(found[best]), "accountant": best,
            "accountants": {name: stated(value) for name, value in found.items()}, "note": "; ".join(note)}


def steps_of(report: Mapping) -> dict[str, int]:
    """Steps of the run's maximum and of what was begun, whether or not they were noised."""
    return {"guarantee": sum(steps for _, _, steps in planned(report)),
            "spent": sum(steps for _, _, steps in begun(report))}


def number(epsilon: float | str | None) -> float | None:
    """Inverse of `stated`. Raises ValueError for another text than "infinite" and for a negative number."""
    if epsilon == "infinite":
        return math.inf
    if isinstance(epsilon, str) or (epsilon is not None and epsilon < 0):
        raise ValueError(f'{epsilon!r} is no epsilon; it is a number of at least 0, or "infinite"')
    return epsilon


def shown(epsilon: float | str | None) -> str:
    """Epsilon in four digits, rounded up: what a person reads never promises more than the JSON."""
    value = number(epsilon)
    return "not computed" if value is None else four_digits(value)


def accountants(history: tuple[Spend, ...], delta: float) -> dict[str, float | None]:
    """Epsilon by each accountant; None where it has no finite figure or is not installed."""
    return {"PRV": prv_epsilon(history, delta), "RDP": rdp_epsilon(history, delta),
            "PLD": pld_epsilon(history, delta)}


def planned(report: Mapping) -> list[Steps]:
    """The run's maximum."""
    mechanism = report["mechanism"]
    return [(mechanism["noise_multiplier"], mechanism["sampling_rate"],
             mechanism["local_steps"] * mechanism["max_participations"])]


def begun(report: Mapping) -> list[Steps]:
    """Every training that was begun and not voided."""
    return [(t["noise_multiplier"], t["sampling_rate"], t["steps"]) for t in report["trainings"]
            if t["state"] != "voided"]


def merged(steps: Iterable[Steps]) -> dict[tuple[float | None, float | None], int]:
    """Steps by (noise multiplier, sampling rate). The order of steps whose parameters are fixed changes no bound."""
    found: dict[tuple[float | None, float | None], int] = {}
    for sigma, q, count in steps:
        found[sigma, q] = found.get((sigma, q), 0) + count
    return found


def _spends(steps: Iterable[Steps]) -> tuple[Spend, ...]:
    """Those with noise. Raises ValueError where their sampling rate is withheld: then they cannot be accounted for."""
    found = []
    for (sigma, q), count in merged(steps).items():
        if sigma is not None and q is None:
            raise ValueError(f"{count} steps with noise multiplier {sigma!r} have no sampling rate; a run with noise "
                             "declares its size, and states the rate that follows from it")
        if sigma is not None and q is not None:
            found.append(Spend(sigma, q, count))
    return tuple(found)
