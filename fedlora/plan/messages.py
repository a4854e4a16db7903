"""What a client answers, and how either side declines or says goodbye: frozen values, checked when they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NewType

if TYPE_CHECKING:  # the commands' --help reads this module and needs no numpy
    import numpy as np

Tensors = Mapping[str, "np.ndarray"]
"""Named float32 arrays in C order; names are those of `fedlora.adapters.AdapterLayout`."""

Released = NewType("Released", Tensors)
"""Tensors that have left a client; under privacy, through the noise. Server steps are given these and what the server
made itself, so that all they do is post-processing."""


@dataclass(frozen=True)
class Upload:
    """What one client sends for one round. Under privacy, everything in it has passed through the noise.

    In round 0 the tensors are by how much the release's steps moved them: its noised gradients.

    Attributes:
        tensors: the trained tensors after the round, float32, rounded to what the wire dtype can carry.
        steps: optimiser steps done.
        delta, noise_multiplier: of the client's guarantee; None without privacy.
        num_examples, train_loss: only without privacy, else None.
        anchor: of the client's ledger, sealed, for the server to keep; empty where it has no real one, or nobody keeps
            it. Made when the upload leaves, and not stored with it.
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
"""Every code with which one side declines, and its fixed meaning. Under privacy none depends on a row's content;
without it "labels" can tell that some row has a label outside the plan's set."""


@dataclass(frozen=True)
class Refusal:
    """A typed no.

    Attributes:
        code: one of `REFUSALS`.
        detail: more for the other side, never anything from private data; empty for policy, budget and unavailable.
    """

    code: str
    detail: str = ""

    def __post_init__(self) -> None:
        if self.code not in REFUSALS:
            raise ValueError(f"{self.code!r} is not a refusal code; the codes are {', '.join(REFUSALS)}")

    def __str__(self) -> str:
        return f"{REFUSALS[self.code]}{': ' + self.detail if self.detail else ''} [{self.code}]"


class Refused(Exception):
    """Raised where a refusal ends what was being done."""

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
"""How a run can end, and the words with which the server says goodbye then."""


UPLOAD_METRICS = ("steps", "delta", "noise_multiplier", "num_examples", "train_loss")
"""The only scalars that may leave a client beside its tensors; those that are None are left out. The anchor is none."""


def upload_metrics(upload: Upload) -> dict[str, int | float]:
    """The upload's scalars that are not None, by name, in the order of `UPLOAD_METRICS`."""
    values = ((name, getattr(upload, name)) for name in UPLOAD_METRICS)
    return {name: value for name, value in values if value is not None}
