"""Round plans and uploads as Flower messages.

Flower 1.41 can make a `Message` only in a process in which `TaskIdentity` is set, and leaves the message's id to its
SuperLink. FedLoRA's own engines run without Flower's processes, so `assume_identity` and `assign_id` set both. These
are private names of Flower; `tests/test_private_names.py` lists every such use and fails if Flower changes them.

    server → client   one ArrayRecord "arrays", one ConfigRecord "config": the fields of `RoundPlan`
    client → server   one ArrayRecord "arrays", one ConfigRecord "config": `UPLOAD_KEY`,
                      one MetricRecord "metrics": keys of `UPLOAD_METRICS`; or an Error whose reason is a refusal code

If the clients are SuperNodes, each is asked to join before its first order, with the same frames as over gRPC:

    server → client   one ConfigRecord "config": `WELCOME_KEY`, a ServerFrame with the Welcome
    client → server   one ConfigRecord "config": `JOIN_KEYS`, two ClientFrames with the Join and the Ready; or an Error

The arrays have the plan's wire dtype (`fedlora.wire.dtypes`). The client's half of the mapping is
`fedlora_client.flower_app`; tests check that the two fit together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode  # private
from flwr.supercore.task_identity import TaskIdentity  # private

from fedlora.plan import (
    REFUSALS,
    UPLOAD_METRICS,
    Refusal,
    Released,
    RoundPlan,
    Tensors,
    Upload,
    round_from_scalars,
    round_to_scalars,
    upload_metrics,
)
from fedlora.wire import packed, unpacked
from fedlora.wire.npy import from_npy, to_npy

UPLOAD_KEY: Mapping[str, type] = {"run_id": str, "round": int, "attempt": int}
"""The fields that identify the order which an upload answers."""

REFUSED = 100
"""Flower error code of a refusal; Flower's own codes are below 10."""

TRAIN, JOIN = MessageType.TRAIN, MessageType.QUERY

WELCOME_KEY, JOIN_KEYS = "welcome", ("join", "ready")

NUMPY = "numpy.ndarray"
"""Flower's name for the serialisation of arrays in the .npy format."""


def assume_identity(run_id: str) -> None:
    """Let this process make messages, as Flower's own processes can.

    Args:
        run_id: The run's id, 16 hexadecimal digits.
    """
    TaskIdentity.task_id = 0
    TaskIdentity.node_id = 0
    TaskIdentity.run_id = int(run_id, 16)


def assign_id(message: Message, message_id: str) -> None:
    """Give a message its id, which the reply will refer to."""
    message.metadata.__dict__["_message_id"] = message_id  # private


def to_record(tensors: Tensors, wire_dtype: str = "fp32") -> ArrayRecord:
    """Serialise tensors in C order.

    Args:
        tensors: The tensors, by name.
        wire_dtype: The dtype to send floats in: "fp32" or "bf16".

    Returns:
        A record that several messages may share, because its arrays are immutable bytes.
    """
    return record_of((name, array.dtype, array.shape, to_npy(array))
                     for name, array in packed(tensors, wire_dtype).items())


def record_of(arrays: Iterable[tuple[str, np.dtype, tuple[int, ...], bytes | memoryview]]) -> ArrayRecord:
    """Make a record of arrays that are in the .npy format already.

    It bypasses the checks of Flower's constructors. They take longer than everything else about a small reply, and they
    refuse a view of memory. Flower's own code can read such a record.

    Args:
        arrays: The name, dtype, shape and .npy data of each array.
    """
    record = ArrayRecord()
    record.__dict__["_data"].update((name, _to_array(dtype, shape, data)) for name, dtype, shape, data in arrays)
    return record


def _to_array(dtype: np.dtype, shape: tuple[int, ...], data: bytes | memoryview) -> Array:
    made = Array.__new__(Array)
    made.__dict__.update(dtype=_name_of(dtype), shape=shape, stype=NUMPY, data=data)
    return made


@lru_cache
def _name_of(dtype: np.dtype) -> str:
    return str(dtype)


def to_tensors(record: ArrayRecord, wire_dtype: str = "fp32") -> Tensors:
    """Decode every array of a record. It is the inverse of `to_record`, except for rounding.

    Args:
        record: The record.
        wire_dtype: The dtype that floats were sent in: "fp32" or "bf16".

    Raises:
        ValueError: An array is not what it claims to be, would need code to be decoded, or has another dtype.
    """
    return unpacked(to_arrays(record), wire_dtype)


def to_arrays(record: ArrayRecord) -> Tensors:
    """Decode every array of a record without converting its dtype.

    Returns:
        The arrays in C order, read-only, and if possible without a copy.

    Raises:
        ValueError: An array is not what it claims to be, or would need code to be decoded.
    """
    if any(array.stype != NUMPY for array in record.values()):
        raise ValueError("an array of the message is not a numpy array; nothing else is accepted")
    try:
        return {name: from_npy(array.data) for name, array in record.items()}
    except ValueError as error:
        raise ValueError("an array of the message cannot be decoded; only plain numpy arrays are accepted") from error


def train_messages(plan: RoundPlan, arrays: Iterable[tuple[int, ArrayRecord]]) -> Iterator[Message]:
    """Make the orders to train. They share one ConfigRecord, and may share ArrayRecords.

    Args:
        plan: The round's plan.
        arrays: The id of each node, with the tensors that it is sent.

    Yields:
        One order for each node.
    """
    config = ConfigRecord({**round_to_scalars(plan)})
    for node_id, record in arrays:
        content = RecordDict({"arrays": record, "config": config})
        yield Message(content=content, dst_node_id=node_id, message_type=TRAIN, group_id=str(plan.round))


def train_message(plan: RoundPlan, arrays: ArrayRecord, node_id: int) -> Message:
    """Make the order to train for one node."""
    return next(train_messages(plan, [(node_id, arrays)]))


def read_train_messages(messages: Iterable[Message]) -> Iterator[tuple[Message, RoundPlan, Tensors]]:
    """Read orders to train. It is the inverse of `train_messages`; a record that orders share is decoded once.

    Args:
        messages: The orders.

    Yields:
        (the order, its plan, its arrays as they were sent)

    Raises:
        ValueError: An order does not hold exactly one ArrayRecord and one ConfigRecord with `RoundPlan`'s fields, or an
            array is not what it claims to be.
    """
    # the records are kept too, because Python gives the id of a deleted object to a new one
    plans: dict[int, tuple[ConfigRecord, RoundPlan]] = {}
    decoded: dict[int, tuple[ArrayRecord, Tensors]] = {}
    for message in messages:
        if message.metadata.message_type != TRAIN:
            raise ValueError(f"message type {message.metadata.message_type!r} is not supported; only {TRAIN!r} is")
        try:
            arrays, config = _records(message.content, ArrayRecord, ConfigRecord)
        except ValueError as error:
            raise ValueError(f"an order must carry {error}") from None
        if id(config) not in plans:
            plans[id(config)] = config, round_from_scalars(config)
        if id(arrays) not in decoded:
            decoded[id(arrays)] = arrays, to_arrays(arrays)
        yield message, plans[id(config)][1], decoded[id(arrays)][1]


def reply(answer: Upload | Refusal, to: Message, wire_dtype: str = "fp32",
          arrays: ArrayRecord | None = None) -> Message:
    """Make the reply to an order from a client's answer.

    Args:
        answer: The client's upload or refusal.
        to: The order.
        wire_dtype: The dtype to send floats in: "fp32" or "bf16".
        arrays: The upload's tensors, if they are serialised already; None serialises those of `answer`.
    """
    if isinstance(answer, Refusal):
        return Message(Error(REFUSED, f"{answer.code}: {answer.detail}"), reply_to=to)
    content = RecordDict({
        "arrays": to_record(answer.tensors, wire_dtype) if arrays is None else arrays,
        "config": ConfigRecord({name: getattr(answer, name) for name in UPLOAD_KEY}),
        "metrics": MetricRecord({**upload_metrics(answer)}),
    })
    return Message(content, reply_to=to)


def join_message(welcome: bytes, node_id: int) -> Message:
    """Make the message that asks a node to join, with the Welcome that it decides by.

    Args:
        welcome: A serialised ServerFrame with the Welcome.
        node_id: The node.
    """
    content = RecordDict({"config": ConfigRecord({WELCOME_KEY: welcome})})
    return Message(content=content, dst_node_id=node_id, message_type=JOIN, group_id="join")


def read_join_reply(message: Message) -> tuple[bytes, bytes] | Refusal:
    """Read the reply to `join_message`.

    Returns:
        The serialised ClientFrames with the Join and the Ready, or the node's refusal to take part.

    Raises:
        ValueError: The reply is no error and does not hold exactly one ConfigRecord with the two frames.
    """
    if message.has_error():
        return _refusal(message.error)
    [config] = _records(message.content, ConfigRecord)
    if set(config) != set(JOIN_KEYS) or not all(type(frame) is bytes for frame in config.values()):
        raise ValueError(f"the reply to a welcome must hold exactly the frames {', '.join(JOIN_KEYS)}")
    join, ready = (config[key] for key in JOIN_KEYS)
    return join, ready


def is_undelivered(message: Message) -> bool:
    """Return whether a reply is the SuperLink's own message that the node is gone."""
    return message.has_error() and message.error.code == ErrorCode.NODE_UNAVAILABLE


def read_reply(message: Message, wire_dtype: str = "fp32") -> Upload | Refusal:
    """Read a client's answer. It is the inverse of `reply`. The tensors are not checked against a layout yet.

    Args:
        message: The reply.
        wire_dtype: The dtype that floats were sent in: "fp32" or "bf16".

    Returns:
        The upload or the refusal. An error that is no refusal, such as that of an engine or of a crashed ClientApp,
        becomes the refusal "unavailable".

    Raises:
        ValueError: The reply is no error and does not hold exactly one record of each kind with an upload's keys.
    """
    if message.has_error():
        return _refusal(message.error)
    try:
        arrays, config, metrics = _records(message.content, ArrayRecord, ConfigRecord, MetricRecord)
    except ValueError as error:
        raise ValueError(f"a reply must carry {error}") from None
    if set(config) != set(UPLOAD_KEY) or any(type(config[name]) is not kind for name, kind in UPLOAD_KEY.items()):
        raise ValueError(f"a reply's ConfigRecord must hold exactly {', '.join(UPLOAD_KEY)}")
    if unknown := set(metrics) - set(UPLOAD_METRICS):
        raise ValueError(f"a reply discloses {sorted(unknown)}; only {', '.join(UPLOAD_METRICS)} may be sent")
    if type(metrics.get("steps")) is not int or any(isinstance(value, list) for value in metrics.values()):
        raise ValueError("a reply's metrics must be single numbers, among them the whole number of steps")
    return Upload(tensors=Released(to_tensors(arrays, wire_dtype)), **config, **metrics)


def _refusal(error: Error) -> Refusal:
    code, _, detail = (error.reason or "").partition(": ")
    known = error.code == REFUSED and code in REFUSALS
    return Refusal(code, detail) if known else Refusal("unavailable")


def _records(content: RecordDict, *kinds: type) -> list[Any]:
    """Return the content's records, one of each kind and in the order of `kinds`.

    Flower's own `array_records` and the like are not used: they leave reference cycles, which keep every upload in
    memory until the garbage collector runs.

    Raises:
        ValueError: The content is not exactly one record of each kind. The message completes "… must carry".
    """
    found = {type(record): record for record in content.values()}
    if len(content) != len(kinds) or set(found) != set(kinds):
        names = [kind.__name__ for kind in kinds]
        raise ValueError(f"exactly one each of {', '.join(names)}, not {[type(r).__name__ for r in content.values()]}")
    return [found[kind] for kind in kinds]
