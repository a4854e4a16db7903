"""Conversion between protobuf messages and the values of `fedlora.plan`. An invalid message raises `WireError`.

Text that a person will read (names, labels, details, reasons) could steer a terminal. It is refused or cleaned if it
holds characters that are not printable.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from typing import Any, TypeVar

from fedlora.plan import (
    LONGEST_LABEL,
    MOST_ANNOUNCED,
    MOST_LABELS,
    PROTOCOL,
    Proposal,
    Refusal,
    Refused,
    RoundPlan,
    RunPlan,
    Upload,
    check_anchor,
    from_scalars,
    to_scalars,
    upload_metrics,
)
from fedlora.plan.schema import SINCE, paired

from . import fedlora_pb2 as pb
from .schema import SCHEMA, SPOKEN, is_spoken, spoken_by
from .tensors import Shapes, WireError, header_of, shapes_of

SERVICE = "/fedlora.Federation/Session"
"""gRPC path of the one call, a stream in both directions."""
MAX_NAME, MAX_TEXT = 64, 2000
"""The most characters of a client's name, and of a text for a person."""
SECRET_BYTES = 32
"""Size of the secret with which a client proves that a name is its own."""
Key = tuple[str, int, int]
"""(run id, round, attempt): names one training."""
Headed = TypeVar("Headed", pb.TrainRequest, pb.Upload)


def proposal_to_wire(proposal: Proposal) -> pb.Welcome:
    """Return the Welcome that proposes a run, without a secret."""
    plan = proposal.plan
    return pb.Welcome(protocol=PROTOCOL, schema=SCHEMA, fedlora_version=plan.fedlora_version, run=run_to_wire(plan),
                      anchor=proposal.anchor)


def proposal_from_wire(welcome: pb.Welcome) -> Proposal:
    """Return the proposal in a server's Welcome.

    Raises:
        Refused: "version-mismatch", if the server speaks another version of the protocol or has another schema.
        WireError: the Welcome is not valid.
    """
    if not is_spoken(welcome):
        raise Refused("version-mismatch", f"the server runs FedLoRA {clean(welcome.fedlora_version)} "
                                          f"({spoken_by(welcome)}), this client {SPOKEN}")
    try:
        return Proposal(run_from_wire(welcome.run), welcome.anchor if welcome.HasField("anchor") else None)
    except ValueError as error:
        raise WireError(f"the server's welcome is not valid: {error}") from None


def labels_from_wire(labels: Collection[str], *, announced: bool = False) -> tuple[str, ...]:
    """Check and return label names.

    Args:
        labels: the names.
        announced: whether a client announced them; else they are a server's label set, of which more are allowed.

    Raises:
        WireError: there are too many, or a name is repeated, empty, too long or not printable.
    """
    most, longest = (MOST_ANNOUNCED, LONGEST_LABEL) if announced else (MOST_LABELS, 200)
    if len(labels) > most:
        raise WireError(f"there are {len(labels)} label names; at most {most} are allowed")
    if len(set(labels)) != len(labels) or not all(label and len(label) <= longest and label.isprintable()
                                                  for label in labels):
        raise WireError(f"a label is repeated, empty, longer than {longest} characters or not printable")
    return tuple(labels)


def run_to_wire(run: RunPlan) -> pb.RunPlan:
    """Return the message for a plan, field by field."""
    return pb.RunPlan(**to_scalars(run))  # type: ignore[arg-type]


def run_from_wire(message: pb.RunPlan) -> RunPlan:
    """Return the plan in a message. Raise ValueError if a value is not valid or a label cannot be shown."""
    labels_from_wire(message.labels)
    values = {f.name: list(getattr(message, f.name)) if f.is_repeated else getattr(message, f.name)
              for f in pb.RunPlan.DESCRIPTOR.fields}
    return from_scalars({name: value for name, value in values.items()
                         if value or SINCE.get(name, 0) <= message.protocol})


def request_to_wire(plan: RoundPlan, shapes: Shapes) -> pb.TrainRequest:
    """Return the TrainRequest for a round and the shapes of the tensors that follow it."""
    return pb.TrainRequest(run=run_to_wire(plan.run), round=plan.round, attempt=plan.attempt,
                           frozen_sha256=plan.frozen_sha256, tensors=header_of(shapes), active=plan.active,
                           prefix_sites=[name for name, _ in plan.prefixes],
                           prefix_ranks=[rank for _, rank in plan.prefixes], deadline_s=plan.left_s)


def plan_from_wire(request: pb.TrainRequest) -> RoundPlan:
    """Return the round's plan. Its deadline is counted from now, on this machine's monotonic clock.

    Raises:
        WireError: a value is not valid.
    """
    try:
        return RoundPlan(run=run_from_wire(request.run), round=request.round, attempt=request.attempt,
                         frozen_sha256=request.frozen_sha256, active=tuple(request.active),
                         prefixes=paired(request.prefix_sites, request.prefix_ranks, "prefix_sites", "prefix_ranks"),
                         until=time.monotonic() + request.deadline_s)
    except ValueError as error:
        raise WireError(f"the round's plan is not valid: {error}") from None


REPEATED = ("run", "frozen_sha256", "tensors", "delta", "noise_multiplier")
"""Fields of a TrainRequest or an Upload that are left out if they have not changed since the last one on the same
stream. A field that was sent once belongs to every later message, whether it is sent again or left out."""


class Repeats:
    """One end's memory of the last TrainRequest, or Upload, on a stream, so that unchanged fields travel once.

    Names, shapes and the plan would outweigh a small adapter. A stream keeps its order and ends when it breaks, so both
    ends remember the same. Each end uses one object for each kind of message.
    """

    def __init__(self) -> None:
        self._last: dict[str, Any] = {}

    def shorten(self, message: Headed) -> Headed:
        """Return the message to send: a copy without the fields that equal the last one's."""
        short = type(message)()
        short.CopyFrom(message)
        for name, value in self._news(message).items():
            if self._last.get(name) == value:
                short.ClearField(name)
            self._last[name] = value
        return short

    def restore(self, message: Headed) -> Headed:
        """Return a copy of a received message with the fields that were left out.

        A field that was never sent on this stream stays absent; later checks refuse the message then.
        """
        whole = type(message)()
        whole.CopyFrom(message)
        said = self._news(message)
        for name in self._last.keys() - said.keys():
            if name in ("run", "tensors"):
                getattr(whole, name).MergeFrom(self._last[name])
            else:
                setattr(whole, name, self._last[name])
        self._last |= said
        return whole

    def _news(self, message: Headed) -> dict[str, Any]:
        return {field.name: value for field, value in message.ListFields() if field.name in REPEATED}


def upload_to_wire(upload: Upload) -> pb.Upload:
    """Return the Upload message: key, anchor, scalars, and the header of the tensors that follow it."""
    return pb.Upload(key=key_to_wire((upload.run_id, upload.round, upload.attempt)), anchor=upload.anchor,
                     tensors=header_of(shapes_of(upload.tensors)), **upload_metrics(upload))  # type: ignore[arg-type]


def anchor_from_wire(upload: pb.Upload) -> bytes:
    """Return an upload's anchor, which no server can read; b"" if there is none. Raise WireError for a wrong length."""
    try:
        check_anchor(upload.anchor)
    except ValueError as error:
        raise WireError(str(error)) from None
    return upload.anchor


def metrics_from_wire(upload: pb.Upload, *, private: bool) -> dict[str, int | float]:
    """Return the scalars of an upload, by the names of `fedlora.plan.UPLOAD_METRICS`.

    Args:
        upload: the message.
        private: whether the run is private. Then only steps, delta and noise_multiplier are allowed; delta and
            noise_multiplier may both be absent.

    Raises:
        Refused: "privacy-mismatch", if an upload of a private run discloses more than it may, or states no noise.
        WireError: a value is not finite or out of range.
    """
    metrics: dict[str, int | float] = {"steps": upload.steps}
    for name in ("delta", "noise_multiplier", "num_examples", "train_loss"):
        if upload.HasField(name):
            metrics[name] = getattr(upload, name)
    if not all(math.isfinite(v) and (v >= 0 or k == "train_loss") for k, v in metrics.items()):
        raise WireError("a metric is not finite or is negative")
    unsaid = "noise_multiplier" not in metrics and "delta" not in metrics
    noised = unsaid or (metrics.get("noise_multiplier", 0) > 0 and 0 < metrics.get("delta", 0) < 1)
    if private and ("num_examples" in metrics or "train_loss" in metrics or not noised):
        raise Refused("privacy-mismatch", "a private upload carries steps, delta and noise_multiplier (both or "
                                          "neither), nothing else")
    return metrics


def key_to_wire(key: Key) -> pb.Key:
    """Return the message for a key; the run is known from the stream's Welcome and is not sent."""
    return pb.Key(round=key[1], attempt=key[2])


def key_from_wire(key: pb.Key, run_id: str) -> Key:
    """Return the key in a message, within the run that the stream's Welcome named."""
    return run_id, key.round, key.attempt


def refusal_to_wire(refusal: Refusal) -> pb.Refusal:
    """Return the message for a refusal, with its detail cut to `MAX_TEXT` characters."""
    return pb.Refusal(code=refusal.code, detail=refusal.detail[:MAX_TEXT])


def refusal_from_wire(refusal: pb.Refusal) -> Refusal:
    """Return the refusal in a message, with its detail made printable. Raise WireError if its code is unknown."""
    try:
        return Refusal(refusal.code, clean(refusal.detail))
    except ValueError:
        raise WireError("a refusal has a code that this version does not know") from None


def clean(text: str) -> str:
    """Return text from the other side made safe to print: characters that are not printable become blanks."""
    return "".join(c if c.isprintable() else " " for c in text[:MAX_TEXT])


def check_name(name: str) -> None:
    """Raise ValueError unless `name` can be a client's name."""
    if not (0 < len(name) <= MAX_NAME and name.isprintable() and name == name.strip()):
        raise ValueError(f"the client's name {name[:MAX_NAME]!r} has {len(name)} characters; --name must have 1 to "
                         f"{MAX_NAME} printable characters, and no space at either end")
