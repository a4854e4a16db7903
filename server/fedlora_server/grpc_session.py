"""One client's stream at the server: reads the client's frames, sends the server's, and survives whatever comes in.

gRPC gives each stream a thread that sends; a second thread reads. A frame that the protocol does not allow ends the
stream with INVALID_ARGUMENT. An upload that does not fit its order is refused by an Ack, as early as its header if that
shows it, and the stream goes on. The memory and the work that one client can cost the server are bounded; a client that
goes beyond a bound has its stream ended with INVALID_ARGUMENT too.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import grpc
from typing_extensions import override

from fedlora import wire
from fedlora.adapters import AdapterLayout
from fedlora.identity.certificates import utc_now
from fedlora.plan import Refusal, Refused
from fedlora.secure_sum import statements
from fedlora.secure_sum.packages import SUM
from fedlora.secure_sum.roster import Entry, run_digest
from fedlora.wire import Incoming, Key, Repeats, Shapes, WireError, pb
from fedlora.wire.sums import membership_from_wire

from .anchors import Anchors
from .client_registry import ClientRegistry, Unasked
from .connections import peer_of
from .joining import Unproven
from .names import Names
from .patience import HeldUp, Patience
from .seats import ClientStream, PendingRequest, Standing
from .sum_answers import check_answer
from .tls import ServerTls, client_certificate
from .upload_store import IncomingUpload, Stored, new_upload, not_stored

log = logging.getLogger(__name__)

DRAINED_BYTES = 512 << 20
"""Bytes of a refused upload that are read and dropped: so much can be in transit until the sender learns of the
refusal."""
READY_TIMEOUT_S = 600.0
"""Seconds from Join to Ready. In this time a client hashes its model, and may ask its owner at a terminal. A client
that takes longer joins again by itself, and is ready as soon as its owner has answered."""
MOST_UNWANTED = 64
"""Most answers on a stream in excess of the requests sent on it. Each is acknowledged, and acknowledgements pile up in
memory if the client does not read. An honest client sends at most one: its answer to a request of an earlier stream."""
END_TIMEOUT_S = 1.0
"""Seconds that a client has to receive the status with which its stream ends, before it is cut off."""


class _Upload:
    """An upload that is arriving.

    Attributes:
        key: the order that it answers.
        metrics: the numbers that came with it.
        acknowledged: whether its Ack has been sent, which happens early if it is refused.
        file: where its bytes go; None if they are dropped.
        incoming: checks the bytes as they arrive, and holds the reason if the upload is refused.
    """

    def __init__(self, key: Key, shapes: Shapes, wire_dtype: str, metrics: dict[str, int | float],
                 folder: Path | None, refusal: Refusal | None, patience: Patience) -> None:
        self.key, self.metrics, self.acknowledged = key, metrics, False
        self.file = None
        if folder is not None and refusal is None:
            try:
                self.file = IncomingUpload(new_upload(folder), shapes, wire_dtype, patience)
            except OSError as error:
                refusal = not_stored(error)
        self.incoming = Incoming(shapes, self._store, wire_dtype, refusal)

    def _store(self, data: memoryview) -> None:
        if self.file is not None:
            try:
                self.file.write(data)
            except OSError as error:
                self.incoming.refusal = not_stored(error)

    def stored(self) -> Stored | Refusal | None:
        """Return the whole, checked upload, or why it cannot be stored; None if it had been accepted before."""
        try:
            return None if self.file is None else self.file.stored(self.metrics)
        except OSError as error:
            return not_stored(error)

    def discard(self) -> None:
        """Remove the part of the upload that was stored."""
        if self.file is not None:
            self.file.discard()


class NoPlace(Exception):
    """Raised if the server has no place for a further client. The message is sent to the client."""


class GrpcSession(ClientStream):
    """One client's stream at the server. It is the `ClientStream` through which the registry reaches the client.

    Args:
        registry: the run's clients.
        context: gRPC's side of the stream.
        layout: returns the layout of the run's tensors; None before it is known.
        uploads: folder for uploads.
        anchors: where the anchors that come with uploads are kept. No strategy ever sees them.
        names: where a client's name is recorded as its own once it is ready.
        admit: called when the client joins, with this session, the client's standing and the stream that this one
            replaces. It raises NoPlace if the server has no place for the client.
        held_up: where uploads wait that cannot be stored for now.
        tls: which clients may take part; None on a server without TLS.

    Attributes:
        peer: the client's end of the connection.
        peer_group: the address that limits apply to (`Peer.group`).
        name: the client's name; empty until it has joined.
        process: token of the client's process.
        secret: proves that the name is this client's, from its Ready on.
        came_from: address of the client's end of the connection.
        fingerprint: SHA-256 of its certificate's public key, in hexadecimal digits; empty without TLS.
        has_place: whether the stream holds one of the server's places. If not, its Join decides whether it gets one.
        is_ready: whether the client has said that it is ready.
        started_at: when the stream began (monotonic seconds).
        last_frame_at: when the last frame arrived (monotonic seconds).
        ended_at: when the server began to end the stream (monotonic seconds); None if it has not.
    """

    def __init__(self, registry: ClientRegistry, context: grpc.ServicerContext,
                 layout: Callable[[], AdapterLayout | None], uploads: Path, anchors: Anchors, names: Names,
                 admit: Callable[[GrpcSession, Standing, ClientStream | None], None], held_up: HeldUp,
                 tls: ServerTls | None = None) -> None:
        self.name, self.process, self.secret = "", b"", b""
        self.has_place = True
        self.peer, self.is_ready = peer_of(context.peer()), False
        self.peer_group = self.peer.group
        self.ended_at: float | None = None
        self.started_at = self.last_frame_at = time.monotonic()
        self._names, self._admit, self._proof_wanted = names, admit, False
        self._asked = self._acknowledged = 0
        self._registry, self._context, self._layout, self._uploads = registry, context, layout, uploads
        self._anchors, self._held_up = anchors, held_up
        self._tls, self._certificate = tls, client_certificate(context) if tls is not None else None
        self.came_from = self.peer.host
        self.fingerprint = self._certificate.fingerprint if self._certificate is not None else ""
        self._outgoing: SimpleQueue[Iterable[bytes] | None] = SimpleQueue()
        self._failure: tuple[grpc.StatusCode, str] | None = None
        self._sent, self._received = Repeats(), Repeats()
        self._upload: _Upload | None = None
        self._drained_bytes = 0
        self._left = False

    def send(self, frames: Iterable[bytes]) -> None:
        """Queue frames. An iterator is advanced only when the frame before has been sent."""
        self._outgoing.put(frames)

    @override
    def ask(self, order: PendingRequest) -> None:
        self._asked += 1
        self.send(order.frames(self._sent))

    @override
    def cancel(self, key: Key) -> None:
        self.send([pb.ServerFrame(cancel=wire.key_to_wire(key)).SerializeToString()])

    @override
    def consult(self, request: pb.SumRequest) -> None:
        self._asked += 1
        self.send([pb.ServerFrame(sum=request).SerializeToString()])

    @override
    def close(self, why: Refusal | None = None) -> None:
        """End the stream once the queued frames are sent. With `why`, the client is told not to open it again."""
        if why is not None:
            self.send([pb.ServerFrame(refused=wire.refusal_to_wire(why)).SerializeToString()])
        self._outgoing.put(None)

    def goodbye(self, reason: str) -> None:
        """Tell the client why the server ends, and end the stream."""
        self._left = True
        self.send([pb.ServerFrame(goodbye=pb.Goodbye(reason=reason)).SerializeToString()])
        self.close()

    def end(self, status: grpc.StatusCode, why: str) -> None:
        """End the stream with a gRPC status that tells the client why."""
        self.ended_at = time.monotonic()
        self._failure = self._failure or (status, why)
        self.close()

    def check_deadlines(self, now: float, ready_within_s: float) -> None:
        """End the stream if its Join, its Ready, the next chunk of its upload, or its end is overdue.

        On a server with TLS, also end it if its client may no longer take part.

        Args:
            now: monotonic time in seconds.
            ready_within_s: seconds from Join to Ready.
        """
        silent_s = now - self.last_frame_at
        if self.ended_at is not None:
            if now - self.ended_at > END_TIMEOUT_S:
                self._context.cancel()
        elif (not self.name and silent_s > wire.JOIN_TIMEOUT_S) or (self._upload and silent_s > wire.STALL_TIMEOUT_S):
            self._context.cancel()
        elif self.name and (not_allowed := self._not_allowed(self.name)):
            log.warning("Client %r was disconnected: %s", self.name, not_allowed[1],
                        extra={"peer": self.peer_group, "kind": "not allowed"})
            self._registry.disconnected(self, "certificate", not_allowed[1])
            self.end(*not_allowed)
        elif not self.is_ready and now - self.started_at > ready_within_s:
            self.end(grpc.StatusCode.DEADLINE_EXCEEDED, f"not ready within {ready_within_s:g} s of joining; join again")

    def responses(self) -> Iterator[bytes]:
        """Yield the frames for gRPC to send, until the stream is to end."""
        while (frames := self._outgoing.get()) is not None:
            for frame in frames:
                self._registry.count(self, down=len(frame) + wire.FRAME_PREFIX_BYTES)
                yield frame
        if self._failure is not None:
            self._context.abort(*self._failure)

    def read(self, requests: Iterator[bytes]) -> None:
        """Take the client's frames until the stream ends. Runs in its own thread."""
        try:
            for data in requests:
                self.last_frame_at = time.monotonic()
                self._registry.count(self, up=len(data) + wire.FRAME_PREFIX_BYTES)
                frame, chunk = wire.read_frame(pb.ClientFrame, data)
                if frame is not None:
                    self._on_frame(frame)
                if chunk is not None:
                    self._on_chunk(*chunk)
                if self._left:
                    break
        except WireError as error:
            self._failure = grpc.StatusCode.INVALID_ARGUMENT, str(error)
        except grpc.RpcError:
            pass  # the stream broke
        except Exception:
            log.exception("The stream of client %r ended by an error of this server", self.name,
                          extra={"peer": self.peer_group, "kind": "server error"})
            self._failure = grpc.StatusCode.INTERNAL, "the server failed; its log says why"
        finally:
            if self._upload is not None:
                self._upload.discard()
            if self._failure is not None:
                log.warning("The stream of client %r was ended: %s", self.name, self._failure[1],
                            extra={"peer": self.peer_group, "kind": "ended"})
            try:
                self._registry.gone(self, "left" if self._left else "lost")
            finally:
                self.close()

    def _on_frame(self, frame: pb.ClientFrame) -> None:
        if self._acknowledged - self._asked > MOST_UNWANTED:
            raise WireError("too many answers to requests that were never sent")
        kind = frame.WhichOneof("kind")
        if (kind == "join") == bool(self.name):
            raise WireError("a stream begins with one Join")
        if (kind == "end") != (self._upload is not None):
            raise WireError("an Upload is followed by its chunks, and only then by anything else")
        if kind == "join":
            self._on_join(frame.join)
        elif kind == "ready":
            self._on_ready(frame.ready)
        elif kind == "upload":
            self._on_upload(frame.upload)
        elif kind == "end":
            self._on_end(checksum=0)  # of no bytes
        elif kind == "declined":
            self._on_declined(frame.declined)
        elif kind == "sum":
            self._on_sum(frame.sum)
        elif kind == "leave":
            self._left = True

    def _not_allowed(self, name: str) -> tuple[grpc.StatusCode, str] | None:
        """Return with which status and why this stream's client may not take part under a name; None if it may.

        A client whose certificate has ended is told to come back (UNAUTHENTICATED): it may have been renewed since.
        """
        if self._tls is None:
            return None
        if self._certificate is None:
            return grpc.StatusCode.PERMISSION_DENIED, "the connection shows no certificate that this server takes"
        if name != self._certificate.name:
            return (grpc.StatusCode.PERMISSION_DENIED,
                    f"the certificate is that of {self._certificate.name!r}; join under this name (--name)")
        if why := self._certificate.why_invalid(utc_now()):
            return grpc.StatusCode.UNAUTHENTICATED, why
        why = self._tls.why_refused(self._certificate)
        return None if why is None else (grpc.StatusCode.PERMISSION_DENIED, why)

    def _on_join(self, join: pb.Join) -> None:
        if not_allowed := self._not_allowed(join.name):
            self._turn_away(join, "certificate", not_allowed[1])
            self.end(*not_allowed)
            return
        try:
            proposal = self._registry.join(self, join, admit=partial(self._admit, self),
                                           proved=self._certificate is not None)
        except NoPlace as none:
            self._turn_away(join, "places", str(none))
            self.end(grpc.StatusCode.RESOURCE_EXHAUSTED, str(none))
        except Refused as refused:
            if isinstance(refused, Unproven) and not self._proof_wanted:
                self._proof_wanted = True  # told which run this is, the client may join again with that run's secret
                welcome = wire.proposal_to_wire(replace(self._registry.proposal, anchor=None))
                self.send([pb.ServerFrame(welcome=welcome).SerializeToString()])
                return
            self._turn_away(join, refused.refusal.code, str(refused.refusal))
            self.close(refused.refusal)
        else:
            welcome = wire.proposal_to_wire(replace(proposal, anchor=self._anchors.newest(self.name)))
            welcome.secret = self.secret
            self.send([pb.ServerFrame(welcome=welcome).SerializeToString()])

    def _turn_away(self, join: pb.Join, code: str, why: str) -> None:
        """Tell that the client may not join, and read no further frame. The caller ends the stream."""
        name = wire.clean(join.name)
        log.warning("A client that calls itself %r was turned away: %s", name, why,
                    extra={"peer": self.peer_group, "kind": "turned away"})
        self._registry.turned_away(self, name, code, why)
        self._left = True

    def _on_ready(self, ready: pb.Ready) -> None:
        working = self._key(ready.working) if ready.HasField("working") else None
        try:
            if self._registry.ready(self, wire.labels_from_wire(ready.labels, announced=True), working,
                                    self._membership(ready)):
                self.is_ready = True
                self._names.keep(self.name, self.secret)
        except Refused as refused:
            self.end(grpc.StatusCode.RESOURCE_EXHAUSTED, refused.refusal.detail)

    def _membership(self, ready: pb.Ready) -> tuple[Entry, float] | None:
        """Return what the client gives for its place in a roster; None without secure aggregation."""
        plan = self._registry.proposal.plan
        if ready.HasField("membership") != plan.secure_aggregation:
            raise WireError("a Ready has a membership in a run with secure aggregation, and in no other")
        if not plan.secure_aggregation:
            return None
        entry, noise = membership_from_wire(ready.membership, self.name)
        try:
            if self._tls is None or entry.check(run_digest(plan), self._tls.authority_pem,
                                                utc_now()).fingerprint != self.fingerprint:
                raise WireError("a membership is not that of the connection's certificate")
        except statements.Refused as error:
            raise WireError(f"a membership is not valid: {error}") from None
        return entry, noise

    def _on_sum(self, answer: pb.SumAnswer) -> None:
        if not self._registry.proposal.plan.secure_aggregation:
            raise WireError("a SumAnswer belongs to no run without secure aggregation")
        self._acknowledged += 1
        check_answer(answer, self.name)
        self._registry.told(self, answer)

    def _on_upload(self, upload: pb.Upload) -> None:
        if anchor := wire.anchor_from_wire(upload):  # kept even if the upload is refused: the client has released it
            self._anchors.keep(self.name, anchor)
        upload = self._received.restore(upload)
        key, shapes = self._key(upload.key), wire.shapes_from(upload.tensors)
        metrics: dict[str, int | float] = {}
        refusal, folder, wire_dtype = None, None, self._registry.answers_in(self)
        try:
            order = self._registry.expected(self, key)
            if order is not None:
                folder, wire_dtype = self._uploads, order.answers_in
            wire.check_shapes(shapes, self._expected(order, shapes))
            metrics = wire.metrics_from_wire(upload, private=self._registry.proposal.plan.private)
        except Refused as refused:
            refusal = refused.refusal
            if isinstance(refused, Unasked):
                log.warning("Client %r sent an upload for round %d, attempt %d, which this server never asked of it; "
                            "it was dropped", self.name, key[1], key[2],
                            extra={"peer": self.peer_group, "kind": "unasked"})
        if refusal is not None and self._registry.proposal.plan.secure_aggregation:
            # dropped, whichever ring its values are of: as many bytes as in the larger one
            shapes, wire_dtype = {name: (2 * math.prod(shape),) for name, shape in shapes.items()}, "u32"
        self._upload, self._drained_bytes = _Upload(key, shapes, wire_dtype, metrics, folder, refusal,
                                                    self._held_up.patience(partial(self._go_on, key))), 0
        if refusal is not None:
            self._refuse(refusal)

    def _expected(self, order: PendingRequest | None, shapes: Shapes) -> Shapes:
        """Return the shapes that an upload must have.

        Args:
            order: the order that it answers; None for an upload that is sent again, and dropped.
            shapes: the upload's shapes.
        """
        layout = self._layout()
        if layout is None:
            return {}
        if (plan := self._registry.proposal.plan).secure_aggregation:
            most = plan.counted + (layout if order is None else layout.in_round(order.plan)).num_trained
            sizes = shapes.get(SUM, ()) if order is None else ()
            return {SUM: (min(most, sizes[0]) if len(sizes) == 1 else most,)}
        layout = layout.resent(shapes) if order is None else layout.in_round(order.plan)
        return {spec.name: spec.shape for spec in layout.trained}

    def _on_chunk(self, data: memoryview, checksum: int | None) -> None:
        if self._upload is None:
            raise WireError("a chunk belongs to no Upload")
        incoming = self._upload.incoming
        incoming.add(data)
        if incoming.refusal is not None and not self._upload.acknowledged:
            self._refuse(incoming.refusal)
        if incoming.refusal is not None:
            self._drained_bytes += len(data)
            if self._drained_bytes > DRAINED_BYTES:
                raise WireError("an upload went on after it had been refused")
        if checksum is not None:
            self._on_end(checksum)

    def _on_end(self, checksum: int) -> None:
        upload = self._upload
        assert upload is not None
        answer = upload.incoming.finish(checksum) or upload.stored()
        self._upload = None  # an upload whose check failed above is discarded by `read`
        refusal = answer if isinstance(answer, Refusal) else None
        if refusal is not None:
            upload.discard()  # before the client learns of it and may be asked for the next
        if not upload.acknowledged:
            refusal = self._registry.answered(self, upload.key, answer,
                                            lambda late: self._send_ack(upload.key, late or refusal)) or refusal
        if refusal is not None:
            upload.discard()

    def _go_on(self, key: Key, fault: OSError) -> None:
        """Return if the upload that waits for a full disk is still needed.

        Raises:
            OSError: the order was cancelled; this is the fault itself.
            RpcError: the stream is gone; a client that returns sends the upload again.
        """
        self.last_frame_at = time.monotonic()  # the delay is this machine's, not the client's
        if self._left or not self._context.is_active():
            raise grpc.RpcError
        try:
            self._registry.expected(self, key)
        except Refused:
            raise fault from None

    def _on_declined(self, declined: pb.Declined) -> None:
        refusal = wire.refusal_from_wire(declined.refusal)
        if declined.HasField("key"):
            key = self._key(declined.key)
            self._registry.answered(self, key, refusal, lambda late: self._send_ack(key, late))
        else:  # the client takes no part in the run at all
            self._registry.declined(self, refusal)
            self._left = True

    def _key(self, key: pb.Key) -> Key:
        return wire.key_from_wire(key, self._registry.proposal.plan.run_id)

    def _refuse(self, refusal: Refusal) -> None:
        """Refuse the upload that is arriving, and drop the rest of it."""
        assert self._upload is not None
        key = self._upload.key
        self._upload.discard()
        self._upload.acknowledged = True
        self._registry.answered(self, key, refusal, lambda late: self._send_ack(key, refusal),
                                unasked=refusal.code == "too-late")

    def _send_ack(self, key: Key, refusal: Refusal | None) -> None:
        self._acknowledged += 1
        ack = pb.Ack(key=wire.key_to_wire(key), refusal=None if refusal is None else wire.refusal_to_wire(refusal))
        self.send([pb.ServerFrame(ack=ack).SerializeToString()])
