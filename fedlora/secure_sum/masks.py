"""Masks: the keys that two members agree on, and the integers that are drawn from a key.

Key agreement is X25519, keys are derived by HKDF-SHA256, and masks are the key stream of AES-256 in counter mode. All
three are those of the library `cryptography`.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32


def derived(secret: bytes, purpose: bytes) -> bytes:
    """Return a key of 32 bytes for one purpose. Different purposes give keys that tell nothing of each other."""
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=b"fedlora secure sum 1\0" + purpose).derive(secret)


def private_key(seed: bytes) -> X25519PrivateKey:
    """Return the X25519 key of a seed, which is what members share in place of the key."""
    return X25519PrivateKey.from_private_bytes(derived(seed, b"mask key"))


def public_bytes(key: X25519PrivateKey) -> bytes:
    """Return the public half of a key, 32 bytes."""
    return key.public_key().public_bytes_raw()


def agreed(key: X25519PrivateKey, other: bytes, purpose: bytes) -> bytes:
    """Return the key that both owners derive, for one purpose.

    Args:
        key: one's own private key.
        other: the other's public key.
        purpose: what the key is for; equal on both sides.

    Raises:
        ValueError: the other's public key is none, or is one with which everybody agrees on the same key.
    """
    return derived(key.exchange(X25519PublicKey.from_public_bytes(other)), purpose)


def is_usable(public: bytes) -> bool:
    """Return whether a public key is one, and none with which everybody agrees on the same key."""
    try:
        agreed(X25519PrivateKey.generate(), public, b"a trial")
    except ValueError:
        return False
    return True


def mask(key: bytes, count: int, dtype: np.dtype[np.unsignedinteger]) -> np.ndarray:
    """Return `count` uniform integers of the ring. Each key serves one mask only, so the counter starts at 0."""
    cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(cipher.update(bytes(count * dtype.itemsize)), dtype=dtype)
