"""A run's label set, if its clients name the labels: the union of what the first clients announced.

Clients that announce labels decide together what is trained. One of them must not be able to end the run or to swamp
it. The connected and ready clients are taken in the order in which they became ready. A client is left out if

- it announced no label names;
- it announced more than `DISPROPORTION` times as many as the usual client (the lower median), and more than `FEW`;
- its names would make the set larger than `MOST_ANNOUNCED`.

The set is the union over the first --min-clients clients that are not left out. Any other client that has a label
outside of the set declines by itself. A client can still add a few names that nobody uses; only --labels prevents that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median_low

from fedlora import data
from fedlora.plan import MOST_ANNOUNCED

DISPROPORTION = 10
"""Ratio to the usual number of label names beyond which a client is left out."""
FEW = 20
"""Number of label names that any client may announce, however few the others announce."""


@dataclass(frozen=True)
class LabelSet:
    """The label set that clients announced together.

    Attributes:
        labels: the labels, in the order of `data.in_order`.
        of: names of the clients that announced them.
        left_out: name → why the client's labels are not included.
    """

    labels: tuple[str, ...]
    of: tuple[str, ...]
    left_out: Mapping[str, str]


def agree(announced: Mapping[str, tuple[str, ...]], clients: int) -> LabelSet:
    """Return the label set of the first clients that are not left out.

    Args:
        announced: name → label names, in the order in which the clients became ready.
        clients: how many clients decide. If there are fewer, all of them decide.
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
            left_out[name] = f"it announced {len(own)}, and half of the clients announced {usual} or fewer"
        elif len(labels.union(own)) > MOST_ANNOUNCED:
            left_out[name] = f"with its {len(own)} names the set would have more than {MOST_ANNOUNCED}"
        else:
            labels.update(own)
            of.append(name)
    return LabelSet(data.in_order(labels), tuple(of), left_out)


def told_of(labels: tuple[str, ...]) -> str:
    """Return a line of bounded length that tells which label names a client announced; "" if it announced none."""
    if len(labels) <= 3:
        return f"discloses its label names {', '.join(labels)}" if labels else ""
    return f"discloses {len(labels)} label names: {', '.join(labels[:3])}, …"
