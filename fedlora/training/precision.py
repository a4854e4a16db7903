"""Which number format a device computes in, and what is kept out of it or stored in it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
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
        raise ValueError(f"--device {device}: this PyTorch ({torch.__version__}) sees no such device; use "
                         "--device cpu, or install the build of PyTorch for it")
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


def store_frozen_weights(model: nn.Module, dtype: torch.dtype, keep: Collection[int]) -> None:
    """Keep the base model's frozen linear and embedding weights in `dtype`; normalisations stay as they are.

    Autocast would cast frozen weights in every step. Embeddings decide the format of what flows between the layers: in
    float32, each linear layer casts it anew.

    Args:
        keep: ids of the parameters that travel, which stay as they are even if frozen.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad and id(parameter) not in keep:
                    parameter.data = parameter.data.to(dtype)
        if isinstance(module, BaseTunerLayer):
            # else PEFT casts to float32 what autocast casts back
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]


def attend_with_mask(model: PreTrainedModel, device: torch.device) -> None:
    """Fused attention always with a mask; on a CPU in float32, whatever the linear layers compute in.

    transformers leaves the mask out where no record of a batch is padded, which rounds a decoder's attention in another
    way: one record would change the others' gradients. And to see whether any is, the host waits for a GPU.

    PyTorch 2.13's fused attention has a backward pass for bfloat16 on CPUs that takes up to ten times as long as the
    one for float32 (sequences of 16 to 64 tokens), and more than half of a whole step. Models that do not use fused
    attention are left as they are.
    """
    if model.config._attn_implementation == "sdpa":
        name = "fedlora_sdpa_float32" if device.type == "cpu" else "fedlora_sdpa"
        AttentionInterface.register(name, _float32_attention if device.type == "cpu" else sdpa_attention_forward)
        AttentionMaskInterface.register(name, _full_mask)
        model.set_attn_implementation(name)


def _full_mask(*arguments: Any, **options: Any) -> torch.Tensor | None:
    """transformers' own, which is never left out."""
    return sdpa_mask(*arguments, **options | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def _float32_attention(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                       attention_mask: torch.Tensor | None, **options: Any) -> tuple[torch.Tensor, None]:
    """As transformers' own function: query, key, value [records, heads, length, d] to [records, length, heads, d]."""
    with torch.autocast(query.device.type, enabled=False):
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return output.to(value.dtype), None
