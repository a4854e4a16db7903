"""Arrays as bytes in the .npy format 1.0, which is how Flower's messages hold them; never on FedLoRA's own wire.

The same bytes as `numpy.save` writes, in C order. Its header takes longer to write and to parse than a small adapter
tensor takes to copy, hence the caches.
"""

from __future__ import annotations

import math
from functools import lru_cache
from io import BytesIO

import numpy as np

MAGIC = b"\x93NUMPY\x01\x00"


def to_npy(array: np.ndarray) -> bytes:
    """Serialise a plain array."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return b"".join((npy_header(array.shape, array.dtype), data))


def npy_size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes of such an array in this format."""
    return len(npy_header(shape, dtype)) + math.prod(shape) * dtype.itemsize


def from_npy(data: bytes | memoryview) -> np.ndarray:
    """A read-only view of the bytes where they are plain and in C order, else a read-only copy in C order.

    Raises:
        ValueError: the bytes are no such array, or code would be needed to decode them.
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
    except Exception as error:  # numpy parses the header as Python, and takes the memory that it asks for
        raise ValueError(f"{len(data)} bytes that are no array in the .npy format") from error
    array.flags.writeable = False
    return array


@lru_cache(maxsize=1024)
def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """What stands before an array's values in C order."""
    stream = BytesIO()
    description = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(stream, {"descr": description, "fortran_order": False, "shape": shape})
    return stream.getvalue()


@lru_cache(maxsize=1024)
def _parsed_header(start: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    stream = BytesIO(start)
    np.lib.format.read_magic(stream)
    return np.lib.format.read_array_header_1_0(stream)
