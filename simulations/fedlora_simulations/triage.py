"""Short triage notes from a seeded generator: made-up text for the demo and the benchmarks, about nobody.

A note is *urgent* if the patient has a finding now that cannot wait; otherwise it is *routine*. Notes of both kinds
mention alarming and harmless findings, so that single words do not give the label away. What matters is which finding
is present, and which is denied, over, somebody else's, or only warned of.

    urgent   Dry cough settled overnight; now has crushing chest pain.
    routine  Here with dry cough. Advised to return should crushing chest pain occur.

Every word occurs in both kinds (logistic regression on bags of words, without privacy, is right for about 0.9 of the
notes). Pairs of neighbouring words tell most of the rest: a model has to learn which finding a phrase belongs to.

One in eight possible notes, chosen by its hash, is reserved for the held-out set; no hospital ever holds one of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

LABELS = ("routine", "urgent")

HELD_OUT_SHARE = 8
"""One in so many possible notes is reserved for the held-out set."""

MOST_TRIES = 10_000
"""Notes in a row that may be known already before no new one is looked for."""

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

# Share of notes with the alarming finding alone, and share with both findings present or both absent. In all other
# notes one is present and one is absent, and single words say nothing: the smaller these shares, the harder the text.
_ONE, _ALIKE = 0.6, 0.25


def note(rng: np.random.Generator, urgent: bool) -> str:
    """Write one note, urgent or routine."""
    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

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


def notes(rng: np.random.Generator, rows: int, urgent_share: float, *, held_out: bool = False,
          taken: Collection[str] = ()) -> list[tuple[str, str]]:
    """Write distinct notes in random order.

    Args:
        rng: generator of random numbers.
        rows: number of notes.
        urgent_share: round(rows · urgent_share) of the notes are urgent.
        held_out: write notes of the held-out set rather than notes for hospitals.
        taken: texts that must not be written again.

    Returns:
        (text, label) pairs.

    Raises:
        ValueError: there are not as many different notes.
    """
    urgent = rng.permutation(np.arange(rows) < round(rows * urgent_share))
    seen: dict[str, str] = {}
    for flag in urgent:
        for _ in range(MOST_TRIES):
            text = note(rng, bool(flag))
            kept_back = hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_SHARE == 0
            if text not in seen and text not in taken and kept_back == held_out:
                break
        else:
            raise ValueError(f"no further note differs from the {len(seen) + len(taken)} that are written")
        seen[text] = LABELS[int(flag)]
    return list(seen.items())


def write_hospitals(folder: Path, seed: int, *, hospitals: int = 3, rows: int = 6000) -> list[Path]:
    """Write one file of notes for each hospital: hospital-1.jsonl, hospital-2.jsonl, …

    No note is in two files. The share of urgent notes rises from 30 % in the first hospital to 70 % in the last; a
    single hospital has 50 %.

    Args:
        folder: folder to write into.
        seed: seed of the notes.
        hospitals: number of hospitals.
        rows: number of notes of each hospital.

    Returns:
        The files. A client takes one of them as its --data.
    """
    shares = np.linspace(0.3, 0.7, hospitals) if hospitals > 1 else [0.5]
    files: list[Path] = []
    taken: set[str] = set()
    for i, share in enumerate(shares, start=1):
        written = notes(np.random.default_rng([seed, i]), rows, share, taken=taken)
        taken.update(text for text, _ in written)
        files.append(_write(folder / f"hospital-{i}.jsonl", written))
    return files


def write_held_out(file: Path, seed: int, *, rows: int = 1000) -> Path:
    """Write a file of notes that no hospital of any seed holds, half of them urgent."""
    return _write(file, notes(np.random.default_rng([seed, 0]), rows, 0.5, held_out=True))


def _write(file: Path, pairs: list[tuple[str, str]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs), "utf-8")
    return file
