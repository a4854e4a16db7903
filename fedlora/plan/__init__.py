"""The contract between a server and its clients: plans, uploads and refusals, as typed values without code.

The server proposes a `RunPlan` once, and sends a `RoundPlan` in each round. The client answers with an `Upload` or a
`Refusal`. All of these are frozen values, checked when they are made, on either side of the network.
"""

from fedlora.plan.found import FOUND, task_facts
from fedlora.plan.limits import (
    ANCHOR_BYTES,
    COLUMN,
    CONTINUED,
    LEAST_SCALE,
    LONGEST_LABEL,
    LONGEST_NAME,
    LR_SCHEDULES,
    MOST_ANNOUNCED,
    MOST_CLIP_NORM,
    MOST_LABELS,
    MOST_RANK,
    MOST_SCALE,
    MOST_STEPS,
    PROTOCOL,
    ROW,
    WIRE_DTYPES,
    check_run_id,
    check_unit,
    unit_column,
)
from fedlora.plan.messages import (
    GOODBYES,
    REFUSALS,
    UPLOAD_METRICS,
    Refusal,
    Refused,
    Released,
    Tensors,
    Upload,
    upload_metrics,
)
from fedlora.plan.proposal import Proposal, check_anchor
from fedlora.plan.run import (
    ModelRef,
    RoundPlan,
    RunPlan,
)
from fedlora.plan.schema import (
    from_scalars,
    plan_digest,
    round_from_scalars,
    round_to_scalars,
    to_scalars,
)

__all__ = [
    "ANCHOR_BYTES",
    "COLUMN",
    "CONTINUED",
    "FOUND",
    "GOODBYES",
    "LEAST_SCALE",
    "LONGEST_LABEL",
    "LONGEST_NAME",
    "LR_SCHEDULES",
    "MOST_ANNOUNCED",
    "MOST_CLIP_NORM",
    "MOST_LABELS",
    "MOST_RANK",
    "MOST_SCALE",
    "MOST_STEPS",
    "PROTOCOL",
    "REFUSALS",
    "ROW",
    "UPLOAD_METRICS",
    "WIRE_DTYPES",
    "ModelRef",
    "Proposal",
    "Refusal",
    "Refused",
    "Released",
    "RoundPlan",
    "RunPlan",
    "Tensors",
    "Upload",
    "check_anchor",
    "check_run_id",
    "check_unit",
    "from_scalars",
    "plan_digest",
    "round_from_scalars",
    "round_to_scalars",
    "task_facts",
    "to_scalars",
    "unit_column",
    "upload_metrics",
]
