"""One attempt at a stream to the server: what is still to be sent, and the order that is arriving."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue

import grpc
import numpy as np

from fedlora import wire
from fedlora.plan import Proposal, Refusal, RoundPlan, Tensors, Upload
from fedlora.wire import Incoming, Key, Repeats, WireError, pb


class Stream:
    """The frames that are still to be sent on one stream, and how far the conversation has come.

    Attributes:
        outgoing: frames to be sent; None ends the stream.
        call: the gRPC call, while there is one.
        welcomed: whether the server's Welcome has come.
        has_proved: whether the secret of this client's name was shown.
        is_ready: whether Ready was sent.
        last_frame_at: when the last frame came, by time.monotonic().
    """

    def __init__(self) -> None:
        self.outgoing: SimpleQueue[Iterable[bytes] | None] = SimpleQueue()
        self.call: grpc.Call | None = None
        self.welcomed = False
        self.has_proved = False
        self.is_ready = False
        self.last_frame_at = time.monotonic()
        self._sent, self._received = Repeats(), Repeats()
        self._plan: RoundPlan | None = None  # the order whose tensors are arriving
        self._incoming: Incoming | None = None
        self._tensors: dict[str, np.ndarray] = {}

    def send(self, frame: pb.ClientFrame) -> None:
        """Send a frame."""
        self.outgoing.put([frame.SerializeToString()])

    @property
    def is_receiving(self) -> bool:
        """Whether the tensors of an order are arriving."""
        return self._incoming is not None

    def begin(self, request: pb.TrainRequest, proposal: Proposal, max_tensor_bytes: int) -> RoundPlan:
        """Begin to receive the tensors of an order.

        Args:
            request: the order's head, as it came.
            proposal: the run that the server proposed.
            max_tensor_bytes: the most bytes of tensors; of a larger order no bytes are kept.

        Returns:
            The order.

        Raises:
            WireError: the order is not valid, or of another run.
        """
        request = self._received.restore(request)
        plan, shapes = wire.plan_from_wire(request), wire.shapes_from(request.tensors)
        if not self.is_ready or plan.run.run_id != proposal.plan.run_id:
            raise WireError("the server sent a request before Ready, or of another run")
        if plan.run.wire_dtype != proposal.plan.wire_dtype:
            raise WireError("the plan's wire dtype is not that of the server's welcome")
        if request.HasField("cohort") != proposal.plan.secure_aggregation:
            raise WireError("an order has a cohort exactly where the server's welcome asks for secure aggregation")
        size = wire.size_of(shapes, plan.run.wire_dtype)
        if size > max_tensor_bytes:
            refusal = Refusal("invalid-tensors", f"{size} bytes of tensors; this client takes at most "
                              f"{max_tensor_bytes}")
            self._incoming, self._tensors = Incoming(shapes, lambda data: None, plan.run.wire_dtype, refusal), {}
        else:
            self._incoming, self._tensors = wire.receive_in_memory(shapes, plan.run.wire_dtype)
        self._plan = plan
        return plan

    def add(self, data: memoryview) -> None:
        """Take a chunk of the order's tensors.

        Raises:
            WireError: no order is arriving, or the chunk does not fit it.
        """
        if self._incoming is None:
            raise WireError("the server broke the protocol: a chunk belongs to no TrainRequest")
        self._incoming.add(data)

    def finish(self, checksum: int) -> tuple[RoundPlan, Tensors, Refusal | None]:
        """End the order's tensors.

        Args:
            checksum: the sender's.

        Returns:
            The order, its tensors, and why they cannot be used; None if they can.

        Raises:
            WireError: bytes are missing.
        """
        assert self._incoming is not None and self._plan is not None
        refusal, plan = self._incoming.finish(checksum), self._plan
        tensors, self._incoming, self._tensors = wire.unpacked(self._tensors, plan.run.wire_dtype), None, {}
        return plan, tensors, refusal

    def answer_frames(self, key: Key, answer: Upload | Refusal, proposal: Proposal,
                      is_wanted: Callable[[], bool]) -> Iterator[bytes]:
        """Yield the frames of an answer to an order.

        Args:
            key: names the order.
            answer: the upload or the refusal.
            proposal: the run that the server proposed.
            is_wanted: whether the answer is still to be sent. A server may refuse it while it is under way.
        """
        if isinstance(answer, Refusal):
            declined = pb.Declined(key=wire.key_to_wire(key), refusal=wire.refusal_to_wire(answer))
            yield pb.ClientFrame(declined=declined).SerializeToString()
            return
        head = pb.ClientFrame(upload=self._sent.shorten(wire.upload_to_wire(answer))).SerializeToString()
        plan = proposal.plan
        frames = wire.transfer_frames(head, answer.tensors if plan.secure_aggregation else
                                      wire.packed(answer.tensors, plan.wire_dtype))
        yield next(frames)
        for frame in frames:
            if not is_wanted():
                yield pb.ClientFrame(end=pb.End()).SerializeToString()
                return
            yield frame
