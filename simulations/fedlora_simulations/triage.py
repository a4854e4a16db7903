"""Short triage notes written by a seeded generator: the demo's text, about nobody.

A note is *urgent* if a finding that cannot wait is there now, in the patient. Otherwise it is *routine*. Both kinds
of note speak of alarming and of harmless findings alike, so the words alone do not tell: what tells is which of them
is there, and which is denied, over, somebody else's, or only warned of.

    urgent   Dry cough settled overnight; now has crushing chest pain.
    routine  Here with dry cough. Advised to return should crushing chest pain occur.

Any word is found in both kinds (logistic regression on bags of words, without privacy: about 0.9), while pairs of
neighbouring words tell most of it: what has to be learned is which finding a phrase belongs to.

Every eighth possible note, chosen by its hash, is kept for the held-out set: no hospital ever holds one of them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

LABELS = ("routine", "urgent")

HELD_OUT_SHARE = 8

_ALARMING = (
    "crushing chest pain", "sudden arm weakness", "slurred speech", "facial droop", "breathlessness at rest",
    "vomiting blood", "black tarry stools", "sudden loss of vision", "stiff neck and high fever", "seizures",
    "sudden severe headache", "tongue swelling", "heavy bleeding", "severe abdominal pain",
)
_HARMLESS = (
    "runny nose", "mild sore throat", "itchy forearms", "blocked ears", "back ache after gardening", "sneezing",
    "dry skin", "hiccups", "mild heartburn", "stiff fingers", "tired legs", "chapped lips", "insect bites",
    "mild toothache",
)
_SINCE = ("since this morning", "since noon", "since last night", "for an hour", "since breakfast", "for two hours",
          "since yesterday", "since waking", "for three days", "since lunch", "since Monday", "for half a day")
_THERE = (
    "reports {f} {since}", "complains of {f} {since}", "now has {f}", "presents with {f}", "worsening {f} {since}",
    "ongoing {f} {since}", "{f} {since}, still present",
)
_RELATIVES = ("mother", "father", "brother", "sister", "husband", "wife")
_NOT_THERE = (
    "denies {f}", "no {f}", "{f} denied", "without {f}", "no sign of {f}", "does not report {f}",
    "past {f}, recovered", "history of {f} in childhood", "no longer has {f}", "{f} resolved",
    "{who} has {f}", "told to watch for {f}",
)
_OPENINGS = ("Walk-in: ", "By phone: ", "At the desk: ", "Adult. ", "Evening clinic. ")
_CLOSINGS = (" No medicines.", " No allergies.", " Pulse regular.", " Came with {who}.", " Lives with {who}.")
_FRAMED = 0.25
_JOINS = ("; ", ". ", ", ", ", ")

# Share of notes with the alarming finding alone, and with both findings there or both not. In all others one is there
# and one is not, and words say nothing at all: the smaller these shares, the harder the text.
_ONE, _ALIKE = 0.6, 0.25


def note(rng: np.random.Generator, urgent: bool) -> str:
    """One note of the kind asked for."""
    def pick(options):
        return options[rng.integers(len(options))]

    def clause(finding: str, there: bool) -> str:
        form = pick(_THERE if there else _NOT_THERE)
        return form.format(f=finding, since=pick(_SINCE), who=pick(_RELATIVES))

    alarming, harmless = pick(_ALARMING), pick(_HARMLESS)
    shape = rng.random()
    clauses = [clause(alarming, urgent)]
    if shape > _ONE:
        clauses.append(clause(harmless, urgent if shape < _ONE + _ALIKE else not urgent))
    if rng.random() < 0.5:
        clauses.reverse()
    join = pick(_JOINS)
    if join == ". ":
        clauses = [c[0].upper() + c[1:] for c in clauses]
    body = join.join(clauses)
    opening = pick(_OPENINGS) if rng.random() < _FRAMED else ""
    closing = pick(_CLOSINGS).format(who=pick(_RELATIVES)) if rng.random() < _FRAMED else ""
    return f"{opening}{body[0].upper()}{body[1:]}.{closing}"


def notes(rng: np.random.Generator, rows: int, urgent_share: float, *, held_out: bool = False) -> list[tuple[str, str]]:
    """(text, label) pairs, distinct, in random order; exactly round(rows · urgent_share) are urgent."""
    urgent = rng.permutation(np.arange(rows) < round(rows * urgent_share))
    seen: dict[str, str] = {}
    for flag in urgent:
        while True:
            text = note(rng, bool(flag))
            kept_back = hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_SHARE == 0
            if text not in seen and kept_back == held_out:
                break
        seen[text] = LABELS[int(flag)]
    return list(seen.items())


def write_hospitals(folder: Path, seed: int, *, hospitals: int = 3, rows: int = 6000) -> list[Path]:
    """One file of `rows` notes per hospital, hospital-1.jsonl onwards: 30 % urgent in the first, 70 % in the last.

    Returns:
        the files, each of which a client takes as its --data.
    """
    shares = np.linspace(0.3, 0.7, hospitals) if hospitals > 1 else [0.5]
    return [_write(folder / f"hospital-{i}.jsonl", notes(np.random.default_rng([seed, i]), rows, share))
            for i, share in enumerate(shares, start=1)]


def write_held_out(file: Path, seed: int, *, rows: int = 1000) -> Path:
    """A balanced file of notes that no hospital of any seed holds."""
    return _write(file, notes(np.random.default_rng([seed, 0]), rows, 0.5, held_out=True))


def _write(file: Path, pairs: list[tuple[str, str]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs), "utf-8")
    return file
