"""The computation of a privacy report's figures from its facts, used by the report's author and by its verifier.

The facts are plain JSON, as `fedlora.privacy.report.privacy_report` writes them. Every epsilon is for one unit (a row,
or all rows that share a value of a column) under the zero-out relation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from fedlora.plan.limits import AGGREGATE, LOCAL
from fedlora.privacy.accounting import Accountant, four_digits, pld_epsilon, prv_epsilon
from fedlora.privacy.ledger.lifetime_budget import filter_epsilon
from fedlora.privacy.mechanisms import Mechanism, Noise, mechanism_named
from fedlora.privacy.report.signing import Document
from fedlora.privacy.spend import Spend, rdp_epsilon
from fedlora.privacy.trade_off import FALSE_ALARMS, attack

SCHEMA, VERSION = "fedlora privacy report", 4
READABLE = (1, 2, 3, 4)
"""Versions that can be verified. In version 1, extra noise covered the rounding that was measured in bf16
(`rounding_cover`). Since version 2, a record's arithmetic is shown not to depend on others (`batch_invariance`). Since
version 3, the signature stands in an envelope (`dsse`), and the report says what an attacker can achieve (`attack`),
what the owner states (`about`) and what an audit measured (`audit`). Since version 4, it names the mechanism, and says
of secure sums what holds in them (`sums`)."""

RELATION = "zero-out: one unit is replaced by one that contributes nothing (accounts like adding or removing it)"
LABELS = {"guarantee": "guarantee at the run's maximum", "spent": "spent so far"}
STATES = ("reserved", "stored", "released", "voided")

Steps = tuple[float | None, float | None, int]
"""(noise multiplier, None without noise; sampling rate, None if it is withheld; number of steps)."""


def stated(epsilon: float | None) -> float | str | None:
    """Return epsilon as JSON can hold it: infinity becomes "infinite"."""
    return "infinite" if epsilon is not None and math.isinf(epsilon) else epsilon


def why_no_guarantee(report: Document) -> str | None:
    """Return the reason why no epsilon may be stated; None if the report's facts allow a guarantee.

    A verifier compares the reason with the one in the report, so its words are part of the format.
    """
    source = report["randomness"]
    if source["predictable"]:
        return (f"PREDICTABLE: sampling and noise follow from a seed ({source['why']}). Whoever knows it can subtract "
                "the noise, so no epsilon holds for this run")
    if report["mechanism"]["noise_multiplier"] is None or any(s[0] is None for s in begun(report)):
        return "privacy was off: no noise was added, so no finite epsilon holds for this run"
    return None


def whom(unit: Document) -> str:
    """Return in words whom one guarantee covers: one row, or all rows that share a value of a column."""
    name = unit["name"]
    return "one row" if name == "row" else f"all rows that share one value of {name.removeprefix('column:')}"


def mechanism_of(report: Document) -> Mechanism:
    """Return the privacy mechanism of the report's run. It is DP-SGD in versions that do not name it."""
    return mechanism_named(report["mechanism"].get("key", LOCAL))


def steps_delta(report: Document, delta: float) -> float:
    """Return the part of a delta that is left for the steps of the report's run by this client's own noise."""
    return mechanism_of(report).steps_delta(Noise(report["mechanism"]["noise_multiplier"]), delta)


def planned_history(report: Document) -> tuple[Spend, ...]:
    """Return what the run's planned maximum costs by this client's own noise; () without noise."""
    return charged(report, planned(report))


def spent_history(report: Document) -> tuple[Spend, ...]:
    """Return what every training that was charged and not voided costs by this client's own noise."""
    return charged(report, begun(report))


def event_of(report: Document) -> str | None:
    """Return what the run's planned maximum costs by this client's own noise, as the text of dp-accounting's event.

    None if no epsilon may be stated.
    """
    mechanism, steps = report["mechanism"], steps_of(report)["guarantee"]
    if why_no_guarantee(report) is not None:
        return None
    return repr(mechanism_of(report).event(Noise(mechanism["noise_multiplier"]), mechanism["sampling_rate"], steps))


def lifetime_spent(report: Document) -> float:
    """Return the epsilon of everything charged to the lifetime budget, at its delta, by the ledger's own rule.

    This is the Rényi filter's figure. If a sole run closed the budget, it is PRV's or RDP's where that is smaller. Each
    charge holds steps as its run's mechanism charges them.
    """
    account = report["lifetime"]
    if any(c["noise_multiplier"] is None and c["steps"] for c in account["charges"]):
        return math.inf
    spends = [_spends([(c["noise_multiplier"], c["sampling_rate"], c["steps"])]) for c in account["charges"]]
    delta = min((_charge_delta(report, charge) for charge in account["charges"]), default=account["delta"])
    filtered = filter_epsilon(spends, delta, tuple(account["orders"]))
    if account["closed_by"] is None or {c["run"] for c in account["charges"]} != {account["closed_by"]}:
        return filtered
    return min(filtered, Accountant(tuple(spend for part in spends for spend in part)).epsilon(delta))


def figures(label: str, steps: int, history: tuple[Spend, ...], delta: float | None) -> dict[str, Any]:
    """Return one row of the report: a number of steps and their epsilon by each accountant.

    Args:
        label: the row's name.
        steps: the number of steps.
        history: the same steps with their noise and sampling rate.
        delta: None if no epsilon may be stated for this run; then the row has no figure.
    """
    if delta is None:
        return {"label": label, "steps": steps, "epsilon": None, "accountant": None,
                "accountants": {"PRV": None, "RDP": None, "PLD": None}, "note": "no epsilon is stated for this run"}
    found = accountants(history, delta)
    prv, rdp, pld = found["PRV"], found["RDP"], found["PLD"]
    assert rdp is not None
    best = "PRV" if prv is not None and prv <= rdp else "RDP"
    note = [] if prv is not None else ["PRV gives no finite figure here, so RDP's is stated"]
    if pld is None:
        note.append("PLD is not computed for figures this large")
    return {"label": label, "steps": steps, "epsilon": stated(found[best]), "accountant": best,
            "accountants": {name: stated(value) for name, value in found.items()}, "note": "; ".join(note)}


def best_attack(history: tuple[Spend, ...]) -> dict[str, Any] | None:
    """Return the most that an attacker can achieve against one unit after these steps, as JSON; None if unbounded."""
    most = attack(history)
    if most is None:
        return None
    return {"even_odds": most.even_odds, "found": [{"false_alarms": rate, "at_most": found}
                                                   for rate, found in zip(FALSE_ALARMS, most.found, strict=True)]}


def steps_of(report: Document) -> dict[str, int]:
    """Return the number of steps of the run's planned maximum and of what was charged, noised or not."""
    return {"guarantee": sum(steps for _, _, steps in planned(report)),
            "spent": sum(steps for _, _, steps in begun(report))}


def number(epsilon: float | str | None) -> float | None:
    """Return epsilon from its JSON form; the inverse of `stated`.

    Raises:
        ValueError: it is a text other than "infinite", or a negative number.
    """
    if epsilon == "infinite":
        return math.inf
    if isinstance(epsilon, str) or (epsilon is not None and epsilon < 0):
        raise ValueError(f'{epsilon!r} is no epsilon; it is a number of at least 0, or "infinite"')
    return epsilon


def shown(epsilon: float | str | None) -> str:
    """Format epsilon with four digits, rounded up so that the page never promises more than the JSON."""
    value = number(epsilon)
    return "not computed" if value is None else four_digits(value)


def accountants(history: tuple[Spend, ...], delta: float) -> dict[str, float | None]:
    """Return epsilon at `delta` by each accountant; None if an accountant has no finite figure."""
    return {"PRV": prv_epsilon(history, delta), "RDP": rdp_epsilon(history, delta),
            "PLD": pld_epsilon(history, delta)}


def planned(report: Document) -> list[Steps]:
    """Return the steps of the run's planned maximum."""
    mechanism = report["mechanism"]
    return [(mechanism["noise_multiplier"], mechanism["sampling_rate"],
             mechanism["local_steps"] * mechanism["max_participations"])]


def begun(report: Document) -> list[Steps]:
    """Return the steps of every training that was charged and not voided."""
    return [(t["noise_multiplier"], t["sampling_rate"], t["steps"]) for t in report["trainings"]
            if t["state"] != "voided"]


def charged_noise(report: Document) -> Noise:
    """Return the noise of the report's run for which the budget is charged, maybe that of sums."""
    sums = report.get("sums") or {}
    return Noise(report["mechanism"]["noise_multiplier"], sums.get("aggregate_noise_multiplier"))


def charged(report: Document, steps: Iterable[Steps], aggregate: float | None = None) -> tuple[Spend, ...]:
    """Return the noised steps of the report's run as its mechanism charges them.

    Args:
        report: the report.
        steps: the steps, with this client's own noise.
        aggregate: the noise multiplier of the sums, if that is charged; None if this client's own noise is.
    """
    mechanism = mechanism_of(report)
    return tuple(spend for own in _spends(steps) for spend in mechanism.spends(
        Noise(own.noise_multiplier, aggregate), own.sampling_rate, own.steps))


def merged(steps: Iterable[Steps]) -> dict[tuple[float | None, float | None], int]:
    """Add up the steps with equal (noise multiplier, sampling rate).

    The order of steps is dropped: it changes no bound, since their parameters were fixed in advance.
    """
    found: dict[tuple[float | None, float | None], int] = {}
    for sigma, q, count in steps:
        found[sigma, q] = found.get((sigma, q), 0) + count
    return found


def _charge_delta(report: Document, charge: Document) -> float:
    """Return the part of the lifetime's delta that is left for the steps of one of its charges.

    A charge of another run does not name its mechanism. It says only whether that is the one of secure sums.
    """
    delta: float = report["lifetime"]["delta"]
    if charge["run"] == report["run"]["id"]:
        return mechanism_of(report).steps_delta(charged_noise(report), delta)
    sigma = charge["noise_multiplier"]
    return mechanism_named(AGGREGATE).steps_delta(Noise(sigma, sigma), delta) if charge.get("sums") else delta


def _spends(steps: Iterable[Steps]) -> tuple[Spend, ...]:
    """Return the noised steps, merged. Raise ValueError if their sampling rate is withheld: they have no epsilon."""
    found = []
    for (sigma, q), count in merged(steps).items():
        if sigma is not None and q is None:
            raise ValueError(f"{count} steps with noise multiplier {sigma!r} have no sampling rate; a run with noise "
                             "must declare its size and state the sampling rate that follows from it")
        if sigma is not None and q is not None:
            found.append(Spend(sigma, q, count))
    return tuple(found)
