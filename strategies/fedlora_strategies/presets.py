"""The values that a run gets when only a strategy and a privacy setting are named. Constants: no data chose them here.

Orthonormal A makes the effective step about three times that of Kaiming A (row norm ≈ 1/√3), so rates are per strategy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Defaults of one (strategy, private); see `RunPlan` for their meaning. `batch_size` is its expected_batch."""

    rank: int
    alpha: float
    init: str
    optimizer: str
    lr: float
    local_steps: int
    batch_size: int
    clip_norm: float
    head_scale: float
    rounds: int


PRESETS: Mapping[tuple[str, bool], Preset] = {
    # (strategy, private):          rank alpha  init           optimizer  lr    steps batch  clip  head  rounds
    ("fedavg-lora", False):   Preset(8,   16.0, "kaiming",     "adamw",   2e-3, 10,   32,    1.0,  1.0,  20),
    ("ffa-lora", False):      Preset(8,   16.0, "kaiming",     "adamw",   5e-3, 10,   32,    1.0,  1.0,  20),
    ("fed-sb", False):        Preset(16,  16.0, "orthonormal", "adamw",   1e-2, 10,   32,    1.0,  1.0,  20),
    ("fedsvd", False):        Preset(8,   16.0, "orthonormal", "adamw",   2e-3, 10,   32,    1.0,  1.0,  20),
    ("fedavg-lora", True):    Preset(1,   1.0,  "kaiming",     "adamw",   1e-2, 4,    512,   0.2,  0.1,  20),
    ("ffa-lora", True):       Preset(1,   1.0,  "kaiming",     "adamw",   2e-2, 4,    512,   0.2,  0.1,  20),
    ("fed-sb", True):         Preset(16,  16.0, "orthonormal", "adamw",   3e-2, 4,    512,   0.2,  0.1,  20),
    ("fedsvd", True):         Preset(1,   1.0,  "orthonormal", "adamw",   1e-2, 4,    512,   0.2,  0.1,  20),
}


def preset(strategy: str, private: bool) -> Preset:
    """The preset of a strategy, with or without privacy.

    Raises:
        ValueError: there is no such strategy.
    """
    if (strategy, private) not in PRESETS:
        names = ", ".join(dict.fromkeys(name for name, _ in PRESETS))
        raise ValueError(f"there is no strategy {strategy!r}; choose one of {names}")
    return PRESETS[strategy, private]
