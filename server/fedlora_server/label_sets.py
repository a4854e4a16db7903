"""Which label names a run has, where its clients name them: the union of what the first ones announced.

Whoever announces decides with the others what is trained, so one client must be able neither to end the run nor to
swamp it. Of the clients that are connected and ready, in the order in which they became so,

- one is left out that announced none;
- one that announced more than `DISPROPORTION` times the lower median of how many each announced, or than
  `FEW` where that is more;
- one whose names would make the set larger than `MOST_ANNOUNCED`.

The set is the union of the first --min-clients that are not left out, and whoever else has a label beside it declines
by itself. A client can still add a few names that nobody uses; --labels alone rules that out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median_low

from fedlora import data
from fedlora.plan import MOST_ANNOUNCED

DISPROPORTION = 10
FEW = 20


@dataclass(frozen=True)
class LabelSet:
    """What was announced.

    Attributes:
        labels: in the order of `data.in_order`.
        of: the names of the clients whose labels they are.
        left_out: name → why the client's labels are not among them.
    """

    labels: tuple[str, ...]
    of: tuple[str, ...]
    left_out: Mapping[str, str]


def agree(announced: Mapping[str, tuple[str, ...]], clients: int) -> LabelSet:
    """Of the first `clients` that are not left out, or of fewer where there are not so many.

    Args:
        announced: name → label names, in the order in which the clients became ready.
    """
    usual = median_low([len(labels) for labels in announced.values() if labels] or [0])
    most = max(FEW, DISPROPORTION * usual)
    labels: set[str] = set()
    of: list[str] = []
    left_out: dict[str, str] = {}
    for name, own in announced.items():
        if len(of) == clients:
            break
        if not own:
            left_out[name] = "it announced none"
        elif len(own) > most:
            left_out[name] = f"it announced {len(own)}, and half of the clients {usual} or fewer"
        elif len(labels.union(own)) > MOST_ANNOUNCED:
            left_out[name] = f"with its {len(own)} the set would have more than {MOST_ANNOUNCED}"
        else:
            labels.update(own)
            of.append(name)
    return LabelSet(data.in_order(labels), tuple(of), left_out)


def told_of(labels: tuple[str, ...]) -> str:
    """Return a line of bounded length that tells which label names a client announced; "" if it announced none."""
    if len(labels) <= 3:
        return f"discloses its label names {', '.join(labels)}" if labels else ""
    return f"discloses {len(labels)} label names: {', '.join(labels[:3])}, …"
