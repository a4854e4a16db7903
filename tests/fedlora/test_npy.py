"""Tests of arrays in the .npy format: numpy's own bytes, decoded without a copy, and never by running code."""

from io import BytesIO

import numpy as np
import pytest

from fedlora.wire.npy import from_npy, to_npy


def saved(array):
    stream = BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0), (4, 5), (2, 3, 4)])
def test_the_bytes_are_numpys_and_decode_to_the_array(shape):
    array = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    assert to_npy(array) == saved(array)
    decoded = from_npy(to_npy(array))
    assert decoded.dtype == array.dtype and not decoded.flags.writeable
    np.testing.assert_array_equal(decoded, array)


def test_a_decoded_array_is_a_view_of_the_bytes():
    data = to_npy(np.ones((4, 5), np.float32))
    assert np.shares_memory(from_npy(data), np.frombuffer(data, np.uint8))


def test_fortran_order_becomes_c_order_both_ways():
    array = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    for data in (saved(array), to_npy(array)):
        np.testing.assert_array_equal(from_npy(data), array)
        assert from_npy(data).flags.c_contiguous


@pytest.mark.parametrize("data", [b"", b"\x93NUMPY\x01\x00", saved(np.ones(4))[:-1], b"x" * 200,
                                  b"\x93NUMPY\x01\x00\x06\x00(((   ",
                                  saved(np.ones(4)).replace(b"(4,), }" + b" " * 20, b"(%d,), }" % 2**60 + b" " * 3)])
def test_what_is_no_array_is_an_error(data):
    with pytest.raises(ValueError):
        from_npy(data)


def test_an_array_of_objects_is_not_unpickled():
    stream = BytesIO()
    np.save(stream, np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError):
        from_npy(stream.getvalue())
