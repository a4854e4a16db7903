"""Secret sharing (Shamir, Communications of the ACM 1979): a threshold of shares gives the secret, fewer give nothing.

A secret of 31 bytes is the value at 0 of a random polynomial over the integers modulo 2^255 − 19; a share is its value
at a member's number. The library that has it in Python shares 16 bytes at a time and interpolates anew for each secret.
A sum of a hundred clients recovers a hundred secrets from the same members, whose coefficients are computed once here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

PRIME = 2**255 - 19
SECRET_BYTES, SHARE_BYTES = 31, 32


def split(secret: bytes, threshold: int, numbers: Sequence[int],
          random: Callable[[int], bytes] = os.urandom) -> dict[int, bytes]:
    """Return number → share, for each of the numbers.

    Args:
        secret: `SECRET_BYTES` bytes.
        threshold: how many shares recover the secret.
        numbers: different positive numbers, one for each member.
        random: returns that many random bytes.

    Raises:
        ValueError: the secret's length, the threshold or a number is wrong.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"the secret has {len(secret)} bytes; it must have {SECRET_BYTES}")
    if not 1 <= threshold <= len(numbers):
        raise ValueError(f"the threshold is {threshold}; it must be in 1 … {len(numbers)}, the number of shares")
    if len(set(numbers)) < len(numbers) or min(numbers) < 1:
        raise ValueError("members' numbers must be positive and different")
    # 64 bytes modulo the prime: its remainders are uniform up to 2^-256
    slopes = [int.from_bytes(random(64)) % PRIME for _ in range(threshold - 1)]
    shares = {}
    for number in numbers:
        value = 0
        for coefficient in reversed(slopes):
            value = (value + coefficient) * number % PRIME
        shares[number] = ((value + int.from_bytes(secret)) % PRIME).to_bytes(SHARE_BYTES)
    return shares


def coefficients(numbers: Sequence[int]) -> dict[int, int]:
    """Return number → its factor in the sum of shares that is the secret (Lagrange interpolation at 0)."""
    factors = {}
    for own in numbers:
        above = below = 1
        for other in numbers:
            if other != own:
                above = above * other % PRIME
                below = below * (other - own) % PRIME
        factors[own] = above * pow(below, -1, PRIME) % PRIME
    return factors


def combine(shares: Mapping[int, bytes], factors: Mapping[int, int]) -> bytes:
    """Return the secret.

    Args:
        shares: number → share, at least for each number of `factors`.
        factors: the `coefficients` of as many numbers as the threshold.

    Raises:
        ValueError: the shares are not those of one secret.
    """
    secret = sum(factor * int.from_bytes(shares[number]) for number, factor in factors.items()) % PRIME
    if secret >> (8 * SECRET_BYTES):
        raise ValueError("the shares do not fit together: one of them was changed, or is of another secret")
    return secret.to_bytes(SECRET_BYTES)
