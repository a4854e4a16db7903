"""The client as a Flower ClientApp, which a SuperNode runs. No other module of the client imports Flower.

    app = client_app(session_of)      # session_of(context) returns the node's ClientSession, or a whole `Node`

The `app` of this module is what a SuperNode runs; its node configuration consists of the options of fedlora-client.
Messages have the layout of `fedlora_strategies.messages`, which the client does not import.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import fedlora
from fedlora.config import ClientConfig, config_from
from fedlora.plan import (
    PROTOCOL,
    Proposal,
    Refusal,
    Refused,
    RoundPlan,
    Tensors,
    Upload,
    round_from_scalars,
    upload_metrics,
)
from fedlora.wire import SCHEMA, packed, parse, pb, proposal_from_wire, unpacked
from fedlora.wire.npy import from_npy, to_npy

from .supernode import SuperNodeClient

REFUSED = 100
"""Flower error code that marks a refusal."""

log = logging.getLogger(__name__)


class Session(Protocol):
    """The part of `fedlora_client.session.ClientSession` that the app uses."""

    def run_round(self, plan: RoundPlan, tensors: Tensors) -> Upload | Refusal:
        """Train once for `plan`, starting from `tensors`; return what may be sent."""


class Node(Session, Protocol):
    """A session that also joins a server by name, such as `fedlora_client.supernode.SuperNodeClient`.

    Attributes:
        name: the client's name at the server.
        private: whether the client trains under differential privacy.
    """

    name: str
    private: bool

    def join(self, proposal: Proposal) -> tuple[str, ...] | Refusal:
        """Return the label names that are disclosed to the server, or why this client does not take part."""


def join(message: Message, node: Node) -> Message:
    """Answer a server's welcome: with the frames Join and Ready, as over gRPC, or with a refusal.

    Args:
        message: Flower's message with the Welcome frame.
        node: the client.

    Raises:
        Refused: the server speaks another version of the protocol.
        ValueError: the message is not a welcome.
    """
    [config] = message.content.values()
    if set(config) != {"welcome"}:
        raise ValueError(f"a welcome holds exactly one frame, not {sorted(config)}; both sides need the same FedLoRA "
                         "version")
    frame = parse(pb.ServerFrame, config["welcome"])  # type: ignore[arg-type]
    answer = node.join(proposal_from_wire(frame.welcome))
    if isinstance(answer, Refusal):
        return _refused(answer, message)
    joining = pb.Join(protocol=PROTOCOL, schema=SCHEMA, fedlora_version=fedlora.__version__, name=node.name,
                      private=node.private, process=message.metadata.dst_node_id.to_bytes(16, "big"))
    frames = {"join": pb.ClientFrame(join=joining), "ready": pb.ClientFrame(ready=pb.Ready(labels=answer))}
    config = ConfigRecord({key: frame.SerializeToString() for key, frame in frames.items()})
    return Message(RecordDict({"config": config}), reply_to=message)


def train(message: Message, session: Session) -> Message:
    """Answer one order to train: decode it, run the round, and encode the upload or the refusal.

    Args:
        message: Flower's message with the plan and the tensors.
        session: the client.

    Raises:
        ValueError: the message is not an order of this FedLoRA version.
    """
    records = list(message.content.values())  # Flower's own `array_records` leaves reference cycles
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
        return _refused(answer, message)
    sent = packed(answer.tensors, wire_dtype)
    content = RecordDict({
        "arrays": ArrayRecord({name: Array(str(array.dtype), array.shape, "numpy.ndarray", to_npy(array))
                               for name, array in sent.items()}),
        "config": ConfigRecord({"run_id": answer.run_id, "round": answer.round, "attempt": answer.attempt}),
        "metrics": MetricRecord({**upload_metrics(answer)}),
    })
    return Message(content, reply_to=message)


def client_app(session_of: Callable[[Context], Session]) -> ClientApp:
    """Return a Flower ClientApp that answers with `session_of(context)`; it answers welcomes too if that is a `Node`.

    Flower sends the text of an exception to the server, and that text can quote private rows. Here it is written to the
    local log, and the server learns only that the client is unavailable.

    Args:
        session_of: returns the session of the node that a Flower context belongs to.
    """
    app = ClientApp()

    def answering(answer: Callable[[Message, Any], Message]) -> Callable[[Message, Context], Message]:
        def answered(message: Message, context: Context) -> Message:
            try:
                return answer(message, session_of(context))
            except Refused as refused:
                return _refused(refused.refusal, message)
            except Exception:
                log.exception("The server's message cannot be answered, for the reason below; the server is told only "
                              "that this client is unavailable.")
                return _refused(Refusal("unavailable"), message)

        return answered

    app.query()(answering(join))
    app.train()(answering(train))
    return app


def _refused(refusal: Refusal, message: Message) -> Message:
    return Message(Error(REFUSED, f"{refusal.code}: {refusal.detail}"), reply_to=message)


def _supernode(context: Context) -> SuperNodeClient:
    return SuperNodeClient(config_from({"server": "SuperLink", **context.node_config}, ClientConfig, "--node-config"))


app = client_app(_supernode)
