"""Plans as flat typed values, as they travel and are stored, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from fedlora.plan.run import ModelRef, RoundPlan, RunPlan


def to_scalars(plan: RunPlan) -> dict[str, int | float | str | bool | list[str]]:
    """The plan as flat typed values: nested `model` becomes `model_name`, `model_weights_sha256`, ….

    Inverse of `from_scalars`. The Flower ConfigRecord and the gRPC message both have exactly these fields.
    """
    flat: dict[str, int | float | str | bool | list[str]] = {}
    for f in dataclasses.fields(plan):
        value = getattr(plan, f.name)
        if isinstance(value, ModelRef):
            flat |= {f"model_{k}": v for k, v in dataclasses.asdict(value).items()}
        else:
            flat[f.name] = list(value) if isinstance(value, tuple) else value
    return flat


def from_scalars(flat: Mapping[str, object]) -> RunPlan:
    """Build a plan from `to_scalars`' values.

    Raises:
        ValueError: a field is missing, unknown, of the wrong type or out of range.
    """
    model_names = {f"model_{f.name}": f.name for f in dataclasses.fields(ModelRef)}
    kinds = {f.name: str(f.type) for f in dataclasses.fields(RunPlan) if f.name != "model"}
    kinds |= dict.fromkeys(model_names, "str")
    if set(flat) != set(kinds):
        raise ValueError(f"the plan's fields differ: missing {sorted(set(kinds) - set(flat))}, "
                         f"unknown {sorted(set(flat) - set(kinds))}; both sides need the same FedLoRA version")
    fields: dict[str, object] = {}
    for name, value in flat.items():
        kind = kinds[name]
        if kind == "tuple[str, ...]":
            if isinstance(value, str) or not all(isinstance(v, str) for v in value):  # type: ignore[attr-defined]
                raise ValueError(f"{name} must be a list of strings")
            fields[name] = tuple(value)  # type: ignore[arg-type]
        else:
            expected: tuple[type, ...] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}[kind]
            if not isinstance(value, expected) or (kind != "bool" and isinstance(value, bool)):
                raise ValueError(f"{name} must be of type {kind}, not {type(value).__name__}")
            fields[name] = float(value) if kind == "float" else value  # type: ignore[arg-type]
    model = ModelRef(**{model_names[k]: fields.pop(k) for k in model_names})  # type: ignore[arg-type]
    return RunPlan(model=model, **fields)  # type: ignore[arg-type]


def round_to_scalars(plan: RoundPlan) -> dict[str, int | float | str | bool | list[str]]:
    """`to_scalars` of the run plus the round's own `round`, `attempt` and `frozen_sha256`."""
    return to_scalars(plan.run) | {"round": plan.round, "attempt": plan.attempt, "frozen_sha256": plan.frozen_sha256}


def round_from_scalars(flat: Mapping[str, object]) -> RoundPlan:
    """Inverse of `round_to_scalars`; raises ValueError as `from_scalars` does."""
    own = {"round": int, "attempt": int, "frozen_sha256": str}
    for name, kind in own.items():
        if not isinstance(flat.get(name), kind) or isinstance(flat[name], bool):
            raise ValueError(f"{name} is missing from the round's plan or is not of type {kind.__name__}")
    run = from_scalars({k: v for k, v in flat.items() if k not in own})
    return RoundPlan(run=run, **{k: flat[k] for k in own})  # type: ignore[arg-type]
