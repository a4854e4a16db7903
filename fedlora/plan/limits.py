"""The bounds of every value that the two sides agree on, and the words that it can be."""

from __future__ import annotations

PROTOCOL = 7
"""Version of the wire protocol. Two sides with different numbers refuse each other. It rises with each change of the
.proto's messages, of a plan's meaning, or of what is answered to what."""
CONTINUED = (4, 5, 6, PROTOCOL)
"""Protocols under which a run may have been begun that this version takes up again: their plans mean the same."""

LR_SCHEDULES = ("constant", "linear")
WIRE_DTYPES = ("fp32", "bf16")
ROW, COLUMN = "row", "column:"
"""Units of privacy: each row, or "column:NAME" for all rows of a client with one value in that column together."""

LEAST_SCALE, MOST_CLIP_NORM, MOST_SCALE = 1e-6, 1e6, 1e16
"""Of clip norms and of the factors on gradients: far outside of what trains, and well within what numbers can hold. The
start from noised gradients scales by 1e10 clip norms."""

MOST_RANK = 4096
"""Of an adapter: a plan may not have a client take memory without end."""

LONGEST_NAME = 64
"""Characters of a strategy's, a family's or a task's name, which a client shows whether it knows it or not."""

LONGEST_LABEL, MOST_ANNOUNCED, MOST_LABELS = 64, 1000, 5000
"""Characters of a label name that a client announces, names that it does, and names that a server may give."""

ANCHOR_BYTES = 68
"""Of a ledger's sealed anchor (`fedlora.privacy.ledger.anchor`), whatever it holds."""

MOST_STEPS = 100_000
"""Of one client in one run: what an accountant takes seconds for."""


def check_unit(unit: str) -> None:
    """Raises ValueError for anything but "row" or "column:NAME"."""
    if unit != ROW and not (unit.startswith(COLUMN) and len(unit) > len(COLUMN)):
        raise ValueError(f"the privacy unit is {unit!r}; it must be row or column:NAME, as in column:patient_id")


def unit_column(unit: str) -> str | None:
    """The column that tells the units, or None where each row is one."""
    return None if unit == ROW else unit.removeprefix(COLUMN)


def check_run_id(run_id: str) -> None:
    """Raises ValueError unless it can be a run's; it names a folder at the client."""
    if len(run_id) != 16 or set(run_id) - set("0123456789abcdef"):
        raise ValueError(f"run_id is {run_id!r}; it must be 16 lower-case hexadecimal digits")
