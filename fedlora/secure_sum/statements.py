"""What is signed in a secure sum, and what each signature is bound to.

Every statement names the run, its plan and model, the roster, the round and the attempt. So a signature is worth
nothing in any other place.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA256


class Refused(ValueError):
    """What the other side sent is not what the protocol allows. The message says what, in words for an operator."""


class Unreadable(Refused):
    """A member sealed shares that cannot be opened. It may be that member's fault as well as the server's."""


def digest(*parts: bytes | str | int) -> bytes:
    """Return the SHA-256 of a sequence of parts. Different sequences have different inputs: each length is hashed."""
    hashed = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part if isinstance(part, bytes) else b"%d" % part
        hashed.update(len(data).to_bytes(8) + data)
    return hashed.digest()


@dataclass(frozen=True)
class Attempt:
    """One attempt at one round of one run.

    Attributes:
        run: digest of the run's id, its plan and its model.
        roster: digest of the roster.
        round: number of the round, from 1.
        attempt: number of the attempt at it, from 0. Another attempt has fresh keys and fresh noise.
    """

    run: bytes
    roster: bytes
    round: int
    attempt: int

    def statement(self, kind: str, *parts: bytes | str | int) -> bytes:
        """Return what is signed, or what a key is for: the digest of a kind of message and its content here."""
        return digest("fedlora secure sum 1", self.run, self.roster, self.round, self.attempt, kind, *parts)


def sign(key: EllipticCurvePrivateKey, statement: bytes) -> bytes:
    """Return the signature of a statement by a certificate's key (ECDSA with SHA-256)."""
    return key.sign(statement, ECDSA(SHA256()))


def is_signed(key: EllipticCurvePublicKey, signature: bytes, statement: bytes) -> bool:
    """Return whether a signature is that of a statement by this key."""
    try:
        key.verify(signature, statement, ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return True
