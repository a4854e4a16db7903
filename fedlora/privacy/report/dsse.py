"""The signed envelope of a privacy report, and how it is read from a file.

The envelope is DSSE 1.0.2 (https://github.com/secure-systems-lab/dsse): JSON that holds the bytes of privacy.json in
base64, their type, and an Ed25519 signature over both. Any DSSE library verifies it; so does this, given the key:

    signed = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
    Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(signature, signed)

The signed report names the public key (`public_key`), so nobody can pass it off as signed by another. The envelope's
keyid is that key's fingerprint, as `fedlora.identity.fingerprint` makes it. It is a hint and is not relied on. Further
signatures in the envelope, of a data protection officer for example, do no harm and are not checked here.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedlora.identity.certificates import fingerprint
from fedlora.privacy.report.figures import SCHEMA
from fedlora.privacy.report.signing import Document, check_signature, public_key

PAYLOAD_TYPE = "application/vnd.fedlora.privacy+json"
ENDING = ".dsse.json"
"""The envelope of privacy.json is privacy.dsse.json, in the same folder."""

_DAMAGED = ("the signature does not fit the report: something was changed after it was signed, or the file is damaged; "
            "ask its author for the original")


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """Return the bytes that a DSSE signature covers.

    Args:
        payload_type: the type of the payload.
        payload: the payload.
    """
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def spelled(document: Document) -> bytes:
    """Return a report or an envelope as the bytes of its file.

    Raises:
        ValueError: it is not plain JSON: it has a number that is not finite, or another type of value.
    """
    try:
        return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"this is not plain JSON ({error}); only plain JSON can be signed") from None


def sign(report: Document, key: Ed25519PrivateKey) -> dict[str, Any]:
    """Return the envelope of a report.

    Args:
        report: plain JSON. Its `public_key` becomes that of `key`.
        key: the author's.

    Raises:
        ValueError: the report is not plain JSON.
    """
    payload = spelled({**report, "public_key": public_key(key)})
    signature = key.sign(pre_authentication_encoding(PAYLOAD_TYPE, payload))
    return {"payload": base64.b64encode(payload).decode(), "payloadType": PAYLOAD_TYPE,
            "signatures": [{"keyid": fingerprint(key.public_key()), "sig": base64.b64encode(signature).decode()}]}


def is_envelope(document: Document) -> bool:
    """Return whether a JSON object is an envelope, of whatever payload."""
    return "payload" in document and "payloadType" in document


def payload_of(envelope: Document) -> bytes:
    """Return the bytes in an envelope, whose signature is not checked here.

    Raises:
        ValueError: the envelope is not one of a privacy report, or is damaged.
    """
    if envelope["payloadType"] != PAYLOAD_TYPE:
        raise ValueError(f"the envelope holds {envelope['payloadType']!r}, and a privacy report is {PAYLOAD_TYPE}; "
                         f"name a client's privacy{ENDING}")
    return _bytes(envelope["payload"])


def opened(document: Document) -> tuple[Document, str]:
    """Check the signature of a document, and return the report in it with the public key of who signed exactly this.

    Args:
        document: an envelope; or a report of version 1 or 2, which has its signature inside.

    Returns:
        The report, and the key as 64 hexadecimal digits.

    Raises:
        ValueError: there is no signature, or something was changed after signing.
    """
    if not is_envelope(document):
        return document, check_signature(document)
    payload = payload_of(document)
    report = parsed(payload)
    signed = pre_authentication_encoding(PAYLOAD_TYPE, payload)
    try:
        author = report["public_key"]
        raw = bytes.fromhex(author)
        signatures = [_bytes(one["sig"]) for one in document["signatures"]]
        if raw.hex() != author or not any(_verifies(raw, signature, signed) for signature in signatures):
            raise ValueError("another spelling, or no signature of this key")
    except (KeyError, TypeError, ValueError):
        raise ValueError(_DAMAGED) from None
    return report, author


def _verifies(key: bytes, signature: bytes, signed: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, signed)
    except InvalidSignature:
        return False
    return True


def _bytes(text: object) -> bytes:
    """Return what base64 text stands for, in its standard or its URL-safe alphabet, as DSSE allows."""
    try:
        return base64.b64decode(str(text).replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(_DAMAGED) from None


def read_signed(path: Path) -> dict[str, Any]:
    """Read a signed document from a file, without checking the signature.

    Args:
        path: a privacy.dsse.json; a privacy.json, whose envelope stands beside it; or a privacy.json of version 1 or 2,
            which has its signature inside.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, the envelope is missing, or privacy.json is not what the envelope holds.
    """
    content = path.read_bytes()
    document = parsed(content)
    if is_envelope(document) or "signature" in document or document.get("schema") != SCHEMA:
        return document
    beside = path.with_suffix(ENDING)
    if not beside.exists():
        raise ValueError(f"the report carries no signature. It stands in {beside.name}, which belongs beside this "
                         "file; ask the report's author for it")
    envelope = parsed(beside.read_bytes())
    if not is_envelope(envelope) or payload_of(envelope) != content:
        raise ValueError(f"it is not the report that {beside.name} beside it holds: one of the two was changed, or is "
                         f"older. The signed report is in {beside.name}; verify that file")
    return envelope


def parsed(content: bytes) -> dict[str, Any]:
    """Return the JSON object in a file or an envelope.

    Raises:
        ValueError: it is not JSON, or no object; a name appears twice in one object, so that two readers may see
            different values; or it holds NaN or an infinity.
    """
    try:
        document = json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"this is not JSON: {error}") from None
    except RecursionError:
        raise ValueError("its brackets are nested too deeply for a report") from None
    if not isinstance(document, Mapping):
        raise ValueError(f"this is not a {SCHEMA}; name a client's privacy.json or privacy{ENDING}")
    return dict(document)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} appears twice in one object")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"it holds {name}, which is not JSON")
