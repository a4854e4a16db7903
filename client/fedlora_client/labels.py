"""What a client tells of its labels, and what it holds against the server's set."""

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
)

log = logging.getLogger(__name__)

ROWS_PER_LABEL = 5
"""So many rows has each label name on average, or the column is not announced."""


def check_declared(declared: Sequence[str] | None, labels: Sequence[str]) -> None:
    """Raises Refused, by what is declared alone, where the server's set lacks one of the declared labels."""
    if lacking := [name for name in declared or () if name not in labels]:
        log.error("The declared labels %s are not in the server's set, which is: %s.", ", ".join(lacking),
                  ", ".join(labels))
        raise Refused("labels")


def how_to_declare(rows: Rows) -> str:
    """For the owner's eyes: the labels that the files hold, where they can be names."""
    try:
        names = json.dumps(names_to_announce(rows), ensure_ascii=False)
    except ValueError as error:
        return str(error)
    return (f"The files hold labels = {names}. If the server may know them, write that into policy.toml, or name them "
            "with --labels")


def names_to_announce(rows: Rows) -> tuple[str, ...]:
    """The label names that the server asked for, where they can be names: texts must not leave this machine as such.

    Raises:
        ValueError: one is long or not printable, or there are too many for so few rows. None is shown.
    """
    remedy = "It would be told to the server. Name the right column with --column label=NAME, or have the server " \
             "started with --labels"
    names, labelled = data.label_names(rows), 0
    for row, label in enumerate(rows.labels or ()):
        labelled += label is not None
        if label is not None and not (len(label) <= LONGEST_LABEL and label.isprintable()):
            raise ValueError(f"{rows.where(row)}: the label is no name of a class: it has {len(label)} characters, and "
                             f"at most {LONGEST_LABEL} printable ones are announced. {remedy}")
    if len(names) > max(2, min(MOST_ANNOUNCED, labelled // ROWS_PER_LABEL)):
        raise ValueError(f"the label column has {len(names)} different values in {labelled} rows, and looks like texts "
                         f"(at most {MOST_ANNOUNCED} names are announced, of {ROWS_PER_LABEL} rows each). {remedy}")
    return names
