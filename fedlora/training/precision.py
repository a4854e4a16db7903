"""Which number format a device computes in, and frozen weights kept in it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16")


def resolve_device(device: str) -> torch.device:
    """"auto" takes CUDA, then Apple's MPS, then the CPU.

    Raises:
        ValueError: the device is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, usable in there.items() if usable))
    kind = device.split(":")[0]
    if kind not in there:
        raise ValueError(f"--device is {device!r}; choose one of {', '.join(DEVICES)}")
    if not there[kind]:
        raise ValueError(f"--device {device}: this PyTorch ({torch.__version__}) sees no such device; use --device cpu, "
                         "or install the build of PyTorch for it")
    return torch.device(device)


def resolve_precision(precision: str, device: str | torch.device) -> str:
    """"auto" becomes "bf16" where the hardware multiplies bfloat16 matrices itself, else "fp32"."""
    if precision not in PRECISIONS:
        raise ValueError(f"--precision is {precision!r}; choose one of {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    kind = torch.device(device).type
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if kind == "cpu" and _cpu_flags() & {"avx512_bf16", "amx_bf16"} else "fp32"


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())


def store_frozen_linears(model: nn.Module, dtype: torch.dtype, keep: Collection[int]) -> None:
    """Keep the base model's frozen linear weights in `dtype`, so that autocast does not cast them in every step.

    Left alone: what is trained or travels (`keep`, by id), and weights that another module (an embedding) shares.
    """
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            for parameter in module.parameters(recurse=False):
                if not (parameter.requires_grad or id(parameter) in keep or uses[id(parameter)] > 1):
                    parameter.data = parameter.data.to(dtype)
