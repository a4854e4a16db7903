"""The parts of the page for any reader: what an attacker can achieve, who is responsible, an audit, and the terms."""

from __future__ import annotations

import math

from fedlora.plan import ROW
from fedlora.privacy.report.figures import LABELS
from fedlora.privacy.report.signing import Document
from fedlora.privacy.report.text import table, text
from fedlora.privacy.trade_off import suspicion

PRIOR = 0.01
"""How likely an attacker holds it to be beforehand that a unit's records were used, in the page's example."""

RESPONSIBLE = {"controller": "Controller: who decides why and how the data are used",
               "processor": "Processor: who trains on them for the controller", "purpose": "Purpose",
               "legal_basis": "Legal basis", "retention": "Retention: how long data, uploads and adapter are kept",
               "recipient": "Recipient: who receives what leaves, and the adapter made from it"}
"""Field of `fedlora.privacy.about.About` → its words on the page."""

NOT_STATED = "*not stated in policy.toml*"

TERMS = {
    "reserved": "State of a training: it is charged. The charge was on the disk before the first record was read.",
    "stored": "State of a training: its noised update is finished and kept here. It has not left.",
    "released": "State of a training: its noised update has left this client, or may have.",
    "voided": "State of a training: nothing was read, so the charge was taken back. It costs nothing.",
    LABELS["guarantee"]: "ε of the most trainings that this run may begin. It is fixed before the run begins, and "
                         "holds however the run ends.",
    LABELS["spent"]: "ε of every training that was begun and not voided, whether or not its update left.",
    "charged": "The same as spent.",
    "limit": "The owner's ε for the data set over all runs, from policy.toml. No run is begun that does not fit.",
    "counted": "ε of everything that this machine's ledger has charged to the data set, over all runs, added up by the "
               "rule for runs whose terms may depend on earlier results.",
    "remaining": "What is left of the limit for further runs.",
    "closed": "A run that fits into the limit only by the exact sum for a sole run uses up the whole budget. No "
              "further run can begin.",
    "given up": "The owner began a new ledger although an earlier one existed. What only that one knew is not counted.",
    "unit": "What is protected as a whole: one row, or all rows of one patient if the owner said so.",
    "declared size": "The number of units that the owner stated. It is public; the true number never leaves.",
}
"""Word on the page, in privacy.json or in the ledger → what it means."""

SUMS_TERMS = {
    "secure sum": "What the server learns of a round: the sum over the members who took part, and nothing of any one "
                  "of them.",
    "by own noise": "What holds by the noise that this client adds alone. It holds against everyone, even if all "
                    "others work together.",
    "in the sums": "What holds by the noise of this client and of the other honest members together. It holds only "
                   "against those who see the sums and nothing else.",
    "roster": "The list of members of secure sums, with their keys, which this client checked before it trained.",
    "honest": "A member that adds its noise, and tells nobody what it knows. Of every sum that can be opened, at least "
              "as many members are honest as is stated, if no more collude than is stated.",
    "pinned": "The owner's policy names the member's key. Whoever runs the certificate authority cannot make such a "
              "member up.",
}
"""Word that stands on the page in a run with secure sums → what it means."""


def attacker(report: Document) -> str:
    """Return the section on what an attacker can achieve against one unit; "" if there is no guarantee."""
    attacks = report["privacy"]["attack"]
    if report["privacy"]["no_guarantee"] is not None:
        return ""
    subject = _subject(report)
    heading = f"## What an attacker can learn about {subject}\n\n"
    if attacks["guarantee"] is None:
        return heading + ("ε is so large that no useful bound on an attacker's success follows from it: an attacker "
                          "may be right almost always.")
    kinds = [attacks["guarantee"], attacks["spent"]]
    rows = [["Right answers, if yes and no are equally likely",
             *(_at_most(kind["even_odds"]) for kind in kinds), percent(0.5)]]
    for place, first in enumerate(attacks["guarantee"]["found"]):
        rate, found = first["false_alarms"], [kind["found"][place]["at_most"] for kind in kinds]
        rows += [[f"Found among those in the data, if 1 in {round(1 / rate):,} of the others is named wrongly",
                  *map(_at_most, found), percent(rate)],
                 [f"Certainty about one who is so named, if it was {percent(PRIOR)} before",
                  *(_at_most(suspicion(PRIOR, one, rate)) for one in found), percent(PRIOR)]]
    return (heading + f"An attacker asks whether the data hold {subject}. The attacker sees everything that left this "
            "client, knows all other records, and has any amount of computing power."
            + ("" if report.get("sums") is None else " Masks count for nothing here: the figures are those of this "
               "client's own noise. Whoever sees the sums alone achieves less.") + "\n\n"
            + table(["", "at the run's maximum", "so far", "by guessing"], rows)
            + "\n\nThese bounds follow from the exact trade-off between false alarms and misses over all steps of this "
            "run (arXiv:1905.02383); they are tighter than what ε alone says. They hold for a single unit and for this "
            "run: someone with several units, or in several runs or institutions, is easier to find. They do not limit "
            "what the other records teach about people in general.")


def _subject(report: Document) -> str:
    """Return what is protected as a whole, in words for a heading."""
    name = report["unit"]["name"]
    return "one row" if name == ROW else f"one {text(name.removeprefix('column:'))} with all its rows"


def percent(share: float) -> str:
    """Format a probability in percent, rounded up, so that a text never promises more than was computed."""
    value = 100 * share
    places = 1 if value >= 1 else 1 - math.floor(math.log10(value)) if value > 0 else 0
    digits = f"{math.ceil(round(value * 10**places, 6)) / 10**places:.{places}f}"
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + " %"


def _at_most(share: float) -> str:
    return f"**at most {percent(share)}**"


def responsible(report: Document) -> str:
    """Return the section with the owner's own words from policy.toml."""
    rows = [[words, NOT_STATED if report["about"][field] is None else text(report["about"][field])]
            for field, words in RESPONSIBLE.items()]
    return ("## Who is responsible, and what for\n\n" + table(["", "in the words of the owner"], rows)
            + "\n\nThese statements are from this machine's policy.toml. No server receives them from this client.")


def measured(report: Document) -> str:
    """Return the section on an audit's lower bound; it says so if there is none."""
    audit = report["audit"]
    if audit is None:
        said = ("No audit is attached. `fedlora-simulate audit` attacks a run of the same mechanism on made-up "
                "members, and `fedlora-client attach-audit` adds its result here.")
    else:
        said = (f"Measured lower bound: **ε ≥ {math.floor(audit['epsilon'] * 1000) / 1000:.3f}** at δ = "
                f"{audit['delta']:.4g}, with {audit['confidence']:.0%} confidence, from {audit['right']} right guesses "
                f"out of {audit['guesses']} about {audit['canaries']} canaries. The audit was a run of its own with "
                "the same noise multiplier, sampling rate, number of steps, clip norm and adapter family. It shows "
                "that this attack does not succeed better than the guarantee allows. It is no proof: a better attack "
                f"may. SHA-256 of audit.json: `{audit['sha256']}`.")
    return f"## What an audit measured\n\n{said}"


def terms(report: Document) -> str:
    """Return the appendix that explains every state and sum."""
    words = TERMS if report.get("sums") is None else {**TERMS, **SUMS_TERMS}
    return ("## Appendix A: words on this page\n\n"
            + table(["word", "meaning"], [[f"**{word}**", meaning] for word, meaning in words.items()]))
