"""The proposal that a client receives when it joins, before it says that it is ready."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fedlora.plan.limits import ANCHOR_BYTES
from fedlora.plan.run import RunPlan


def check_anchor(sealed: bytes) -> None:
    """Check the length of a sealed anchor, which may be empty.

    Raises:
        ValueError: the length is neither 0 nor `ANCHOR_BYTES`.
    """
    if len(sealed) not in (0, ANCHOR_BYTES):
        raise ValueError(f"the anchor has {len(sealed)} bytes; it must have {ANCHOR_BYTES}, or none")


@dataclass(frozen=True)
class Proposal:
    """The whole plan of a run, so that a client can decide before it discloses anything or charges its budget.

    Attributes:
        plan: the run's plan. If its labels are open, clients must name theirs when they are ready, which discloses
            them. Then the labels are the only part of the plan that may change before training begins.
        anchor: the last anchor that the server received under this client's name; b"" if it received none. None if the
            server keeps no anchors, so that the client sends none.
    """

    plan: RunPlan
    anchor: bytes | None = None

    def __post_init__(self) -> None:
        if self.anchor is not None:
            check_anchor(self.anchor)

    @property
    def announce_labels(self) -> bool:
        """Whether clients must name their labels."""
        return self.plan.labels_open

    def broken_by(self, run: RunPlan) -> list[str]:
        """Return the names of the fields in which a run's plan differs from the proposed plan."""
        told = run.with_open_labels() if self.announce_labels else run
        return [field.name for field in dataclasses.fields(RunPlan)
                if getattr(told, field.name) != getattr(self.plan, field.name)]
