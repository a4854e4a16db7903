"""Random streams for sampling and noise: AES-256 in counter mode under a 256-bit key.

torch's generator is not used: on the CPU it takes 32 bits of its seed, and two clients with the same seed would draw
the same noise. Deployment and simulation run the same code here and differ only in the key. In deployment it comes from
the operating system's entropy. In a simulation it is the SHA-256 of (seed, client, round, purpose, attempt).

Gaussians are drawn in float64 by Box-Muller. Each value is a sum of `DRAWS` draws, as in the secure mode of Opacus
(Holohan & Braghin, arXiv:2107.10138). This makes the attack on the floating-point representation of noise (Mironov
2012; arXiv:2112.05307) expensive. It does not rule the attack out, and the privacy report says so.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

INSECURE_SEED_VARIABLE = "FEDLORA_INSECURE_NOISE_SEED"
"""Environment variable for tests only. An integer in it makes this process's sampling and noise predictable, so no
epsilon holds for its runs."""

DRAWS = 4
"""Number of Gaussian draws summed into one value: 2n with n = 2 in arXiv:2107.10138, section 5.1."""

_BLOCK = 16_384
"""Number of pairs of values drawn at once; their memory fits a processor's cache."""


class RandomStream:
    """An endless sequence of uniform or Gaussian numbers, determined by a 32-byte key and the order of calls."""

    def __init__(self, key: bytes) -> None:
        if len(key) != 32:
            raise ValueError(f"the key has {len(key)} bytes; a stream needs 32, from os.urandom or SHA-256")
        # Each key serves one stream only, so the counter may start at zero.
        self._cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    @classmethod
    def from_os(cls) -> RandomStream:
        """Return a stream that nobody can predict: its key is 256 bits of the operating system's entropy."""
        return cls(os.urandom(32))

    @classmethod
    def derived(cls, seed: int, name: str, round: int, purpose: str, attempt: int = 0) -> RandomStream:
        """Return a reproducible stream, for simulation and tests. Different arguments give independent streams.

        Args:
            seed: whoever knows it can subtract the noise.
            name: the client's name.
            round: the round of the run.
            purpose: "sampling", "noise" or "hold-out".
            attempt: the attempt at this round.
        """
        identity = json.dumps(["fedlora stream 1", seed, name, round, purpose, attempt])
        return cls(hashlib.sha256(identity.encode()).digest())

    def uniform(self, count: int) -> np.ndarray:
        """Return `count` uniform float64 values, multiples of 2^-53 in [0, 1)."""
        words = np.frombuffer(self._cipher.update(bytes(8 * count)), dtype="<u8")
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def gaussian(self, count: int) -> np.ndarray:
        """Return `count` float64 values of the standard normal distribution (mean 0, standard deviation 1)."""
        values = np.zeros((2, (count + 1) // 2))
        for start in range(0, values.shape[1], _BLOCK):
            block = values[:, start:start + _BLOCK]
            for _ in range(DRAWS):
                u, v = self.uniform(block.size).reshape(block.shape)
                radius = np.sqrt(np.log(1.0 - u) * (-2.0 / DRAWS))  # 1 - u is in (0, 1]
                # Cosine and sine of 2·pi·(v - 1/2), from the tangent of half the angle: in a third of their time.
                tangent = np.tan(np.pi * (v - 0.5))
                square = tangent * tangent
                radius /= 1.0 + square
                block[0] += radius * (1.0 - square)
                block[1] += radius * tangent * 2.0
        return values.ravel()[:count]


@dataclass(frozen=True)
class RunStreams:
    """The source of one client's random streams in one run.

    Attributes:
        name: the client's name.
        seed: None in deployment: the operating system gives each stream a fresh key. An integer makes all streams
            reproducible, and then no epsilon may be printed as a guarantee.
    """

    name: str
    seed: int | None = None

    @property
    def predictable(self) -> bool:
        """True if the streams follow from a seed: whoever knows it can subtract the noise."""
        return self.seed is not None

    def stream(self, round: int, purpose: str, attempt: int = 0) -> RandomStream:
        """Return a stream for one purpose ("sampling", "noise", "hold-out") in one attempt at one round.

        In deployment each call returns a fresh stream; with a seed, equal arguments return equal streams.
        """
        if self.seed is None:
            return RandomStream.from_os()
        return RandomStream.derived(self.seed, self.name, round, purpose, attempt)


def run_streams(name: str) -> RunStreams:
    """Return the streams of a deployed client: the operating system's, unless the test-only variable is set.

    Raises:
        ValueError: the variable `INSECURE_SEED_VARIABLE` is set to something that is not an integer.
    """
    value = os.environ.get(INSECURE_SEED_VARIABLE)
    if value is None:
        return RunStreams(name)
    try:
        return RunStreams(name, int(value))
    except ValueError:
        raise ValueError(f"{INSECURE_SEED_VARIABLE} is {value!r}; it must be an integer. It is for tests only: unset "
                         "it wherever privacy matters") from None
