"""Messages other than plans: a client's upload, either side's refusal, and the ways in which a run can end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NewType

if TYPE_CHECKING:  # the commands' --help reads this module and needs no numpy
    import numpy as np

Tensors = Mapping[str, "np.ndarray"]
"""Named float32 arrays in C order. The names are those of `fedlora.adapters.AdapterLayout`."""

Released = NewType("Released", Tensors)
"""Tensors that have left a client. Under privacy, noise has been added to them.

Server steps only receive these and values that the server made itself. So whatever they compute is post-processing,
which costs no privacy."""


@dataclass(frozen=True)
class Upload:
    """The values that one client sends for one round. Under privacy, everything computed from records is noised.

    In round 0, the release of a private start, the tensors hold how far the release's steps moved them: the client's
    noised gradients.

    Attributes:
        run_id: the run.
        round: number of the round, as in its `RoundPlan`.
        attempt: number of the attempt, as in its `RoundPlan`.
        tensors: the trained tensors after the round, float32, rounded to the wire dtype.
        steps: number of optimizer steps done.
        delta: δ of the client's guarantee; None without privacy.
        noise_multiplier: standard deviation of the client's noise, as a multiple of the clip norm; None without
            privacy.
        num_examples: number of the client's records; None under privacy.
        train_loss: mean training loss; None under privacy.
        anchor: the sealed anchor of the client's ledger, for the server to keep; empty if the client has no real
            ledger or the server keeps no anchors. It is made when the upload is sent, and not stored with it.
    """

    run_id: str
    round: int
    attempt: int
    tensors: Released
    steps: int
    delta: float | None = None
    noise_multiplier: float | None = None
    num_examples: int | None = None
    train_loss: float | None = None
    anchor: bytes = b""


REFUSALS: Mapping[str, str] = {
    "policy": "the client's policy does not allow this",
    "budget": "the client's privacy budget does not allow this",
    "unavailable": "the client cannot train now",
    "too-late": "the round was closed, or never asked this client",
    "missing-tensors": "the client does not hold the frozen tensors; send them again",
    "invalid-tensors": "the tensors received do not fit the plan",
    "model-mismatch": "the client's base model is not the plan's",
    "version-mismatch": "the two sides' versions do not fit each other",
    "privacy-mismatch": "the client's --epsilon contradicts the server's --privacy",
    "name-in-use": "the name is another client's",
    "labels": "the labels that the client declares do not fit the plan's label set, or it declares none",
}
"""The codes with which a side can decline, and their meanings.

Under privacy no code depends on a row's content. Without privacy, "labels" can disclose that some row has a label
outside the plan's label set."""


@dataclass(frozen=True)
class Refusal:
    """A refusal with one of a fixed set of codes.

    Attributes:
        code: one of `REFUSALS`.
        detail: an explanation for the other side, which never contains private data. It is empty for the codes policy,
            budget and unavailable.
    """

    code: str
    detail: str = ""

    def __post_init__(self) -> None:
        if self.code not in REFUSALS:
            raise ValueError(f"{self.code!r} is not a refusal code; the codes are {', '.join(REFUSALS)}")

    def __str__(self) -> str:
        return f"{REFUSALS[self.code]}{': ' + self.detail if self.detail else ''} [{self.code}]"


class Refused(Exception):
    """The exception for a refusal that ends the current operation. Its attribute `refusal` has the code."""

    def __init__(self, code: str, detail: str = "") -> None:
        self.refusal = Refusal(code, detail)
        super().__init__(str(self.refusal))


GOODBYES: Mapping[str, str] = {
    "finished": "the run is finished",
    "stopped": "the coordinator stopped the run",
    "suspended": "the server is stopped for a while, and its run goes on when it is back",
    "wait-timeout": "too few clients were left",
    "labels": "the label names do not fit; the coordinator has to fix the label set with --labels",
    "failed": "the server failed",
    "diverged": "training diverged; the coordinator has to lower the learning rate",
}
"""The ways in which a run can end for a client, and the explanation that the server sends with each."""


UPLOAD_METRICS = ("steps", "delta", "noise_multiplier", "num_examples", "train_loss")
"""The only scalars that an upload can have beside its tensors and the anchor. Those that are None are left out."""


def upload_metrics(upload: Upload) -> dict[str, int | float]:
    """Return the upload's scalars that are not None, by name, in the order of `UPLOAD_METRICS`."""
    values = ((name, getattr(upload, name)) for name in UPLOAD_METRICS)
    return {name: value for name, value in values if value is not None}
