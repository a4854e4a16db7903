"""What a secure sum costs each client and the server, by phase, for 3 to 100 clients; and its bytes against plain ones.

First come sums in which the clients take turns in this process. A client's phases do not wait for each other's, so the
times are those of one client alone. Beside them stands the sum of as many plain float32 uploads in float64.

Then come whole rounds over gRPC and mutual TLS, against rounds with plain uploads. There the clients are threads of
this process, and share its interpreter and its cores with the server: a client of its own machine waits for less.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedlora.adapters import AdapterLayout, TensorSpec, family_of
from fedlora.identity.folder import CERTIFICATE, KEY, load_key, read_identity
from fedlora.plan import AGGREGATE, Proposal
from fedlora.privacy.rng import RandomStream
from fedlora.secure_sum.collector import Collector
from fedlora.secure_sum.integers import Grid
from fedlora.secure_sum.masks import public_bytes
from fedlora.secure_sum.member import Attendance
from fedlora.secure_sum.roster import Entry, Roster
from fedlora.secure_sum.rounding import rounded_noise
from fedlora_server.client_sampling import Clients
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_server.observer import Observer
from fedlora_server.pki.authority import Authority
from fedlora_server.round_state import OpenRound, RoundOptions
from fedlora_server.sum_roster import Rosters
from fedlora_server.sum_round import PHASES, SumRound
from fedlora_server.tls import ServerTls
from fedlora_strategies import strategy_class
from fedlora_strategies.messages import to_record
from tests.sum_clients import NAMES, SumClient, leave

from ..federations import plan, tensors
from ..grpc_clients import echo
from ..measure import RATIO, Figure, Row, Settings, Value, exactly, interleaved
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
        _enroll_all(authority, folder, count)
        for name in NAMES[:count]:
            sealing = X25519PrivateKey.generate()
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
        for count, values in cases:
            yield rounds_over_grpc(count, values, authority, Path(folder), settings.repeats(max(1, 20 // count)))


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


def rounds_over_grpc(count: int, values: int, authority: Authority, folder: Path, repeats: int) -> Row:
    """Return what whole rounds over gRPC take, with secure sums and with plain uploads, by phase.

    Args:
        count: number of clients.
        values: number of values in an upload.
        authority: signs the clients' certificates.
        folder: where the clients' identities are, or are written.
        repeats: number of blocks of rounds.
    """
    _enroll_all(authority, folder, count)
    with _secure(count, values, authority, folder) as secure, _plain(count, values, authority, folder) as plain:
        times = interleaved({"secure": secure.hold, "plain": plain.hold}, repeats, warm_up=False)
        phases = {phase: Value.of([1e3 * held[phase] for held in secure.phases], "ms") for phase in PHASES}
        up, down = (exactly(ours / others, RATIO) for ours, others in zip(secure.bytes, plain.bytes, strict=True))
        return Row(f"{count} clients, {values:,} values, over gRPC", {
            "÷ plain": times["secure"].over(times["plain"]), "bytes up ÷ plain": up, "bytes down ÷ plain": down,
            "round": times["secure"].value("ms"), "plain": times["plain"].value("ms"), **phases})


def _enroll_all(authority: Authority, folder: Path, count: int) -> None:
    """Write an identity of each of the first clients, unless it has one."""
    for name in NAMES[:count]:
        if not (folder / name).exists():
            enroll(authority, folder / name)


class _Rounds:
    """A server with its clients, and the rounds that it holds.

    Attributes:
        phases: for each round, phase → seconds.
        bytes: bytes up and down of the last round.
    """

    def __init__(self, engine: GrpcEngine, one_round: Callable[[int], dict[str, float]]) -> None:
        self._engine, self._one_round, self._number = engine, one_round, 0
        self.phases: list[dict[str, float]] = []
        self.bytes = (0, 0)

    def hold(self, block: int) -> None:
        """Hold one round."""
        self._number += 1
        up, down = self._engine.bytes_up, self._engine.bytes_down
        self.phases.append(self._one_round(self._number))
        self.bytes = self._engine.bytes_up - up, self._engine.bytes_down - down


def _layout(values: int) -> AdapterLayout:
    return AdapterLayout(family_of("frozen-a"), (), (TensorSpec("layer.B", (values,)),), ())


@contextmanager
def _secure(count: int, values: int, authority: Authority, folder: Path) -> Iterator[_Rounds]:
    """Start a server and clients of secure sums, and yield their rounds."""
    run = plan("ffa-lora", "frozen-a", mechanism=AGGREGATE, least_members=count, rounds=1000, max_participations=1000,
               expected_batch=BATCH)
    layout, options, stop = _layout(values), RoundOptions(seed=0, min_clients=count), threading.Event()
    strategy, arrays = strategy_class("ffa-lora")(run, layout), to_record(tensors(layout.trained, 0))
    with TemporaryDirectory(prefix="fedlora-uploads-") as uploads:
        engine = GrpcEngine("127.0.0.1:0", Proposal(run), Path(uploads), tls=ServerTls(authority.folder))
        engine.expect(layout)
        asked = Clients(engine, run, 0)
        rosters = Rosters(engine, asked, run, values, options, Observer(), stop, lambda write: None)
        clients = [SumClient(engine.address, name, run, noise=NOISE, identity=read_identity(folder / name)).start()
                   for name in NAMES[:count]]

        def one_round(number: int) -> dict[str, float]:
            under_way = SumRound(engine, strategy, asked, rosters, number, options, Observer(), stop)
            opened = under_way.collect(arrays)
            assert len(opened.survivors) == count and under_way.unopened == 0
            strategy.aggregate_sum(number, opened.total, opened.roster.grid, count)
            return under_way.seconds

        while len(engine.idle()) < count:
            engine.wait([], 1.0)
        yield _Rounds(engine, one_round)
        leave(clients)
        engine.close("done")


@contextmanager
def _plain(count: int, values: int, authority: Authority, folder: Path) -> Iterator[_Rounds]:
    """Start a server and clients that send back what they receive, and yield their rounds."""
    run = plan("ffa-lora", "frozen-a", private=False, rounds=1000, max_participations=1000)
    layout, options, stop = _layout(values), RoundOptions(seed=0, min_clients=count), threading.Event()
    strategy, arrays = strategy_class("ffa-lora")(run, layout), to_record(tensors(layout.trained, 0))
    with TemporaryDirectory(prefix="fedlora-uploads-") as uploads:
        engine = GrpcEngine("127.0.0.1:0", Proposal(run), Path(uploads), tls=ServerTls(authority.folder))
        engine.expect(layout)
        asked = Clients(engine, run, 0)
        for name in NAMES[:count]:
            threading.Thread(target=echo, args=(engine.address, name, 0, folder), daemon=True).start()

        def one_round(number: int) -> dict[str, float]:
            replies = OpenRound(engine, strategy, asked, number, options, Observer(), stop).collect(arrays)
            strategy.aggregate_train(number, replies)
            replies.discard()
            return {}

        while len(engine.idle()) < count:
            engine.wait([], 1.0)
        yield _Rounds(engine, one_round)
        engine.close("done")


FIGURE = Figure(18, measure)
