"""The values that a run gets when only a strategy and a privacy setting are named.

Constants, found on the demo's made-up notes and on public text (SST-2), never on a user's data.

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
    lr_schedule: str
    targets: tuple[str, ...]


def _open(rank: int, init: str, lr: float) -> Preset:
    return Preset(rank, 16.0, init, "adamw", lr, local_steps=16, batch_size=32, clip_norm=1.0, head_scale=1.0,
                  rounds=20, lr_schedule="linear", targets=("auto",))


def _private(rank: int, alpha: float, init: str, lr: float, targets: str) -> Preset:
    """Before training a record's gradient is some 60 times longer in the head than in the adapters: unscaled, the head
    would use up the clip norm and the noise would bury the adapters."""
    return Preset(rank, alpha, init, "adamw", lr, local_steps=8, batch_size=160, clip_norm=0.05, head_scale=0.03,
                  rounds=8, lr_schedule="linear", targets=(targets,))


PRESETS: Mapping[tuple[str, bool], Preset] = {
    ("fedavg-lora", False): _open(8, "kaiming", 2e-3),
    ("ffa-lora", False): _open(8, "kaiming", 5e-3),
    ("fed-sb", False): _open(16, "orthonormal", 3e-2),
    ("fedsvd", False): _open(8, "orthonormal", 2e-3),
    ("fedavg-lora", True): _private(1, 1.0, "kaiming", 1e-2, "auto"),
    ("ffa-lora", True): _private(2, 2.0, "kaiming", 2e-2, "auto"),
    ("fed-sb", True): _private(16, 16.0, "orthonormal", 3e-2, "all"),
    ("fedsvd", True): _private(2, 2.0, "orthonormal", 1e-2, "auto"),
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
