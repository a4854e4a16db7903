"""The appendix that holds a run against the privacy hazards of NIST SP 800-226.

NIST SP 800-226, *Guidelines for Evaluating Differential Privacy Guarantees* (March 2025), orders a guarantee as a
pyramid: privacy parameters and unit of privacy on top (section 2), then algorithms (section 3), and deployment at the
base (section 4). Section numbers and hazards are those of its initial public draft of December 2023, in our own words.
Hazards of data releases that a run does not make (histograms, synthetic data) are listed as not applicable.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fedlora.plan import ROW
from fedlora.privacy.report.figures import number
from fedlora.privacy.report.signing import Document
from fedlora.privacy.report.text import table, text

MET, PARTLY, OPEN, NONE = "✓ met", "◐ in part", "✗ not met", "— not applicable"

STRONG = 1.0
"""Epsilon up to which SP 800-226 calls protection strong in most cases (section 2.2)."""


class Hazard(NamedTuple):
    """One hazard, and how a run stands to it.

    Attributes:
        section: where SP 800-226 has it.
        hazard: what can go wrong, in our own words.
        state: `MET`, `PARTLY`, `OPEN` or `NONE`.
        how: how it is met here, or why not.
    """

    section: str
    hazard: str
    state: str
    how: str


def appendix(report: Document) -> str:
    """Return the appendix for a report, as Markdown."""
    rows = [[one.section, one.hazard, one.state, one.how] for one in hazards(report)]
    return ("## Appendix B: the privacy hazards of NIST SP 800-226\n\n"
            "In the order of *Guidelines for Evaluating Differential Privacy Guarantees*, from the top of its pyramid "
            "(ε and the unit) to its base (data collection). Sections and hazards are those of the public draft of "
            "December 2023, some taken together, in our own words. This is no certification: the last column says what "
            "each tick rests on.\n\n" + table(["§", "hazard", "", "here"], rows))


def hazards(report: Document) -> Iterator[Hazard]:
    """Yield the hazards in their order, each with the state that follows from the report's facts."""
    if report["privacy"]["no_guarantee"] is not None:
        yield from _none()
    else:
        yield from _guarantee(report)
        yield from _algorithms(report)
    yield from _deployment(report)


def _none() -> Iterator[Hazard]:
    """Yield what sections 2 and 3 come to if no guarantee holds."""
    yield Hazard("2, 3", "All hazards of the guarantee and of its algorithms.", OPEN,
                 "No guarantee holds for this run; the first paragraph says why.")


def _guarantee(report: Document) -> Iterator[Hazard]:
    epsilon, unit = number(report["privacy"]["guarantee"]["epsilon"]), report["unit"]
    small = epsilon is not None and epsilon <= STRONG
    yield Hazard("2.2", "A large ε may protect nobody.", MET if small else PARTLY,
                 f"ε is {'at most' if small else 'above'} {STRONG:g}, up to which the guideline calls it strong in "
                 "most cases. What ε amounts to is said above, in percent.")
    yield Hazard("2.3", "With (ε, δ) alone, privacy may fail completely with probability δ.", MET,
                 "The mechanism is Gaussian and has no such failure: δ comes from the conversion alone.")
    row = unit["name"] == ROW
    yield Hazard("2.4", "What the unit does not cover is not protected.", PARTLY if row else MET,
                 "The unit is one row." if row else
                 f"The unit is all rows that share a value of {text(unit['name'].removeprefix('column:'))}.")
    yield Hazard("2.4", "Row-level privacy protects rows, not people.", PARTLY if row else MET,
                 "Met only if nobody has more than one row. Otherwise --privacy-unit column:NAME is needed." if row else
                 "All rows of one value are protected together, however many there are.")
    yield Hazard("2.5", "Guarantees with another δ or another unit cannot be compared by ε.", MET,
                 "δ, unit and relation stand beside ε, and the noise in privacy.json, so that others can convert.")
    yield Hazard("2.5", "A large δ makes ε look small.", MET,
                 "δ is below 1 / declared size; `fedlora-client verify` checks that too.")
    charges = report["lifetime"]["charges"] if report["lifetime"] else ()
    other = any(charge["noise_multiplier"] is None and charge["steps"] for charge in charges)
    yield Hazard("2.6", "Releases from the same data without differential privacy are not made safer.",
                 OPEN if other else PARTLY,
                 "Another run on these data added no noise." if other else
                 "What left this client without noise is listed above. Releases by other software are not known here.")


def _algorithms(report: Document) -> Iterator[Hazard]:
    people = report["unit"]["name"] != ROW
    yield Hazard("3", "Custom implementations go wrong; well-tested libraries should be used.", PARTLY,
                 "ε is Opacus's and, as a check, dp-accounting's. Clipping and noise are this project's own; their "
                 "gradients are tested against Opacus's, and docs/privacy.md has a walk for reviewers.")
    yield Hazard("3.3", "Noise can create or magnify bias against small groups.", OPEN,
                 "Not measured at clients. The coordinator's results have the recall of each label, not of each group.")
    yield Hazard("3.3", "Remedies for human bias, such as rounding results, have effects of their own.", MET,
                 "Updates leave as the mechanism makes them. Nothing is changed to look better.")
    yield Hazard("3.3", "A mechanism can be statistically biased.", PARTLY,
                 "The noise has mean zero. Clipping shrinks large gradients, which biases their sum.")
    yield Hazard("3.4", "Bounding what one person contributes calls for noise that fits the bound.",
                 MET if people else NONE,
                 "The gradient of a unit is clipped as a whole, so one unit changes the sum by at most the clip norm."
                 if people else "The unit is a row; what one person contributes is not bounded.")
    yield Hazard("3.4", "Histogram bins that are found in the data leak.", MET,
                 "No histogram is released. Label names are declared, not read from the records, and sampling rate and "
                 "noise follow from the declared size.")
    yield Hazard("3.5", "Trained models memorise records.", MET,
                 "Training is DP-SGD: each unit's gradient is clipped, and the sum is noised before it leaves.")
    yield Hazard("3.6", "Synthetic data leak without differential privacy, and are poor with it.", NONE,
                 "No synthetic data are made.")
    yield Hazard("3.7", "In texts it may be unclear whose data a passage is.", PARTLY,
                 "People who are mentioned in another person's record are protected within that record's unit only.")


def _deployment(report: Document) -> Iterator[Hazard]:
    none, about = report["privacy"]["no_guarantee"] is not None, report["about"]
    limited = not none and report["lifetime"] is not None and report["lifetime"]["epsilon"] is not None
    yield Hazard("4.1", "Answering queries again and again calls for a budget and for defence.",
                 MET if limited else PARTLY,
                 "Every round is charged to a ledger before it reads a record"
                 + (", against the data's budget for life." if limited else "; no limit over all runs holds here.")
                 + " A plan fixes what a server may ask.")
    sums = report.get("sums")
    relied = sums is not None and sums["charged"] == "aggregate"
    yield Hazard("4.2", "A guarantee is void if those whom it trusts are not trustworthy.",
                 OPEN if none else PARTLY if relied else MET,
                 "Without noise the server would have to be trusted." if none else
                 "The budget is charged for the noise of secure sums, which relies on the members whose keys the owner "
                 "pinned. This client's own noise holds without them." if relied else
                 "Noise is added here; no server and no other client is trusted. This machine, whoever administers it, "
                 "and the software are.")
    yield Hazard("4.3", "Floating point, timing and error messages are side channels.", PARTLY,
                 "Under privacy each noise value is a sum of several draws, and no answer depends on a row. Timing and "
                 "availability are not covered.")
    yield Hazard("4.4", "A breach of access control or data security makes every guarantee void.", PARTLY,
                 "Records stay on this machine, and connections can use mutual TLS. Who may log in here, and how disks "
                 "are encrypted, is the owner's to decide and not known to this software.")
    stated = about["purpose"] is not None and about["retention"] is not None
    yield Hazard("4.5", "Differential privacy is no reason to collect more than is needed.", PARTLY if stated else OPEN,
                 "Purpose and retention are stated above. Whether less would do is the owner's to decide."
                 if stated else "Purpose or retention is not stated in policy.toml.")
