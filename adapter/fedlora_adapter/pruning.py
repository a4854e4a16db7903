"""Structured pruning of a base model, and the way back for adapters trained on what is left (LoRAM, arXiv:2502.13533).

Whole attention heads and whole neurons of the MLP go. A config of transformers has one number of heads and one size of
the MLP for all layers, so the same number of each goes in every layer; LoRAM spares the first and the last layers,
which such a config cannot say. Query heads go together with the key and value head that they share.

    heads      outputs of the projections of queries, keys and values; inputs of the attention's output projection
    neurons    outputs of the MLP's first projections; inputs of its last one

Where outputs went, an adapter's B lacks rows; where inputs went, its A lacks columns. `Side` says which.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig

HEADS, NEURONS = "heads", "neurons"

RECORD, PIN = "fedlora_pruned.json", "fedlora_pruned_sha256"
"""The file of a pruned base that says what was kept, and the setting of its config.json that holds this file's hash."""


@dataclass(frozen=True)
class Side:
    """One side of a layer that loses units.

    Attributes:
        layer: end of the layer's name after the number of its block.
        unit: `HEADS` or `NEURONS`.
        is_output: whether its outputs go, else its inputs.
    """

    layer: str
    unit: str
    is_output: bool


_MLP = (Side("mlp.gate_proj", NEURONS, True), Side("mlp.up_proj", NEURONS, True), Side("mlp.down_proj", NEURONS, False))
_ATTENTION = (*(Side(f"self_attn.{one}_proj", HEADS, True) for one in "qkv"), Side("self_attn.o_proj", HEADS, False))


@dataclass(frozen=True)
class Architecture:
    """Where models of some types have their heads and neurons.

    Attributes:
        types: the model types (`model_type` in config.json).
        block: what stands before a block's number in the names of its layers.
        sides: what loses units.
        size: the config's name for the number of neurons.
        is_turned: whether weights are stored with their inputs as rows, as GPT-2's are.
        generates: whether they are language models, else encoders.
    """

    types: tuple[str, ...]
    block: str
    sides: tuple[Side, ...]
    size: str = "intermediate_size"
    is_turned: bool = False
    generates: bool = True

    @property
    def has_heads(self) -> bool:
        """Whether a config can say that there are fewer heads than fill the hidden size."""
        return any(side.unit == HEADS for side in self.sides)

    def place(self, layer: str) -> tuple[str, Side] | None:
        """Return a layer's block number and which of its sides loses units; None if none does."""
        match = re.search(rf"(?:^|\.){self.block}\.(\d+)\.(.+)$", layer)
        return next(((match[1], side) for side in self.sides if side.layer == match[2]), None) if match else None


ARCHITECTURES = (
    Architecture(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "granite", "smollm3"), "layers",
                 (*_ATTENTION, *_MLP)),
    Architecture(("bert", "roberta"), "layer",
                 (Side("intermediate.dense", NEURONS, True), Side("output.dense", NEURONS, False)), generates=False),
    Architecture(("gpt2",), "h", (Side("mlp.c_fc", NEURONS, True), Side("mlp.c_proj", NEURONS, False)), "n_inner",
                 is_turned=True),
)


def architecture_of(config: Mapping[str, Any], model: str) -> Architecture:
    """Return the architecture of a model.

    Raises:
        ValueError: pruning is not known for this model type.
    """
    kind = config.get("model_type")
    for one in ARCHITECTURES:
        if kind in one.types:
            return one
    known = ", ".join(name for one in ARCHITECTURES for name in one.types)
    raise ValueError(f"{model} has model type {kind!r}, and what can be pruned is known for {known}")


@dataclass(frozen=True)
class Sizes:
    """Numbers of heads and neurons in each block.

    Attributes:
        groups: key and value heads, each with the query heads that share it; 0 if heads stay.
        queries: query heads of a group.
        width: features of a head.
        neurons: neurons of the MLP.
    """

    groups: int
    queries: int
    width: int
    neurons: int

    def units(self, unit: str) -> int:
        """Return the number of groups of heads, or of neurons."""
        return self.groups if unit == HEADS else self.neurons


def sizes_of(architecture: Architecture, config: Mapping[str, Any]) -> Sizes:
    """Return the sizes that a config gives."""
    neurons = config.get(architecture.size) or 4 * int(config.get("n_embd", 0))
    if not architecture.has_heads:
        return Sizes(0, 0, 0, int(neurons))
    heads = int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    return Sizes(groups, heads // groups, int(config.get("head_dim") or config["hidden_size"] // heads), int(neurons))


def smaller(architecture: Architecture, config: Mapping[str, Any], ratio: float) -> tuple[dict[str, Any], Sizes]:
    """Return the config of a model without a share of its heads and neurons, and its sizes.

    Never more than this share goes. Some configs allow only certain numbers of heads (Llama's only divisors of the
    hidden size); then it is the largest allowed share below.

    Args:
        architecture: the model's architecture.
        config: the full model's config.
        ratio: the share, from 0 to below 1.
    """
    full = sizes_of(architecture, config)
    new = {**config, architecture.size: _kept(full.neurons, ratio)}
    if not architecture.has_heads:
        return new, sizes_of(architecture, new)
    for groups in range(_kept(full.groups, ratio), full.groups + 1):
        tried = new | {"num_attention_heads": groups * full.queries, "num_key_value_heads": groups,
                       "head_dim": full.width}
        try:
            AutoConfig.for_model(**tried)
        except Exception:  # transformers raises errors of many kinds for a config that it refuses
            continue
        return tried, sizes_of(architecture, tried)
    return new, sizes_of(architecture, new)


def _kept(count: int, ratio: float) -> int:
    return max(1, count - math.floor(ratio * count + 1e-9))


def features(sizes: Sizes, side: Side, layer: str, units: Sequence[int]) -> torch.Tensor:
    """Return the places of units among a layer's outputs or inputs, in rising order.

    Args:
        sizes: the full model's sizes.
        side: the layer's side.
        layer: the layer's name, which says whether it has the query heads or the key and value heads.
        units: numbers of groups of heads, or of neurons.
    """
    wide = width_of(sizes, side, layer)
    return (torch.tensor(units, dtype=torch.long)[:, None] * wide + torch.arange(wide)).flatten()


def width_of(sizes: Sizes, side: Side, layer: str) -> int:
    """Return the number of a layer's outputs or inputs that belong to one unit."""
    if side.unit == NEURONS:
        return 1
    return sizes.width * (1 if layer.endswith(("k_proj", "v_proj")) else sizes.queries)


Measure = Callable[[str, torch.Tensor], torch.Tensor]
"""(layer, weight as it is stored) → how much each value matters, of the same shape."""


def scores(architecture: Architecture, sizes: Sizes, weights: Iterator[tuple[str, torch.Tensor]],
           measure: Measure) -> dict[str, dict[str, torch.Tensor]]:
    """Return how much each unit matters: the sum over all weights that go with it.

    Args:
        architecture: the model's architecture.
        sizes: its sizes.
        weights: name and tensor of each of the model's parameters.
        measure: how much each value of a weight matters.

    Returns:
        Block number → unit → [units] float64.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights:
        layer, _, part = name.rpartition(".")
        place = architecture.place(layer) if part == "weight" else None
        if place is None:
            continue
        block, side = place
        values = measure(layer, tensor).double()
        by_feature = values.sum(dim=1 if side.is_output != architecture.is_turned else 0)
        by_unit = by_feature.view(-1, width_of(sizes, side, layer)).sum(1)
        of_block = found.setdefault(block, {})
        of_block[side.unit] = of_block.get(side.unit, torch.zeros_like(by_unit)) + by_unit
    return found


def magnitude(layer: str, weight: torch.Tensor) -> torch.Tensor:
    """Return the squares of a layer's weight."""
    return weight.double().square()


def chosen(found: Mapping[str, Mapping[str, torch.Tensor]], new: Sizes) -> dict[str, dict[str, list[int]]]:
    """Return the units of each block that are kept: those that matter most, in rising order."""
    return {block: {unit: sorted(values.topk(new.units(unit)).indices.tolist()) for unit, values in of_block.items()}
            for block, of_block in sorted(found.items(), key=lambda one: int(one[0]))}


def cut(architecture: Architecture, sizes: Sizes, kept: Mapping[str, Mapping[str, Sequence[int]]], name: str,
        tensor: torch.Tensor) -> torch.Tensor:
    """Return a parameter of the model without what does not stay."""
    layer, _, part = name.rpartition(".")
    place = architecture.place(layer)
    if place is None or part not in ("weight", "bias"):
        return tensor
    block, side = place
    places = features(sizes, side, layer, kept[block][side.unit])
    if part == "bias":
        return tensor[places].contiguous() if side.is_output else tensor
    return tensor.index_select(0 if side.is_output != architecture.is_turned else 1, places).contiguous()
