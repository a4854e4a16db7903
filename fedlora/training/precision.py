"""The device and number format to compute in, and the attention that is safe for per-record gradients."""

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
    """Return the device to compute on. "auto" takes CUDA if there is one, then Apple's MPS, then the CPU.

    Raises:
        ValueError: The name is unknown, or PyTorch sees no such device.
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
    """Return "fp32" or "bf16". "auto" takes "bf16" where the hardware multiplies bfloat16 matrices itself."""
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
    """Convert the base model's frozen linear and embedding weights to `dtype`. Normalisations stay as they are.

    This saves time: autocast would otherwise cast the frozen weights in every step. Embeddings are included because
    their dtype is the dtype of the activations: with float32 activations, every linear layer would cast its inputs.

    Args:
        model: The base model with its adapters.
        dtype: The dtype to store the weights in.
        keep: The ids of parameters that are sent between server and clients. They stay as they are, even if frozen.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad and id(parameter) not in keep:
                    parameter.data = parameter.data.to(dtype)
        if isinstance(module, BaseTunerLayer):
            # otherwise PEFT casts the inputs to float32, and autocast casts them back
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]


def attend_with_mask(model: PreTrainedModel, device: torch.device) -> None:
    """Make the model's fused attention always use a mask, and on a CPU always compute in float32.

    The mask: transformers omits it where no record of a batch is padded. A decoder's attention is then rounded
    differently, so that one record would change the gradients of the others. Besides, the test for padding makes the
    host wait for a GPU.

    float32: on CPUs, the backward pass of PyTorch 2.13's fused attention takes up to ten times as long in bfloat16 as
    in float32 (sequences of 16 to 64 tokens), which is more than half of a whole step.

    Models that do not use fused attention (`sdpa`) are left as they are.
    """
    if model.config._attn_implementation == "sdpa":
        name = "fedlora_sdpa_float32" if device.type == "cpu" else "fedlora_sdpa"
        AttentionInterface.register(name, _float32_attention if device.type == "cpu" else sdpa_attention_forward)
        AttentionMaskInterface.register(name, _full_mask)
        model.set_attn_implementation(name)


def _full_mask(*arguments: Any, **options: Any) -> torch.Tensor | None:
    """Return the mask that transformers makes, with its shortcuts for leaving the mask out switched off."""
    return sdpa_mask(*arguments, **options | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def _float32_attention(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                       attention_mask: torch.Tensor | None, **options: Any) -> tuple[torch.Tensor, None]:
    """Compute transformers' fused attention in float32, outside of autocast.

    Args:
        module: The attention layer.
        query: [records, heads, length, d]
        key: Like `query`; may have fewer heads.
        value: Like `key`.
        attention_mask: Added to the scores, or boolean.
        **options: Passed on to transformers' function.

    Returns:
        ([records, length, heads, d] in the dtype of `value`, None), as transformers expects.
    """
    with torch.autocast(query.device.type, enabled=False):
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return output.to(value.dtype), None
