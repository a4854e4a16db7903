"""What a client is told when it joins, before it is ready."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fedlora.plan.limits import ANCHOR_BYTES
from fedlora.plan.run import RunPlan


def check_anchor(sealed: bytes) -> None:
    """Raises ValueError for anything but an anchor's length, or nothing."""
    if len(sealed) not in (0, ANCHOR_BYTES):
        raise ValueError(f"an anchor of {len(sealed)} bytes; it has {ANCHOR_BYTES}, or none")


@dataclass(frozen=True)
class Proposal:
    """The whole plan, so that everything can be weighed before anything is disclosed or charged.

    Attributes:
        plan: of the run; where its labels are open, clients must name theirs when they are ready, which discloses them,
            and the labels alone may be another's once training begins.
        anchor: the last one that the server was sent under this client's name, b"" if none was; None where it keeps
            none, and none is to be sent.
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
        """What of the run's plan is not as it was proposed, by name."""
        told = run.with_open_labels() if self.announce_labels else run
        return [field.name for field in dataclasses.fields(RunPlan)
                if getattr(told, field.name) != getattr(self.plan, field.name)]
