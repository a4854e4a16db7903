"""Messages to and from the values of `fedlora.plan`. Whatever does not decode to a valid value is a `WireError`.

Everything that a person will read (names, labels, details, reasons) is refused or cleaned where it holds characters
that could steer a terminal.
"""

from __future__ import annotations

import math
import time
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

from . import fedlora_pb2 as pb
from .schema import SCHEMA, SPOKEN, is_spoken, spoken_by
from .tensors import Shapes, WireError, header_of, shapes_of

SERVICE = "/fedlora.Federation/Session"
MAX_NAME, MAX_TEXT = 64, 2000
SECRET_BYTES = 32
"""Of what proves that a name is a client's own."""
Key = tuple[str, int, int]
Headed = TypeVar("Headed", pb.TrainRequest, pb.Upload)


def proposal_to_wire(proposal: Proposal) -> pb.Welcome:
    plan = proposal.plan
    return pb.Welcome(protocol=PROTOCOL, schema=SCHEMA, fedlora_version=plan.fedlora_version, run=run_to_wire(plan),
                      anchor=proposal.anchor)


def proposal_from_wire(welcome: pb.Welcome) -> Proposal:
    """What a server says of its run.

    Raises:
        Refused: "version-mismatch": it speaks another version of the protocol, or has another schema.
        WireError: it is not valid.
    """
    if not is_spoken(welcome):
        raise Refused("version-mismatch", f"the server runs FedLoRA {clean(welcome.fedlora_version)} "
                                          f"({spoken_by(welcome)}), this client {SPOKEN}")
    try:
        return Proposal(run_from_wire(welcome.run), welcome.anchor if welcome.HasField("anchor") else None)
    except ValueError as error:
        raise WireError(f"the server's welcome is not valid: {error}") from None


def labels_from_wire(labels, *, announced: bool = False) -> tuple[str, ...]:
    """A server's label set, or what a client `announced`."""
    most, longest = (MOST_ANNOUNCED, LONGEST_LABEL) if announced else (MOST_LABELS, 200)
    if len(labels) > most:
        raise WireError(f"{len(labels)} label names are more than the {most} that may be")
    if len(set(labels)) != len(labels) or not all(label and len(label) <= longest and label.isprintable()
                                                  for label in labels):
        raise WireError(f"a label is repeated, empty, longer than {longest} characters or not printable")
    return tuple(labels)


def run_to_wire(run: RunPlan) -> pb.RunPlan:
    return pb.RunPlan(**to_scalars(run))  # type: ignore[arg-type]


def run_from_wire(message: pb.RunPlan) -> RunPlan:
    """Raises ValueError where it is no plan, or has a label that cannot be shown."""
    labels_from_wire(message.labels)
    return from_scalars({f.name: list(getattr(message, f.name)) if f.is_repeated else getattr(message, f.name)
                         for f in pb.RunPlan.DESCRIPTOR.fields})


def request_to_wire(plan: RoundPlan, shapes: Shapes) -> pb.TrainRequest:
    return pb.TrainRequest(run=run_to_wire(plan.run), round=plan.round, attempt=plan.attempt,
                           frozen_sha256=plan.frozen_sha256, tensors=header_of(shapes), active=plan.active,
                           deadline_s=plan.left_s)


def plan_from_wire(request: pb.TrainRequest) -> RoundPlan:
    """The seconds that are left are counted from now."""
    try:
        return RoundPlan(run=run_from_wire(request.run), round=request.round, attempt=request.attempt,
                         frozen_sha256=request.frozen_sha256, active=tuple(request.active),
                         until=time.monotonic() + request.deadline_s)
    except ValueError as error:
        raise WireError(f"the round's plan is not valid: {error}") from None


REPEATED = ("run", "frozen_sha256", "tensors", "delta", "noise_multiplier")
"""Fields of a TrainRequest or an Upload that are left out where they are those of the last one on the same stream. Who
says one says it every time."""


class Repeats:
    """What either end of a stream remembers of the last TrainRequest, or Upload, so that what stays travels once.

    Names, shapes and the plan would outweigh a small adapter. A stream is ordered and ends when it breaks, so that
    both ends remember the same.
    """

    def __init__(self) -> None:
        self._last: dict[str, Any] = {}

    def shorten(self, message: Headed) -> Headed:
        """The message to send, without what the last one said."""
        short = type(message)()
        short.CopyFrom(message)
        for name, value in self._news(message).items():
            if self._last.get(name) == value:
                short.ClearField(name)  # type: ignore[arg-type]
            self._last[name] = value
        return short

    def restore(self, message: Headed) -> Headed:
        """The whole message that was shortened. What was never said stays absent, for other checks to refuse."""
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
    return pb.Upload(key=key_to_wire((upload.run_id, upload.round, upload.attempt)), anchor=upload.anchor,
                     tensors=header_of(shapes_of(upload.tensors)), **upload_metrics(upload))  # type: ignore[arg-type]


def anchor_from_wire(upload: pb.Upload) -> bytes:
    """The anchor of an upload, unread; b"" where it brings none. Raises WireError for another length."""
    try:
        check_anchor(upload.anchor)
    except ValueError as error:
        raise WireError(str(error)) from None
    return upload.anchor


def metrics_from_wire(upload: pb.Upload, *, private: bool) -> dict[str, int | float]:
    """The scalars of an upload, by the names of `fedlora.plan.UPLOAD_METRICS`.

    Raises:
        Refused: "privacy-mismatch", a private upload discloses more than it may, or states no noise. It may leave both
            δ and σ unsaid.
        WireError: a value cannot be.
    """
    metrics: dict[str, int | float] = {"steps": upload.steps}
    for name in ("delta", "noise_multiplier", "num_examples", "train_loss"):
        if upload.HasField(name):  # type: ignore[arg-type]
            metrics[name] = getattr(upload, name)
    if not all(math.isfinite(v) and (v >= 0 or k == "train_loss") for k, v in metrics.items()):
        raise WireError("a metric is not finite or negative")
    unsaid = "noise_multiplier" not in metrics and "delta" not in metrics
    noised = unsaid or (metrics.get("noise_multiplier", 0) > 0 and 0 < metrics.get("delta", 0) < 1)
    if private and ("num_examples" in metrics or "train_loss" in metrics or not noised):
        raise Refused("privacy-mismatch", "a private upload carries steps, delta and noise_multiplier (both or "
                                          "neither), nothing else")
    return metrics


def key_to_wire(key: Key) -> pb.Key:
    return pb.Key(round=key[1], attempt=key[2])


def key_from_wire(key: pb.Key, run_id: str) -> Key:
    """Of the run that the stream's Welcome named."""
    return run_id, key.round, key.attempt


def refusal_to_wire(refusal: Refusal) -> pb.Refusal:
    return pb.Refusal(code=refusal.code, detail=refusal.detail[:MAX_TEXT])


def refusal_from_wire(refusal: pb.Refusal) -> Refusal:
    try:
        return Refusal(refusal.code, clean(refusal.detail))
    except ValueError:
        raise WireError("a refusal has a code that this version does not know") from None


def clean(text: str) -> str:
    """Text of the other side, fit to be printed."""
    return "".join(c if c.isprintable() else " " for c in text[:MAX_TEXT])


def check_name(name: str) -> None:
    """Raises ValueError unless `name` can be a client's."""
    if not (0 < len(name) <= MAX_NAME and name.isprintable() and name == name.strip()):
        raise ValueError(f"the client's name has {len(name)} characters; --name must have 1 to {MAX_NAME}, printable "
                         "and with no space at either end")
