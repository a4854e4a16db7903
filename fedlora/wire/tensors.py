"""Named tensors as a byte stream: a header of names and shapes, chunks of at most 1 MiB, and a checksum.

The bytes of all tensors follow one another in the order of their sorted names, little-endian and in C order. Many small
tensors share a chunk, and a large tensor spans several. So a transfer costs one copy on either side, and no more memory
than its destination.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from fedlora.plan import Refusal, Refused, Tensors

from . import fedlora_pb2 as pb
from .dtypes import ARRAY_DTYPES, RINGS, is_finite, unpacked

CHUNK_BYTES = 1 << 20
"""The most bytes in a chunk."""
MAX_FRAME_BYTES = 2 << 20
"""The most bytes in a frame; gRPC itself refuses a larger one unread. The header of a TrainRequest or Upload must fit
too, which some 30,000 tensors do."""

Shapes = Mapping[str, tuple[int, ...]]
"""Name of a tensor → its shape."""


class WireError(ValueError):
    """The other side broke the protocol. The message that it sent is dropped, and the stream ends."""


def shapes_of(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor, in the order of transfer: sorted by name."""
    return {name: tensors[name].shape for name in sorted(tensors)}


def size_of(shapes: Shapes, wire_dtype: str) -> int:
    """Return how many bytes the tensors have on the wire."""
    return ARRAY_DTYPES[wire_dtype].itemsize * sum(math.prod(shape) for shape in shapes.values())


def tensors_digest(tensors: Tensors) -> str:
    """Return the SHA-256 (64 hexadecimal digits) of the tensors' names, shapes and bytes: float32, or masked integers.

    Neither the order of the mapping nor the dtype in which float32 tensors travelled matters.

    Raises:
        ValueError: a tensor is of another dtype, or two dtypes are mixed.
    """
    wire_dtype = next((RINGS[array.dtype] for array in tensors.values() if array.dtype in RINGS), "fp32")
    state = TensorsDigest(shapes_of(tensors), wire_dtype)
    for name in sorted(tensors):
        state.add(_bytes_of(name, tensors[name], ARRAY_DTYPES[wire_dtype]))
    return state.hexdigest()


class TensorsDigest:
    """The `tensors_digest` of tensors that are given piece by piece.

    Args:
        shapes: the tensors' shapes by name, in the order of transfer.
        wire_dtype: dtype of the pieces: "fp32" or another key of `ARRAY_DTYPES`.
    """

    def __init__(self, shapes: Shapes, wire_dtype: str) -> None:
        kept = ARRAY_DTYPES["fp32" if wire_dtype == "bf16" else wire_dtype].str
        header = [(name, kept, list(shape)) for name, shape in shapes.items()]
        self._state, self._wire_dtype, self._rest = hashlib.sha256(json.dumps(header).encode()), wire_dtype, b""

    def add(self, data: memoryview) -> None:
        """Add the next bytes, as many as come. They may end in the middle of a value."""
        if self._wire_dtype != "bf16":
            self._state.update(data)
            return
        whole = self._rest + bytes(data)
        width = ARRAY_DTYPES[self._wire_dtype].itemsize
        stop = len(whole) - len(whole) % width
        values = np.frombuffer(whole[:stop], ARRAY_DTYPES[self._wire_dtype])
        self._state.update(unpacked({"": values}, self._wire_dtype)[""].tobytes())
        self._rest = whole[stop:]

    def hexdigest(self) -> str:
        """Return the SHA-256 of all that was added, as 64 hexadecimal digits."""
        return self._state.hexdigest()


def chunks(arrays: Tensors) -> Iterator[list[memoryview]]:
    """Yield the bytes of packed arrays as chunks of at most `CHUNK_BYTES`; each is a list of views, without copies."""
    pieces: list[memoryview] = []
    room = CHUNK_BYTES
    for name in sorted(arrays):
        view = _bytes_of(name, arrays[name], *ARRAY_DTYPES.values())
        while view:
            pieces.append(view[:room])
            room -= len(pieces[-1])
            view = view[len(pieces[-1]):]
            if not room:
                yield pieces
                pieces, room = [], CHUNK_BYTES
    if pieces:
        yield pieces


def add_to_checksum(checksum: int, chunk: memoryview) -> int:
    """Return the checksum after one more chunk.

    It is 31 × checksum + the sum of the chunk's 64-bit little-endian words (the last one padded), modulo 2^64.
    """
    whole = len(chunk) // 8 * 8
    words = int(np.add.reduce(np.frombuffer(chunk[:whole], "<u8"))) + int.from_bytes(chunk[whole:], "little")
    return (31 * checksum + words) % 2**64


def split(shapes: Shapes, values: np.ndarray) -> dict[str, np.ndarray]:
    """Return arrays of these shapes, as views into the flat array that holds them one after the other."""
    tensors, start = {}, 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        tensors[name] = values[start:stop].reshape(shape)
        start = stop
    return tensors


def header_of(shapes: Shapes) -> list[pb.Tensor]:
    """Encode names and shapes as a header."""
    return [pb.Tensor(name=name, shape=shape) for name, shape in shapes.items()]


def shapes_from(header: Sequence[pb.Tensor]) -> dict[str, tuple[int, ...]]:
    """Decode a header into names and shapes.

    Raises:
        WireError: a name is out of order, repeated, empty or not printable, or a shape is not valid.
    """
    names = [tensor.name for tensor in header]
    if any(a >= b for a, b in itertools.pairwise(names)) or "" in names:
        raise WireError("tensor names are not sorted, are repeated or are empty")
    if not all(map(str.isprintable, names)):
        raise WireError("a tensor's name is not printable")
    if any(len(tensor.shape) > 8 or any(size < 1 for size in tensor.shape) for tensor in header):
        raise WireError("a tensor has more than 8 dimensions or one below 1")
    return {tensor.name: tuple(tensor.shape) for tensor in header}


def check_shapes(shapes: Shapes, expected: Shapes) -> None:
    """Check that names and shapes are exactly the expected ones, before a chunk is read.

    Raises:
        Refused: "invalid-tensors", if they differ; the detail names the first differences.
    """
    missing, unknown = sorted(set(expected) - set(shapes)), sorted(set(shapes) - set(expected))
    if missing or unknown:
        raise Refused("invalid-tensors", f"{_some(missing)} missing, {_some(unknown)} unknown")
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise Refused("invalid-tensors", f"{name} has shape {shape}, not {expected[name]}")


class Incoming:
    """The receiving end of one transfer. It checks each chunk and passes it on.

    A refusal is final: later chunks are dropped until the sender ends the transfer.

    Args:
        shapes: names and shapes from the header.
        write: called with the bytes of each chunk, in order, after all their values were found finite.
        wire_dtype: dtype of the bytes, a key of `ARRAY_DTYPES`.
        refusal: given if the header was refused already.

    Attributes:
        shapes: as in the arguments.
        refusal: why the transfer is refused; None so far.
        total_bytes: bytes that the header announces.
        received_bytes: bytes received so far, dropped ones included.
    """

    def __init__(self, shapes: Shapes, write: Callable[[memoryview], object], wire_dtype: str,
                 refusal: Refusal | None = None) -> None:
        self.shapes = shapes
        self.refusal = refusal
        self.total_bytes = size_of(shapes, wire_dtype)
        self._dtype = ARRAY_DTYPES[wire_dtype]
        self.received_bytes = 0
        self._write = write
        self._checksum = 0

    def add(self, data: memoryview) -> None:
        """Take the next chunk.

        Raises:
            WireError: the chunk is empty, too large, cut within a value, or beyond the announced size.
        """
        start, width = self.received_bytes, self._dtype.itemsize
        self.received_bytes += len(data)
        if self.received_bytes > self.total_bytes or len(data) % width or not data or len(data) > CHUNK_BYTES:
            raise WireError("a chunk is empty, cut within a value, above 1 MiB or beyond the announced size")
        if self.refusal:
            return
        finite = is_finite(np.frombuffer(data, self._dtype))
        if not finite.all():
            name = self._name_at(start // width + int(np.argmin(finite)))
            self.refusal = Refusal("invalid-tensors", f"{name} has values that are not finite")
            return
        self._checksum = add_to_checksum(self._checksum, data)
        self._write(data)

    def finish(self, checksum: int) -> Refusal | None:
        """End the transfer.

        Args:
            checksum: the sender's.

        Returns:
            Why the transfer is refused; None if it is complete and correct.

        Raises:
            WireError: bytes are missing, and the transfer was not refused before.
        """
        if self.refusal:
            return self.refusal
        if self.received_bytes != self.total_bytes:
            raise WireError(f"the transfer ended after {self.received_bytes} of {self.total_bytes} bytes")
        if checksum != self._checksum:
            self.refusal = Refusal("invalid-tensors", "the checksum does not match the bytes received")
        return self.refusal

    def _name_at(self, index: int) -> str:
        ends = list(itertools.accumulate(math.prod(shape) for shape in self.shapes.values()))
        return list(self.shapes)[bisect_right(ends, index)]


def receive_in_memory(shapes: Shapes, wire_dtype: str) -> tuple[Incoming, dict[str, np.ndarray]]:
    """Return the receiving end of a transfer, and the packed arrays that it fills."""
    values = np.empty(sum(math.prod(shape) for shape in shapes.values()), ARRAY_DTYPES[wire_dtype])
    return Incoming(shapes, _filling(values), wire_dtype), split(shapes, values)


def _filling(values: np.ndarray) -> Callable[[memoryview], None]:
    """Return a `write` for `Incoming` that fills an array from its start."""
    target, start = values.view(np.uint8), 0

    def write(data: memoryview) -> None:
        nonlocal start
        target[start:start + len(data)] = np.frombuffer(data, np.uint8)
        start += len(data)

    return write


def _bytes_of(name: str, array: np.ndarray, *allowed: np.dtype) -> memoryview:
    if array.dtype not in allowed:
        raise ValueError(f"tensor {name} is {array.dtype}; only float32 is sent, so convert it first")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(name[:80] for name in names[:3])
    return (shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "none"
