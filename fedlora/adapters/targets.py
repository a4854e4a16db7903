"""Which linear layers of a model are adapted: by name, by the ending of a name, or those that the papers adapt."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_CONVENTIONS = (
    ("query", "value"),  # BERT, RoBERTa, ELECTRA
    ("Wqkv",),  # ModernBERT
    ("q_proj", "v_proj"),  # Llama, Qwen2, Mistral, Gemma, OPT
    ("c_attn",),  # GPT-2
    ("q_lin", "v_lin"),  # DistilBERT
    ("value_proj",),  # DeBERTa, whose query_proj is given the relative positions too, which belong to no record
    ("query_key_value",),  # GPT-NeoX, BLOOM, Falcon
    ("qkv_proj",),  # Phi-3
)


def automatic_targets(model: PreTrainedModel) -> tuple[str, ...]:
    """The projections that the LoRA papers adapt: queries and values, or the fused one that holds them.

    Returns:
        Suffixes of module names, for `attach`.
    Raises:
        ValueError: the model follows none of the known naming conventions.
    """
    candidates = _linear_names(model)
    for suffixes in _CONVENTIONS:
        if all(any(_matches(name, suffix) for name in candidates) for suffix in suffixes):
            return suffixes
    raise ValueError(f"no attention projections are known for {type(model).__name__}; name the layers with --targets, "
                     f"for example from {_last_parts(candidates)}")


def all_targets(model: PreTrainedModel) -> tuple[str, ...]:
    """Every linear layer of the repeated blocks, as suffixes of module names for `attach`.

    Raises:
        ValueError: the model has no numbered blocks.
    """
    parts = [name.split(".") for name in _linear_names(model)]
    inner = {".".join(name[max(i for i, part in enumerate(name) if part.isdigit()) + 1:])
             for name in parts if any(part.isdigit() for part in name)}
    if not inner - {""}:
        raise ValueError(f"{type(model).__name__} has no numbered blocks; name the layers with --targets")
    return tuple(sorted(inner - {""}))


def target_modules(model: PreTrainedModel, targets: Sequence[str], missing: Sequence[str],
                    head: str | None) -> list[str]:
    """Full names of the modules that the targets name, in the model's order."""
    outside = {name.rpartition(".")[0] for name in missing} | ({top(head)} if head else set())
    candidates = [name for name in _linear_names(model) if not any(is_inside(name, other) for other in outside)]
    for target in targets:
        if not any(_matches(name, target) for name in candidates):
            raise ValueError(f"target {target!r} names no linear layer of {type(model).__name__}; its layers end in "
                             f"{_last_parts(candidates)}")
    return [name for name in candidates if any(_matches(name, target) for target in targets)]


def _linear_names(model: PreTrainedModel) -> list[str]:
    # the output projection of a language model is no adapter target: it is often tied to the embeddings
    output = model.get_output_embeddings()
    return [name for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and module is not output]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def is_inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def top(head: str) -> str:
    """The classifier as PEFT sees it: the top-level module that the final linear is, or is in."""
    return head.partition(".")[0]


def _last_parts(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
