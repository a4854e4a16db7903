"""Stored uploads come back bit for bit, mapped from their files, and a full disk leaves no file behind."""

import gc
from io import BytesIO

import numpy as np
import pytest

from fedlora.wire import packed
from fedlora_server.upload_store import IncomingUpload, new_upload, store
from fedlora_strategies.messages import to_arrays, to_record
from tests.fedlora.ledgers import full_disk

RANDOM = np.random.default_rng(0)
TENSORS = {f"layer.{i}": RANDOM.standard_normal(shape, dtype=np.float32)
           for i, shape in enumerate([(3,), (1, 1), (700, 500), (64, 2)])}


@pytest.mark.parametrize("wire_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("piece", [4, 1000, 1 << 20])
def test_pieces_of_any_size_come_back_as_the_record_that_was_sent(tmp_path, wire_dtype, piece):
    arrays = packed(TENSORS, wire_dtype)
    data = memoryview(b"".join(array.tobytes() for array in arrays.values()))
    incoming = IncomingUpload(new_upload(tmp_path), {name: array.shape for name, array in arrays.items()}, wire_dtype)
    for start in range(0, len(data), piece):
        incoming.write(data[start:start + piece])
    stored = incoming.stored({"steps": 1})
    record = stored.read()
    assert list(stored.read()) == list(record) and list(tmp_path.iterdir()) == [stored.path]
    stored.discard()
    assert not list(tmp_path.iterdir())
    sent = to_record(arrays)
    assert {name: (a.dtype, a.shape, a.stype, bytes(a.data)) for name, a in record.items()} == {
        name: (a.dtype, a.shape, a.stype, a.data) for name, a in sent.items()}
    for name, array in record.items():
        np.testing.assert_array_equal(array.numpy(), arrays[name])  # Flower's own decoder
        np.testing.assert_array_equal(np.load(BytesIO(array.data)), arrays[name])


def test_the_arrays_of_a_record_lie_in_one_mapping_which_goes_with_it(tmp_path):
    tensors = {"a": np.ones((1000, 1000), np.float32), "b": np.ones((1000, 1000), np.float32)}
    record = store(new_upload(tmp_path), tensors, "fp32", {}).read()
    arrays = to_arrays(record)
    mapping = record["a"].data.obj
    assert record["b"].data.obj is mapping and all(not array.flags.owndata for array in arrays.values())
    del record, arrays
    gc.collect()
    mapping.close()  # raises BufferError while a view is left


def test_a_full_disk_is_an_error_and_leaves_no_file(tmp_path):
    for tensors in ({"a": np.ones(3, np.float32)}, {"a": np.ones(1 << 20, np.float32)}):
        with full_disk(), pytest.raises(OSError):
            store(new_upload(tmp_path), tensors, "fp32", {})
        assert not list(tmp_path.iterdir())
