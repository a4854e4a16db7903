"""Label names: those that a client tells a server, and the check of the server's label set."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from fedlora import data
from fedlora.data import Rows
from fedlora.plan import (
    LONGEST_LABEL,
    MOST_ANNOUNCED,
    Refused,
    RunPlan,
)

log = logging.getLogger(__name__)

DECLARE = "Write them into policy.toml (labels), or give them with --labels"

ROWS_PER_LABEL = 5
"""Least rows per label name, on average. A column with fewer looks like texts, and its values are not announced."""


def check_declared(declared: Sequence[str] | None, labels: Sequence[str]) -> None:
    """Check that the server's label set has every declared label. The rows play no part in the answer.

    Args:
        declared: the label names that the data holder declared; None if there are none.
        labels: the server's label set.

    Raises:
        Refused: "labels": one is missing; the local log names it.
    """
    if lacking := [name for name in declared or () if name not in labels]:
        log.error("The declared labels %s are not in the server's set, which is: %s.", ", ".join(lacking),
                  ", ".join(labels))
        raise Refused("labels")


def check_with_kit(declared: Sequence[str] | None, plan: RunPlan, rows: Rows | None) -> None:
    """Check the declared labels against the plan of a kit.

    Args:
        declared: the label names that the data holder declared; None if there are none.
        plan: the kit's plan.
        rows: the client's data, whose labels the message shows if they have to be declared; None to show none.

    Raises:
        Refused: "labels": one is not in the plan's set; the local log names it.
        ValueError: the server will ask for the names, and none are declared.
    """
    if not plan.labels_open:
        check_declared(declared, plan.labels)
    elif declared is None and plan.private:
        raise ValueError("the server will ask for the label names, and a client tells only those that its owner "
                         f"declares. {how_to_declare(rows) if rows is not None else DECLARE}")


def how_to_declare(rows: Rows) -> str:
    """Tell the data holder which labels the files hold, and how to declare them. Never sent to a server."""
    try:
        names = json.dumps(names_to_announce(rows), ensure_ascii=False)
    except ValueError as error:
        return str(error)
    return (f"The files hold labels = {names}. If the server may know them, write that into policy.toml, or give them "
            "with --labels")


def names_to_announce(rows: Rows) -> tuple[str, ...]:
    """Return the label names to tell a server that asks for them. Texts must not leave this machine as labels.

    Args:
        rows: the client's data.

    Raises:
        ValueError: a label is too long or not printable, or there are too many for so few rows. The message shows
            none.
    """
    remedy = "It would be told to the server. Give the right column with --column label=NAME, or have the server " \
             "started with --labels"
    names, labelled = data.label_names(rows), 0
    for row, label in enumerate(rows.labels or ()):
        labelled += label is not None
        if label is not None and not (len(label) <= LONGEST_LABEL and label.isprintable()):
            raise ValueError(f"{rows.where(row)}: the label is no name of a class: it has {len(label)} characters, "
                             f"and only labels of at most {LONGEST_LABEL} printable characters are announced. {remedy}")
    if len(names) > max(2, min(MOST_ANNOUNCED, labelled // ROWS_PER_LABEL)):
        raise ValueError(f"the label column has {len(names)} different values in {labelled} rows and looks like texts "
                         f"(at most {MOST_ANNOUNCED} names are announced, with {ROWS_PER_LABEL} rows each on average). "
                         f"{remedy}")
    return names
