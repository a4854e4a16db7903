"""Verification of a privacy report: its fields, its signature, and every epsilon, recomputed from the signed history.

This proves the arithmetic and whose key signed the report, not that noise was added. `Verified.text` says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass

from fedlora import registry
from fedlora.plan import MOST_STEPS
from fedlora.plan.limits import AGGREGATE, LOCAL
from fedlora.privacy.accounting import short
from fedlora.privacy.ledger.lifetime_budget import FILTER_ORDERS
from fedlora.privacy.mechanisms import PACKAGE
from fedlora.privacy.report.audited import check_audit
from fedlora.privacy.report.dsse import is_envelope, opened
from fedlora.privacy.report.facts import CERTIFICATE
from fedlora.privacy.report.figures import (
    LABELS,
    READABLE,
    RELATION,
    SCHEMA,
    STATES,
    Steps,
    accountants,
    begun,
    best_attack,
    charged,
    charged_noise,
    event_of,
    lifetime_spent,
    merged,
    number,
    planned,
    planned_history,
    shown,
    spent_history,
    steps_delta,
    steps_of,
    whom,
    why_no_guarantee,
)
from fedlora.privacy.report.shapes import SHAPES, fit, require
from fedlora.privacy.report.signing import Document
from fedlora.privacy.report.sums import check_sums
from fedlora.versions import versions

TOLERANCE = 1e-6
"""Amount by which a stated epsilon may be below the recomputed one, as processors round the same sums differently."""

@dataclass(frozen=True)
class Check:
    """One figure of a report beside the same figure computed here.

    Attributes:
        label: the figure's row.
        accountant: the accountant by which it was computed.
        stated: epsilon in the report; None if it is not stated.
        recomputed: epsilon computed here; None if it cannot be computed.
    """

    label: str
    accountant: str
    stated: float | None
    recomputed: float | None


@dataclass(frozen=True)
class Verified:
    """The result of verifying a report that is consistent and correctly signed.

    Attributes:
        public_key: the key that signed the report, 64 hexadecimal digits. Compare it with the one that the author gave
            you.
        guarantee: False if the report itself says that no guarantee holds.
        epsilon: epsilon guaranteed at the run's planned maximum, for one unit under zero-out; None without a guarantee.
        delta: the delta of that guarantee; None without a guarantee.
        spent: epsilon spent so far; None without a guarantee.
        checks: every figure that was compared.
        text: what the verification proves and what it does not.
        report: the report that was signed.
        connections: the keys at both ends of the run's encrypted connections, in words; () without TLS.
        aggregate: epsilon at the run's planned maximum against whoever sees the secure sums alone; None if none is
            stated.
    """

    public_key: str
    guarantee: bool
    epsilon: float | None
    delta: float | None
    spent: float | None
    checks: tuple[Check, ...]
    text: str
    report: Document
    connections: tuple[str, ...] = ()
    aggregate: float | None = None


def verify(document: Document, public_key: str | None = None) -> Verified:
    """Verify a signed report.

    Args:
        document: the JSON of privacy.dsse.json; or that of a privacy.json of version 1 or 2, which has its signature
            inside. `dsse.read_signed` reads both from a file.
        public_key: the author's, 64 hexadecimal digits; None accepts any author, and the result names the key.

    Raises:
        ValueError: a field is missing, unknown or of the wrong type; the signature is not the author's or does not fit;
            facts contradict each other; an epsilon or an attacker's success is below the recomputed one; the guarantee
            covers fewer steps than were begun; or an audit is of another mechanism. The message names the field.
    """
    enveloped = isinstance(document, Mapping) and is_envelope(document)
    if not enveloped:
        _check_version(document)
    report, author = opened(document)
    if enveloped:
        _check_version(report)
    if public_key is not None and public_key.strip().lower() != author:
        raise ValueError(f"the report is signed by {author}, not by {public_key.strip().lower()}; it is another "
                         "client's, or its author has a new key: ask the author for the public key")
    fit(report, SHAPES[report["version"]], "report")
    _check_facts(report)
    privacy = report["privacy"]
    if privacy["no_guarantee"] is not None:
        _check_sums(report)
        return Verified(author, False, None, None, None, (), _without_guarantee(report), report, connections(report))
    checks = [*_check_figures(report, "guarantee"), *_check_figures(report, "spent"), *_check_sums(report),
              *_check_lifetime(report)]
    _check_attack(report)
    if report.get("audit") is not None:
        check_audit(report, report["audit"])
    epsilon, spent = (number(privacy[kind]["epsilon"]) for kind in ("guarantee", "spent"))
    sums = report.get("sums")
    return Verified(author, True, epsilon, privacy["delta"], spent, tuple(checks), _with_guarantee(report), report,
                    connections(report), None if sums is None else number(sums["guarantee"]["epsilon"]))


def _check_version(report: Document) -> None:
    if not isinstance(report, Mapping) or report.get("schema") != SCHEMA:
        raise ValueError(f"this is not a {SCHEMA}; name a client's privacy.json or privacy.dsse.json")
    version = report.get("version")
    if version not in READABLE or isinstance(version, bool):
        raise ValueError(f"the report has version {version!r}, and this FedLoRA reads versions "
                         f"{', '.join(map(str, READABLE))}; verify it with the FedLoRA version that it names")


def _check_facts(report: Document) -> None:
    """Check that the facts fit each other, before anything is computed from them."""
    unit, mechanism, privacy = report["unit"], report["mechanism"], report["privacy"]
    key = mechanism.get("key", LOCAL)
    known = registry.keys(PACKAGE)
    require(key in known, "mechanism.key", key, f"it must be one of those installed here: {', '.join(known)}")
    require((report.get("sums") is not None) == (key == AGGREGATE), "sums", report.get("sums"),
            f"it must be stated with the mechanism {AGGREGATE}, and only then")
    require(key != AGGREGATE or mechanism["local_steps"] == 1, "mechanism.local_steps", mechanism["local_steps"],
            "with secure sums it must be 1")
    name, size, delta = unit["name"], unit["declared_size"], privacy["delta"]
    require(name == "row" or (name.startswith("column:") and len(name) > 7), "unit.name", name, 'it must be "row" or '
            '"column:NAME"')
    require(unit["relation"] == RELATION, "unit.relation", unit["relation"], f"it must be {RELATION!r}")
    for field in ("expected_batch", "local_steps", "max_participations"):
        require(mechanism[field] >= 1, f"mechanism.{field}", mechanism[field], "it must be at least 1")
    for field, value in {"clip_norm": mechanism["clip_norm"], **mechanism["scales"]}.items():
        require(value > 0, f"mechanism {field}", value, "it must be positive")
    if "rounding_cover" in mechanism:
        require(mechanism["rounding_cover"] >= 0, "mechanism.rounding_cover", mechanism["rounding_cover"],
                "it must be at least 0")
    else:
        for length, rows in mechanism["batch_invariance"]["rows"].items():
            require(rows >= 1, f"mechanism.batch_invariance.rows {length}", rows, "it must be at least 1")
    seen: set[tuple[int, int]] = set()
    for training in report["trainings"]:
        key = training["round"], training["attempt"]
        if training["state"] != "voided":  # a voided one may be begun again
            require(key not in seen, "trainings", key, "this (round, attempt) is charged twice")
            seen.add(key)
        require(training["state"] in STATES, "state", training["state"], f"it must be one of {', '.join(STATES)}")
        require(training["steps"] >= 1, "steps", training["steps"], "a training has at least 1 step")
    require(report["randomness"]["predictable"] == (report["randomness"]["why"] is not None), "randomness.why",
            report["randomness"]["why"], "it must give a reason if randomness is predictable, and only then")
    reason = why_no_guarantee(report)
    require(privacy["no_guarantee"] == reason, "privacy.no_guarantee", privacy["no_guarantee"],
            f"by the report's own facts it must be {reason!r}")
    steps = steps_of(report)
    most = max(steps.values())
    require(most <= MOST_STEPS, "steps", most, f"at most {MOST_STEPS} steps can be recomputed")
    for kind, label in LABELS.items():
        require(privacy[kind]["label"] == label, f"privacy.{kind}.label", privacy[kind]["label"],
                f"it must be {label!r}")
        require(privacy[kind]["steps"] == steps[kind], f"privacy.{kind}.steps", privacy[kind]["steps"],
                f"by the report's own facts it must be {steps[kind]}")
    if reason is not None:
        lifetime = report["lifetime"] or {}
        found = [lifetime.get(field) for field in ("epsilon", "spent", "remaining")]
        found += [value for kind in LABELS for value in (privacy[kind]["epsilon"],
                                                         *privacy[kind]["accountants"].values())]
        found += [*privacy.get("attack", {}).values(), report.get("audit"), mechanism.get("event")]
        require(all(value is None for value in found), "epsilon", found, "it may not be stated without a guarantee")
        return
    require(size is not None and size >= 1, "unit.declared_size", size, "a guarantee needs a declared size")
    require(delta is not None and 0 < delta < 1 / size, "privacy.delta", delta, f"it must be positive and below "
            f"1/{size}, the declared size")
    rate = min(1.0, mechanism["expected_batch"] / size)
    require(mechanism["sampling_rate"] is not None and math.isclose(mechanism["sampling_rate"], rate, rel_tol=1e-9),
            "mechanism.sampling_rate", mechanism["sampling_rate"], f"with an expected batch of "
            f"{mechanism['expected_batch']} out of {size} declared units it must be {rate!r}")
    _covers(planned(report), begun(report), "the guarantee")
    if "event" in mechanism:
        require(mechanism["event"] == event_of(report), "mechanism.event", mechanism["event"],
                f"by the report's own facts it must be {event_of(report)!r}")


def _check_figures(report: Document, kind: str) -> list[Check]:
    """Recompute the epsilons of one row of the report, and check that none is stated too low."""
    claimed = report["privacy"][kind]
    history = planned_history(report) if kind == "guarantee" else spent_history(report)
    found = accountants(history, steps_delta(report, report["privacy"]["delta"]))
    checks = [Check(claimed["label"], name, number(claimed["accountants"][name]), value)
              for name, value in found.items()]
    for check in checks:
        if check.stated is not None:
            _not_below(report, f"{check.label}, {check.accountant}", check.stated,
                       math.inf if check.recomputed is None else check.recomputed)
    require(claimed["accountant"] in ("PRV", "RDP"), f"privacy.{kind}.accountant", claimed["accountant"],
            "it must be PRV or RDP")
    require(claimed["epsilon"] is not None and claimed["epsilon"] == claimed["accountants"][claimed["accountant"]],
            f"privacy.{kind}.epsilon", claimed["epsilon"], f"it is not {claimed['accountant']}'s figure")
    return checks


def _check_sums(report: Document) -> list[Check]:
    """Check what the report says of secure sums, recompute its epsilons, and check that none is stated too low."""
    if report.get("sums") is None:
        return []
    checks = [Check(*figures) for figures in check_sums(report)]
    for check in checks:
        if check.stated is not None:
            _not_below(report, f"{check.label}, {check.accountant}", check.stated,
                       math.inf if check.recomputed is None else check.recomputed)
    return checks


def _check_attack(report: Document) -> None:
    """Check that no report of version 3 states a smaller success of an attacker than is recomputed here."""
    if "attack" not in report["privacy"]:
        return
    for kind, history in (("guarantee", planned_history(report)), ("spent", spent_history(report))):
        claimed, found = report["privacy"]["attack"][kind], best_attack(history)
        if found is None or claimed is None:
            require(found is claimed, f"privacy.attack.{kind}", claimed, f"by the report's own history it is {found}")
            continue
        rates = [[one["false_alarms"] for one in both["found"]] for both in (claimed, found)]
        require(rates[0] == rates[1], f"privacy.attack.{kind}.found", claimed["found"], f"it is stated for {rates[1]}")
        pairs = [(claimed["even_odds"], found["even_odds"]),
                 *((ours["at_most"], theirs["at_most"])
                   for ours, theirs in zip(claimed["found"], found["found"], strict=True))]
        for stated, least in pairs:
            _not_below(report, f"{LABELS[kind]}, attacker's success", stated, least, "probability")


def _check_lifetime(report: Document) -> list[Check]:
    """Recompute the lifetime budget's epsilon. Check that spending is not understated nor the rest overstated."""
    account = report["lifetime"]
    if account is None:
        return []
    require(account["delta"] is not None and 0 < account["delta"] < 1, "lifetime.delta", account["delta"],
            "it must be in (0, 1)")
    require(tuple(account["orders"]) == FILTER_ORDERS, "lifetime.orders", account["orders"],
            "the filter's orders are fixed; others could have been chosen after seeing results")
    most = max((charge["steps"] for charge in account["charges"]), default=0)
    require(most <= MOST_STEPS, "lifetime.charges steps", most, f"at most {MOST_STEPS} steps can be recomputed")
    own = [c for c in account["charges"] if c["run"] == report["run"]["id"]]
    aggregate, whole = charged_noise(report).aggregate, begun(report) and account["closed_by"] == report["run"]["id"]
    _covers([(c["noise_multiplier"], c["sampling_rate"], c["steps"]) for c in own],
            map(astuple, charged(report, planned(report) if whole else begun(report), aggregate)), "the lifetime")
    sums = aggregate is not None
    require(all(c.get("sums", False) == sums for c in own), "lifetime.charges sums", not sums,
            f"this run is {'' if sums else 'not '}charged for the noise of its sums")
    recomputed, spent, limit = lifetime_spent(report), number(account["spent"]), account["epsilon"]
    require(spent is not None, "lifetime.spent", spent, "it must be stated")
    assert spent is not None
    _not_below(report, "lifetime, spent", spent, recomputed)
    if limit is not None:
        left = 0.0 if account["closed_by"] else max(0.0, limit - spent)
        require(account["remaining"] is not None and account["remaining"] <= left + TOLERANCE, "lifetime.remaining",
                account["remaining"], f"of the limit {limit} only {left} is left")
    return [Check("lifetime, spent", "RDP" if account["closed_by"] is None else "RDP or PRV", spent, recomputed)]


def _not_below(report: Document, what: str, claimed: float, recomputed: float, figure: str = "epsilon") -> None:
    """Raise ValueError if a stated figure is below the recomputed one by more than `TOLERANCE`."""
    if claimed >= recomputed - TOLERANCE:
        return
    here = versions(("opacus", "numpy", "scipy", "dp-accounting"))
    other = {name: report["versions"].get(name) for name in here}
    hint = "" if other == here else f" (it was computed with {_listed(other)}, here with {_listed(here)})"
    raise ValueError(f"{what}: the report states {figure} {claimed!r}, but its own history amounts to {recomputed!r}"
                     f"{hint}; do not rely on this report")


def _listed(found: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {value or 'absent'}" for name, value in found.items())


def _covers(most: Iterable[Steps], done: Iterable[Steps], what: str) -> None:
    """Raise ValueError unless `most` has at least as many steps of every kind as `done`."""
    allowed = merged(most)
    for kind, steps in merged(done).items():
        if steps > allowed.get(kind, 0):
            raise ValueError(f"{what} covers {allowed.get(kind, 0)} steps with noise multiplier {kind[0]} and sampling "
                             f"rate {kind[1]}, and {steps} were begun; do not rely on this report")


def connections(report: Document) -> tuple[str, ...]:
    """Return what a report says of the keys at both ends of the run's connections; nothing without TLS."""
    return tuple(item["value"] for item in report["left_without_noise"] if item["what"] == CERTIFICATE)


def _without_guarantee(report: Document) -> str:
    return (f"No guarantee. {report['privacy']['no_guarantee']}. The signature is valid: this is what the owner of the "
            "key wrote.")


def _with_guarantee(report: Document) -> str:
    unit, privacy = report["unit"], report["privacy"]
    guarantee = privacy["guarantee"]
    return (f"Verified: {guarantee['steps']} steps of the stated mechanism are ({shown(guarantee['epsilon'])}, "
            f"{short(privacy['delta'], up=True)})-differentially private for {whom(unit)}, under the zero-out "
            f"relation{_in_the_sums(report)}. This proves the arithmetic and whose key signed the report. It does not "
            "prove that noise was added, that the list of trainings is complete, or that the software ran as "
            "published.")


def _in_the_sums(report: Document) -> str:
    sums = report.get("sums")
    if sums is None:
        return ""
    if sums["no_guarantee"] is not None:
        return f", by this client's own noise; {sums['no_guarantee']}"
    return (f", by this client's own noise; and ({shown(sums['guarantee']['epsilon'])}, "
            f"{short(report['privacy']['delta'], up=True)}) against whoever sees the sums alone, if the members of the "
            "rosters are who their pinned keys say and as many of them are honest as is stated")
