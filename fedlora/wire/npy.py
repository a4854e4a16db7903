"""Arrays as bytes in numpy's .npy format 1.0, which Flower's messages use. FedLoRA's own wire format does not use it.

The bytes are those that `numpy.save` writes, in C order. Writing or parsing the header takes longer than copying a
small adapter tensor, so headers are cached.
"""

from __future__ import annotations

import math
from functools import lru_cache
from io import BytesIO

import numpy as np

MAGIC = b"\x93NUMPY\x01\x00"
"""First bytes of the format's version 1.0."""


def to_npy(array: np.ndarray) -> bytes:
    """Return the bytes of an array whose values are plain numbers."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return b"".join((npy_header(array.shape, array.dtype), data))


def npy_size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Return how many bytes an array of this shape and dtype has in this format."""
    return len(npy_header(shape, dtype)) + math.prod(shape) * dtype.itemsize


def from_npy(data: bytes | memoryview) -> np.ndarray:
    """Decode an array, without running any code that the bytes could hold.

    Returns:
        A read-only view of the bytes if they have version 1.0 of the format and C order; else a read-only copy in C
        order.

    Raises:
        ValueError: the bytes are no array in the .npy format, or decoding them could run code.
    """
    start = bytes(data[:10 + int.from_bytes(data[8:10], "little")])
    try:
        if start.startswith(MAGIC):
            shape, fortran, dtype = _parsed_header(start)
            if not fortran and len(data) == len(start) + math.prod(shape) * dtype.itemsize:
                return np.frombuffer(data, dtype, offset=len(start)).reshape(shape)
        array = np.asarray(np.load(BytesIO(data), allow_pickle=False), order="C")
    except ValueError:
        raise
    except Exception as error:  # numpy parses the header as a Python literal, and allocates the size that it states
        raise ValueError(f"these {len(data)} bytes are no array in the .npy format") from error
    array.flags.writeable = False
    return array


@lru_cache(maxsize=1024)
def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Return the bytes before the values of an array in C order."""
    stream = BytesIO()
    description = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(stream, {"descr": description, "fortran_order": False, "shape": shape})
    return stream.getvalue()


@lru_cache(maxsize=1024)
def _parsed_header(start: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    stream = BytesIO(start)
    np.lib.format.read_magic(stream)
    return np.lib.format.read_array_header_1_0(stream)
