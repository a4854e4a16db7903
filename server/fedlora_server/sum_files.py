"""The files in a run's folder from which a server resumes a secure sum after a crash or a stop.

    roster.json   the roster, written before any member is told it
    sum.json      all that was collected for the attempt that is under way, written before each step that depends on it
    sum.total     the sum of the masked uploads, written just before the sum.json that says which uploads are in it

Each is replaced atomically. None of them tells more than the sum. The last two are removed once the round's checkpoint
is written.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError

from fedlora.files import replace_file
from fedlora.secure_sum.collector import Collected, Collector
from fedlora.secure_sum.roster import Roster
from fedlora.wire import pb
from fedlora.wire.sums import (
    package_from_wire,
    package_to_wire,
    reveal_from_wire,
    reveal_to_wire,
    roster_from_wire,
    roster_to_wire,
)

ROSTER, SUM, TOTAL = "roster.json", "sum.json", "sum.total"


@dataclass(frozen=True)
class Left:
    """What an earlier server of a run left of its secure sums.

    Attributes:
        roster: the roster.
        round: the round of the attempt that was under way; None if none was.
        attempt: the attempt's number.
        held: what was collected for it.
    """

    roster: Roster
    round: int | None = None
    attempt: int = 0
    held: Collected | None = None


def keep_roster(folder: Path, roster: Roster) -> None:
    """Write the roster."""
    _put(folder / ROSTER, {"digest": roster.digest.hex(), "roster": _text(roster_to_wire(roster).SerializeToString())})


def keep_total(folder: Path, collector: Collector) -> None:
    """Write the sum of the masked uploads."""
    assert collector.held.total is not None
    replace_file(folder / TOTAL, collector.held.total.tobytes(), make_folder=False)


def keep(folder: Path, collector: Collector) -> None:
    """Write all that was collected, without the sum of the uploads."""
    held, about = collector.held, collector.attempt
    key = pb.Key(round=about.round, attempt=about.attempt)
    _put(folder / SUM, {
        "round": about.round, "attempt": about.attempt, "roster": about.roster.hex(), "values": collector.values,
        "sent": held.sent.hex(),
        "packages": [_text(package_to_wire(held.packages[name], key).SerializeToString()) for name in held.cohort],
        "survivors": held.survivors,
        "signatures": {name: _text(signature) for name, signature in held.signatures.items()},
        "reveals": {name: _text(reveal_to_wire(reveal, key).SerializeToString())
                    for name, reveal in held.reveals.items()}})


def clear(folder: Path) -> None:
    """Remove the files of the attempt that was under way."""
    for name in (SUM, TOTAL):
        (folder / name).unlink(missing_ok=True)


def take_up(folder: Path, run: bytes) -> Left | None:
    """Read what an earlier server left; None if it had made no roster.

    Args:
        folder: the run's folder.
        run: digest of the run (`fedlora.secure_sum.roster.run_digest`).

    Raises:
        ValueError: a file is damaged, or another run's.
    """
    if not (folder / ROSTER).exists():
        return None
    try:
        roster = roster_from_wire(pb.Roster.FromString(b64decode(json.loads((folder / ROSTER).read_text())["roster"])),
                                  run)
        if not (folder / SUM).exists():
            return Left(roster)
        said = json.loads((folder / SUM).read_text())
        if said["roster"] != roster.digest.hex():
            return Left(roster)  # of the roster before, whose attempt was given up
        packages = [package_from_wire(pb.KeyPackage.FromString(b64decode(text))) for text in said["packages"]]
        held = Collected({package.keys.name: package for package in packages}, bytes.fromhex(said["sent"]),
                         tuple(package.keys.name for package in packages))
        if said["survivors"]:
            held.survivors, held.uploaded = tuple(said["survivors"]), set(said["survivors"])
            held.total = np.frombuffer((folder / TOTAL).read_bytes(), roster.grid.dtype)
            if len(held.total) != said["values"]:
                raise ValueError(f"{TOTAL} holds {len(held.total)} values, and {SUM} says {said['values']}")
        held.signatures = {name: b64decode(text) for name, text in said["signatures"].items()}
        held.reveals = {name: reveal_from_wire(pb.Reveal.FromString(b64decode(text)), name)
                        for name, text in said["reveals"].items()}
        return Left(roster, said["round"], said["attempt"], held)
    except (ValueError, KeyError, TypeError, OSError, DecodeError) as error:
        raise ValueError(f"--resume: {folder} is damaged ({type(error).__name__}: {error}); restore {ROSTER}, {SUM} "
                         f"and {TOTAL} from a copy. Without {SUM}, the round is tried again with new uploads, which "
                         "its clients charge once more") from error


def _put(path: Path, content: dict[str, object]) -> None:
    replace_file(path, f"{json.dumps(content)}\n".encode(), make_folder=False)


def _text(data: bytes) -> str:
    return b64encode(data).decode("ascii")
