"""The witness: a small file beside the data that says how far the ledger had come when something last left.

A ledger that is missing, was restored from an older copy, or is another one contradicts it. Both files deleted
together, or a copy of the data on another machine, are outside of what it can tell.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fedlora.files import replace_file
from fedlora.privacy.ledger.lifetime_budget import LedgerError


@dataclass(frozen=True)
class Witness:
    """The ledger's `head` (64 hex digits) after `rows` events, written for one dataset."""

    dataset: str
    ledger_id: str
    rows: int
    head: str


def witness_file(folder: Path, dataset: str) -> Path:
    """The name under which a dataset's witness lies in a folder."""
    return folder / f".fedlora-witness-{dataset}.json"


def witnesses_in(folder: Path) -> list[Path]:
    """All witnesses in a folder, in order; none where there is no such folder."""
    return sorted(folder.glob(witness_file(Path(), "*").name))


def read_witness(path: Path) -> Witness | None:
    """None where there is no file. Raises LedgerError for one that cannot be read as a witness."""
    try:
        witness = Witness(**json.loads(path.read_text()))
        if not isinstance(witness.rows, int) or not 0 <= witness.rows < 2**63 or not isinstance(witness.head, str):
            raise ValueError("rows or head")
        return witness
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise LedgerError(f"{path}, the ledger's witness, cannot be read ({error}). Restore it, or use --new-ledger "
                          "and count what was spent before as lost budget") from error


def write_witness(path: Path, witness: Witness) -> None:
    """On the disk when it returns. Raises LedgerError where it cannot be written; nothing may leave then."""
    try:
        replace_file(path, json.dumps(asdict(witness)).encode())
    except OSError as error:
        raise LedgerError(f"{path}, the ledger's witness, cannot be written ({error.strerror}), so nothing may leave; "
                          "make room or make its folder writable, or set `witness` in policy.toml") from error
