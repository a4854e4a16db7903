"""Frames to and from the values of `fedlora.plan`. Whatever does not decode to a valid value is a `WireError`.

Everything that a person will read (names, labels, details, reasons) is refused or cleaned where it holds characters
that could steer a terminal.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from fedlora.plan import (
    ANCHOR_BYTES,
    LEAST_SCALE,
    MOST_CLIP_NORM,
    MOST_LABELS,
    MOST_STEPS,
    PROTOCOL,
    STRATEGIES,
    TASKS,
    WIRE_DTYPES,
    ModelRef,
    Refusal,
    Refused,
    RoundPlan,
    RunPlan,
    Tensors,
    Upload,
    check_run_id,
    from_scalars,
    to_scalars,
    upload_metrics,
)

from . import fedlora_pb2 as pb
from .schema import SCHEMA, SPOKEN, is_spoken, spoken_by
from .tensors import CHUNK_BYTES, Shapes, WireError, add_to_checksum, chunks, header_of, shapes_of

SERVICE = "/fedlora.Federation/Session"
MAX_NAME, MAX_TEXT = 64, 2000
Key = tuple[str, int, int]
Chunk = tuple[memoryview, int | None]
"""The bytes, and the checksum of a transfer's last one."""
Frame = TypeVar("Frame", pb.ClientFrame, pb.ServerFrame)
Headed = TypeVar("Headed", pb.Task, pb.Upload)


@dataclass(frozen=True)
class Setup:
    """What a client is told when it joins, before it reads its data; every field but three as in `RunPlan`.

    Attributes:
        labels: the fixed label set in order, or () where there is none (yet).
        announce_labels: clients must name their labels when they are ready, which discloses them.
        anchor: the last one that the server was sent under this client's name, b"" if none was; None where it keeps
            none, and none is to be sent.
    """

    run_id: str
    fedlora_version: str
    strategy: str
    private: bool
    model: ModelRef
    task: str
    labels: tuple[str, ...]
    announce_labels: bool
    max_length: int
    rounds: int
    max_participations: int
    local_steps: int
    expected_batch: int
    clip_norm: float
    wire_dtype: str = "fp32"
    private_start: bool = False
    anchor: bytes | None = None

    @classmethod
    def of(cls, plan: RunPlan, *, announce_labels: bool = False) -> Setup:
        """What a plan proposes; its labels are left out where the clients are to name theirs."""
        own = ("announce_labels", "anchor")
        shared = {f.name: getattr(plan, f.name) for f in dataclasses.fields(cls) if f.name not in own}
        labels = {"labels": () if announce_labels else plan.labels, "announce_labels": announce_labels}
        return cls(**shared | labels)

    def __post_init__(self) -> None:
        check_run_id(self.run_id)
        if self.strategy not in STRATEGIES or self.task not in TASKS or self.wire_dtype not in WIRE_DTYPES:
            raise ValueError(f"strategy {self.strategy!r}, task {self.task!r} or wire dtype {self.wire_dtype!r} is not "
                             "known; update FedLoRA")
        if self.anchor is not None:
            _check_anchor(self.anchor)
        if self.announce_labels and (self.labels or self.task != "classification"):
            raise ValueError("labels are announced only for a classification without a fixed label set")
        for name in ("max_length", "rounds", "max_participations", "local_steps", "expected_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not LEAST_SCALE <= self.clip_norm <= MOST_CLIP_NORM:
            raise ValueError(f"clip_norm is {self.clip_norm}; it must be from {LEAST_SCALE:g} to {MOST_CLIP_NORM:g}")
        if self.most_trainings * self.local_steps > MOST_STEPS:
            raise ValueError(f"{self.most_trainings} trainings of {self.local_steps} steps are more than "
                             f"{MOST_STEPS:,} steps")

    @property
    def most_trainings(self) -> int:
        """What one client may begin at most, as in `RunPlan`."""
        return self.max_participations + self.private_start


def parse(kind: type[Frame], data: bytes) -> Frame:
    """Decode a frame that carries no chunk.

    Raises:
        WireError: it does, or as `read_frame`.
    """
    frame, chunk = read_frame(kind, data)
    if frame is None or chunk is not None:
        raise WireError("a frame brings a chunk where none may come")
    return frame


def read_frame(kind: type[Frame], data: bytes) -> tuple[Frame | None, Chunk | None]:
    """Decode one frame of a stream.

    A chunk that stands at the start, where `transfer_frames` puts it, is read by hand and not copied.

    Returns:
        What the frame says, None if nothing but a chunk; and its chunk, to be taken after that.
    Raises:
        WireError: it is no frame, it is empty or of a kind that this version does not know, or it has a field, at any
            depth, that this version does not know. What another version says of itself is let through without them,
            for the reader to answer by name.
    """
    chunk, rest = _leading_chunk(memoryview(data))
    if chunk is not None and not rest:
        return None, chunk
    try:
        frame = kind.FromString(bytes(rest))
    except DecodeError:
        raise WireError("a frame could not be decoded") from None
    if frame.HasField("chunk"):
        if chunk is not None:
            raise WireError("a frame has two chunks")
        chunk = memoryview(frame.chunk.data), frame.chunk.checksum if frame.chunk.HasField("checksum") else None
    says = frame.WhichOneof("kind") is not None
    if not says and chunk is None:
        raise WireError("a frame is empty or of a kind that this version does not know")
    if _drop_unknown(frame) and not _is_of_another_version(frame):
        raise WireError("a frame has a field that this version does not know; both sides need the same FedLoRA version")
    return frame if says else None, chunk


def _drop_unknown(frame: pb.ClientFrame | pb.ServerFrame) -> bool:
    """Remove what this version's .proto does not have, at any depth; whether there was anything."""
    size = frame.ByteSize()
    frame.DiscardUnknownFields()
    return frame.ByteSize() != size


def _is_of_another_version(frame: pb.ClientFrame | pb.ServerFrame) -> bool:
    """Whether a frame ends the conversation because the two versions differ, once it is looked at."""
    kind = frame.WhichOneof("kind")
    if kind in ("join", "welcome"):
        return not is_spoken(getattr(frame, kind))
    return kind == "refused" and frame.refused.code == "version-mismatch"  # type: ignore[union-attr]


def setup_to_wire(setup: Setup) -> pb.Welcome:
    fields = {f.name: getattr(setup, f.name) for f in dataclasses.fields(setup)}
    return pb.Welcome(protocol=PROTOCOL, schema=SCHEMA,
                      **(fields | {"model": pb.Model(**dataclasses.asdict(setup.model))}))


def setup_from_wire(welcome: pb.Welcome) -> Setup:
    """What a server says of itself and its run.

    Raises:
        Refused: "version-mismatch": it speaks another version of the protocol, or has another schema.
        WireError: it is not valid.
    """
    if not is_spoken(welcome):
        raise Refused("version-mismatch", f"the server runs FedLoRA {clean(welcome.fedlora_version)} "
                                          f"({spoken_by(welcome)}), this client {SPOKEN}")
    fields = {f.name: getattr(welcome, f.name) for f in dataclasses.fields(Setup)}
    if not welcome.HasField("anchor"):
        fields["anchor"] = None
    model = {f.name: getattr(welcome.model, f.name) for f in dataclasses.fields(ModelRef)}
    try:
        return Setup(**(fields | {"model": ModelRef(**model), "labels": labels_from_wire(welcome.labels),
                                  "fedlora_version": clean(welcome.fedlora_version)}))
    except ValueError as error:
        raise WireError(f"the server's welcome is not valid: {error}") from None


def labels_from_wire(labels, most: int = MOST_LABELS) -> tuple[str, ...]:
    if len(labels) > most:
        raise WireError(f"{len(labels)} label names are more than the {most} that may be")
    if len(set(labels)) != len(labels) or not all(label and len(label) <= 200 and label.isprintable()
                                                  for label in labels):
        raise WireError("a label is repeated, empty, longer than 200 characters or not printable")
    return tuple(labels)


def task_to_wire(plan: RoundPlan, shapes: Shapes) -> pb.Task:
    return pb.Task(run=pb.RunPlan(**to_scalars(plan.run)), round=plan.round, attempt=plan.attempt,  # type: ignore[arg-type]
                   shared_sha256=plan.shared_sha256, tensors=header_of(shapes))


def plan_from_wire(task: pb.Task) -> RoundPlan:
    flat = {f.name: list(getattr(task.run, f.name)) if f.is_repeated else getattr(task.run, f.name)
            for f in pb.RunPlan.DESCRIPTOR.fields}
    try:
        run: RunPlan = from_scalars(flat)
        return RoundPlan(run=run, round=task.round, attempt=task.attempt, shared_sha256=task.shared_sha256)
    except ValueError as error:
        raise WireError(f"the round's plan is not valid: {error}") from None


REPEATED = ("run", "shared_sha256", "tensors", "delta", "noise_multiplier")
"""Fields of a Task or an Upload that are left out where they are those of the last one on the same stream. Who says one
says it every time."""


class Repeats:
    """What either end of a stream remembers of the last Task, or Upload, so that what stays the same travels once.

    Names, shapes and the plan would outweigh a small adapter. A stream is ordered and ends when it breaks, so that
    both ends remember the same.
    """

    def __init__(self) -> None:
        self._last: dict[str, Any] = {}

    def shorten(self, message: Headed) -> Headed:
        """The message to send, without what the last one said."""
        short = type(message)()
        short.CopyFrom(message)
        for name, value in self._news(message).items():
            if self._last.get(name) == value:
                short.ClearField(name)  # type: ignore[arg-type]
            self._last[name] = value
        return short

    def restore(self, message: Headed) -> Headed:
        """The whole message that was shortened. What was never said stays absent, for other checks to refuse."""
        whole = type(message)()
        whole.CopyFrom(message)
        said = self._news(message)
        for name in self._last.keys() - said.keys():
            if name in ("run", "tensors"):
                getattr(whole, name).MergeFrom(self._last[name])
            else:
                setattr(whole, name, self._last[name])
        self._last |= said
        return whole

    def _news(self, message: Headed) -> dict[str, Any]:
        return {field.name: value for field, value in message.ListFields() if field.name in REPEATED}


def upload_to_wire(upload: Upload) -> pb.Upload:
    return pb.Upload(key=key_to_wire((upload.run_id, upload.round, upload.attempt)), anchor=upload.anchor,
                     tensors=header_of(shapes_of(upload.tensors)), **upload_metrics(upload))  # type: ignore[arg-type]


def anchor_from_wire(upload: pb.Upload) -> bytes:
    """The anchor of an upload, unread; b"" where it brings none. Raises WireError for another length."""
    try:
        _check_anchor(upload.anchor)
    except ValueError as error:
        raise WireError(str(error)) from None
    return upload.anchor


def metrics_from_wire(upload: pb.Upload, *, private: bool) -> dict[str, int | float]:
    """The scalars of an upload, by the names of `fedlora.plan.UPLOAD_METRICS`.

    Raises:
        Refused: "privacy-mismatch", a private upload discloses more than it may, or states no noise. It may leave both
            δ and σ unsaid.
        WireError: a value cannot be.
    """
    metrics: dict[str, int | float] = {"steps": upload.steps}
    for name in ("delta", "noise_multiplier", "num_examples", "train_loss"):
        if upload.HasField(name):  # type: ignore[arg-type]
            metrics[name] = getattr(upload, name)
    if not all(math.isfinite(v) and (v >= 0 or k == "train_loss") for k, v in metrics.items()):
        raise WireError("a metric is not finite or negative")
    unsaid = "noise_multiplier" not in metrics and "delta" not in metrics
    noised = unsaid or (metrics.get("noise_multiplier", 0) > 0 and 0 < metrics.get("delta", 0) < 1)
    if private and ("num_examples" in metrics or "train_loss" in metrics or not noised):
        raise Refused("privacy-mismatch", "a private upload carries steps, delta and noise_multiplier (both or "
                                          "neither), nothing else")
    return metrics


def key_to_wire(key: Key) -> pb.Key:
    return pb.Key(round=key[1], attempt=key[2])


def key_from_wire(key: pb.Key, run_id: str) -> Key:
    """Of the run that the stream's Welcome named."""
    return run_id, key.round, key.attempt


def refusal_to_wire(refusal: Refusal) -> pb.Refusal:
    return pb.Refusal(code=refusal.code, detail=refusal.detail[:MAX_TEXT])


def refusal_from_wire(refusal: pb.Refusal) -> Refusal:
    try:
        return Refusal(refusal.code, clean(refusal.detail))
    except ValueError:
        raise WireError("a refusal has a code that this version does not know") from None


def clean(text: str) -> str:
    """Text of the other side, fit to be printed."""
    return "".join(c if c.isprintable() else " " for c in text[:MAX_TEXT])


def _check_anchor(sealed: bytes) -> None:
    """Raises ValueError for anything but an anchor's length, or nothing."""
    if len(sealed) not in (0, ANCHOR_BYTES):
        raise ValueError(f"an anchor of {len(sealed)} bytes; it has {ANCHOR_BYTES}, or none")


def check_name(name: str) -> None:
    """Raises ValueError unless `name` can be a client's."""
    if not (0 < len(name) <= MAX_NAME and name.isprintable() and name == name.strip()):
        raise ValueError(f"the client's name has {len(name)} characters; --name must have 1 to {MAX_NAME}, printable "
                         "and with no space at either end")


def transfer_frames(head: bytes, arrays: Tensors) -> Iterator[bytes]:
    """The serialized frames of a transfer, the same in both directions; a small one is a single frame, which stays
    below `MAX_FRAME_BYTES`.

    A chunk is put into its frame by hand: the tensors' bytes are then copied once, or twice where a chunk holds
    several tensors, and not three times.

    Args:
        head: the serialized frame of the Task or Upload.
        arrays: packed; what `head` names.
    """
    checksum, left = 0, sum(array.nbytes for array in arrays.values())
    together = 0 < left <= CHUNK_BYTES and len(head) <= CHUNK_BYTES // 2
    if not together:
        yield head
    if not left:
        yield pb.ServerFrame(end=pb.End()).SerializeToString()
    for pieces in chunks(arrays):
        data = pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))
        checksum = add_to_checksum(checksum, data)
        left -= len(data)
        start, rest = _DATA + _varint(len(data)), b"" if left else _CHECKSUM + checksum.to_bytes(8, "little")
        size = len(start) + len(data) + len(rest)
        yield b"".join((_CHUNK, _varint(size), start, data, rest, head if together else b""))


_CHUNK, _DATA, _CHECKSUM = b"\x22", b"\x0a", b"\x11"
"""Protobuf's tags of a frame's chunk and of a chunk's fields."""


def _leading_chunk(frame: memoryview) -> tuple[Chunk | None, memoryview]:
    """The chunk at the start of a frame, and what follows it; none where it was not written in the usual way."""
    if frame[:1] != _CHUNK:
        return None, frame
    size, start = _read_varint(frame, 1)
    stop = start + size
    if size < 0 or stop > len(frame) or frame[start:start + 1] != _DATA:
        return None, frame
    size, start = _read_varint(frame, start + 1)
    data, rest = frame[start:start + size], frame[start + size:stop]
    if size < 0 or start + size > stop:
        return None, frame
    if not rest:
        return (data, None), frame[stop:]
    if len(rest) == 9 and rest[:1] == _CHECKSUM:
        return (data, int.from_bytes(rest[1:], "little")), frame[stop:]
    return None, frame


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(view: memoryview, start: int) -> tuple[int, int]:
    """The value of at most 4 bytes at `start`, and where it ends; a longer one reads as -1."""
    value = 0
    for i, byte in enumerate(view[start:start + 4]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, start + i + 1
    return -1, start
