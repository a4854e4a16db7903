"""Rosters, members and whole secure sums for tests, in one process."""

from __future__ import annotations

import atexit
import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fedlora.identity.folder import AUTHORITY, Identity, read_identity
from fedlora.secure_sum.collector import Collector
from fedlora.secure_sum.integers import Grid
from fedlora.secure_sum.masks import public_bytes
from fedlora.secure_sum.member import Attendance
from fedlora.secure_sum.roster import Entry, Roster
from fedlora_server.pki.authority import Authority
from tests.identities import enrolled

RUN, SENT = b"a run", b"tensors"


@cache
def authority() -> Authority:
    folder = TemporaryDirectory(prefix="fedlora-test-authority-")
    atexit.register(folder.cleanup)
    return Authority.create(Path(folder.name) / "pki", ["127.0.0.1"])


def authority_pem() -> bytes:
    return (authority().folder / AUTHORITY).read_bytes()


@cache
def identity_of(name: str, by: Authority | None = None) -> Identity:
    """Return the identity of this name that the authority has signed, or another one; made once for all tests."""
    with TemporaryDirectory(prefix="fedlora-test-identity-") as folder:
        return read_identity(enrolled(by or authority(), Path(folder) / name, name))


@cache
def person(number: int) -> tuple[EllipticCurvePrivateKey, X25519PrivateKey, Entry]:
    """Return a member's certificate key, its sealing key, and its entry."""
    identity, sealing = identity_of(f"site-{number:03}"), X25519PrivateKey.generate()
    key = load_pem_private_key(identity.key_pem, None)
    return key, sealing, Entry.signed(identity.certificate.name, identity.chain_pem, public_bytes(sealing), RUN, key)


def people(count: int) -> dict[str, tuple[EllipticCurvePrivateKey, X25519PrivateKey, Entry]]:
    """Return name → member, for the first so many members."""
    return {f"site-{number:03}": person(number) for number in range(count)}


def roster(count: int, *, values: int = 20, colluding: int = 0, ring_bits: int = 32, noise: float = 2.0) -> Roster:
    grid = Grid(clip_norm=1.0, fraction_bits=10, ring_bits=ring_bits, most=1 << 18)
    return Roster(RUN, tuple(entry for _, _, entry in people(count).values()), colluding, grid, values, noise)


def attendance(of: Roster, name: str, *, round: int = 1, attempt: int = 1,
               random: Callable[[int], bytes] | None = None) -> Attendance:
    key, sealing, _ = people(len(of.entries))[name]
    options = {} if random is None else {"random": random}
    return Attendance(name, of, key, sealing, round=round, attempt=attempt, **options)


def seeded(*identity: object) -> Callable[[int], bytes]:
    """Return a source of bytes that repeats itself, for tests."""
    counter = 0

    def random(count: int) -> bytes:
        nonlocal counter
        counter += 1
        return hashlib.shake_256(repr((identity, counter)).encode()).digest(count)

    return random


def vectors(of: Roster, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {entry.name: rng.integers(-(1 << 18), 1 << 18, of.values) for entry in of.entries}


class Sum:
    """One attempt at one round by a whole roster, phase by phase. Whoever is named in a phase drops out before it."""

    def __init__(self, of: Roster, *, round: int = 1, attempt: int = 1, seed: int = 0) -> None:
        self.roster = of
        self.vectors = vectors(of, seed)
        self.members = {name: attendance(of, name, round=round, attempt=attempt) for name in of.members}
        self.collector = Collector(of, round=round, attempt=attempt)
        self.uploads: dict[str, np.ndarray] = {}

    def restart(self) -> None:
        """Go on with another collector, as a server that was killed does."""
        self.collector = Collector(self.roster, round=self.collector.attempt.round,
                                   attempt=self.collector.attempt.attempt, held=self.collector.held)

    def packages(self, without: set[str] = frozenset()) -> None:
        for name, member in self.members.items():
            if name not in without:
                self.collector.add_package(member.offer())

    def requests(self, without: set[str] = frozenset()) -> None:
        for name, request in self.collector.form_cohort(SENT).items():
            if name not in without:
                self.members[name].accept(request, SENT)
                self.uploads[name] = self.members[name].masked(self.vectors[name])

    def collect(self, without: set[str] = frozenset()) -> None:
        for name, vector in self.uploads.items():
            if name not in without:
                self.collector.add_upload(name, vector)

    def close(self, without: set[str] = frozenset()) -> None:
        survivors = self.collector.close()
        for name in survivors:
            if name not in without:
                self.collector.add_signature(name, self.members[name].agree(survivors))

    def reveal(self, without: set[str] = frozenset()) -> None:
        closing = self.collector.closing()
        if closing is not None:
            for name in closing.survivors:
                if name not in without:
                    self.collector.add_reveal(self.members[name].reveal(closing))

    def expected(self) -> np.ndarray:
        """Return the plain sum of the vectors of whose uploads were taken."""
        return np.sum([self.vectors[name] for name in self.collector.held.uploaded], axis=0)
