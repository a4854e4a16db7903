"""The client as a Flower ClientApp: for the in-process, Ray and SuperNode engines. No other client module knows Flower.

    app = client_app(session_of)      # session_of(context) -> the node's ClientSession

The message layout is that of `fedlora_strategies.messages`, which the client does not import.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedlora.plan import Refusal, RoundPlan, Tensors, Upload, round_from_scalars, upload_metrics
from fedlora.wire import packed, unpacked
from fedlora.wire.npy import from_npy, to_npy

REFUSED = 100
"""Flower error code of a refusal."""

log = logging.getLogger(__name__)


class Session(Protocol):
    """What the app needs of `fedlora_client.session.ClientSession`."""

    def run_round(self, plan: RoundPlan, tensors: Tensors) -> Upload | Refusal: ...


def train(message: Message, session: Session) -> Message:
    """Answer one order to train: decode it, run the round, encode the upload or the refusal.

    Raises:
        ValueError: the message is not an order of this FedLoRA version.
    """
    records = list(message.content.values())  # not Flower's `array_records`: it leaves reference cycles
    arrays = [record for record in records if isinstance(record, ArrayRecord)]
    configs = [record for record in records if isinstance(record, ConfigRecord)]
    if (len(records), len(arrays), len(configs)) != (2, 1, 1):
        raise ValueError("an order must carry exactly one ArrayRecord and one ConfigRecord; both sides need the same "
                         "FedLoRA version")
    plan = round_from_scalars(configs[0])
    wire_dtype = plan.run.wire_dtype
    received = {name: from_npy(array.data) for name, array in arrays[0].items()}
    answer = session.run_round(plan, unpacked(received, wire_dtype))
    if isinstance(answer, Refusal):
        return Message(Error(REFUSED, f"{answer.code}: {answer.detail}"), reply_to=message)
    sent = packed(answer.tensors, wire_dtype)
    content = RecordDict({
        "arrays": ArrayRecord({name: Array(str(array.dtype), array.shape, "numpy.ndarray", to_npy(array))
                               for name, array in sent.items()}),
        "config": ConfigRecord({"run_id": answer.run_id, "round": answer.round, "attempt": answer.attempt}),
        "metrics": MetricRecord({**upload_metrics(answer)}),
    })
    return Message(content, reply_to=message)


def client_app(session_of: Callable[[Context], Session]) -> ClientApp:
    """A ClientApp whose nodes train with `session_of(context)`.

    The text of an exception can quote private rows, and Flower sends it to the server: here it goes to the local log
    and the server learns only that the client is unavailable.
    """
    app = ClientApp()

    @app.train()
    def answer(message: Message, context: Context) -> Message:
        try:
            return train(message, session_of(context))
        except Exception:
            log.exception("The round failed; the server is told only that this client is unavailable.")
            return Message(Error(REFUSED, "unavailable: "), reply_to=message)

    return app
