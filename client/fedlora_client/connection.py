"""The client's connection to its server: one gRPC stream, kept up by a thread while the main thread trains.

    connection = Connection("127.0.0.1:9092", "north", private=True, report=print)
    proposal = connection.join()                 # read the data, then
    connection.ready(labels)
    while True:
        plan, tensors = connection.next_request()
        refusal = connection.send(train(plan, tensors, stop=connection.is_unwanted))

A stream that breaks is opened again with the same process token, by which the server recognises this process. If a
request is in hand at that moment, the server does not send it again and it is not trained again: its answer, with
identical bytes, follows on the new stream.

The server's Welcome holds a secret that reserves this client's name for the rest of the run. A server that finds the
name taken sends a Welcome without a secret; the client then joins again with the secret that it keeps for the run named
in that Welcome. The secrets of other runs are not shown.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from secrets import token_bytes

import grpc

import fedlora
from fedlora import wire
from fedlora.plan import GOODBYES, PROTOCOL, Proposal, Refusal, Refused, RoundPlan, Tensors, Upload
from fedlora.wire import Key, WireError, pb
from fedlora.wire.sums import cohort_from_wire

from .own_name import OwnName, Secrets
from .stream import Stream
from .sums import SumMember
from .tls import Tls, Unreachable, Untrusted

LEAVE_TIMEOUT_S = 2.0
"""Seconds for which `leave` waits for the thread to say goodbye."""

SEE_ABOVE = "see the messages above"
"""Detail of a refusal whose reason is in this client's own log."""

_PATIENCE_S = (0.1, 0.2, 0.5, 1.0, 2.0)
"""Pauses before the next attempts to connect, in seconds; the last one is repeated."""


class ServerUnreachable(Exception):
    """No server was found within the connect timeout."""


class Goodbye(Exception):
    """The server ended the run, or its part in it; the message is the server's reason."""

    @property
    def as_planned(self) -> bool:
        """Whether the run is finished, or was stopped by its coordinator."""
        return str(self) in (GOODBYES["finished"], GOODBYES["stopped"])

    @property
    def run_may_go_on(self) -> bool:
        """Whether the run may be resumed; the server would then ask for what this client is training now."""
        return str(self) in (GOODBYES["stopped"], GOODBYES["wait-timeout"], GOODBYES["failed"])


class RunChanged(Exception):
    """The server was restarted with another run. Check `proposal`, then call `ready` again."""

    def __init__(self, proposal: Proposal) -> None:
        self.proposal = proposal
        super().__init__(f"the server was restarted and runs {proposal.plan.run_id} now")


class _Suspended(Exception):
    """The server said that it will be back. It is treated as a broken stream."""


class Connection:
    """The client's side of the conversation with one server. Creating it does not connect; `join` does.

    Args:
        server: the server's address, host:port.
        name: this client's name, unique at the server.
        private: whether this client trains under differential privacy; the server is told.
        connect_timeout_s: how long to look for the server, in seconds: at first, and again whenever it is lost.
        report: called with a line for the user now and then, from another thread.
        insecure: allow a server on another machine although the connection is not encrypted.
        tls: this client's identity and the servers it trusts; None for a connection that is not encrypted.
        secrets: where the name's secrets are kept. None keeps them in memory, so that no later process can use the
            name in the same run.

    Raises:
        ValueError: the address or the name is malformed, or the address is not on this machine and `insecure` is not
            set.

    Attributes:
        max_tensor_bytes: most bytes of tensors in a request. A larger one is refused by its header, before memory is
            allocated for it.
        cancelled: set when the request in hand is no longer wanted. It stays clear when the run was only stopped or
            the server is gone: the run may be resumed, so that what is being trained is worth finishing.
        bytes_up: bytes sent so far.
        bytes_down: bytes received so far.
    """

    def __init__(self, server: str, name: str, *, private: bool, connect_timeout_s: float = 60.0,
                 report: Callable[[str], None] = lambda line: None, insecure: bool = False,
                 tls: Tls | None = None, secrets: Secrets | None = None) -> None:
        if not wire.is_loopback(server) and not insecure and tls is None:
            raise ValueError(f"{server} is another machine and the connection would not be encrypted; give --tls DIR "
                             "(fedlora-client enroll makes the folder), go through a tunnel to 127.0.0.1, or accept "
                             "that with --insecure")
        wire.check_name(name)
        self.server, self.name, self._tls = server, name, tls
        self.cancelled = threading.Event()
        self.bytes_up = self.bytes_down = 0
        self._private, self._connect_timeout_s, self._report = private, connect_timeout_s, report
        self.max_tensor_bytes = 8 << 30
        self._process = token_bytes(16)
        self._own_name = OwnName(name, secrets, report)
        self._changed = threading.Condition()
        self._stream = Stream()
        self._thread: threading.Thread | None = None
        self._leaving = threading.Event()
        self._end: Exception | None = None
        self._proposal: Proposal | None = None
        self._run_changed = False
        self._labels: tuple[str, ...] | None = None  # None until `ready` is called
        self._member: SumMember | None = None
        self._request: tuple[RoundPlan, Tensors] | None = None
        self._working: Key | None = None  # the request in hand: received, and its answer not yet acknowledged
        self._until = math.inf  # when the time of the request in hand is up, by time.monotonic()
        self._answer: tuple[Key, Upload | Refusal] | None = None
        self._acks: dict[Key, Refusal | None] = {}

    def join(self) -> Proposal:
        """Connect and join; keep trying until the connect timeout.

        Returns:
            The run that the server proposes.

        Raises:
            ServerUnreachable: no server answered within the connect timeout.
            Refused: the server turned this client away; the code and detail say why.
            Goodbye: the server is closing.
            WireError: the peer does not speak this protocol.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep_up, name="fedlora-connection", daemon=True)
            self._thread.start()
        with self._changed:
            self._wait(lambda: self._proposal is not None)
            self._run_changed = False
            assert self._proposal is not None
            return self._proposal

    def ready(self, labels: tuple[str, ...] = (), member: SumMember | None = None) -> None:
        """Tell the server that it may send requests.

        Args:
            labels: this client's label names. They are disclosed to the server if the proposal asks for them, and else
                not sent.
            member: answers the server's requests for secure sums; needed if the plan has secure aggregation.
        """
        with self._changed:
            self._wait(lambda: True)
            self._labels, self._member = labels, member
            if self._stream.welcomed and not self._stream.is_ready:
                self._say_ready(self._stream)

    def decline(self, refusal: Refusal) -> None:
        """Tell the server why this client will not take part, and leave."""
        self._stream.send(pb.ClientFrame(declined=pb.Declined(refusal=wire.refusal_to_wire(refusal))))
        self.leave()

    def next_request(self) -> tuple[RoundPlan, Tensors]:
        """Block until the server asks for a round. Clears `cancelled`.

        Returns:
            The plan and the tensors that came with it. The tensors arrived whole and are finite float32 arrays; their
            names and shapes are not yet checked against the layout.

        Raises:
            Goodbye: the server ended the run.
            RunChanged: the server was restarted with another run.
            ServerUnreachable: the server was lost for longer than the connect timeout.
            Refused: the server turned this client away.
            WireError: the server broke the protocol.
        """
        with self._changed:
            self._wait(lambda: self._request is not None)
            assert self._request is not None
            request, self._request = self._request, None
            self.cancelled.clear()
            return request

    def send(self, answer: Upload | Refusal) -> Refusal | None:
        """Answer the request in hand, and wait until the server has acknowledged the answer.

        If the stream breaks, the answer is sent again on the next one. If the request was cancelled meanwhile, the
        server gets a refusal ("unavailable") instead.

        Args:
            answer: the upload, or why there is none.

        Returns:
            None if the server accepted the answer, else its reason ("too-late", "invalid-tensors", …).

        Raises:
            Goodbye: the server ended the run.
            RunChanged: the server was restarted with another run.
            ServerUnreachable: the server was lost for longer than the connect timeout.
            Refused: the server turned this client away.
            WireError: the server broke the protocol.
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
        """Return whether the request in hand was cancelled, or its time is up.

        After a broken stream there is no deadline any more. A server that comes back cancels what it does not want, and
        one that has resumed the run has given the request more time.
        """
        return self.cancelled.is_set() or time.monotonic() >= self._until

    def leave(self) -> None:
        """Tell the server that this client leaves, and close. May be called at any time, also twice."""
        self._leaving.set()
        self._stream.send(pb.ClientFrame(leave=pb.Leave()))
        self._stream.outgoing.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(LEAVE_TIMEOUT_S)
        if self._stream.call is not None:
            self._stream.call.cancel()

    def _wait(self, ready: Callable[[], bool], timeout_s: float | None = None) -> None:
        """Wait until `ready()` is true, or raise what ended the connection. The caller holds the lock."""
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
        if stream.call is not None and stream.is_receiving and silent_s > wire.STALL_TIMEOUT_S:
            stream.call.cancel()

    # The connection's thread. `ready` and `send` call `_say_ready` and `_give` in the main thread, too.

    def _keep_up(self) -> None:
        try:
            lost_at, attempt = time.monotonic(), 0
            while not self._leaving.is_set():
                began = time.monotonic()
                error = self._converse()
                if self._stream.welcomed:
                    lost_at = time.monotonic()
                    attempt = 0 if lost_at - began > 2 * _PATIENCE_S[-1] else attempt  # do not storm a failing server
                    if not self._leaving.is_set():
                        self._report(f"The connection to {self.server} was lost ({error}); trying to connect again for "
                                     f"{self._connect_timeout_s:g} s.")
                elif attempt == 0:
                    self._report(f"No server at {self.server} yet ({error}); trying for {self._connect_timeout_s:g} s.")
                if time.monotonic() - lost_at > self._connect_timeout_s:
                    raise ServerUnreachable(f"no server at {self.server} for {self._connect_timeout_s:g} s ({error}). "
                                            "Start fedlora-server there, or give its address with --server")
                self._leaving.wait(_PATIENCE_S[min(attempt, len(_PATIENCE_S) - 1)])
                attempt += 1
            raise Goodbye("this client left")
        except Exception as error:
            with self._changed:
                self._end = error
                if not (isinstance(error, ServerUnreachable) or (isinstance(error, Goodbye) and error.run_may_go_on)):
                    self.cancelled.set()
                elif self._working is not None and self._request is None and self._answer is None:
                    self._report("The server is gone. This client finishes its training and keeps the result, in case "
                                 "the run is resumed; Ctrl-C leaves at once.")
                self._changed.notify_all()

    def _converse(self) -> str:
        """Open a stream and serve it until it breaks. Return how it broke; raise what must not be retried."""
        stream = Stream()
        with self._changed:
            self._stream = stream
        stream.send(self._join_frame())
        try:
            opened = self._channel()
        except Unreachable as error:
            return str(error)
        except ValueError as error:  # not trusted, or this client's certificate has ended or is being replaced
            if self._proposal is None:
                raise
            return str(error)  # it was right before, and may be again
        with opened as channel:
            call = channel.stream_stream(wire.SERVICE)(self._requests(stream))
            stream.call = call
            overdue = threading.Timer(wire.JOIN_TIMEOUT_S, lambda: stream.welcomed or call.cancel())
            overdue.daemon = True
            overdue.start()
            try:
                for received in call:
                    self.bytes_down += len(received) + wire.FRAME_PREFIX_BYTES
                    stream.last_frame_at = time.monotonic()
                    frame, chunk = wire.read_frame(pb.ServerFrame, received)
                    if frame is not None:
                        self._on_frame(stream, frame)
                    if chunk is not None:
                        data, checksum = chunk
                        stream.add(data)
                        if checksum is not None:
                            self._on_end(stream, checksum)
                return "the server closed the stream"
            except _Suspended:
                return GOODBYES["suspended"]
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.INVALID_ARGUMENT:
                    raise WireError(f"the server ended the stream: {wire.clean(error.details() or '')}") from None
                if error.code() == grpc.StatusCode.PERMISSION_DENIED:
                    raise Untrusted(f"{self.server} refuses this client: {wire.clean(error.details() or '')}") from None
                if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                    raise WireError(f"the program that listens at {self.server} is not a FedLoRA server; check "
                                    "--server") from None
                if error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED,
                                    grpc.StatusCode.UNAUTHENTICATED):
                    return wire.clean(error.details() or "")  # the server's own words
                status: str = error.code().name.lower()
                return status
            finally:
                overdue.cancel()
                stream.outgoing.put(None)
                with self._changed:
                    stream.is_ready, stream.call, self._until = False, None, math.inf
                call.cancel()

    def _channel(self) -> grpc.Channel:
        """Return a new channel to the server. Where TLS is used, the server is checked first.

        Raises:
            Untrusted: the server is not one that this client trusts, or does not take its certificate.
            Unreachable: the server did not answer.
            ValueError: this client's identity cannot be used.
        """
        if self._tls is None:
            return grpc.insecure_channel(self.server, options=wire.CHANNEL_OPTIONS)
        credentials, _ = self._tls.credentials(self.server)
        return grpc.secure_channel(self.server, credentials, options=(*wire.CHANNEL_OPTIONS, *self._tls.options))

    def _join_frame(self, secret: bytes = b"") -> pb.ClientFrame:
        return pb.ClientFrame(join=pb.Join(protocol=PROTOCOL, schema=wire.SCHEMA, name=self.name,
                                           fedlora_version=fedlora.__version__, process=self._process,
                                           private=self._private, secret=secret))

    def _requests(self, stream: Stream) -> Iterator[bytes]:
        while (frames := stream.outgoing.get()) is not None:
            for frame in frames:
                self.bytes_up += len(frame) + wire.FRAME_PREFIX_BYTES
                yield frame

    def _on_frame(self, stream: Stream, frame: pb.ServerFrame) -> None:
        kind = frame.WhichOneof("kind")
        if kind == "refused":
            refusal = wire.refusal_from_wire(frame.refused)
            raise Refused(refusal.code, refusal.detail)
        if kind == "goodbye":
            if frame.goodbye.reason == GOODBYES["suspended"]:
                raise _Suspended
            raise Goodbye(wire.clean(frame.goodbye.reason))
        if (kind == "welcome") == stream.welcomed:
            raise WireError("the server broke the protocol: its stream must begin with exactly one Welcome")
        if (kind == "end") != stream.is_receiving and kind not in ("ack", "cancel"):
            raise WireError("the server broke the protocol: the chunks of a TrainRequest must follow it")
        if kind == "welcome":
            proposal = wire.proposal_from_wire(frame.welcome)
            if not frame.welcome.secret and not stream.has_proved:
                stream.has_proved = True
                stream.send(self._join_frame(self._own_name.secret(proposal.plan.run_id)))
                return
            self._own_name.keep(proposal.plan.run_id, frame.welcome.secret)
            self._on_welcome(stream, proposal)
        elif kind == "request":
            self._on_request(stream, frame.request)
        elif kind == "end":
            self._on_end(stream, checksum=0)  # the checksum of no bytes
        elif kind == "sum":
            self._on_sum_request(stream, frame.sum)
        elif kind == "ack":
            self._on_ack(frame.ack)
        elif kind == "cancel":
            self._on_cancel(self._key(frame.cancel))

    def _on_welcome(self, stream: Stream, proposal: Proposal) -> None:
        with self._changed:
            stream.welcomed = True
            before, self._proposal = self._proposal, proposal
            # A server that resumes its run has fixed the label set that clients were asked for: still the same run.
            if before is not None and before.plan.with_open_labels() != proposal.plan.with_open_labels():
                self._run_changed, self._labels, self._member = True, None, None
                self._request = self._working = self._answer = None
                self.cancelled.set()
            elif self._labels is not None:
                self._say_ready(stream)
            self._changed.notify_all()

    def _say_ready(self, stream: Stream) -> None:
        working = None if self._working is None else wire.key_to_wire(self._working)
        assert self._proposal is not None
        labels = self._labels if self._proposal.announce_labels else ()
        membership = None if self._member is None else self._member.membership()
        stream.is_ready = True  # set before Ready is sent: the first request may come at once
        stream.send(pb.ClientFrame(ready=pb.Ready(labels=labels or (), working=working, membership=membership)))
        if self._answer is not None:
            stream.outgoing.put(self._answer_frames(stream, *self._answer))

    def _give(self, key: Key, answer: Upload | Refusal) -> None:
        """Send the answer on this stream if it is ready, else on the next. The caller holds the lock."""
        self._answer = key, answer
        if self._stream.is_ready:
            self._stream.outgoing.put(self._answer_frames(self._stream, key, answer))

    def _answer_frames(self, stream: Stream, key: Key, answer: Upload | Refusal) -> Iterator[bytes]:
        assert self._proposal is not None

        def is_wanted() -> bool:
            given = self._answer
            return given is not None and given[0] == key

        return stream.answer_frames(key, answer, self._proposal, is_wanted)

    def _on_request(self, stream: Stream, request: pb.TrainRequest) -> None:
        assert self._proposal is not None
        plan = stream.begin(request, self._proposal, self.max_tensor_bytes)
        if self._working is not None and plan.key != self._working:
            raise WireError("the server sent a request while another is in hand")
        if self._member is not None and not self._member.take(plan.key, cohort_from_wire(request.cohort)):
            raise Refused("policy", SEE_ABOVE)

    def _on_end(self, stream: Stream, checksum: int) -> None:
        plan, tensors, refusal = stream.finish(checksum)
        with self._changed:
            if self._working == plan.key:
                return  # this request is in hand already; its answer follows
            self._working, self._answer, self._until = plan.key, None, plan.until
            if refusal is not None:
                self._give(plan.key, refusal)
            else:
                self._request = plan, tensors
            self._changed.notify_all()

    def _on_sum_request(self, stream: Stream, request: pb.SumRequest) -> None:
        member = self._member
        if member is None or not stream.is_ready:
            raise WireError("the server sent a SumRequest before Ready, or in a run without secure aggregation")
        answer = member.answer(request)
        stream.send(pb.ClientFrame(sum=answer))
        if answer.declined.refusal.code == "policy":  # the stream stays for `leave`, so that the answer arrives
            with self._changed:
                self._end = Refused("policy", SEE_ABOVE)
                self.cancelled.set()
                self._changed.notify_all()

    def _on_cancel(self, key: Key) -> None:
        with self._changed:
            if key != self._working:
                return
            if self._request is not None:  # the main thread has not taken it yet
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
