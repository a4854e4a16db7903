"""The anchor: the state of a ledger when an update last left, encrypted for a server to keep and give back.

Ledger, policy and witness are on one machine. If all of them are put back to an earlier state together, they agree with
each other, and what left since is forgotten. An anchor is kept elsewhere: if it comes back newer than the ledger, the
ledger was put back. The server that keeps an anchor can neither read it nor make one, nor tell from two anchors whether
they hold the same state.

An anchor has 68 bytes: a random nonce (12), then the number of rows (8, big-endian) and the chain's hash (32) under
AES-256-GCM, then its tag (16). The key is derived from the ledger's own by HKDF-SHA256.
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
    """Encrypt a ledger's state. The nonce is random, so two calls never return the same bytes.

    Args:
        key: the ledger's `fingerprint_key`, 32 bytes.
        rows: number of the ledger's rows.
        head: the chain's hash after them, 64 hexadecimal digits.

    Returns:
        The anchor, `ANCHOR_BYTES` bytes.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + _cipher(key).encrypt(nonce, rows.to_bytes(ROWS_BYTES, "big") + bytes.fromhex(head), None)


def unseal(key: bytes, sealed: bytes) -> tuple[int, str] | None:
    """Decrypt an anchor.

    Args:
        key: the ledger's `fingerprint_key`, 32 bytes.
        sealed: the anchor, as a server gave it back.

    Returns:
        The rows and the head that were sealed; None if the anchor was not made with this key or was changed.
    """
    if len(sealed) != ANCHOR_BYTES:
        return None
    try:
        plain = _cipher(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], None)
    except InvalidTag:
        return None
    return int.from_bytes(plain[:ROWS_BYTES], "big"), plain[ROWS_BYTES:].hex()


def _cipher(key: bytes) -> AESGCM:
    return AESGCM(HKDF(SHA256(), 32, salt=None, info=INFO).derive(key))
