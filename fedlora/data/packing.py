"""Bytes of data files, unpacked if the name ends in .gz, with a bound on what a small file can unpack to."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from typing_extensions import Buffer, override

PACKED = ".gz"

MOST_TIMES = 200
"""Most bytes for each packed byte. Tables of text unpack to 3 to 30 times their size, a gzip bomb to 1,000 times."""

ALWAYS = 64 * 1024 * 1024
"""Bytes that any file may unpack to."""


class Unusable(Exception):
    """A file that cannot be unpacked.

    Attributes:
        what: what is wrong with it.
        remedy: how to correct it.
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.what, self.remedy = what, remedy


def is_packed(name: str) -> bool:
    """Return whether a file is packed, by its name."""
    return name.lower().endswith(PACKED)


def check_unpacked(size: int, packed: int) -> None:
    """Check that a file does not unpack to far more than data do.

    Args:
        size: number of bytes that it unpacks to, as far as is known.
        packed: number of its own bytes.

    Raises:
        Unusable: it does.
    """
    if size > max(ALWAYS, MOST_TIMES * packed):
        raise Unusable(f"the file unpacks to more than {MOST_TIMES} times its size, as no table of text does",
                       "If you trust it, unpack it yourself and name the unpacked file")


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """Open a data file for reading its bytes, unpacked.

    Raises:
        Unusable: the file is packed, and cannot be unpacked. This may be raised by any reading within the block.
        OSError: the file cannot be read.
    """
    if not is_packed(file.name):
        with file.open("rb") as stream:
            yield stream
        return
    try:
        with io.BufferedReader(_Unpacked(file), 1 << 16) as unpacked:
            yield cast(BinaryIO, unpacked)
    except gzip.BadGzipFile:
        raise Unusable("the file is damaged, or not packed by gzip, whatever its name says",
                       "Fetch or pack it again, or name it by what it is") from None
    except (EOFError, zlib.error):
        raise Unusable("the packed file is damaged or was cut off", "Fetch or pack it again") from None


class _Unpacked(io.RawIOBase):
    """The unpacked bytes of a .gz file, which end in an error beyond the bound."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._packed = file.stat().st_size
        self._stream = gzip.open(file, "rb")  # noqa: SIM115 - closed by `close`
        self._read = 0

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Buffer) -> int:
        found = self._stream.readinto(buffer)
        self._read += found
        check_unpacked(self._read, self._packed)
        return found

    @override
    def close(self) -> None:
        self._stream.close()
        super().close()
