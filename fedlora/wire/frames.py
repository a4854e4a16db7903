"""Conversion between bytes and frames, which hardly copies chunks. Bytes that are no frame raise `WireError`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from google.protobuf.message import DecodeError

from fedlora.plan import Tensors

from . import fedlora_pb2 as pb
from .schema import is_spoken
from .tensors import CHUNK_BYTES, WireError, add_to_checksum, chunks

Chunk = tuple[memoryview, int | None]
"""(bytes, checksum). Only the last chunk of a transfer has a checksum; else it is None."""
Frame = TypeVar("Frame", pb.ClientFrame, pb.ServerFrame)


def parse(kind: type[Frame], data: bytes) -> Frame:
    """Decode a frame that carries no chunk.

    Args:
        kind: `pb.ClientFrame` or `pb.ServerFrame`.
        data: the serialized frame.

    Raises:
        WireError: the frame carries a chunk or is not valid (see `read_frame`).
    """
    frame, chunk = read_frame(kind, data)
    if frame is None or chunk is not None:
        raise WireError("a frame brings a chunk where none is allowed")
    return frame


def read_frame(kind: type[Frame], data: bytes) -> tuple[Frame | None, Chunk | None]:
    """Decode one frame of a stream.

    A chunk at the start of the frame, where `transfer_frames` puts it, is read by hand and not copied.

    Args:
        kind: `pb.ClientFrame` or `pb.ServerFrame`.
        data: the serialized frame.

    Returns:
        The message, None if the frame carries only a chunk; and the chunk, None if there is none. The message comes
        first: handle it before the chunk.

    Raises:
        WireError: the bytes are no frame, the frame is empty or of an unknown kind, or it has a field, at any depth,
            that this version does not know. The greeting or refusal of another version is let through without its
            unknown fields, so that the reader can name both versions in its answer.
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
    """Remove the fields that this version's .proto does not have, at any depth. Return whether there were any."""
    size: int = frame.ByteSize()
    frame.DiscardUnknownFields()
    known_size: int = frame.ByteSize()
    return known_size != size


def _is_of_another_version(frame: pb.ClientFrame | pb.ServerFrame) -> bool:
    """Return whether a frame is the greeting or the refusal of another version, after which the conversation ends."""
    kind = frame.WhichOneof("kind")
    if kind in ("join", "welcome"):
        return not is_spoken(getattr(frame, kind))
    return kind == "refused" and frame.refused.code == "version-mismatch"


def transfer_frames(head: bytes, arrays: Tensors) -> Iterator[bytes]:
    """Yield the serialized frames of a transfer, which has the same form in both directions.

    A small transfer is a single frame, below `MAX_FRAME_BYTES`. A chunk is put into its frame by hand: the tensors'
    bytes are then copied once (twice if a chunk holds several tensors) and not three times.

    Args:
        head: the serialized frame of the TrainRequest or Upload.
        arrays: name → packed array, for the tensors that `head` names.
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
"""Protobuf's tags of a frame's field `chunk` and of a chunk's fields `data` and `checksum`."""


def _leading_chunk(frame: memoryview) -> tuple[Chunk | None, memoryview]:
    """Return the chunk at the start of a frame, and the bytes after it.

    The chunk is None if there is none at the start, or if its fields are not in the order in which `transfer_frames`
    writes them. Protobuf's own decoder then reads the whole frame.
    """
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
    """Return the varint at `start` and the position after it; the value is -1 if it has more than 4 bytes."""
    value = 0
    for i, byte in enumerate(view[start:start + 4]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, start + i + 1
    return -1, start
