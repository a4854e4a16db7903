"""Choice of the linear layers to adapt: by name, by name ending, or those that the LoRA papers adapt."""

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
    ("value_proj",),  # DeBERTa; its query_proj also receives the relative positions, which belong to no record
    ("query_key_value",),  # GPT-NeoX, BLOOM, Falcon
    ("qkv_proj",),  # Phi-3
)


def automatic_targets(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the projections that the LoRA papers adapt: queries and values, or the fused projection that holds them.

    Returns:
        Suffixes of module names for `attach`, or full names if a suffix would also match layers that are not used.

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
    """Return every linear layer of the model's repeated blocks, as suffixes of module names for `attach`.

    Args:
        model: the model.
        private: leave out layers that cannot be trained under privacy, because they do not receive each record
            separately. The router of a mixture of experts is one.

    Raises:
        ValueError: the model has no numbered blocks, or none of their layers can be trained under privacy.
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
            raise ValueError(f"no linear layer of {type(model).__name__} receives each record separately ({name} "
                             f"{given}), so none can be trained under privacy; choose another --model")
        inner = {_within_block(name) for name in kept}
        shared = {suffix for suffix in inner if any(_matches(name, suffix) for name in strange)}
        inner = inner - shared | {name for name in kept if _within_block(name) in shared}
    return tuple(sorted(inner))


def _within_block(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[max(i for i, part in enumerate(parts) if part.isdigit()) + 1:])


_RECORDS, _LENGTH = 3, 8
"""Records, and tokens of each, in the made-up batch that `not_by_record` runs the model on."""


def not_by_record(model: PreTrainedModel, names: Sequence[str]) -> dict[str, str]:
    """Find the layers that do not receive each record's values separately, by running the model on a made-up batch.

    Examples are a router that receives all tokens of a batch in one row, a projection of positions that belong to no
    record, and a layer that is not used.

    Args:
        model: the model.
        names: the linear layers to look at.

    Returns:
        Layer → what it receives instead, as the end of a sentence for a message.
    """
    seen = _seen(model, names)
    return {name: f"is given {' and '.join('×'.join(map(str, shape)) for shape in dict.fromkeys(shapes))} values for "
                  f"{_RECORDS} records of {_LENGTH} tokens" if shapes else "has no part in the model's output"
            for name, shapes in seen.items()
            if not shapes or any(len(shape) < 2 or shape[0] != _RECORDS for shape in shapes)}


def _seen(model: PreTrainedModel, names: Sequence[str]) -> dict[str, list[tuple[int, ...]]]:
    """Run the model on made-up records, and return the shapes of each layer's inputs.

    A use of a layer that the model's output does not depend on is left out.
    """
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
    except Exception as error:  # the model's code can raise anything
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


@torch.no_grad()
def outputs_for_made_up(model: PreTrainedModel) -> torch.Tensor:
    """Return the model's outputs (logits) for the made-up batch of `not_by_record`, in float64."""
    tokens = _made_up_tokens(model)
    logits: torch.Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return logits.double()


def _made_up_tokens(model: PreTrainedModel) -> torch.Tensor:
    """Make a batch of ordinary tokens, [records, tokens]. Encoder-decoders get an end-of-text token at the end."""
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
    """Return the full names of the linear layers that the targets match, in the model's order.

    Args:
        model: the model.
        targets: full names or suffixes of module names.
        missing: names of the parameters that are not in the base checkpoint. Their modules are left out.
        head: name of the head's final linear layer; the whole classifier around it is left out. None if there is none.

    Raises:
        ValueError: a target matches no layer.
    """
    outside = {name.rpartition(".")[0] for name in missing} | ({top(head)} if head else set())
    candidates = [name for name in _linear_names(model) if not any(is_inside(name, other) for other in outside)]
    for target in targets:
        if not any(_matches(name, target) for name in candidates):
            raise ValueError(f"target {target!r} names no linear layer of {type(model).__name__}; its layers end in "
                             f"{_last_parts(candidates)}")
    return [name for name in candidates if any(_matches(name, target) for target in targets)]


def _linear_names(model: PreTrainedModel) -> list[str]:
    # the output projection of a language model is not a target, because it is often tied to the embeddings
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers does not annotate it
    return [name for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and module is not output]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def is_inside(name: str, module: str) -> bool:
    """Return whether a module's or parameter's name is the module itself or lies inside it."""
    return name == module or name.startswith(f"{module}.")


def top(head: str) -> str:
    """Return the classifier as PEFT sees it: the top-level module that is, or contains, the final linear layer."""
    return head.partition(".")[0]


def _last_parts(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
