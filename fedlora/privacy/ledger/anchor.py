"""The anchor: how far a ledger had come when something last left, sealed for a server to keep and give back.

Ledger, policy and witness lie on one machine. Put back together to an earlier state they agree with each other, and
what left since is forgotten. An anchor is off the machine: it tells where it comes back newer than the ledger. The
server that keeps it cannot read it, make one, or tell two of them apart by what they hold.

An anchor is AES-256-GCM of (rows, 8 bytes, big-endian; head, 32 bytes) after its random nonce of 12 bytes, under a key
that HKDF-SHA256 makes of the ledger's own.
"""

from __future__ import annotations

import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedlora.plan import ANCHOR_BYTES

INFO = b"fedlora ledger anchor 1"
ROWS_BYTES, HEAD_BYTES, NONCE_BYTES, TAG_BYTES = 8, 32, 12, 16
assert NONCE_BYTES + ROWS_BYTES + HEAD_BYTES + TAG_BYTES == ANCHOR_BYTES


def seal(key: bytes, rows: int, head: str) -> bytes:
    """The anchor of a ledger with so many rows and this head (64 hex digits); never twice the same.

    Args:
        key: the ledger's `fingerprint_key`, 32 bytes.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + _cipher(key).encrypt(nonce, rows.to_bytes(ROWS_BYTES, "big") + bytes.fromhex(head), None)


def unseal(key: bytes, sealed: bytes) -> tuple[int, str] | None:
    """The rows and the head that were sealed; None where it was not with this key, or was changed since."""
    if len(sealed) != ANCHOR_BYTES:
        return None
    try:
        plain = _cipher(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], None)
    except InvalidTag:
        return None
    return int.from_bytes(plain[:ROWS_BYTES], "big"), plain[ROWS_BYTES:].hex()


def _cipher(key: bytes) -> AESGCM:
    return AESGCM(HKDF(SHA256(), 32, salt=None, info=INFO).derive(key))
