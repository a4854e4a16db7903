"""The fields of a privacy report and their types, for each version that can be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora.privacy.about import KEYS
from fedlora.privacy.report.figures import VERSION

_NUMBER = (int, float)
_MAYBE = (*_NUMBER, type(None))
_TEXT = (str, type(None))
_EPSILON = (*_NUMBER, str, type(None))
_FIGURES = {"label": str, "steps": int, "epsilon": _EPSILON, "accountant": _TEXT,
            "accountants": {"PRV": _EPSILON, "RDP": _EPSILON, "PLD": _EPSILON}, "note": str}
_ROSTER = {"digest": str, "members": int, "colluding": int, "honest": int, "noise_multiplier": _NUMBER,
           "deviation": _NUMBER, "step": _NUMBER, "clip_norm": _NUMBER, "values": int, "pinned": bool}
_SUMS = ({"charged": str, "aggregate_noise_multiplier": _MAYBE, "least_members": int, "colluding": int,
          "rosters": [_ROSTER], "revealed": [{"round": int, "attempt": int}], "hold_out": _NUMBER,
          "no_guarantee": _TEXT, "event": _TEXT, "guarantee": _FIGURES, "spent": _FIGURES, "rounding_delta": _MAYBE,
          "two_clients": _EPSILON}, None)
_ATTACK = ({"even_odds": _NUMBER, "found": [{"false_alarms": _NUMBER, "at_most": _NUMBER}]}, None)
SHAPE: dict[str, Any] = {
    "schema": str, "version": int, "made": str,
    "run": {"id": str, "dataset": str, "client": str, "server": str, "plan_sha256": str, "strategy": str,
            "base_model": {...: str}},
    "about": {field: _TEXT for field in KEYS.values()},
    "unit": {"name": str, "rows_per_unit": (int, type(None)), "relation": str, "declared_size": (int, type(None))},
    "adversary": str,
    "mechanism": {"key": str, "event": _TEXT,
                  "name": str, "family": str, "sampler": str, "noise_multiplier": _MAYBE, "sampling_rate": _MAYBE,
                  "expected_batch": int, "local_steps": int, "max_participations": int, "clip_norm": _NUMBER,
                  "scales": {...: _NUMBER}, "precision": str,
                  "batch_invariance": {"shown": str, "rows": {...: int}, "one_at_a_time": _TEXT}},
    "randomness": {"predictable": bool, "why": _TEXT, "generator": str, "key": str, "gaussian": str},
    "trainings": [{"round": int, "attempt": int, "state": str, "time": str, "steps": int, "noise_multiplier": _MAYBE,
                   "sampling_rate": _MAYBE, "upload": ({"bytes": (int, type(None)), "sha256": str}, None)}],
    "privacy": {"no_guarantee": _TEXT, "delta": _MAYBE, "guarantee": _FIGURES, "spent": _FIGURES,
                "attack": {"guarantee": _ATTACK, "spent": _ATTACK}},
    "sums": _SUMS,
    "lifetime": ({"epsilon": _MAYBE, "delta": _MAYBE, "spent": _EPSILON, "remaining": _MAYBE, "accountant": str,
                  "orders": [_NUMBER],
                  "charges": [{"dataset": str, "run": str, "noise_multiplier": _MAYBE, "sampling_rate": _MAYBE,
                               "steps": int, "sums": bool}],
                  "overlapping": [str], "distinct": [str], "closed_by": _TEXT, "ledger": _TEXT, "new_ledger": _TEXT,
                  "simulated": bool}, None),
    "left_without_noise": [{"what": str, "value": str}],
    "not_covered": [str],
    "audit": ({"epsilon": _NUMBER, "confidence": _NUMBER, "canaries": int, "guesses": int, "right": int,
               "noise_multiplier": _NUMBER, "sampling_rate": _NUMBER, "steps": int, "clip_norm": _NUMBER,
               "family": str, "delta": _NUMBER, "sha256": str}, None),
    "versions": {...: _TEXT},
    "public_key": str,
}
"""Fields and types of the version that is written. `...` stands for any name; `(shape, None)` for a value or null."""


def _without(shape: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: kind for name, kind in shape.items() if name not in names}


_LIFETIME = SHAPE["lifetime"][0]
_THIRD = {**_without(SHAPE, "sums"), "mechanism": _without(SHAPE["mechanism"], "key", "event"),
          "lifetime": ({**_LIFETIME, "charges": [_without(_LIFETIME["charges"][0], "sums")]}, None)}
_SECOND = {**_without(_THIRD, "about", "audit", "public_key"),
           "mechanism": _without(_THIRD["mechanism"], "family"), "privacy": _without(SHAPE["privacy"], "attack"),
           "signature": {"algorithm": str, "public_key": str, "value": str}}
_FIRST = {**_SECOND, "mechanism": {**_without(_SECOND["mechanism"], "batch_invariance"), "rounding_cover": _NUMBER}}
SHAPES = {1: _FIRST, 2: _SECOND, 3: _THIRD, VERSION: SHAPE}
"""Version → fields and types, for each version that can be read."""


def require(ok: bool, field: str, value: object, remedy: str) -> None:
    """Raise ValueError unless a field's value is as it must be; the message names the field and the value."""
    if not ok:
        raise ValueError(f"{field} is {value!r}; {remedy}")


def fit(value: object, shape: object, where: str) -> None:
    """Raise ValueError unless a value has exactly the fields and types of a shape (see `SHAPE`).

    Args:
        value: the value.
        shape: the shape.
        where: the value's place in the report, for messages.
    """
    if isinstance(shape, dict):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is {type(value).__name__}; it must be an object")
        if ... in shape:
            shape = dict.fromkeys(value, shape[...])
        if set(value) != set(shape):
            raise ValueError(f"{where} lacks the fields {sorted(set(shape) - set(value))} and has the unknown fields "
                             f"{sorted(set(value) - set(shape))}; this is no report of the version that it states")
        for name, inner in shape.items():
            fit(value[name], inner, f"{where}.{name}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{where} is {type(value).__name__}; it must be a list")
        for place, item in enumerate(value):
            fit(item, shape[0], f"{where}[{place}]")
    elif isinstance(shape, tuple) and shape[-1] is None:
        if value is not None:
            fit(value, shape[0], where)
    elif not isinstance(value, shape) or (isinstance(value, bool) and shape is not bool):  # type: ignore[arg-type]
        raise ValueError(f"{where} is {value!r}, which is not of the right type")
