"""Bounds and allowed words of the values in plans and uploads, which both sides check."""

from __future__ import annotations

PROTOCOL = 8
"""Version of the wire protocol. Two sides with different versions refuse each other.

It is raised with each change of the messages in the .proto file, of a plan's meaning, or of which message answers
which."""
CONTINUED = (4, 5, 6, 7, PROTOCOL)
"""Protocol versions under which a run may have begun that this version can resume. Their plans mean the same."""

LOCAL, AGGREGATE = "dp-sgd", "distributed-gaussian"
"""Keys of the privacy mechanisms: each client's own noise, or shares of the noise of a sum."""

LEAST_MEMBERS, MOST_MEMBERS = 3, 200
"""Fewest and most members of a roster of secure aggregation. Two members' sum tells each the other's; beyond 200, the
complete graph of masks would need another protocol."""

MOST_HELD_OUT = 0.5
"""Largest share of units that a plan can hold out from training."""

LR_SCHEDULES = ("constant", "linear")
WIRE_DTYPES = ("fp32", "bf16")
ROW, COLUMN = "row", "column:"
"""Units of privacy: each row by itself, or "column:NAME" for all of a client's rows with the same value there."""

LEAST_SCALE, MOST_CLIP_NORM, MOST_SCALE = 1e-6, 1e6, 1e16
"""Allowed range of clip norms and gradient scales: far wider than useful, safely inside float32.

`MOST_SCALE` leaves room for the start from noised gradients, whose gradient scale is 1e10 times the clip norm."""

MOST_RANK = 4096
"""Highest rank of an adapter, so that a plan cannot make a client allocate memory without limit."""

LONGEST_NAME = 64
"""Most characters of the name of a strategy, family or task. A client shows the name even if it does not know it."""

LONGEST_LABEL, MOST_ANNOUNCED, MOST_LABELS = 64, 1000, 5000
"""Most characters of a label name that a client announces, most names that it announces, and most that a run has."""

ANCHOR_BYTES = 68
"""Length of a ledger's sealed anchor (`fedlora.privacy.ledger.anchor`), whatever it holds."""

MOST_STEPS = 100_000
"""Most optimizer steps of one client in one run. An accountant needs some seconds for this many."""


def sum_threshold(members: int) -> int:
    """Return T = ⌊2n/3⌋ + 1, the fewest members whose vectors a secure sum may hold, and who can open it."""
    return 2 * members // 3 + 1


def check_unit(unit: str) -> None:
    """Check a unit of privacy.

    Raises:
        ValueError: it is neither "row" nor "column:NAME".
    """
    if unit != ROW and not (unit.startswith(COLUMN) and len(unit) > len(COLUMN)):
        raise ValueError(f"the privacy unit is {unit!r}; it must be row or column:NAME, as in column:patient_id")


def unit_column(unit: str) -> str | None:
    """Return the column that identifies the units of privacy; None if each row is a unit."""
    return None if unit == ROW else unit.removeprefix(COLUMN)


def check_run_id(run_id: str) -> None:
    """Check the id of a run. A client uses it as the name of a folder.

    Raises:
        ValueError: it is not 16 lower-case hexadecimal digits.
    """
    if len(run_id) != 16 or set(run_id) - set("0123456789abcdef"):
        raise ValueError(f"run_id is {run_id!r}; it must be 16 lower-case hexadecimal digits")
