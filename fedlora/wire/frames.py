"""Bytes to frames and back. What is no frame of ours is a `WireError`; chunks are copied as little as may be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from google.protobuf.message import DecodeError

from fedlora.plan import Tensors

from . import fedlora_pb2 as pb
from .schema import is_spoken
from .tensors import CHUNK_BYTES, WireError, add_to_checksum, chunks

Chunk = tuple[memoryview, int | None]
"""The bytes, and the checksum of a transfer's last one."""
Frame = TypeVar("Frame", pb.ClientFrame, pb.ServerFrame)


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
