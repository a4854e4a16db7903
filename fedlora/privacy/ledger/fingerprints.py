"""Keyed hashes by which a machine recognises a record that it has seen in another dataset. They never leave it.

They are a safety net below the dataset id that the owner declares: copies are recognised, edited rows are not.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence

from fedlora.data.rows import Rows


def fingerprints(rows: Rows, key: bytes, units: Sequence[str] | None) -> list[bytes]:
    """One fingerprint per row, then one per distinct unit.

    A row's covers its texts and not its label, so that a relabelled copy is the same record; rows are hashed under a
    column unit too, so that the same file is recognised under both kinds of unit.

    Args:
        rows: the training rows.
        key: the ledger's `fingerprint_key`, 32 bytes.
        units: [rows] the unit (a patient's id, say) of each row; None where the row is the unit.

    Returns:
        Keyed BLAKE2b digests of 16 bytes, of the content in Unicode NFC, case folded, white space collapsed.

    Raises:
        ValueError: a unit is empty (it names the row's file and line), or the units are not one per row.
    """
    if units is not None and len(units) != len(rows):
        raise ValueError(f"there are {len(units)} units for {len(rows)} rows; each row belongs to one")

    def keyed_hash(purpose: bytes, parts: Sequence[str]) -> bytes:
        content = json.dumps([normalized(part) for part in parts]).encode()
        return hashlib.blake2b(content, digest_size=16, key=key, person=purpose).digest()

    def content(row: int) -> list[str]:
        if rows.messages is not None:
            return [text for _, text in rows.messages[row]]
        return [rows.texts[row]] if rows.seconds is None else [rows.texts[row], rows.seconds[row]]

    found = [keyed_hash(b"row", content(row)) for row in range(len(rows))]
    for row, unit in enumerate(units or ()):
        if not normalized(unit):
            raise ValueError(f"{rows.where(row)}: the row's unit is empty, so nobody's budget would pay for it; give "
                             "it an id, or remove the row")
    return found + [keyed_hash(b"unit", [unit]) for unit in dict.fromkeys(normalized(unit) for unit in units or ())]


def normalized(text: str) -> str:
    """Unicode NFC, case folded, white space collapsed to single blanks and stripped."""
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return " ".join(folded.split())
