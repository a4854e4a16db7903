"""Uploads that wait to be aggregated, each in a file: its tensors one after the other, as in .npy files.

Replies read the file where the operating system has it, without a copy, so that memory grows neither with the number
of clients nor, beyond one upload, with what they send.
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
from fedlora.wire import ARRAY_DTYPES, Shapes, shapes_of
from fedlora.wire.npy import npy_header, npy_size
from fedlora.wire.tensors import chunks
from fedlora_strategies.messages import record_of

from .patience import Patience, once

log = logging.getLogger(__name__)

BUFFER_BYTES = 128 * 1024
"""Of each file: a small adapter's many tensors are written at once, and hundreds of open files stay small."""


def not_stored(error: OSError) -> Refusal:
    """What the sender of an upload is told."""
    log.error("An upload could not be stored: %s", error, extra={"peer": "", "kind": "not stored"})
    return Refusal("unavailable", "the server cannot store the upload")


@dataclass(frozen=True)
class Stored:
    """A stored upload: the tensors' file, and the rest."""

    path: Path
    shapes: Shapes
    wire_dtype: str
    metrics: Mapping[str, int | float]

    def read(self) -> ArrayRecord:
        """The tensors as they travelled, however often; their memory is free once the record is gone."""
        with self.path.open("rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return read_record(content, self.shapes, self.wire_dtype)

    def discard(self) -> None:
        """Remove the file; records that were read stay as they are."""
        self.path.unlink(missing_ok=True)


class _NewFile(io.FileIO):
    """A file for this user alone, made and written to with patience."""

    def __init__(self, path: Path, patience: Patience) -> None:
        make = super().__init__
        self._patience = patience
        patience(lambda: make(path, "x", opener=_for_this_user))

    def write(self, data: Any) -> int:
        write = super().write
        return self._patience(lambda: write(data))


class IncomingUpload:
    """An upload that is being stored. Every method but `discard` raises OSError where the disk does.

    Args:
        path: of the file, which must not be there yet.
        shapes: in the order in which the tensors come.
        patience: with a disk that cannot take it.
    """

    def __init__(self, path: Path, shapes: Shapes, wire_dtype: str, patience: Patience = once) -> None:
        self._path, self._shapes, self._wire_dtype = path, shapes, wire_dtype
        self._to_come = iter(shapes.values())
        self._missing_bytes = 0  # of the tensor that is being written
        self._file = io.BufferedWriter(_NewFile(path, patience), BUFFER_BYTES)

    def write(self, data: memoryview) -> None:
        """The next bytes of the tensors, which follow one another."""
        dtype = ARRAY_DTYPES[self._wire_dtype]
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
        """Close the file, all of whose tensors are written."""
        self._file.close()
        return Stored(self._path, self._shapes, self._wire_dtype, metrics)

    def discard(self) -> None:
        """Remove the file, also one that is `stored`."""
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._file.raw.close()  # what is buffered is not written any more


def store(path: Path, arrays: Tensors, wire_dtype: str, metrics: Mapping[str, int | float],
          patience: Patience = once) -> Stored:
    """Put packed arrays into the store. Raises OSError where the disk does, and leaves nothing then."""
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
    """Tensors that stand one after the other as in .npy files, without a copy."""
    dtype, arrays, start = ARRAY_DTYPES[wire_dtype], [], 0
    for name, shape in shapes.items():
        stop = start + npy_size(shape, dtype)
        arrays.append((name, dtype, shape, content[start:stop]))
        start = stop
    return record_of(arrays)


def new_upload(store: Path) -> Path:
    """A path in the store that no other upload has."""
    return store / f"{secrets.token_hex(8)}.upload"


def _for_this_user(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
