"""What a secure sum costs each client and the server, by phase, for 3 to 100 clients; and its bytes against plain ones.

The clients of a sum take turns in this process. A client's phases do not wait for each other's, so the times are those
of one client alone. Beside them stands the sum of as many plain float32 uploads in float64.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedlora.identity.folder import CERTIFICATE, KEY, load_key
from fedlora.privacy.rng import RandomStream
from fedlora.secure_sum.collector import Collector
from fedlora.secure_sum.integers import Grid
from fedlora.secure_sum.masks import public_bytes
from fedlora.secure_sum.member import Attendance
from fedlora.secure_sum.roster import Entry, Roster
from fedlora.secure_sum.rounding import rounded_noise
from fedlora_server.pki.authority import Authority

from ..measure import RATIO, Figure, Row, Settings, Value, exactly
from .tls import enroll

RUN, SENT = b"a run", b"tensors"
NOISE, BATCH = 0.6, 256
"""Noise of each client, in units of the clip norm, and the expected batch of a step."""


class Members:
    """A roster, and the keys of its members.

    Args:
        authority: signs their certificates.
        folder: where their identities are written.
        count: number of members.
        values: number of values in a vector.
    """

    def __init__(self, authority: Authority, folder: Path, count: int, values: int) -> None:
        grid = Grid.fitting(values, clip_norm=1.0, expected_batch=BATCH, members=count, noise=NOISE)
        self.keys: dict[str, tuple[EllipticCurvePrivateKey, X25519PrivateKey]] = {}
        entries = []
        for number in range(count):
            name, sealing = f"site-{number:03}", X25519PrivateKey.generate()
            if not (folder / name).exists():
                enroll(authority, folder / name)
            key, chain = load_key(folder / name / KEY), (folder / name / CERTIFICATE).read_bytes()
            self.keys[name] = key, sealing
            entries.append(Entry.signed(name, chain, public_bytes(sealing), RUN, key))
        self.roster = Roster(RUN, tuple(entries), 0, grid, values, NOISE * 2.0**grid.fraction_bits)

    def sum(self, attempt: int, sums: np.ndarray) -> dict[str, float]:
        """Take one sum of the same vector by every member, and return phase → seconds, of a client or the server."""
        roster, count = self.roster, len(self.keys)
        server = Collector(roster, round=1, attempt=attempt)
        members = {name: Attendance(name, roster, *keys, round=1, attempt=attempt) for name, keys in self.keys.items()}
        clock = _Clock(count)
        packages = [member.offer() for member in members.values()]
        clock.lap("client: key package")
        for package in packages:
            server.add_package(package)
        requests = server.form_cohort(SENT)
        clock.lap("server: cohort", clients=1)
        for name, member in members.items():
            member.accept(requests[name], SENT)
        clock.lap("client: check the cohort")
        noised = roster.grid.encode(sums) + rounded_noise(RandomStream.from_os(), roster.noise, roster.values)
        clock.lap("client: encode and noise", clients=1)
        uploads = {name: member.masked(noised) for name, member in members.items()}
        clock.lap("client: mask")
        for name, upload in uploads.items():
            server.add_upload(name, upload)
        clock.lap("server: add up", clients=1)
        survivors = server.close()
        for name, member in members.items():
            server.add_signature(name, member.agree(survivors))
        closing = server.closing()
        assert closing is not None, "everybody signed"
        clock.lap("agreement")
        for member in members.values():
            server.add_reveal(member.reveal(closing))
        clock.lap("client: reveal")
        total = server.opened()
        clock.lap("server: open", clients=1)
        assert total is not None and (total == count * noised).all(), "the masked sum is the plain one"
        return clock.laps


class _Clock:
    def __init__(self, clients: int) -> None:
        self.laps: dict[str, float] = {}
        self._clients, self._since = clients, time.perf_counter()

    def lap(self, phase: str, clients: int | None = None) -> None:
        """Note the seconds since the last lap, divided among the clients that took part in it one after the other."""
        now = time.perf_counter()
        self.laps[phase] = (now - self._since) / (clients or self._clients)
        self._since = now


def measure(settings: Settings) -> Iterator[Row]:
    """Yield one row for each number of clients and of values."""
    cases = [(3, 100)] if settings.quick else [(count, values) for count in (3, 20, 100) for values in (10**4, 10**6)]
    with TemporaryDirectory(prefix="fedlora-bench-sum-") as folder:
        authority = Authority.create(Path(folder) / "pki", ["127.0.0.1"])
        for count, values in cases:
            yield _row(Members(authority, Path(folder), count, values), settings.repeats(3))


def _row(members: Members, repeats: int) -> Row:
    count, values = len(members.keys), members.roster.values
    sums = np.random.default_rng(0).normal(0, 1, values)
    plain = sums.astype(np.float32)
    runs: list[dict[str, float]] = []
    ratios = []
    for repeat in range(repeats):
        runs.append(members.sum(repeat + 1, sums))
        began = time.perf_counter()
        total = np.zeros(values)
        for _ in range(count):
            total += plain
        ratios.append(sum(runs[-1].values()) / (time.perf_counter() - began))
    return Row(f"{count} clients, {values:,} values", {
        "bytes of an upload ÷ float32": exactly(members.roster.grid.ring_bits / 32, RATIO),
        "a client and the server ÷ a plain sum": Value.of(ratios, RATIO),
        **{phase: Value.of([1e3 * run[phase] for run in runs], "ms") for phase in runs[0]}})


FIGURE = Figure(18, measure)
