"""Conversion of plans to flat typed values, as they are sent and stored, and back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import TypeVar

from fedlora.plan.run import ModelRef, RoundPlan, RunPlan

_Number = TypeVar("_Number", int, float)

Scalars = dict[str, int | float | str | bool | list[str] | list[int] | list[float]]

PAIRS: Mapping[str, tuple[str, str, type]] = {
    "family_options": ("family_option_names", "family_option_values", float),
    "ranks": ("rank_sites", "rank_values", int),
}
"""Field of (name, number) pairs → names of the two lists that represent it, and the number's type."""

SINCE: Mapping[str, int] = {
    **{name: 6 for names in PAIRS.values() for name in names[:2]}, "adjustment": 6,
    **dict.fromkeys(("mechanism", "least_members", "colluding", "least_noise", "hold_out",
                    "whole_gradients"), 8),
}
"""Value → the protocol version that introduced it.

Plans of earlier protocols leave the value out, so that their hashes stay the same. When such a plan is read back, the
value is empty."""


def to_scalars(plan: RunPlan) -> Scalars:
    """Return a plan as flat typed values. The nested `model` becomes `model_name`, `model_weights_sha256`, ….

    `from_scalars` is the inverse. Flower's ConfigRecord and the gRPC message both have exactly these fields.
    """
    flat: Scalars = {}
    for f in dataclasses.fields(plan):
        value = getattr(plan, f.name)
        if isinstance(value, ModelRef):
            flat |= {f"model_{k}": v for k, v in dataclasses.asdict(value).items()}
        elif f.name in PAIRS:
            names, values, _ = PAIRS[f.name]
            flat |= {names: [name for name, _ in value], values: [number for _, number in value]}
        else:
            flat[f.name] = list(value) if isinstance(value, tuple) else value
    return {name: value for name, value in flat.items() if SINCE.get(name, 0) <= plan.protocol}


def plan_digest(plan: RunPlan) -> str:
    """Return the SHA-256 (64 hexadecimal digits) of a plan, by which both sides name it in what they write down."""
    return hashlib.sha256(json.dumps(to_scalars(plan), sort_keys=True).encode()).hexdigest()


def from_scalars(flat: Mapping[str, object]) -> RunPlan:
    """Build a plan from the values that `to_scalars` returns.

    Raises:
        ValueError: a field is missing, unknown, of the wrong type, or out of range.
    """
    model_names = {f"model_{f.name}": f.name for f in dataclasses.fields(ModelRef)}
    kinds = {f.name: str(f.type) for f in dataclasses.fields(RunPlan) if f.name not in ("model", *PAIRS)}
    kinds |= dict.fromkeys(model_names, "str")
    for names, values, number in PAIRS.values():
        kinds |= {names: "tuple[str, ...]", values: f"tuple[{number.__name__}, ...]"}
    protocol = flat.get("protocol")
    later = {name for name, since in SINCE.items() if isinstance(protocol, int) and protocol < since}
    if not set(kinds) - later <= set(flat) <= set(kinds):
        raise ValueError(f"the plan's fields differ: missing {sorted(set(kinds) - set(flat))}, "
                         f"unknown {sorted(set(flat) - set(kinds))}; both sides need the same FedLoRA version")
    fields = {name: _checked(name, value, kinds[name]) for name, value in flat.items()}
    model = ModelRef(**{model_names[k]: fields.pop(k) for k in model_names})  # type: ignore[arg-type]
    for name, (names, values, _) in PAIRS.items():
        keys, numbers = fields.pop(names, ()), fields.pop(values, ())
        fields[name] = paired(keys, numbers, names, values)  # type: ignore[arg-type]
    return RunPlan(model=model, **fields)  # type: ignore[arg-type]


def paired(names: Sequence[str], numbers: Sequence[_Number], *fields: str) -> tuple[tuple[str, _Number], ...]:
    """Return the (name, number) pairs that two lists represent.

    Args:
        names: the names.
        numbers: the number of each.
        *fields: what the two lists are called, for the message.

    Raises:
        ValueError: the lists differ in length.
    """
    if len(names) != len(numbers):
        raise ValueError(f"{fields[0]} has {len(names)} entries and {fields[1]} {len(numbers)}")
    return tuple(zip(names, numbers, strict=True))


_TYPES: Mapping[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}


def _checked(name: str, value: object, kind: str) -> object:
    """Return a value with the type that its field needs.

    Args:
        name: the field, for the message.
        value: its value, as it was received.
        kind: the type's name, such as "int" or "tuple[str, ...]". An int is accepted for a float.

    Raises:
        ValueError: the value has another type.
    """
    def single(one: object, of: str) -> object:
        if not isinstance(one, _TYPES[of]) or (of != "bool" and isinstance(one, bool)):
            raise ValueError(f"{name} must be of type {kind}, not {type(value).__name__}")
        return float(one) if of == "float" else one  # type: ignore[arg-type]

    if not kind.startswith("tuple["):
        return single(value, kind)
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} must be a list, not {type(value).__name__}")
    return tuple(single(one, kind.removeprefix("tuple[").partition(",")[0]) for one in value)


def round_to_scalars(plan: RoundPlan) -> Scalars:
    """Return a round's plan as flat typed values: those of the run, and the round's own.

    The deadline becomes `deadline_s`, the number of seconds left now.
    """
    return to_scalars(plan.run) | {"round": plan.round, "attempt": plan.attempt, "frozen_sha256": plan.frozen_sha256,
                                   "active": list(plan.active), "prefix_sites": [name for name, _ in plan.prefixes],
                                   "prefix_ranks": [rank for _, rank in plan.prefixes], "deadline_s": plan.left_s}


def round_from_scalars(flat: Mapping[str, object]) -> RoundPlan:
    """Build a round's plan from the values that `round_to_scalars` returns. The deadline is counted from now.

    Raises:
        ValueError: a field is missing, unknown, of the wrong type, or out of range.
    """
    own = {"round": "int", "attempt": "int", "frozen_sha256": "str", "active": "tuple[str, ...]",
           "prefix_sites": "tuple[str, ...]", "prefix_ranks": "tuple[int, ...]", "deadline_s": "float"}
    if missing := own.keys() - flat.keys():
        raise ValueError(f"{', '.join(sorted(missing))} is missing from the round's plan")
    run = from_scalars({k: v for k, v in flat.items() if k not in own})
    fields = {k: _checked(k, flat[k], kind) for k, kind in own.items()}
    left_s: float = fields.pop("deadline_s")  # type: ignore[assignment]
    sites, ranks = fields.pop("prefix_sites"), fields.pop("prefix_ranks")
    prefixes = paired(sites, ranks, "prefix_sites", "prefix_ranks")  # type: ignore[arg-type]
    return RoundPlan(run=run, until=time.monotonic() + left_s, prefixes=prefixes, **fields)  # type: ignore[arg-type]
