"""Fingerprints: keyed hashes by which a machine recognises a record of another data set. They never leave the machine.

They are a safety net. The owner's id of a data set decides first; fingerprints recognise copies of rows under another
id. Edited rows are not recognised.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence

from fedlora.data.rows import Rows


def fingerprints(rows: Rows, key: bytes, units: Sequence[str] | None) -> list[bytes]:
    """Return one fingerprint per row, then one per distinct unit.

    A row's fingerprint covers its texts and not its label, so that a relabelled copy is the same record. Rows are
    hashed even if a column is the unit, so that the same file is recognised under both kinds of unit.

    Args:
        rows: the training rows.
        key: the ledger's `fingerprint_key`, 32 bytes.
        units: `[rows]`, the unit of each row (a patient's id, say); None if each row is a unit of its own.

    Returns:
        Keyed BLAKE2b digests of 16 bytes each. They are taken over the content in Unicode NFC, case folded and with
        white space collapsed.

    Raises:
        ValueError: a unit is empty (the message names the row's file and line), or there is not one unit per row.
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
            raise ValueError(f"{rows.where(row)}: the row's unit is empty, so it would count for nobody's budget; give "
                             "the row an id, or remove it")
    return found + [keyed_hash(b"unit", [unit]) for unit in dict.fromkeys(normalized(unit) for unit in units or ())]


def normalized(text: str) -> str:
    """Return the text in Unicode NFC, case folded, with white space collapsed to single blanks and stripped."""
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return " ".join(folded.split())
