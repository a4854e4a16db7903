"""The attacks of `tests.attacks` on a server: by a mere connection, after a Join, or as a client that is asked."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import grpc

from fedlora import wire
from fedlora.plan import LONGEST_LABEL, Refusal, Refused, RoundPlan, Tensors, Upload
from fedlora.wire import WireError, pb
from fedlora_client.connection import Connection, Goodbye, RunChanged, ServerUnreachable
from tests import fuzz
from tests.processes import Deployment
from tests.server.tcp_proxy import TcpProxy
from tests.server.test_grpc_hostile import READY, join_frame

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MOST_IDLE, MOST_JOINED = 1300, 512
GIANT_BYTES = 16 << 20
FUZZERS = 4


class Target:
    """A run under attack.

    Args:
        start_honest: starts the honest clients; for attacks that begin before them.
        identities: folders of the attackers' certificates, each named as its certificate; () for a plaintext run.

    Attributes:
        done: counts of what was done to the run: "connections", "frames" and others.
        until: when the attack ends; set by the harness once round 1 is over.
        proxy: the link of the client south.
    """

    def __init__(self, deployment: Deployment, proxy: TcpProxy, start_honest: Callable[[], None],
                 identities: Sequence[Path] = ()) -> None:
        self.deployment, self.address, self.proxy, self.start_honest, self.identities = (
            deployment, deployment.address, proxy, start_honest, identities)
        self.done: Counter = Counter()
        self.until = float("inf")
        self._lock = threading.Lock()

    def goes_on(self) -> bool:
        """Return whether the attack should continue."""
        return time.monotonic() < self.until and self.deployment.processes["server"].poll() is None

    def rest(self) -> None:
        """Wait until the attack ends."""
        while self.goes_on():
            time.sleep(0.05)

    def count(self, what: str, times: int = 1) -> None:
        with self._lock:
            self.done[what] += times

    def connect(self) -> socket.socket:
        host, _, port = self.address.rpartition(":")
        connection = socket.create_connection((host, int(port)), timeout=5)
        self.count("connections")
        return connection

    def join(self, name: str, **fields: object) -> bytes:
        return join_frame(name, **{"process": os.urandom(16), "private": True} | fields).SerializeToString()


class Stranger:
    """A stream that sends some frames, and then nothing until it is closed.

    Args:
        reads: whether it reads what the server sends.
    """

    def __init__(self, target: Target, *frames: bytes, reads: bool = True) -> None:
        self._target, self._frames, self._done, self._heard = target, frames, threading.Event(), threading.Event()
        self._first: pb.ServerFrame | None = None
        target.count("connections")
        self._channel = grpc.insecure_channel(target.address, options=[
            option for option in wire.CHANNEL_OPTIONS if "max_send" not in option[0]])
        self._call = self._channel.stream_stream(wire.SERVICE)(self._requests())
        if reads:
            threading.Thread(target=self._listen, daemon=True).start()

    def _requests(self) -> Iterator[bytes]:
        for frame in self._frames:
            self._target.count("frames")
            yield frame
        while not self._done.wait(1.0) and self._target.goes_on():
            pass

    def _listen(self) -> None:
        with contextlib.suppress(grpc.RpcError, ValueError):
            for data in self._call:
                self._first = self._first or pb.ServerFrame.FromString(data)
                self._heard.set()
        self._heard.set()

    def answer(self, timeout_s: float = 10.0) -> str:
        """Return the kind of the first frame received; "nothing" if none came."""
        self._heard.wait(timeout_s)
        return "nothing" if self._first is None else str(self._first.WhichOneof("kind"))

    @property
    def is_named(self) -> bool:
        """Return whether the server gave this stream its name. If not, its Welcome asks for the name's secret."""
        return self._first is not None and bool(self._first.welcome.secret)

    def close(self) -> None:
        self._done.set()
        self._channel.close()


def _hold(target: Target, most: int, opened: Callable[[], socket.socket | Stranger]) -> None:
    """Hold `most` open, replace the oldest again and again, and start the honest clients once all are open."""
    held: list[socket.socket | Stranger] = []
    while target.goes_on():
        with contextlib.suppress(OSError):
            held.append(opened())
        if len(held) == most:
            target.start_honest()
        if len(held) > most:
            held.pop(0).close()
            time.sleep(0.002)
    for one in held:
        one.close()


def idle_connections(target: Target) -> None:
    """Hold 1,300 connections that send nothing."""
    _hold(target, MOST_IDLE, target.connect)


def half_handshakes(target: Target) -> None:
    """Hold 1,300 connections that begin HTTP/2 and stop there, every third one sending byte by byte."""
    def opened() -> socket.socket:
        one = target.connect()
        one.sendall(PREFACE[:1 + target.done["connections"] % len(PREFACE)] if target.done["connections"] % 3 == 0
                    else PREFACE)
        return one

    _hold(target, MOST_IDLE, opened)


def garbage_bytes(target: Target) -> None:
    """Send random bytes on connection after connection, some of them after HTTP/2's preface."""
    choice = random.Random(0)
    while target.goes_on():
        with contextlib.suppress(OSError), target.connect() as one:
            one.sendall((PREFACE if choice.random() < 0.5 else b"") + choice.randbytes(choice.randrange(1, 4096)))
        time.sleep(0.002)  # without a pause this machine runs out of ports


def joins_without_ready(target: Target) -> None:
    """Hold as many streams that have joined and are not ready as there are places."""
    def opened() -> Stranger:
        time.sleep(0.005)
        return Stranger(target, target.join(f"joined {target.done['connections']}"))

    _hold(target, MOST_JOINED, opened)


def join_storm(target: Target) -> None:
    """Join under a new name each time and leave at once; every other stream is ready first."""
    while target.goes_on():
        number = target.done["connections"]
        one = Stranger(target, target.join(f"name {number}"), *[READY] * (number % 2))
        one.answer()
        one.close()


def ready_and_silent(target: Target) -> None:
    """Run six clients that are ready, are asked and never answer."""
    held = [Stranger(target, target.join(f"silent {number}"), READY, reads=number % 2 == 0) for number in range(6)]
    target.rest()
    for one in held:
        one.close()


def all_places_taken_by_ready(target: Target) -> None:
    """Fill all places with ready clients while south's link is cut. South must get back in all the same."""
    def opened() -> Stranger:
        time.sleep(0.005)
        return Stranger(target, target.join(f"taken {target.done['connections']}"), READY)

    held = [opened() for _ in range(MOST_JOINED)]
    while target.goes_on():
        target.proxy.cut()
        time.sleep(0.5)
        while target.goes_on() and len(held) < MOST_JOINED + 2:  # south's place is taken too
            held.append(opened())
        target.proxy.restore()
        for one in held[MOST_JOINED:]:
            one.close()
        del held[MOST_JOINED:]
        time.sleep(5.0)
    target.proxy.restore()
    for one in held:
        one.close()


def more_names_than_are_remembered(target: Target) -> None:
    """Become ready and leave under a new name each time, a few at a time."""
    def come_and_go() -> None:
        while target.goes_on():
            number = next(numbers)
            one = Stranger(target, target.join(f"gone {number}"), READY)
            one.answer()
            one.close()

    numbers = itertools.count()
    threads = [threading.Thread(target=come_and_go, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _fresh_names(target: Target, asked: Callable[[Connection, RoundPlan], None]) -> None:
    """Keep joining under new names; each is ready until it is asked, and `asked` decides what it does then."""
    for number in itertools.count():
        if not target.goes_on():
            return
        connection = Connection(target.address, f"fresh {number}", private=True, connect_timeout_s=5)
        target.count("connections")
        with contextlib.suppress(Goodbye, Refused, RunChanged, ServerUnreachable, WireError):
            connection.join()
            connection.ready()
            plan, _ = connection.next_request()
            asked(connection, plan)
            target.count("asked")


def backups_that_are_silent(target: Target) -> None:
    """Join under a new name whenever the last one is asked. Twenty stay, ready and silent; then the oldest leaves."""
    held: list[Connection] = []

    def stay(connection: Connection, plan: RoundPlan) -> None:
        held.append(connection)
        if len(held) > 20:
            held.pop(0).leave()

    _fresh_names(target, stay)
    for connection in held:
        connection.leave()


def backups_that_decline(target: Target) -> None:
    """Join under a new name whenever the last one is asked, which declines at once and leaves."""
    def decline(connection: Connection, plan: RoundPlan) -> None:
        connection.send(Refusal("unavailable"))
        connection.leave()

    _fresh_names(target, decline)


def name_theft(target: Target) -> None:
    """Cut south's link again and again, and meanwhile try to join under its name, with and without a secret."""
    attempts = 0
    while target.goes_on():
        target.proxy.cut()
        cut_until = time.monotonic() + 1.5
        while target.goes_on() and time.monotonic() < cut_until:
            secret = os.urandom(32) if attempts % 2 else b""
            one = Stranger(target, target.join("south"), target.join("south", secret=secret), READY)
            target.count("NAMES TAKEN", one.answer() == "welcome" and one.is_named)
            one.close()
            attempts += 1
        target.proxy.restore()
        time.sleep(3.0)
    target.proxy.restore()


def repeated_declined(target: Target) -> None:
    """Send a thousand Declined frames on each stream: for the whole run, or for orders that nobody gave."""
    refusal = wire.refusal_to_wire(Refusal("policy"))
    for_nothing = pb.Declined(key=pb.Key(round=1, attempt=9), refusal=refusal)
    while target.goes_on():
        number = target.done["connections"]
        declined = pb.ClientFrame(declined=for_nothing if number % 2 else pb.Declined(refusal=refusal))
        one = Stranger(target, target.join(f"declines {number % 10}"), READY, *[declined.SerializeToString()] * 1000)
        one.answer()
        time.sleep(0.02)
        one.close()


def labels_999(target: Target) -> None:
    """Announce 999 label names as one client that is ready before the honest ones and refuses every order."""
    takes_part(target, True, lambda plan, tensors: Refusal("unavailable"),
               tuple(f"label {number}" for number in range(999)))


def labels_900_from_many(target: Target) -> None:
    """Announce 900 label names of the greatest length from each of a hundred clients, ready before the honest ones.

    Later, ever new clients do the same.
    """
    def opened(number: int) -> Stranger:
        labels = [f"{number:03} {place:03} ".ljust(LONGEST_LABEL, "x") for place in range(900)]
        ready = pb.ClientFrame(ready=pb.Ready(labels=labels)).SerializeToString()
        return Stranger(target, target.join(f"wordy {number}"), ready)

    for begin in itertools.count(step=100):
        held = [opened(number) for number in range(begin, begin + 100)]
        time.sleep(2.0)
        target.start_honest()
        time.sleep(5.0)
        for one in held:
            one.close()
        if not target.goes_on():
            return


def giant_frames(target: Target) -> None:
    """Send frames of 16 MiB on four streams at a time, some after a Join and some in place of one."""
    frame = pb.ClientFrame(chunk=pb.Chunk(data=bytes(GIANT_BYTES))).SerializeToString()
    while target.goes_on():
        held = [Stranger(target, *([target.join(f"giant {number}"), READY] * (number % 2)), frame)
                for number in range(4)]
        time.sleep(0.5)
        for one in held:
            one.close()


def garbage_frames(target: Target) -> None:
    """Send frames of the protocol, changed at random (`tests.fuzz`)."""
    def fuzzer(number: int) -> None:
        own = target.identities[number::FUZZERS]
        met = fuzz.to_server(target.address, 10**9, random.randrange(10**6), target.goes_on, own)
        target.count("connections", sum(times for how, times in met.items() if how != "frames"))
        for how in ("frames", "ERRORS OF THE SERVER"):
            target.count(how, met[how])

    with ThreadPoolExecutor(FUZZERS) as pool:
        list(pool.map(fuzzer, range(FUZZERS)))


def takes_part(target: Target, private: bool, answer: Callable[[RoundPlan, Tensors], Upload | Refusal],
               labels: tuple[str, ...] = ()) -> None:
    """Take part as a client that answers orders as `answer` decides, and start the honest clients once it is ready."""
    connection = Connection(target.address, "mallory", private=private, connect_timeout_s=5)
    target.count("connections")
    try:
        connection.join()
        connection.ready(labels)
        time.sleep(0.5)
        target.start_honest()
        while target.goes_on():
            plan, tensors = connection.next_request()
            connection.send(answer(plan, {name: array for name, array in tensors.items()
                                          if (name in plan.active if plan.active else not name.endswith(".A"))}))
            target.count("answers")
    except (Goodbye, Refused, RunChanged, ServerUnreachable, WireError):
        pass
    finally:
        connection.leave()


def _moved(tensors: Tensors, by: float) -> Tensors:
    return {name: array + array.dtype.type(by) for name, array in tensors.items()}


def upload_times_a_million(target: Target) -> None:
    """Answer a private run's orders with the state that was sent, moved by 10⁶."""
    takes_part(target, True, lambda plan, tensors: Upload(*plan.key, tensors=_moved(tensors, 1e6), steps=1, delta=1e-5,
                                                          noise_multiplier=1.0))


def plain_upload_times_a_million(target: Target) -> None:
    """Answer a plain run's orders in the same way, and claim as many examples as the field can hold."""
    takes_part(target, False, lambda plan, tensors: Upload(*plan.key, tensors=_moved(tensors, 1e6), steps=1,
                                                           num_examples=2**62, train_loss=0.1))


def examples_2_to_the_62(target: Target) -> None:
    """Answer a plain run's orders with an ordinary upload that claims 2⁶² examples."""
    takes_part(target, False, lambda plan, tensors: Upload(*plan.key, tensors=_moved(tensors, 0.05), steps=1,
                                                           num_examples=2**62, train_loss=0.1))


def slow_upload(target: Target) -> None:
    """Answer orders as one client, one value at a time."""
    def requests() -> Iterator[bytes]:
        yield target.join("slow")
        yield READY
        request = asked.get()
        trained = [tensor for tensor in request.tensors if not tensor.name.endswith(".A")]
        yield pb.ClientFrame(upload=pb.Upload(key=pb.Key(round=request.round, attempt=request.attempt), tensors=trained,
                                              steps=1, delta=1e-5, noise_multiplier=1.0)).SerializeToString()
        while target.goes_on():
            target.count("frames")
            yield pb.ClientFrame(chunk=pb.Chunk(data=bytes(4))).SerializeToString()
            time.sleep(0.2)

    asked: SimpleQueue[pb.TrainRequest] = SimpleQueue()
    target.count("connections")
    with grpc.insecure_channel(target.address, options=wire.CHANNEL_OPTIONS) as channel:
        call = channel.stream_stream(wire.SERVICE)(requests())
        with contextlib.suppress(grpc.RpcError, WireError):
            for data in call:
                frame, _ = wire.read_frame(pb.ServerFrame, data)
                if frame is not None and frame.WhichOneof("kind") == "request":
                    asked.put(frame.request)


LABELS = ("--labels", "routine,urgent")
DEADLINE = ("--round-timeout", 20)
"""A round's time limit in seconds, longer than any machine needs. A round with silent clients takes all of it."""
PRIVATE = (*LABELS, *DEADLINE)
PLAIN = (*LABELS, "--privacy", "off", *DEADLINE)


@dataclass(frozen=True)
class Attack:
    """An attack, and the run that it attacks.

    Attributes:
        options: options for the server.
        comes_first: whether the attack begins before the honest clients, and starts them. If not, it begins in round 1.
        takes_part: whether the attacker is ready and is asked like any client, if only for a moment. Then the run may
            end with another adapter, of ordinary size.
        files: the system's limit on the server's open files.
        stderr_read: whether anybody reads the server's stderr.
        over_tls: whether it is also an attack on a run over mutual TLS.
    """

    run: Callable[[Target], None]
    options: tuple[object, ...] = PRIVATE
    comes_first: bool = False
    takes_part: bool = False
    files: int | None = None
    stderr_read: bool = True
    over_tls: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__.replace("_", " ") + ("" if self.stderr_read else ", unread stderr")


ATTACKS = (
    Attack(idle_connections, comes_first=True, files=1024, over_tls=True),
    Attack(half_handshakes, comes_first=True, files=1024),
    Attack(joins_without_ready, comes_first=True), Attack(join_storm, takes_part=True),
    Attack(join_storm, takes_part=True, stderr_read=False),
    Attack(all_places_taken_by_ready, takes_part=True), Attack(more_names_than_are_remembered, takes_part=True),
    Attack(backups_that_are_silent, takes_part=True), Attack(backups_that_decline, takes_part=True),
    Attack(name_theft), Attack(labels_999, DEADLINE, comes_first=True, takes_part=True),
    Attack(labels_900_from_many, DEADLINE, comes_first=True, takes_part=True),
    Attack(repeated_declined, takes_part=True), Attack(garbage_bytes),
    Attack(garbage_frames, takes_part=True, over_tls=True),
    Attack(giant_frames, takes_part=True),
    Attack(ready_and_silent, takes_part=True), Attack(slow_upload, takes_part=True),
    Attack(upload_times_a_million, takes_part=True), Attack(plain_upload_times_a_million, PLAIN, takes_part=True),
    Attack(examples_2_to_the_62, PLAIN, takes_part=True))
