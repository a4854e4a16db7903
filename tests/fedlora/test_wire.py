"""Tests of the wire format: the generated code fits the .proto, what is sent arrives, and all else is refused."""

import dataclasses
import filecmp
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given, settings
from hypothesis import strategies as st

import fedlora
from fedlora import wire
from fedlora.plan import (
    ANCHOR_BYTES,
    PROTOCOL,
    WIRE_DTYPES,
    ModelRef,
    Proposal,
    Refused,
    RoundPlan,
    RunPlan,
    Upload,
    to_scalars,
)
from fedlora.wire import CHUNK_BYTES, WireError, pb
from fedlora.wire.schema import canonical

RUN = RunPlan(
    run_id="0123456789abcdef", fedlora_version="0.1.0", strategy="fedsvd", family="frozen-a", private=True,
    model=ModelRef("local", "0" * 64, "1" * 64, "2" * 64), task="classification", labels=("no", "yes"), max_length=64,
    rank=8, alpha=16.0, targets=("query", "value"), train_head=True, dropout=0.0, rounds=3, max_participations=3,
    local_steps=2, expected_batch=32, optimizer="adamw", lr=0.01, clip_norm=1.0, adapter_scale=1.0, head_scale=0.5,
    weight_by_examples=False)

KEY = pb.Key(round=1, attempt=0)
HEAD = pb.ServerFrame(request=pb.TrainRequest(round=1)).SerializeToString()

shapes_strategy = st.dictionaries(st.text(min_size=1, max_size=8),
                                  st.lists(st.integers(1, 40), max_size=3).map(tuple), max_size=6)


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: np.asarray(generator.standard_normal(shape), np.float32) for name, shape in shapes.items()}


def frames_of(tensors, wire_dtype="fp32"):
    return wire.transfer_frames(HEAD, wire.packed(tensors, wire_dtype))


def receive(tensors, frames, wire_dtype="fp32"):
    """Receive a transfer's serialized frames; return (refusal or None, tensors)."""
    incoming, received = wire.receive_in_memory(wire.shapes_of(tensors), wire_dtype)
    says = []
    for data in frames:
        frame, chunk = wire.read_frame(pb.ServerFrame, data)
        says += [frame.WhichOneof("kind")] if frame else []
        if chunk is not None:
            incoming.add(chunk[0])
        ended = 0 if says[-1] == "end" else chunk and chunk[1]
        if ended is not None:
            assert says == ["request", "end"][:len(says)]
            return incoming.finish(ended), wire.unpacked(received, wire_dtype)
    raise AssertionError("no checksum")


def test_the_generated_code_is_that_of_the_proto(tmp_path):
    root = Path(fedlora.__file__).parents[1]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{root}", f"--python_out={tmp_path}",
                    f"--pyi_out={tmp_path}", str(root / "fedlora/wire/fedlora.proto")], check=True)
    for name in ("fedlora_pb2.py", "fedlora_pb2.pyi"):
        assert filecmp.cmp(tmp_path / "fedlora/wire" / name, root / "fedlora/wire" / name, shallow=False), (
            f"{name} is out of date: python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. "
            "fedlora/wire/fedlora.proto")


def test_the_proto_has_exactly_the_fields_of_the_plan():
    newest = dataclasses.replace(RUN, family_options=(("k", 1.0),), ranks=(("q", 3),))
    fields = {f.name: (f.type, f.is_repeated) for f in pb.RunPlan.DESCRIPTOR.fields}
    kinds = {bool: FieldDescriptor.TYPE_BOOL, int: FieldDescriptor.TYPE_INT64, float: FieldDescriptor.TYPE_DOUBLE,
             str: FieldDescriptor.TYPE_STRING}
    assert fields == {name: (kinds[type(value[0] if isinstance(value, list) else value)], isinstance(value, list))
                      for name, value in to_scalars(newest).items()}
    assert list(fields) == list(to_scalars(newest))


PUBLISHED = {5: "180033d786f88ed0e0a5c13ce83c658fe9e28af713b988b1fbbdeecd52371a28",
             6: "43a53f96f263b14a4585abfaa54c5f01fa561824302accf32086ea36dc9fc3fc",
             7: "3407d55c4c8ce7848773e463f7a424637e9e92b534b674e1cc64e94ae25bc767",
             8: "de29876a5269dc834e94115f60c033e20fd6697b209fcf010bb1e7c3981d8963"}
"""Protocol number → digest of the .proto with which it was published."""


def test_the_proto_does_not_change_without_the_protocols_number():
    assert wire.SCHEMA.hex() == PUBLISHED.get(PROTOCOL), (
        f"fedlora.proto no longer is that of protocol {PROTOCOL}, and whoever speaks it is refused: raise PROTOCOL in "
        f"fedlora/plan/limits.py (and see whether CONTINUED still holds), then add the line {PROTOCOL + 1}: "
        f"{wire.SCHEMA.hex()!r} to PUBLISHED. A line that was published is never changed")


def dynamic(change):
    """Return the message classes of a changed .proto, made without protoc."""
    file = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(file)
    change({message.name: message for message in file.message_type})
    return DescriptorPool().AddSerializedFile(file.SerializeToString())


def add_field(messages):
    messages["Tensor"].field.add(name="owner", number=3, type=9, label=1)


def take_presence_away(messages):
    chunk = messages["Chunk"]
    chunk.ClearField("oneof_decl")
    chunk.field[1].ClearField("oneof_index")
    chunk.field[1].ClearField("proto3_optional")


def leave_the_oneof(messages):
    messages["ServerFrame"].field[0].ClearField("oneof_index")


@pytest.mark.parametrize("change", [
    add_field, take_presence_away, leave_the_oneof, lambda messages: messages["RunPlan"].field.pop(),
    lambda messages: setattr(messages["Key"].field[0], "number", 7),
    lambda messages: setattr(messages["Key"].field[0], "name", "turn"),
    lambda messages: setattr(messages["Key"].field[0], "type", 4),
    lambda messages: setattr(messages["Tensor"].field[0], "label", 3)],
    ids=["added", "presence", "oneof", "removed", "number", "name", "type", "repeated"])
def test_the_schemas_digest_depends_on_all_that_decides_how_bytes_are_read(change):
    assert canonical(dynamic(change)) != canonical(pb.DESCRIPTOR) == canonical(dynamic(lambda messages: None))


def test_the_schemas_digest_does_not_depend_on_the_order_of_the_file():
    def reverse(messages):
        fields = [*reversed(messages["RunPlan"].field)]
        del messages["RunPlan"].field[:]
        messages["RunPlan"].field.extend(fields)

    assert canonical(dynamic(reverse)) == canonical(pb.DESCRIPTOR)


def test_a_field_that_this_version_does_not_know_is_refused_at_any_depth():
    newer = dynamic(add_field).message_types_by_name
    task = GetMessageClass(newer["ServerFrame"])(request=dict(tensors=[dict(name="a", shape=[3], owner="me")]))
    upload = GetMessageClass(newer["ClientFrame"])(upload=dict(tensors=[dict(name="a", shape=[3], owner="me")]))
    for kind, frame in ((pb.ServerFrame, task), (pb.ClientFrame, upload)):
        for sent in (frame.SerializeToString(), b"\x22\x06\x0a\x04abcd" + frame.SerializeToString()):
            with pytest.raises(WireError, match="does not know"):
                wire.read_frame(kind, sent)


@pytest.mark.parametrize("frame", [
    pb.ClientFrame(join=pb.Join(protocol=PROTOCOL + 1)), pb.ClientFrame(join=pb.Join(protocol=PROTOCOL)),
    pb.ServerFrame(welcome=pb.Welcome(protocol=PROTOCOL + 1, schema=wire.SCHEMA)),
    pb.ServerFrame(refused=pb.Refusal(code="version-mismatch"))], ids=range(4))
def test_another_version_is_heard_out_before_its_unknown_fields_are_refused(frame):
    """Otherwise neither side could name the two versions in its answer."""
    read, _ = wire.read_frame(type(frame), frame.SerializeToString() + b"\xa0\x06\x01")
    assert read == frame


@pytest.mark.parametrize("frame", [
    pb.ClientFrame(join=pb.Join(protocol=PROTOCOL, schema=wire.SCHEMA)), Proposal, pb.ServerFrame(refused=pb.Refusal(
        code="policy")), pb.ClientFrame(ready=pb.Ready()), pb.ClientFrame(chunk=pb.Chunk(data=b"abcd"))], ids=range(5))
def test_nobody_else_may_say_what_this_version_does_not_know(frame):
    if frame is Proposal:
        frame = pb.ServerFrame(welcome=wire.proposal_to_wire(Proposal(RUN)))
    with pytest.raises(WireError, match="does not know"):
        wire.read_frame(type(frame), frame.SerializeToString() + b"\xa0\x06\x01")


def test_a_round_plan_survives_the_wire():
    plan = RoundPlan(dataclasses.replace(RUN, wire_dtype="bf16"), 2, 1, "a" * 64, ("x",), (("k", 1), ("q", 3)))
    data = wire.request_to_wire(plan, {"x": (2, 3)}).SerializeToString()
    task = pb.TrainRequest.FromString(data)
    assert wire.plan_from_wire(task) == plan
    assert wire.shapes_from(task.tensors) == {"x": (2, 3)}


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.sampled_from([{"x": (2, 3)}, {"x": (2, 3), "y": (1,)}])),
                max_size=6), st.integers(1, 9))
def test_what_a_stream_said_before_is_left_out_and_the_other_end_knows_it(orders, first):
    sent, received = wire.Repeats(), wire.Repeats()
    before = None
    for number, (digit, shapes) in enumerate(orders, start=first):
        task = wire.request_to_wire(RoundPlan(RUN, number, 0, 64 * digit), shapes)
        short = sent.shorten(task)
        assert received.restore(pb.TrainRequest.FromString(short.SerializeToString())) == task
        assert short.HasField("run") == (before is None)
        assert (len(short.SerializeToString()) < 20) == (before == (digit, shapes))
        before = digit, shapes


def test_an_upload_states_its_noise_once_on_a_stream_until_it_changes():
    sent, received = wire.Repeats(), wire.Repeats()
    for number, (noise, said) in enumerate([(1.0, True), (1.0, False), (1.5, True), (1.5, False)]):
        upload = wire.upload_to_wire(Upload(RUN.run_id, number, 0, {}, steps=2, delta=1e-5, noise_multiplier=noise))
        short = sent.shorten(upload)
        assert received.restore(pb.Upload.FromString(short.SerializeToString())) == upload
        assert short.HasField("noise_multiplier") == said and short.steps == 2


def test_a_stream_that_leaves_out_what_it_never_said_is_refused():
    with pytest.raises(WireError):
        wire.plan_from_wire(wire.Repeats().restore(pb.TrainRequest(round=1)))
    with pytest.raises(Refused, match="missing"):
        wire.check_shapes(wire.shapes_from(wire.Repeats().restore(pb.Upload(key=KEY, steps=1)).tensors), {"a": (3,)})


def test_a_proposal_survives_the_wire_with_every_value_of_its_plan():
    newest = dataclasses.replace(RUN, wire_dtype="bf16", family_options=(("blocks", 4.0),), ranks=(("layer.0.q", 3),),
                                 adjustment="momentum")
    for plan in (RUN, RUN.with_open_labels(), newest):
        for anchor in (None, b"", bytes(ANCHOR_BYTES)):
            proposal = Proposal(plan, anchor)
            sent = wire.proposal_to_wire(proposal).SerializeToString()
            assert wire.proposal_from_wire(pb.Welcome.FromString(sent)) == proposal
            assert proposal.announce_labels == (not plan.labels)


def test_a_round_with_open_labels_is_refused():
    with pytest.raises(WireError, match="labels are open"):
        wire.plan_from_wire(pb.TrainRequest(run=wire.proposal_to_wire(Proposal(RUN.with_open_labels())).run, round=1,
                                            frozen_sha256="a" * 64))


def test_an_anchor_has_one_length_on_the_wire():
    upload = Upload(RUN.run_id, 1, 0, {}, steps=1)
    for anchor in (b"", bytes(ANCHOR_BYTES)):
        assert wire.anchor_from_wire(wire.upload_to_wire(dataclasses.replace(upload, anchor=anchor))) == anchor
    for length in (1, ANCHOR_BYTES - 1, ANCHOR_BYTES + 1, 1000):
        with pytest.raises(WireError, match=f"{length} bytes"):
            wire.anchor_from_wire(pb.Upload(anchor=bytes(length)))
        welcome = wire.proposal_to_wire(Proposal(RUN))
        welcome.anchor = bytes(length)
        with pytest.raises(WireError, match=f"{length} bytes"):
            wire.proposal_from_wire(welcome)


def test_a_run_that_was_begun_by_the_version_before_is_proposed_in_this_ones_words():
    begun = dataclasses.replace(RUN, protocol=PROTOCOL - 1)
    welcome = wire.proposal_to_wire(Proposal(begun))
    assert welcome.protocol == PROTOCOL and wire.proposal_from_wire(welcome) == Proposal(begun)
    plan = RoundPlan(begun, 2, 0, "a" * 64)
    assert wire.plan_from_wire(wire.request_to_wire(plan, {})) == plan, "the plan is the one that clients know"
    for other in (PROTOCOL + 1, 3, 0):
        with pytest.raises(ValueError, match="protocol"):
            dataclasses.replace(RUN, protocol=other)


@given(shapes_strategy, st.sampled_from(WIRE_DTYPES))
def test_tensors_survive_the_wire(shapes, wire_dtype):
    tensors = draw(shapes)
    refusal, received = receive(tensors, frames_of(tensors, wire_dtype), wire_dtype)
    assert refusal is None and received.keys() == tensors.keys()
    arrived = wire.rounded(tensors, wire_dtype)
    assert all(np.array_equal(received[name], arrived[name]) for name in tensors)


@pytest.mark.parametrize("sizes", [(CHUNK_BYTES // 4,), (CHUNK_BYTES // 4 + 1, 7), (3, CHUNK_BYTES // 2, 1), (5, 6)])
def test_chunks_are_full_but_the_last_and_are_plain_protobuf(sizes):
    tensors = draw({f"t{i}": (size,) for i, size in enumerate(sizes)})
    sent = list(frames_of(tensors))
    frames = [pb.ServerFrame.FromString(frame) for frame in sent]
    chunks = [frame.chunk for frame in frames if frame.HasField("chunk")]
    lengths = [len(chunk.data) for chunk in chunks]
    assert sum(lengths) == 4 * sum(sizes) and all(length == CHUNK_BYTES for length in lengths[:-1])
    assert [chunk.HasField("checksum") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert [frame.HasField("request") for frame in frames] == [True] + [False] * (len(frames) - 1)
    assert sum(map(len, sent)) == sum(frame.ByteSize() for frame in frames)
    assert receive(tensors, sent)[0] is None


@pytest.mark.parametrize(("size", "head", "frames"), [
    (CHUNK_BYTES // 4, 10, 1), (CHUNK_BYTES // 4 + 1, 10, 3), (1, CHUNK_BYTES, 2)])
def test_a_small_transfer_is_one_frame_and_none_is_above_the_limit(size, head, frames):
    head = pb.ServerFrame(request=pb.TrainRequest(frozen_sha256="a" * head)).SerializeToString()
    sent = list(wire.transfer_frames(head, draw({"a": (size,)})))
    assert len(sent) == frames and max(map(len, sent)) < wire.MAX_FRAME_BYTES


def test_a_transfer_of_no_tensors_is_an_end():
    head, end = frames_of({})
    assert head == HEAD and pb.ServerFrame.FromString(end).WhichOneof("kind") == "end"


frames_strategy = st.builds(
    lambda data, checksum, says: pb.ClientFrame(chunk=pb.Chunk(data=data, checksum=checksum), **says), st.binary(
        max_size=300), st.none() | st.integers(0, 2**64 - 1), st.sampled_from([{}, {"upload": pb.Upload(steps=3)}]))


@given(st.binary(max_size=40) | frames_strategy.map(lambda frame: frame.SerializeToString()), st.integers(0, 40))
def test_whatever_is_read_is_what_protobuf_reads(data, cut):
    for sent in (data, data[:-cut or None], data[-cut:] + data[:-cut or None]):
        try:
            frame, chunk = wire.read_frame(pb.ClientFrame, sent)
        except WireError:
            continue
        whole = pb.ClientFrame.FromString(sent)
        assert whole.HasField("chunk") == (chunk is not None)
        if chunk is not None:
            theirs = whole.chunk.checksum if whole.chunk.HasField("checksum") else None
            assert (bytes(chunk[0]), chunk[1]) == (whole.chunk.data, theirs)
        assert (frame.WhichOneof("kind") if frame else None) == whole.WhichOneof("kind")


@given(frames_strategy)
def test_protobufs_own_frames_and_ours_are_read_alike(frame):
    says = pb.ClientFrame()
    says.CopyFrom(frame)
    says.ClearField("chunk")
    ours = pb.ClientFrame(chunk=frame.chunk).SerializeToString() + says.SerializeToString()  # our order: chunk first
    for sent in (frame.SerializeToString(), ours):
        read, chunk = wire.read_frame(pb.ClientFrame, sent)
        assert chunk == (frame.chunk.data, frame.chunk.checksum if frame.chunk.HasField("checksum") else None)
        assert read == (says if says.WhichOneof("kind") else None) or read.upload == says.upload
        with pytest.raises(WireError, match="chunk"):
            wire.parse(pb.ClientFrame, sent)


@given(shapes_strategy, st.randoms())
def test_the_digest_does_not_depend_on_the_order(shapes, random):
    tensors = draw(shapes)
    shuffled = list(tensors.items())
    random.shuffle(shuffled)
    assert wire.tensors_digest(dict(shuffled)) == wire.tensors_digest(tensors)


@settings(deadline=None)
@given(shapes_strategy, st.sampled_from(WIRE_DTYPES), st.sampled_from((3, 7, 1001)))
def test_the_digest_of_pieces_is_that_of_the_values_that_arrive(shapes, wire_dtype, size):
    tensors = draw(shapes)
    arrays = wire.packed(tensors, wire_dtype)
    sent = b"".join(arrays[name].tobytes() for name in sorted(arrays))
    digest = wire.TensorsDigest(wire.shapes_of(tensors), wire_dtype)
    for start in range(0, len(sent), size):
        digest.add(memoryview(sent)[start:start + size])
    assert digest.hexdigest() == wire.tensors_digest(wire.rounded(tensors, wire_dtype))


def test_the_digest_depends_on_names_shapes_and_values():
    zeros = np.zeros((2, 3), np.float32)
    variants = [{"x": zeros}, {"y": zeros}, {"x": zeros.T}, {"x": zeros + 1}, {"x": zeros[:1], "y": zeros[1:]}, {}]
    assert len({wire.tensors_digest(tensors) for tensors in variants}) == len(variants)
    strided = np.arange(12, dtype=np.float32).reshape(3, 4).T
    assert wire.tensors_digest({"x": strided}) == wire.tensors_digest({"x": np.ascontiguousarray(strided)})


def test_only_tensors_of_float32_are_packed_and_only_arrays_of_the_runs_dtype_unpacked():
    for wrong in (wire.tensors_digest, lambda it: list(wire.transfer_frames(HEAD, it)),
                  partial(frames_of, wire_dtype="bf16")):
        with pytest.raises(ValueError, match="float64"):
            wrong({"x": np.zeros(3)})
    for wire_dtype, other in (("fp32", "bf16"), ("bf16", "fp32")):
        with pytest.raises(ValueError, match=wire_dtype):
            wire.unpacked(wire.packed(draw({"x": (3,)}), other), wire_dtype)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_bfloat16_is_rounded_to_nearest_ties_to_even_as_torch_does(bits):
    edges = [0, 0x80000000, 0x3F808000, 0x3F818000, 0x3F808001, 0x00000001, 0x7F7FFFFF, 0x7F800000, 0xFF800000]
    values = np.array(bits + edges, "<u4").view("<f4")
    with np.errstate(invalid="ignore"):
        ours = wire.rounded({"x": values}, "bf16")["x"]
    theirs = torch.from_numpy(values).bfloat16().float().numpy()
    assert np.array_equal(np.isnan(ours), np.isnan(theirs))
    number = ~np.isnan(ours)
    assert np.array_equal(ours[number].view("<u4"), theirs[number].view("<u4"))
    once, twice = (wire.packed({"x": x[number]}, "bf16")["x"] for x in (values, ours))
    assert np.array_equal(once, twice)


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_with_its_tensors_name(bad, wire_dtype):
    tensors = draw({"a": (5,), "b": (CHUNK_BYTES // 2,), "c": (9,)})
    tensors["c"][8] = bad
    refusal, _ = receive(tensors, frames_of(tensors, wire_dtype), wire_dtype)
    assert refusal.code == "invalid-tensors" and refusal.detail.startswith("c ")


def test_a_changed_bit_is_refused():
    tensors = draw({"a": (50,)})
    [frame] = frames_of(tensors)
    for place in (-1, -12):  # a byte of the checksum, a byte of the last value
        changed = bytearray(frame)
        changed[place - len(HEAD)] ^= 1
        refusal, _ = receive(tensors, [bytes(changed)])
        assert refusal.code == "invalid-tensors"


def test_too_many_too_few_and_broken_bytes_end_the_transfer():
    for wire_dtype, width in (("fp32", 4), ("bf16", 2)):
        incoming, _ = wire.receive_in_memory({"a": (4,)}, wire_dtype)
        incoming.add(memoryview(bytes(3 * width)))
        with pytest.raises(WireError, match=f"{3 * width} of {4 * width}"):
            incoming.finish(0)
        for data in (bytes(2 * width), bytes(width - 1), b""):
            with pytest.raises(WireError):
                incoming.add(memoryview(data))


@pytest.mark.parametrize("header", [
    [("b", [1]), ("a", [1])], [("a", [1]), ("a", [1])], [("", [1])], [("a", [0])], [("a", [-1])], [("a", [1] * 9)]])
def test_a_header_must_be_sorted_unique_and_of_real_shapes(header):
    with pytest.raises(WireError):
        wire.shapes_from([pb.Tensor(name=name, shape=shape) for name, shape in header])


def test_headers_are_refused_before_anything_is_read():
    for shapes in ({}, {"a": (2,)}, {"a": (1 << 40,)}, {"a": (3,), "b": (1,)}):
        with pytest.raises(Refused, match="invalid-tensors"):
            wire.check_shapes(shapes, {"a": (3,)})
    wire.check_shapes({"a": (3,)}, {"a": (3,)})


def test_a_private_upload_discloses_nothing_that_is_not_noised():
    def upload(**metrics):
        return wire.upload_to_wire(Upload(RUN.run_id, 1, 0, {}, steps=2, **metrics))

    noised = {"delta": 1e-5, "noise_multiplier": 1.0}
    assert wire.metrics_from_wire(upload(**noised), private=True) == {"steps": 2, **noised}
    assert wire.metrics_from_wire(upload(), private=True) == {"steps": 2}, "announce-size = false"
    for metrics in ({"delta": 1e-5}, {"noise_multiplier": 1.0}, {**noised, "num_examples": 7},
                    {**noised, "train_loss": 0.5}, {**noised, "delta": 0.0}, {**noised, "noise_multiplier": 0.0}):
        with pytest.raises(Refused, match="privacy-mismatch"):
            wire.metrics_from_wire(upload(**metrics), private=True)
    with pytest.raises(WireError):
        wire.metrics_from_wire(upload(train_loss=float("nan")), private=False)


def test_text_of_the_other_side_cannot_steer_a_terminal():
    assert wire.clean("\x1b[2Jboo\n") == " [2Jboo "
    with pytest.raises(WireError):
        wire.labels_from_wire(["ok", "\x1b[31m"])


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_decode_to_a_value_or_a_wire_error(data):
    for kind in (pb.ClientFrame, pb.ServerFrame):
        try:
            wire.parse(kind, data)
        except WireError:
            continue
    for kind, decode in ((pb.TrainRequest, wire.plan_from_wire), (pb.Welcome, wire.proposal_from_wire),
                         (pb.Refusal, wire.refusal_from_wire), (pb.Ready, lambda m: wire.labels_from_wire(m.labels)),
                         (pb.Upload, lambda m: wire.shapes_from(m.tensors))):
        try:
            message = kind.FromString(data)
        except Exception:
            continue
        try:
            decode(message)
        except (WireError, Refused):
            continue


@pytest.mark.parametrize(("address", "loopback"), [
    ("127.0.0.1:9092", True), ("127.8.8.8:1", True), ("localhost:9092", True), ("[::1]:9092", True),
    ("0.0.0.0:9092", False), ("10.0.0.1:9092", False), ("example.org:9092", False), ("[::]:9092", False)])
def test_plaintext_stays_on_this_machine(address, loopback):
    assert wire.is_loopback(address) == loopback


@pytest.mark.parametrize("address", ["127.0.0.1", ":9092", "host:", "host:http", "host:99999", ""])
def test_an_address_is_host_and_port(address):
    with pytest.raises(ValueError, match="host:port"):
        wire.is_loopback(address)
