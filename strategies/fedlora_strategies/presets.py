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


def _open(rank: int, alpha: float, init: str, lr: float) -> Preset:
    """All linear layers, where privacy adapts query and value: without noise, more values cost nothing but bytes."""
    return Preset(rank, alpha, init, "adamw", lr, local_steps=8, batch_size=32, clip_norm=1.0, head_scale=1.0,
                  rounds=25, lr_schedule="linear", targets=("all",))


def _private(rank: int, alpha: float, init: str, lr: float, *, clip_norm: float, head_scale: float) -> Preset:
    """The clip norm is for the middle of the run, not for its start: adapters' gradients are tiny until the head has
    grown, then those of misjudged records are the longest, and clipping them all to one length turns the mean around.
    """
    return Preset(rank, alpha, init, "adamw", lr, local_steps=4, batch_size=256, clip_norm=clip_norm,
                  head_scale=head_scale, rounds=20, lr_schedule="linear", targets=("auto",))


PRESETS: Mapping[tuple[str, bool], Preset] = {
    ("fedavg-lora", False): _open(8, 16.0, "kaiming", 1.2e-3),
    ("ffa-lora", False): _open(8, 16.0, "kaiming", 6e-3),
    ("fed-sb", False): _open(32, 64.0, "orthonormal", 2e-2),
    ("fedsvd", False): _open(8, 16.0, "orthonormal", 4e-3),
    ("fedavg-lora", True): _private(1, 10.0, "kaiming", 1.7e-2, clip_norm=6.0, head_scale=3.5),
    ("ffa-lora", True): _private(2, 8.0, "kaiming", 3e-2, clip_norm=3.0, head_scale=2.0),
    ("fed-sb", True): _private(16, 64.0, "orthonormal", 3e-2, clip_norm=3.0, head_scale=2.0),
    ("fedsvd", True): _private(2, 5.0, "orthonormal", 3e-2, clip_norm=3.0, head_scale=2.0),
}


def presets() -> Mapping[tuple[str, bool], Preset]:
    """(strategy, private) → its preset, of all that there are."""
    return PRESETS


def preset(strategy: str, private: bool, init: str | None = None) -> Preset:
    """The preset of a strategy, with or without privacy.

    FFA-LoRA from orthonormal rows is FedSVD without its refactorisation, and has FedSVD's: the two differ in nothing
    else.

    Raises:
        ValueError: there is no such strategy.
    """
    if (strategy, private) not in PRESETS:
        names = ", ".join(dict.fromkeys(name for name, _ in PRESETS))
        raise ValueError(f"there is no strategy {strategy!r}; choose one of {names}")
    return PRESETS["fedsvd" if (strategy, init) == ("ffa-lora", "orthonormal") else strategy, private]
