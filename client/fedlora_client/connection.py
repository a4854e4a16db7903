"""The client's connection to its server: one gRPC stream, kept up by a thread of its own while the main thread trains.

    connection = Connection("127.0.0.1:9092", "north", private=True, report=print)
    proposal = connection.join()                 # read the data, then
    connection.ready(labels)
    while True:
        plan, tensors = connection.next_request()
        refusal = connection.send(train(plan, tensors, stop=connection.is_unwanted))

A stream that breaks is opened again with the same process token. A request that this process has in hand is then
neither sent nor trained again: its answer, the identical bytes, follows on the new stream.

A Welcome holds a secret that keeps the name this client's for the rest of the run. It is shown when a server asks for
it, by a Welcome without one, and only the secret of the run that this Welcome is of: no other server sees it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from secrets import token_bytes
from typing import Protocol

import grpc
import numpy as np

import fedlora
from fedlora import wire
from fedlora.plan import GOODBYES, PROTOCOL, Proposal, Refusal, Refused, RoundPlan, Tensors, Upload
from fedlora.wire import Incoming, Key, Repeats, WireError, pb

LEAVE_TIMEOUT_S = 2.0
_PATIENCE_S = (0.1, 0.2, 0.5, 1.0, 2.0)


class ServerUnreachable(Exception):
    """No server was found within the connect timeout."""


class Goodbye(Exception):
    """The server ended the run; the message is its reason."""

    @property
    def as_planned(self) -> bool:
        """Whether the run is finished, or was stopped by its coordinator."""
        return str(self) in (GOODBYES["finished"], GOODBYES["stopped"])

    @property
    def run_may_go_on(self) -> bool:
        """Whether the run may be taken up again, where what this client is training would be asked for."""
        return str(self) in (GOODBYES["stopped"], GOODBYES["wait-timeout"], GOODBYES["failed"])


class RunChanged(Exception):
    """The server came back with another run: look at `proposal`, then call `ready` again."""

    def __init__(self, proposal: Proposal) -> None:
        self.proposal = proposal
        super().__init__(f"the server was restarted and runs {proposal.plan.run_id} now")


class _Suspended(Exception):
    """The server said that it comes back: as good as a broken stream."""


class Secrets(Protocol):
    """Keeps what proves in a run that a name is this client's, beyond this process."""

    def secret(self, run_id: str, name: str) -> bytes:
        """The last one; b"" if there is none."""

    def save_secret(self, run_id: str, name: str, secret: bytes) -> None: ...


class _Stream:
    """One attempt at a stream: what is to be sent, and how far the conversation is."""

    def __init__(self) -> None:
        self.outgoing: SimpleQueue[Iterable[bytes] | None] = SimpleQueue()
        self.call: grpc.Call | None = None
        self.welcomed = False
        self.has_proved = False
        self.is_ready = False
        self.last_frame_at = time.monotonic()
        self.plan: RoundPlan | None = None  # of the request that is coming in
        self.incoming: Incoming | None = None
        self.sent, self.received = Repeats(), Repeats()
        self.tensors: dict[str, np.ndarray] = {}

    def send(self, frame: pb.ClientFrame) -> None:
        self.outgoing.put([frame.SerializeToString()])


class Connection:
    """Made without connecting; `join` connects.

    Args:
        server: host:port.
        name: this client's, unique at the server.
        private: whether this client trains under differential privacy; told to the server.
        connect_timeout_s: how long a server is looked for, at first and again whenever it is lost.
        report: given a line for the user now and then, from another thread.
        insecure: allow plaintext beyond this machine.
        secrets: None keeps the name's in memory: another process cannot have it in the same run.

    Raises:
        ValueError: the server's address or the name is not one, or is not loopback and `insecure` is not set.

    Attributes:
        max_tensor_bytes: a request with more is refused from its header, before memory is taken for it.
        cancelled: set while the request in hand is no longer wanted. A run that was only stopped, or whose server is
            gone, may be taken up again: what is in hand is then worth finishing, and what was spent on it not lost.
        bytes_up, bytes_down: moved so far.
    """

    def __init__(self, server: str, name: str, *, private: bool, connect_timeout_s: float = 60.0,
                 report: Callable[[str], None] = lambda line: None, insecure: bool = False,
                 secrets: Secrets | None = None) -> None:
        if not wire.is_loopback(server) and not insecure:
            raise ValueError(f"{server} is another machine and the connection would not be encrypted; go through a "
                             "tunnel to 127.0.0.1, or accept that with --insecure")
        wire.check_name(name)
        self.server, self.name = server, name
        self.cancelled = threading.Event()
        self.bytes_up = self.bytes_down = 0
        self._private, self._connect_timeout_s, self._report = private, connect_timeout_s, report
        self.max_tensor_bytes = 8 << 30
        self._process = token_bytes(16)
        self._secrets = secrets
        self._own: dict[str, bytes] = {}  # of the run joined last: its secret
        self._changed = threading.Condition()
        self._stream = _Stream()
        self._thread: threading.Thread | None = None
        self._leaving = threading.Event()
        self._end: Exception | None = None
        self._proposal: Proposal | None = None
        self._run_changed = False
        self._labels: tuple[str, ...] | None = None  # None: not ready
        self._request: tuple[RoundPlan, Tensors] | None = None
        self._working: Key | None = None  # received, and its answer not acknowledged
        self._until = math.inf  # of the request in hand
        self._answer: tuple[Key, Upload | Refusal] | None = None
        self._acks: dict[Key, Refusal | None] = {}

    def join(self) -> Proposal:
        """Connect, retrying, and join.

        Raises:
            ServerUnreachable: nobody answered within the connect timeout.
            Refused: the server turned this client away; the code and detail say why.
            Goodbye: the server is closing.
            WireError: what answered does not speak this protocol.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep_up, name="fedlora-connection", daemon=True)
            self._thread.start()
        with self._changed:
            self._wait(lambda: self._proposal is not None)
            self._run_changed = False
            assert self._proposal is not None
            return self._proposal

    def ready(self, labels: tuple[str, ...] = ()) -> None:
        """Say that requests may come. `labels` (if the proposal asks for them) are disclosed."""
        with self._changed:
            self._wait(lambda: True)
            self._labels = labels
            if self._stream.welcomed and not self._stream.is_ready:
                self._say_ready(self._stream)

    def decline(self, refusal: Refusal) -> None:
        """Tell the server why this client will not take part, and leave."""
        self._stream.send(pb.ClientFrame(declined=pb.Declined(refusal=wire.refusal_to_wire(refusal))))
        self.leave()

    def next_request(self) -> tuple[RoundPlan, Tensors]:
        """Block until the server asks for a round. Clears `cancelled`.

        Returns:
            The plan and the tensors that came with it: finite float32 arrays that arrived whole, whose names and
            shapes are yet to be held against the layout.

        Raises:
            Goodbye, RunChanged, ServerUnreachable, Refused, WireError.
        """
        with self._changed:
            self._wait(lambda: self._request is not None)
            assert self._request is not None
            request, self._request = self._request, None
            self.cancelled.clear()
            return request

    def send(self, answer: Upload | Refusal) -> Refusal | None:
        """Answer the request in hand and wait until the server has acknowledged it, over as many streams as it takes.

        Returns:
            None if the answer was accepted, else why not ("too-late", "invalid-tensors", …).

        Raises:
            Goodbye, RunChanged, ServerUnreachable, Refused, WireError.
        """
        with self._changed:
            key = self._working
            if key is None:
                self._wait(lambda: False, timeout_s=0)
                return Refusal("too-late")
            if isinstance(answer, Upload) and (answer.run_id, answer.round, answer.attempt) != key:
                raise ValueError(f"the upload is for {answer.run_id, answer.round, answer.attempt}; {key} is in hand")
            self._give(key, Refusal("unavailable") if self.cancelled.is_set() else answer)
            self._wait(lambda: key in self._acks)
            return self._acks.pop(key)

    def is_unwanted(self) -> bool:
        """Whether the request in hand was cancelled, or its time is up.

        Once the stream broke, no clock decides: a server that comes back cancels what it does not want, or has taken up
        the run and given the request more time.
        """
        return self.cancelled.is_set() or time.monotonic() >= self._until

    def leave(self) -> None:
        """Say so to the server and close. May be called at any time, also twice."""
        self._leaving.set()
        self._stream.send(pb.ClientFrame(leave=pb.Leave()))
        self._stream.outgoing.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(LEAVE_TIMEOUT_S)
        if self._stream.call is not None:
            self._stream.call.cancel()

    def _wait(self, ready: Callable[[], bool], timeout_s: float | None = None) -> None:
        """Wait, under the lock, until `ready`; raise what ends this connection first."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            if self._end is not None:
                raise self._end
            if self._run_changed:
                self._run_changed = False
                assert self._proposal is not None
                raise RunChanged(self._proposal)
            if ready() or (deadline is not None and time.monotonic() >= deadline):
                return
            self._changed.wait(1.0 if deadline is None else deadline - time.monotonic())
            self._check_deadline()

    def _check_deadline(self) -> None:
        stream, silent_s = self._stream, time.monotonic() - self._stream.last_frame_at
        if stream.call is not None and stream.incoming is not None and silent_s > wire.STALL_TIMEOUT_S:
            stream.call.cancel()

    # The connection's thread.

    def _keep_up(self) -> None:
        try:
            lost_at, attempt = time.monotonic(), 0
            while not self._leaving.is_set():
                began = time.monotonic()
                error = self._converse()
                if self._stream.welcomed:
                    lost_at = time.monotonic()
                    attempt = 0 if lost_at - began > 2 * _PATIENCE_S[-1] else attempt  # no storm at a server that fails
                    if not self._leaving.is_set():
                        self._report(f"The connection to {self.server} was lost ({error}); looking for it again, for "
                                     f"{self._connect_timeout_s:g} s.")
                elif attempt == 0:
                    self._report(f"No server at {self.server} yet ({error}); trying for {self._connect_timeout_s:g} s.")
                if time.monotonic() - lost_at > self._connect_timeout_s:
                    raise ServerUnreachable(f"no server at {self.server} for {self._connect_timeout_s:g} s ({error}). "
                                            "Start fedlora-server there, or name its address with --server")
                self._leaving.wait(_PATIENCE_S[min(attempt, len(_PATIENCE_S) - 1)])
                attempt += 1
            raise Goodbye("this client left")
        except Exception as error:
            with self._changed:
                self._end = error
                if not (isinstance(error, ServerUnreachable) or (isinstance(error, Goodbye) and error.run_may_go_on)):
                    self.cancelled.set()
                elif self._working is not None and self._request is None and self._answer is None:
                    self._report("The server is gone. What is being trained is finished first and kept, in case that "
                                 "its run is taken up again; Ctrl-C leaves at once.")
                self._changed.notify_all()

    def _converse(self) -> str:
        """Open a stream and serve it until it breaks; returns how it broke. Raises what must not be retried."""
        stream = _Stream()
        with self._changed:
            self._stream = stream
        stream.send(self._join_frame())
        with grpc.insecure_channel(self.server, options=wire.CHANNEL_OPTIONS) as channel:  # TLS: grpc.secure_channel
            call = channel.stream_stream(wire.SERVICE)(self._requests(stream))
            stream.call = call
            overdue = threading.Timer(wire.JOIN_TIMEOUT_S, lambda: stream.welcomed or call.cancel())
            overdue.daemon = True
            overdue.start()
            try:
                for data in call:
                    self.bytes_down += len(data) + wire.FRAME_PREFIX_BYTES
                    stream.last_frame_at = time.monotonic()
                    frame, chunk = wire.read_frame(pb.ServerFrame, data)
                    if frame is not None:
                        self._on_frame(stream, frame)
                    if chunk is not None:
                        self._on_chunk(stream, *chunk)
                return "the server closed the stream"
            except _Suspended:
                return GOODBYES["suspended"]
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.INVALID_ARGUMENT:
                    raise WireError(f"the server ended the stream: {wire.clean(error.details() or '')}") from None
                if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                    raise WireError(f"what listens at {self.server} is not a FedLoRA server") from None
                if error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED):
                    return wire.clean(error.details() or "")  # the server's own words
                return error.code().name.lower()
            finally:
                overdue.cancel()
                stream.outgoing.put(None)
                with self._changed:
                    stream.is_ready, stream.call, self._until = False, None, math.inf
                call.cancel()

    def _join_frame(self, secret: bytes = b"") -> pb.ClientFrame:
        return pb.ClientFrame(join=pb.Join(protocol=PROTOCOL, schema=wire.SCHEMA, name=self.name,
                                           fedlora_version=fedlora.__version__, process=self._process,
                                           private=self._private, secret=secret))

    def _requests(self, stream: _Stream) -> Iterator[bytes]:
        while (frames := stream.outgoing.get()) is not None:
            for frame in frames:
                self.bytes_up += len(frame) + wire.FRAME_PREFIX_BYTES
                yield frame

    def _on_frame(self, stream: _Stream, frame: pb.ServerFrame) -> None:
        kind = frame.WhichOneof("kind")
        if kind == "refused":
            refusal = wire.refusal_from_wire(frame.refused)
            raise Refused(refusal.code, refusal.detail)
        if kind == "goodbye":
            if frame.goodbye.reason == GOODBYES["suspended"]:
                raise _Suspended
            raise Goodbye(wire.clean(frame.goodbye.reason))
        if (kind == "welcome") == stream.welcomed:
            raise WireError("the server's stream begins with one Welcome")
        if (kind == "end") != (stream.incoming is not None) and kind not in ("ack", "cancel"):
            raise WireError("a Task is followed by its chunks")
        if kind == "welcome":
            proposal = wire.proposal_from_wire(frame.welcome)
            if not frame.welcome.secret and not stream.has_proved:
                stream.has_proved = True
                stream.send(self._join_frame(self._secret(proposal.plan.run_id)))
                return
            self._keep(proposal.plan.run_id, frame.welcome.secret)
            self._on_welcome(stream, proposal)
        elif kind == "request":
            self._on_request(stream, frame.request)
        elif kind == "end":
            self._on_end(stream, checksum=0)  # of no bytes
        elif kind == "ack":
            self._on_ack(frame.ack)
        elif kind == "cancel":
            self._on_cancel(self._key(frame.cancel))

    def _on_welcome(self, stream: _Stream, proposal: Proposal) -> None:
        with self._changed:
            stream.welcomed = True
            before, self._proposal = self._proposal, proposal
            # a server that takes its run up again has fixed the label set that clients were to name
            if before is not None and before.plan.with_open_labels() != proposal.plan.with_open_labels():
                self._run_changed, self._labels = True, None
                self._request = self._working = self._answer = None
                self.cancelled.set()
            elif self._labels is not None:
                self._say_ready(stream)
            self._changed.notify_all()

    def _secret(self, run_id: str) -> bytes:
        """The name's in this run; b"" if there is none."""
        own = self._own.get(run_id)
        return own or (self._secrets.secret(run_id, self.name) if self._secrets is not None else b"")

    def _keep(self, run_id: str, secret: bytes) -> None:
        """The name's from now on, before this client is ready and the name its own."""
        if len(secret) not in (0, wire.SECRET_BYTES):
            raise WireError(f"the name's secret does not have {wire.SECRET_BYTES} bytes")
        if secret and secret != self._own.get(run_id):
            self._own = {run_id: secret}
            try:
                if self._secrets is not None:
                    self._secrets.save_secret(run_id, self.name, secret)
            except OSError as error:
                self._report(f"What proves that the name {self.name} is this client's cannot be kept in --state "
                             f"({error.strerror or error}): should this client be started again in the same run, its "
                             "coordinator has to free the name first (fedlora-server forget).")

    def _say_ready(self, stream: _Stream) -> None:
        working = None if self._working is None else wire.key_to_wire(self._working)
        assert self._proposal is not None
        labels = self._labels if self._proposal.announce_labels else ()
        stream.is_ready = True  # before it is said: the first request may come at once
        stream.send(pb.ClientFrame(ready=pb.Ready(labels=labels or (), working=working)))
        if self._answer is not None:
            stream.outgoing.put(self._answer_frames(stream, *self._answer))

    def _give(self, key: Key, answer: Upload | Refusal) -> None:
        """Answer over this stream, or the next; under the lock."""
        self._answer = key, answer
        if self._stream.is_ready:
            self._stream.outgoing.put(self._answer_frames(self._stream, key, answer))

    def _answer_frames(self, stream: _Stream, key: Key, answer: Upload | Refusal) -> Iterator[bytes]:
        if isinstance(answer, Refusal):
            declined = pb.Declined(key=wire.key_to_wire(key), refusal=wire.refusal_to_wire(answer))
            yield pb.ClientFrame(declined=declined).SerializeToString()
            return
        assert self._proposal is not None
        head = pb.ClientFrame(upload=stream.sent.shorten(wire.upload_to_wire(answer))).SerializeToString()
        frames = wire.transfer_frames(head, wire.packed(answer.tensors, self._proposal.plan.wire_dtype))
        yield next(frames)
        for frame in frames:
            given = self._answer
            if given is None or given[0] != key:  # refused while under way
                yield pb.ClientFrame(end=pb.End()).SerializeToString()
                return
            yield frame

    def _on_request(self, stream: _Stream, request: pb.TrainRequest) -> None:
        request = stream.received.restore(request)
        plan, shapes = wire.plan_from_wire(request), wire.shapes_from(request.tensors)
        assert self._proposal is not None
        if not stream.is_ready or plan.run.run_id != self._proposal.plan.run_id:
            raise WireError("the server sent a request before Ready, or of another run")
        if self._working is not None and plan.key != self._working:
            raise WireError("the server sent a request while another is in hand")
        if plan.run.wire_dtype != self._proposal.plan.wire_dtype:
            raise WireError("the plan's wire dtype is not that of the server's welcome")
        stream.plan = plan
        size = wire.size_of(shapes, plan.run.wire_dtype)
        if size > self.max_tensor_bytes:
            refusal = Refusal("invalid-tensors", f"{size} bytes of tensors; this client takes {self.max_tensor_bytes}")
            stream.incoming, stream.tensors = Incoming(shapes, lambda data: None, plan.run.wire_dtype, refusal), {}
        else:
            stream.incoming, stream.tensors = wire.receive_in_memory(shapes, plan.run.wire_dtype)

    def _on_chunk(self, stream: _Stream, data: memoryview, checksum: int | None) -> None:
        if stream.incoming is None:
            raise WireError("a chunk belongs to no Task")
        stream.incoming.add(data)
        if checksum is not None:
            self._on_end(stream, checksum)

    def _on_end(self, stream: _Stream, checksum: int) -> None:
        assert stream.incoming is not None and stream.plan is not None
        refusal, plan = stream.incoming.finish(checksum), stream.plan
        tensors, stream.incoming, stream.tensors = wire.unpacked(stream.tensors, plan.run.wire_dtype), None, {}
        with self._changed:
            if self._working == plan.key:
                return  # in hand already; its answer follows
            self._working, self._answer, self._until = plan.key, None, plan.until
            if refusal is not None:
                self._give(plan.key, refusal)
            else:
                self._request = plan, tensors
            self._changed.notify_all()

    def _on_cancel(self, key: Key) -> None:
        with self._changed:
            if key != self._working:
                return
            if self._request is not None:  # nobody has begun with it
                self._request = None
                self._give(key, Refusal("unavailable"))
            else:
                self.cancelled.set()

    def _key(self, key: pb.Key) -> Key:
        assert self._proposal is not None
        return wire.key_from_wire(key, self._proposal.plan.run_id)

    def _on_ack(self, ack: pb.Ack) -> None:
        key = self._key(ack.key)
        with self._changed:
            if self._answer is not None and self._answer[0] == key:
                self._working = self._answer = None
                self._acks = {key: wire.refusal_from_wire(ack.refusal) if ack.HasField("refusal") else None}
                self._changed.notify_all()
