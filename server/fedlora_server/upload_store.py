"""Files of uploads that wait to be aggregated: one upload a file, its tensors one after the other in .npy format.

A reply maps its upload's file into memory and copies nothing. So memory grows neither with the number of clients nor
with what they send, beyond one upload.
"""

from __future__ import annotations

import contextlib
import io
import logging
import mmap
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord

from fedlora.plan import Refusal, Tensors
from fedlora.wire import ARRAY_DTYPES, Shapes, TensorsDigest, shapes_of, size_of
from fedlora.wire.npy import npy_header, npy_size
from fedlora.wire.tensors import chunks
from fedlora_strategies.messages import record_of

from .patience import Patience, once

log = logging.getLogger(__name__)

BUFFER_BYTES = 128 * 1024
"""Write buffer of each file: a small adapter's many tensors go out in one write, and hundreds of open files cost little
memory."""


def not_stored(error: OSError) -> Refusal:
    """Log why an upload could not be stored, and return the refusal for its sender."""
    log.error("An upload could not be stored: %s", error, extra={"peer": "", "kind": "not stored"})
    return Refusal("unavailable", "the server cannot store the upload")


@dataclass(frozen=True)
class Stored:
    """A stored upload.

    Attributes:
        path: file with the tensors.
        shapes: the tensors' shapes by name, in the order in which they stand in the file.
        wire_dtype: "fp32" or another key of `fedlora.wire.ARRAY_DTYPES`.
        metrics: the numbers that came with the tensors.
        sha256: the tensors' digest (`fedlora.wire.tensors_digest`).
    """

    path: Path
    shapes: Shapes
    wire_dtype: str
    metrics: Mapping[str, int | float]
    sha256: str = ""

    @property
    def wire_bytes(self) -> int:
        """Size of the tensors on the wire."""
        return size_of(self.shapes, self.wire_dtype)

    def read(self) -> ArrayRecord:
        """Return the tensors as they were sent. The file stays mapped in memory as long as the record exists."""
        with self.path.open("rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return read_record(content, self.shapes, self.wire_dtype)

    def discard(self) -> None:
        """Remove the file. Records read from it stay valid."""
        self.path.unlink(missing_ok=True)


class _NewFile(io.FileIO):
    """A new file that only this user can open. A `Patience` decides how often each write is tried."""

    def __init__(self, path: Path, patience: Patience) -> None:
        make = super().__init__
        self._patience = patience
        patience(lambda: make(path, "x", opener=_for_this_user))

    def write(self, data: Any) -> int:
        write = super().write
        return self._patience(lambda: write(data))


class IncomingUpload:
    """An upload that is being stored. Every method except `discard` raises OSError if the disk fails.

    Args:
        path: the file, which must not exist yet.
        shapes: the tensors' shapes by name, in the order in which the tensors come.
        wire_dtype: "fp32" or another key of `fedlora.wire.ARRAY_DTYPES`.
        patience: decides how often a failing write is tried again.
    """

    def __init__(self, path: Path, shapes: Shapes, wire_dtype: str, patience: Patience = once) -> None:
        self._path, self._shapes, self._wire_dtype = path, shapes, wire_dtype
        self._to_come, self._digest = iter(shapes.values()), TensorsDigest(shapes, wire_dtype)
        self._missing_bytes = 0  # left to come of the tensor that is being written
        self._file = io.BufferedWriter(_NewFile(path, patience), BUFFER_BYTES)

    def write(self, data: memoryview) -> None:
        """Append the next bytes of the tensors. A piece may begin and end anywhere, and span several tensors."""
        dtype = ARRAY_DTYPES[self._wire_dtype]
        self._digest.add(data)
        while data:
            if not self._missing_bytes:
                shape = next(self._to_come)
                header = npy_header(shape, dtype)
                self._file.write(header)
                self._missing_bytes = npy_size(shape, dtype) - len(header)
            piece, data = data[:self._missing_bytes], data[self._missing_bytes:]
            self._file.write(piece)
            self._missing_bytes -= len(piece)

    def stored(self, metrics: Mapping[str, int | float]) -> Stored:
        """Close the file, once all tensors are written, and return the stored upload."""
        self._file.close()
        return Stored(self._path, self._shapes, self._wire_dtype, metrics, self._digest.hexdigest())

    def discard(self) -> None:
        """Remove the file, even if the upload is already stored."""
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._file.raw.close()  # closing the raw file drops what is still buffered


def store(path: Path, arrays: Tensors, wire_dtype: str, metrics: Mapping[str, int | float],
          patience: Patience = once) -> Stored:
    """Store arrays that are already packed in the wire's dtype.

    Raises:
        OSError: the disk failed. No file is left behind.
    """
    incoming = IncomingUpload(path, shapes_of(arrays), wire_dtype, patience)
    try:
        for pieces in chunks(arrays):
            for piece in pieces:
                incoming.write(piece)
        return incoming.stored(metrics)
    except BaseException:
        incoming.discard()
        raise


def read_record(content: memoryview, shapes: Shapes, wire_dtype: str) -> ArrayRecord:
    """Return a record of tensors that stand one after the other in .npy format. No byte is copied."""
    dtype, arrays, start = ARRAY_DTYPES[wire_dtype], [], 0
    for name, shape in shapes.items():
        stop = start + npy_size(shape, dtype)
        arrays.append((name, dtype, shape, content[start:stop]))
        start = stop
    return record_of(arrays)


def new_upload(store: Path) -> Path:
    """Return the path for a further upload in the folder `store`."""
    return store / f"{secrets.token_hex(8)}.upload"


def _for_this_user(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
