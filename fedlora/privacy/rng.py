"""Streams of random numbers for sampling and noise: AES-256 in counter mode under a 256-bit key.

torch's CPU generator uses 32 bits of its seed, and two clients that share a seed share their noise. Here deployment
and simulation run the same code and differ only in the key: from the operating system's entropy, or derived by
SHA-256 from (seed, client, round, purpose, attempt).

Gaussians are drawn in float64 by Box-Muller, and each value is a sum of `DRAWS` draws, as in the secure mode of
Opacus (Holohan & Braghin, arXiv:2107.10138): that makes the attack on the floating-point representation
(Mironov 2012; arXiv:2112.05307) expensive. It does not remove it: the residual leakage is stated, not denied.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

INSECURE_SEED_VARIABLE = "FEDLORA_INSECURE_NOISE_SEED"
"""Test only. An integer here makes sampling and noise of this process predictable: no epsilon holds for such a run."""

DRAWS = 4
"""Gaussian draws summed into one value: 2n with n = 2, see arXiv:2107.10138, section 5.1."""

_BLOCK = 16_384
"""So many pairs of values are drawn at once: what they take stays in a processor's cache."""


class RandomStream:
    """An endless sequence of uniform or Gaussian numbers that is determined by its key and the order of calls."""

    def __init__(self, key: bytes) -> None:
        if len(key) != 32:
            raise ValueError(f"the key has {len(key)} bytes; a stream needs 32, from os.urandom or SHA-256")
        # One key serves one stream, so the counter may start at zero.
        self._cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    @classmethod
    def from_os(cls) -> RandomStream:
        """A stream nobody can predict: 256 bits of the operating system's entropy."""
        return cls(os.urandom(32))

    @classmethod
    def derived(cls, seed: int, name: str, round: int, purpose: str, attempt: int = 0) -> RandomStream:
        """A reproducible stream for simulation and tests; different arguments give independent streams."""
        identity = json.dumps(["fedlora stream 1", seed, name, round, purpose, attempt])
        return cls(hashlib.sha256(identity.encode()).digest())

    def uniform(self, count: int) -> np.ndarray:
        """`count` float64 values, multiples of 2^-53 in [0, 1)."""
        words = np.frombuffer(self._cipher.update(bytes(8 * count)), dtype="<u8")
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def gaussian(self, count: int) -> np.ndarray:
        """`count` float64 values of the standard normal distribution."""
        values = np.zeros((2, (count + 1) // 2))
        for start in range(0, values.shape[1], _BLOCK):
            block = values[:, start:start + _BLOCK]
            for _ in range(DRAWS):
                u, v = self.uniform(block.size).reshape(block.shape)
                radius = np.sqrt(np.log(1.0 - u) * (-2.0 / DRAWS))  # 1 - u is in (0, 1]
                # cosine and sine of 2·pi·(v - 1/2) by the tangent of its half: a third of the time of both
                tangent = np.tan(np.pi * (v - 0.5))
                square = tangent * tangent
                radius /= 1.0 + square
                block[0] += radius * (1.0 - square)
                block[1] += radius * tangent * 2.0
        return values.ravel()[:count]


@dataclass(frozen=True)
class RunStreams:
    """Where one client's streams of a run come from.

    Attributes:
        name: of the client.
        seed: None in deployment: every stream is keyed afresh by the operating system. An integer makes all of them
            reproducible, and then no epsilon may be printed as a guarantee.
    """

    name: str
    seed: int | None = None

    @property
    def predictable(self) -> bool:
        """True if whoever knows the seed can subtract the noise."""
        return self.seed is not None

    def stream(self, round: int, purpose: str, attempt: int = 0) -> RandomStream:
        """A fresh stream for one purpose ("sampling", "noise") of one attempt at one round."""
        if self.seed is None:
            return RandomStream.from_os()
        return RandomStream.derived(self.seed, self.name, round, purpose, attempt)


def run_streams(name: str) -> RunStreams:
    """The streams of a deployed client: the operating system's, unless the test-only variable is set.

    Raises:
        ValueError: the variable is set to something that is not an integer.
    """
    value = os.environ.get(INSECURE_SEED_VARIABLE)
    if value is None:
        return RunStreams(name)
    try:
        return RunStreams(name, int(value))
    except ValueError:
        raise ValueError(f"{INSECURE_SEED_VARIABLE} is {value!r}; it must be an integer, and it must be unset wherever "
                         "privacy matters") from None
