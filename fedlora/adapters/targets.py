"""Which linear layers of a model are adapted: by name, by the ending of a name, or those that the papers adapt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
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
        Suffixes of module names, for `attach`; full names where a suffix would take in layers that are not used.

    Raises:
        ValueError: the model follows none of the known naming conventions.
    """
    candidates = _linear_names(model)
    for suffixes in _CONVENTIONS:
        if all(any(_matches(name, suffix) for name in candidates) for suffix in suffixes):
            named = [name for name in candidates if any(_matches(name, suffix) for suffix in suffixes)]
            used = tuple(name for name, shapes in _seen(model, named).items() if shapes)
            return suffixes if len(used) in (0, len(named)) else used
    raise ValueError(f"no attention projections are known for {type(model).__name__}; name the layers with --targets, "
                     f"for example from {_last_parts(candidates)}")


def all_targets(model: PreTrainedModel, *, private: bool) -> tuple[str, ...]:
    """Every linear layer of the repeated blocks, as suffixes of module names for `attach`.

    Args:
        private: leave out those that are not given each record by itself, as the router of a mixture of experts.

    Raises:
        ValueError: the model has no numbered blocks, or no layer of them can be trained under privacy.
    """
    numbered = [name for name in _linear_names(model) if any(part.isdigit() for part in name.split("."))]
    inner = {_within_block(name) for name in numbered} - {""}
    if not inner:
        raise ValueError(f"{type(model).__name__} has no numbered blocks; name the layers with --targets")
    if private:
        strange = not_by_record(model, numbered)
        kept = [name for name in numbered if name not in strange and _within_block(name)]
        if not kept:
            name, given = next(iter(strange.items()))
            raise ValueError(f"no linear layer of {type(model).__name__} is given each record by itself ({name} "
                             f"{given}), so that none can be trained under privacy; choose another --model")
        inner = {_within_block(name) for name in kept}
        shared = {suffix for suffix in inner if any(_matches(name, suffix) for name in strange)}
        inner = inner - shared | {name for name in kept if _within_block(name) in shared}
    return tuple(sorted(inner))


def _within_block(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[max(i for i, part in enumerate(parts) if part.isdigit()) + 1:])


_RECORDS, _LENGTH = 3, 8
"""Of the made-up batch on which `not_by_record` looks."""


def not_by_record(model: PreTrainedModel, names: Sequence[str]) -> dict[str, str]:
    """Which of these layers are not given each record's own values for its own output, and what they are given.

    Such are a router that is given all tokens of a batch in one row, a projection of positions that belong to no
    record, and a layer that is not used.
    """
    seen = _seen(model, names)
    return {name: f"is given {' and '.join('×'.join(map(str, shape)) for shape in dict.fromkeys(shapes))} values for "
                  f"{_RECORDS} records of {_LENGTH} tokens" if shapes else "has no part in the model's output"
            for name, shapes in seen.items()
            if not shapes or any(len(shape) < 2 or shape[0] != _RECORDS for shape in shapes)}


def _seen(model: PreTrainedModel, names: Sequence[str]) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of what each layer is given in a pass over made-up records; none where the output does not follow it."""
    shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in names}
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def watch(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def note(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            shapes[name].append(tuple(inputs[0].shape))
            outputs[name].append(output)
        return note

    hooks = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    tokens = _made_up_tokens(model)
    try:
        with torch.enable_grad():
            logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the model's own code raises
        raise ValueError(f"{type(model).__name__} does not take {_RECORDS} records of {_LENGTH} tokens "
                         f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); choose another --model"
                         ) from error
    finally:
        for hook in hooks:
            hook.remove()
    asked = [output for several in outputs.values() for output in several if output.requires_grad]
    given = torch.autograd.grad(logits.float().sum(), asked, allow_unused=True) if asked else ()
    idle = {id(output) for output, gradient in zip(asked, given, strict=True) if gradient is None}
    return {name: [shape for shape, output in zip(shapes[name], outputs[name], strict=True) if id(output) not in idle]
            for name in names}


def _made_up_tokens(model: PreTrainedModel) -> torch.Tensor:
    """[records, tokens], ordinary ones but for the last."""
    config = model.config.get_text_config()
    special = {config.pad_token_id, config.bos_token_id, config.eos_token_id}
    ordinary = [token for token in range(getattr(config, "vocab_size", _LENGTH * 2)) if token not in special]
    tokens = torch.tensor(ordinary[:_LENGTH]).repeat(-(-_LENGTH // len(ordinary[:_LENGTH])))[:_LENGTH]
    tokens = tokens.repeat(_RECORDS, 1)
    if model.config.is_encoder_decoder and isinstance(config.eos_token_id, int):
        tokens[:, -1] = config.eos_token_id
    return tokens.to(model.device)


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
