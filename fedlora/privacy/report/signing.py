"""The key that signs privacy reports, and the signature inside a report of version 1 or 2.

Reports are signed with an envelope (`dsse`) since version 3. Older ones are verified for good, since they are evidence.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

ALGORITHM = "Ed25519"
DOMAIN = b"fedlora privacy report 1\n"
"""Prefix of the bytes that were signed until version 2."""

Document = Mapping[str, Any]
"""A JSON object, as Python's `json` module reads it."""


def canonical(document: Document) -> bytes:
    """Return the one spelling of a document that was signed until version 2.

    Keys are sorted, there are no spaces, all is ASCII, and each float is in its shortest exact form.

    Raises:
        ValueError: the document is not plain JSON: it has a number that is not finite, or another type of value.
    """
    try:
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"this is not plain JSON ({error}); only plain JSON can be signed") from None


def load_or_create_key(path: Path) -> Ed25519PrivateKey:
    """Return the signing key in `path` (PEM, file mode 0600), made at the first call. It never leaves the machine.

    Raises:
        ValueError: someone other than the owner may read or write the file, or it holds no Ed25519 key.
    """
    if not path.exists():
        _create(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ValueError(f"{path} has mode {mode:04o}, so others than its owner can use this signing key. Run "
                         f"chmod 600 '{path}'. If somebody may have copied the key, delete the file instead: a new key "
                         "is made, and whoever verifies your reports needs its public key")
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (TypeError, ValueError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{path} holds no unencrypted Ed25519 key in PEM form; restore it, or delete it: a new key is "
                         "made then, with another public key")
    return key


def _create(path: Path) -> None:
    """Put a new key at `path`, complete or not at all. If another process was first, its key stays.

    The key is written to a temporary file, synchronised to the disk, and then linked to `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def public_key(key: Ed25519PrivateKey) -> str:
    """Return the public key, with which anyone can check the key's signatures: 32 bytes as 64 hexadecimal digits."""
    return key.public_key().public_bytes_raw().hex()


def check_signature(report: Document) -> str:
    """Check the signature inside a report of version 1 or 2, and return the public key of who signed exactly this.

    Returns:
        The key, 64 hexadecimal digits.

    Raises:
        ValueError: there is no signature, or the report or its signature was changed after signing.
    """
    signature = report.get("signature")
    if not isinstance(signature, Mapping) or set(signature) != {"algorithm", "public_key", "value"}:
        raise ValueError("the report carries no signature, so nobody vouches for it; ask its author for the signed one")
    if signature["algorithm"] != ALGORITHM:
        raise ValueError(f"signature.algorithm is {signature['algorithm']!r}; it must be {ALGORITHM}")
    about = {name: signature[name] for name in ("algorithm", "public_key")}
    try:
        raw, value = (bytes.fromhex(signature[name]) for name in ("public_key", "value"))
        if (raw.hex(), value.hex()) != (signature["public_key"], signature["value"]):
            raise ValueError("another spelling")
        Ed25519PublicKey.from_public_bytes(raw).verify(value, _signed_bytes(report, about))
    except (TypeError, ValueError, InvalidSignature):
        raise ValueError("the signature does not fit the report: a field was changed after it was signed, or the file "
                         "is damaged; ask its author for the original") from None
    return raw.hex()


def _signed_bytes(report: Document, about: Document) -> bytes:
    return DOMAIN + canonical({**{k: v for k, v in report.items() if k != "signature"}, "signature": about})
