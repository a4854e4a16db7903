"""Put an adapter on a loaded base model, and move its tensors in and out.

PEFT does the surgery on the target modules. Every trained tensor belongs to a plain `nn.Linear`, so that per-example
gradients exist. The base model's weights are frozen and are never written: one copy serves any number of simulated
clients, whose tensors are written in turn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedlora.adapters.layout import FAMILIES, AdapterLayout, TensorSpec
from fedlora.models import LoadedModel
from fedlora.plan import RunPlan, Tensors

_ADAPTER = "default"  # PEFT's name for the only adapter there is

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


class FactoredB(nn.Module):
    """B·R in the slot of PEFT's lora_B: a trained R between A and a frozen B.

    Shapes: middle.weight is R (r, r), outer.weight is B (d_out, r); input (..., r), output (..., d_out). PEFT cannot
    merge it in memory; what `export` writes merges.
    """

    def __init__(self, outer: nn.Linear) -> None:
        super().__init__()
        rank = outer.in_features
        self.middle = nn.Linear(rank, rank, bias=False, device=outer.weight.device, dtype=outer.weight.dtype)
        self.outer = outer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.outer(self.middle(hidden))


class AdaptedModel:
    """A base model with an adapter. Made by `attach`.

    Attributes:
        model: the module to call; the one that was loaded, changed in place.
        layout: names, shapes and roles of the adapter's tensors.
        base_path: folder of the base checkpoint.
        task: one of `fedlora.plan.TASKS`.
        head: name of the classifier's final linear module; None for causal language models.
        missing: names of the parameters that are not in the base checkpoint.
        classifier: the classifier's parameters that are in the base checkpoint and frozen, as they were loaded; few
            models have any. `export` needs them unrounded even if a trainer has stored the base in bfloat16 since.
    """

    def __init__(self, loaded: LoadedModel, layout: AdapterLayout, head: str | None,
                 leaves: dict[str, tuple[nn.Module, str]]) -> None:
        self.model = loaded.model
        self.layout = layout
        self.base_path: Path = loaded.path
        self.task = loaded.task
        self.head = head
        self.missing = loaded.missing
        self.classifier = {name: parameter.detach().cpu().clone() for name, parameter in loaded.model.named_parameters()
                           if head and _is_inside(name, _top(head)) and f"head.{name}" not in leaves}
        self._leaves = leaves  # tensor name -> its module and the parameter's name there

    def parameter(self, name: str) -> nn.Parameter:
        """The model's parameter behind a tensor of `layout.state`."""
        module, parameter_name = self._leaves[name]
        return getattr(module, parameter_name)

    def base_layer(self, module_name: str) -> nn.Linear | Conv1D:
        """The frozen module that an adapter was put on."""
        return cast("nn.Linear | Conv1D", cast(LoraLayer, self.model.get_submodule(module_name)).get_base_layer())

    def base_weight(self, module_name: str) -> torch.Tensor:
        """The frozen weight W0 of a target module, (d_out, d_in) also where the module stores its transpose."""
        base = self.base_layer(module_name)
        return base.weight.detach().T if isinstance(base, Conv1D) else base.weight.detach()

    def write(self, tensors: Tensors) -> None:
        """Overwrite parameters in place, on their device.

        Args:
            tensors: any subset of `layout.state`.
        Raises:
            ValueError: an unknown name or a wrong shape; nothing is written then.
        """
        for name, array in tensors.items():
            if name not in self._leaves:
                raise ValueError(f"{name!r} is not a tensor of this adapter")
            if array.shape != self.parameter(name).shape:
                raise ValueError(f"{name} has shape {array.shape}; it must be {tuple(self.parameter(name).shape)}")
        with torch.no_grad():
            for name, array in tensors.items():
                self.parameter(name).copy_(torch.tensor(array))

    def read(self, which: str = "trained") -> dict[str, np.ndarray]:
        """Copies of the parameters, float32, in the layout's order.

        Args:
            which: "trained", "frozen" or "state".
        """
        specs = getattr(self.layout, which)
        if not specs:
            return {}
        # in one piece: a GPU would be waited for once for each
        values = torch.cat([self.parameter(spec.name).detach().float().flatten() for spec in specs]).cpu()
        sizes = [math.prod(spec.shape) for spec in specs]
        return {spec.name: part.reshape(spec.shape).numpy().copy()
                for spec, part in zip(specs, values.split(sizes), strict=True)}

    def trained_parameters(self) -> list[tuple[TensorSpec, nn.Parameter]]:
        """Spec and parameter of every trained tensor, in the order of `layout.trained`."""
        return [(spec, self.parameter(spec.name)) for spec in self.layout.trained]

    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's parameter behind every tensor of `layout.state`, by name."""
        return {spec.name: self.parameter(spec.name) for spec in self.layout.state}

    def trained_leaves(self) -> list[tuple[nn.Linear, list[tuple[str, TensorSpec]]]]:
        """Every linear module that trains, with its trained parameters ("weight", "bias") and their specs."""
        leaves: dict[nn.Module, list[tuple[str, TensorSpec]]] = {}
        for spec in self.layout.trained:
            module, parameter_name = self._leaves[spec.name]
            leaves.setdefault(module, []).append((parameter_name, spec))
        return list(leaves.items())  # type: ignore[arg-type]


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


def attach(loaded: LoadedModel, *, family: str, rank: int, alpha: float, targets: Sequence[str], train_head: bool,
           dropout: float = 0.0) -> AdaptedModel:
    """Put an adapter on a loaded model, in place. Its values are PEFT's start; write real ones with `write`.

    Trained and frozen adapter tensors are float32 whatever the base's dtype; so are the head's and the other parameters
    that are missing from the checkpoint.

    Args:
        loaded: a model without adapters.
        family: a key of `FAMILIES`.
        rank: r, at least 1.
        alpha: the update is scaled by alpha / rank.
        targets: full names or suffixes of linear modules; () adapts none. The classifier and modules that are not in
            the base checkpoint are left out even if they match.
        train_head: train the final linear of the classifier. The other parameters that are missing from the
            checkpoint stay frozen.
        dropout: of the adapter's input, active in train mode only.
    Raises:
        ValueError: an unknown family or target, nothing to train, or a model that already has an adapter.
    """
    if family not in FAMILIES:
        raise ValueError(f"{family!r} is not an adapter family; choose one of {', '.join(FAMILIES)}")
    model = loaded.model
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ValueError("this model already has an adapter; load it afresh")
    if not targets and not train_head:
        raise ValueError("nothing would be trained: name targets or train the head")
    head = _head_name(model) if loaded.task == "classification" else None
    if train_head and head is None:
        raise ValueError("a causal language model has no task head to train; leave train_head off")
    modules = _target_modules(model, targets, loaded.missing, head)
    if modules:
        _inject(model, modules, rank, alpha, dropout)
    model.requires_grad_(False)

    trained: list[TensorSpec] = []
    frozen: list[TensorSpec] = []
    leaves: dict[str, tuple[nn.Module, str]] = {}

    def register(name: str, module: nn.Module, parameter_name: str, group: str, trains: bool) -> None:
        parameter = getattr(module, parameter_name)
        parameter.data = parameter.data.float()
        parameter.requires_grad_(trains)
        leaves[name] = (module, parameter_name)
        (trained if trains else frozen).append(TensorSpec(name, tuple(parameter.shape), group))

    for module_name in modules:
        layer = cast(LoraLayer, model.get_submodule(module_name))
        outer = cast(nn.Linear, layer.lora_B[_ADAPTER])
        factors = {"A": layer.lora_A[_ADAPTER], "B": outer}
        if family == "bra":
            factored = layer.lora_B[_ADAPTER] = FactoredB(outer)
            factors["R"] = factored.middle
        for factor, leaf in factors.items():
            register(f"{module_name}.{factor}", leaf, "weight", "adapter", factor in FAMILIES[family].trained)
    head_parameters = {f"{head}.{name}" for name, _ in model.get_submodule(head).named_parameters()} if head else set()
    for name in sorted({*loaded.missing, *(head_parameters if train_head else ())}):
        module_name, _, parameter_name = name.rpartition(".")
        register(f"head.{name}", model.get_submodule(module_name), parameter_name, "head",
                 train_head and name in head_parameters)

    def by_name(spec: TensorSpec) -> str:
        return spec.name

    layout = AdapterLayout(FAMILIES[family], rank, alpha / rank, tuple(sorted(trained, key=by_name)),
                           tuple(sorted(frozen, key=by_name)))
    return AdaptedModel(loaded, layout, head, leaves)


def attach_planned(loaded: LoadedModel, run: RunPlan) -> AdaptedModel:
    """`attach` as the plan of a run says."""
    return attach(loaded, family=run.family, rank=run.rank, alpha=run.alpha, targets=run.targets,
                  train_head=run.train_head, dropout=run.dropout)


def _inject(model: PreTrainedModel, modules: Sequence[str], rank: int, alpha: float, dropout: float) -> None:
    """Let PEFT wrap exactly the named modules, in place."""
    training = model.training
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(modules),  # type: ignore
                        fan_in_fan_out=all(isinstance(model.get_submodule(name), Conv1D) for name in modules))
    inject_adapter_in_model(config, model, _ADAPTER)
    model.train(training)
    wrapped = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert wrapped == set(modules), f"PEFT wrapped {sorted(wrapped)} instead of {sorted(modules)}"


def _target_modules(model: PreTrainedModel, targets: Sequence[str], missing: Sequence[str],
                    head: str | None) -> list[str]:
    """Full names of the modules that the targets name, in the model's order."""
    outside = {name.rpartition(".")[0] for name in missing} | ({_top(head)} if head else set())
    candidates = [name for name in _linear_names(model) if not any(_is_inside(name, other) for other in outside)]
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


def _is_inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _top(head: str) -> str:
    """The classifier as PEFT sees it: the top-level module that the final linear is, or is in."""
    return head.partition(".")[0]


def _last_parts(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _head_name(model: PreTrainedModel) -> str:
    """The final linear of a classifier: the last one whose outputs are the labels."""
    names = [name for name, module in model.named_modules()
             if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels]
    if not names:
        raise ValueError(f"{type(model).__name__} has no final linear layer with {model.config.num_labels} outputs; "
                         "choose another model")
    return names[-1]
