"""The part of a privacy report on secure sums: what holds against whoever sees the sums alone, and its verification.

The figures elsewhere in the report are those of this client's own noise. They hold without trust in anybody. Those of
this part rest on the members whom the rosters name: at least h = T − t of them are honest, and are who their pinned
keys say. Unit and relation are the same: one unit of this client, zero-out.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fedlora.plan.limits import AGGREGATE
from fedlora.privacy.ledger.rosters import RosterFacts, aggregate_epsilon
from fedlora.privacy.mechanisms import Noise, mechanism_named
from fedlora.privacy.report.facts import Sums
from fedlora.privacy.report.figures import LABELS, accountants, figures, number, stated, steps_of, why_no_guarantee
from fedlora.privacy.report.shapes import require
from fedlora.privacy.report.signing import Document
from fedlora.privacy.spend import Spend

NO_ROSTER = "no roster of members is known yet, so no epsilon is stated for the sums"
NOT_PINNED = ("the owner's policy does not name the keys of all members: whoever runs the certificate authority could "
              "have made members up, so no epsilon is stated for the sums")
TOO_COARSE = "the grid of the sums is too coarse for this delta, so no epsilon is stated for the sums"

CLIENTS = 2
"""Number of clients in the figure for one person whose records are at several."""


def sums_part(report: Document, sums: Sums) -> dict[str, Any]:
    """Return the part on secure sums.

    Args:
        report: the rest of the report.
        sums: the facts.
    """
    rosters = [{**asdict(one), "honest": one.honest} for one in sums.rosters]
    aggregate = sums.aggregate_noise_multiplier
    part: dict[str, Any] = {
        "charged": _charged(aggregate), "aggregate_noise_multiplier": aggregate,
        "least_members": sums.least_members, "colluding": sums.colluding, "rosters": rosters,
        "revealed": [{"round": number, "attempt": attempt} for number, attempt in sums.revealed],
        "hold_out": sums.hold_out, "no_guarantee": None,
        "event": None, "rounding_delta": None, "two_clients": None}
    whole = {**report, "sums": part}
    part["no_guarantee"] = why_no_sums(whole)
    holds = part["no_guarantee"] is None
    steps = steps_of(report)
    for kind, label in LABELS.items():
        history = sums_history(whole, steps[kind]) if holds else ()
        part[kind] = figures(label, steps[kind], history, _steps_delta(whole) if holds else None)
    if holds:
        part |= {"event": event(whole), "rounding_delta": _rounding(whole),
                 "two_clients": stated(_two_clients(whole))}
    return part


def why_no_sums(report: Document) -> str | None:
    """Return why no epsilon may be stated for the sums; None if the report's facts allow one.

    A verifier compares the reason with the one in the report, so its words are part of the format.
    """
    rosters = _rosters(report)
    if (reason := why_no_guarantee(report)) is not None:
        return reason
    if not rosters:
        return NO_ROSTER
    if not all(roster.pinned for roster in rosters):
        return NOT_PINNED
    return TOO_COARSE if _largest(report) is None else None


def sums_history(report: Document, steps: int) -> tuple[Spend, ...]:
    """Return a number of steps with the least noise that the sums of any roster had by honest members."""
    return mechanism_named(AGGREGATE).spends(_noise(report), report["mechanism"]["sampling_rate"], steps)


def event(report: Document) -> str:
    """Return what the sums of the run's planned maximum cost, as the text of dp-accounting's event."""
    return repr(mechanism_named(AGGREGATE).event(_noise(report), report["mechanism"]["sampling_rate"],
                                                 steps_of(report)["guarantee"]))


def check_sums(report: Document) -> list[tuple[str, str, float | None, float | None]]:
    """Check the part on secure sums, and recompute its figures.

    Returns:
        (row, accountant, stated, recomputed) of each epsilon; () if none may be stated.

    Raises:
        ValueError: a fact contradicts another, or an epsilon is stated that does not follow from the facts. Whether one
            is too low is for the caller to check.
    """
    part, mechanism = report["sums"], report["mechanism"]
    aggregate, rosters = part["aggregate_noise_multiplier"], _rosters(report)
    require(part["charged"] == _charged(aggregate), "sums.charged", part["charged"],
            f"it must be {_charged(aggregate)!r}, by the aggregate_noise_multiplier")
    for said, roster in zip(part["rosters"], rosters, strict=True):
        require(said["honest"] == roster.honest, "sums.rosters honest", said["honest"],
                f"of {roster.members} members, {roster.colluding} of whom collude, it must be {roster.honest}")
        require(roster.members >= part["least_members"] and roster.colluding == part["colluding"], "sums.rosters",
                (roster.members, roster.colluding), f"it must have {part['least_members']} members or more, of whom "
                                                     f"{part['colluding']} collude")
        require(mechanism["clip_norm"] <= roster.clip_norm, "sums.rosters clip_norm", roster.clip_norm,
                f"this client clips to {mechanism['clip_norm']!r}, which is more")
        most = roster.most_noise(mechanism["clip_norm"])
        require(roster.noise_multiplier <= most * (1 + 1e-9), "sums.rosters noise_multiplier",
                roster.noise_multiplier, f"by the roster's own numbers it is at most {most!r}")
    sent = [(one["round"], one["attempt"]) for one in report["trainings"] if one["state"] == "released"]
    for one in part["revealed"]:
        require((one["round"], one["attempt"]) in sent, "sums.revealed", one, "no upload was sent for it")
    reason = why_no_sums(report)
    require(part["no_guarantee"] == reason, "sums.no_guarantee", part["no_guarantee"],
            f"by the report's own facts it must be {reason!r}")
    if aggregate is not None and report["privacy"]["no_guarantee"] is None and steps_of(report)["spent"]:
        require(reason is None, "sums.charged", part["charged"], f"the sums may not be charged: {reason}")
        least = min(roster.noise_multiplier for roster in rosters)
        require(least >= aggregate, "sums.aggregate_noise_multiplier", aggregate,
                f"a roster's sums have noise of {least!r} only")
    for kind, label in LABELS.items():
        require((part[kind]["label"], part[kind]["steps"]) == (label, steps_of(report)[kind]), f"sums.{kind}",
                (part[kind]["label"], part[kind]["steps"]), f"it must be {(label, steps_of(report)[kind])}")
    if reason is not None:
        found = [part["event"], part["rounding_delta"], part["two_clients"], *(
            value for kind in LABELS for value in (part[kind]["epsilon"], *part[kind]["accountants"].values()))]
        require(all(value is None for value in found), "sums", found, "no epsilon may be stated for the sums")
        return []
    require(part["event"] == event(report), "sums.event", part["event"], f"it must be {event(report)!r}")
    added = _rounding(report)
    require(part["rounding_delta"] is not None and part["rounding_delta"] >= added * (1 - 1e-6),
            "sums.rounding_delta", part["rounding_delta"], f"it must be {added!r}")
    checks: list[tuple[str, str, float | None, float | None]] = []
    for kind, label in LABELS.items():
        claimed = part[kind]
        for name, value in accountants(sums_history(report, claimed["steps"]), _steps_delta(report)).items():
            checks.append((f"in the sums, {label}", name, number(claimed["accountants"][name]), value))
        require(claimed["accountant"] in ("PRV", "RDP") and claimed["epsilon"] is not None
                and claimed["epsilon"] == claimed["accountants"][claimed["accountant"]], f"sums.{kind}.epsilon",
                claimed["epsilon"], "it must be PRV's or RDP's figure")
    two = _two_clients(report)
    require((part["two_clients"] is None) == (two is None), "sums.two_clients", part["two_clients"],
            f"it must be {two!r}")
    return [*checks, (f"in the sums, one person's records at {CLIENTS} clients", "PLD", number(part["two_clients"]),
                      two)]


def several_clients(report: Document, clients: int) -> float:
    """Return ε at the run's planned maximum, in the sums, for one person whose records are at several clients.

    Args:
        report: a verified report.
        clients: m, this client included. The others sample as this one does, and clip to the plan's clip norm or less.

    Raises:
        ValueError: the report states no epsilon for sums, or no roster has as many members.
    """
    if report.get("sums") is None:
        raise ValueError("the report is of a run without secure sums, in which several clients' epsilons add up")
    if (reason := why_no_sums(report)) is not None:
        raise ValueError(reason)
    most = max(roster.members for roster in _rosters(report))
    if not 2 <= clients <= most:
        raise ValueError(f"--clients is {clients}; it must be 2 to {most}, the members of the run's largest roster")
    epsilon = _largest(report, clients)
    if epsilon is None:
        raise ValueError(f"with one person's records at {clients} clients, {TOO_COARSE}")
    return epsilon


def _charged(aggregate: float | None) -> str:
    """Return what the budget is charged for, in the word that policy.toml has for it."""
    return "local" if aggregate is None else "aggregate"


def _rosters(report: Document) -> list[RosterFacts]:
    return [RosterFacts(**{name: value for name, value in one.items() if name != "honest"})
            for one in report["sums"]["rosters"]]


def _noise(report: Document) -> Noise:
    """Return the client's own noise, with the least that the sums of any roster had by honest members."""
    return Noise(report["mechanism"]["noise_multiplier"], min(one.noise_multiplier for one in _rosters(report)))


def _steps_delta(report: Document) -> float:
    return mechanism_named(AGGREGATE).steps_delta(_noise(report), report["privacy"]["delta"])


def _largest(report: Document, clients: int = 1) -> float | None:
    return aggregate_epsilon(_rosters(report), report["mechanism"]["sampling_rate"], report["privacy"]["delta"],
                             steps_of(report)["guarantee"], clients=clients)


def _two_clients(report: Document) -> float | None:
    return _largest(report, CLIENTS)


def _rounding(report: Document) -> float:
    """Return the most that rounding adds to delta at the epsilon of the planned maximum, under any roster."""
    epsilon, most = _largest(report), steps_of(report)["guarantee"]
    assert epsilon is not None, "an epsilon may be stated"
    return max(roster.noise(report["mechanism"]["sampling_rate"]).check_rounding(report["privacy"]["delta"], most,
                                                                                 epsilon)
               for roster in _rosters(report))
