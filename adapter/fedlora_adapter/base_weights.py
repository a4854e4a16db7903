"""The weights of a base model, read from its safetensors files one at a time. The model is never built."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fedlora import models

from .peft_folder import Adapter, Target

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class BaseWeights:
    """The weights that an adapter is added to.

    Args:
        model: a folder, or the id of a model in the hub's cache on this machine.

    Raises:
        ValueError: there is no such model on this machine.
    """

    def __init__(self, model: str) -> None:
        try:
            self.path = models.resolve(model)
        except ValueError as error:
            if Path(model).is_dir() or model == "minilm":
                raise
            raise ValueError(f"--base {model}: there is no such folder, and no model of this name in the hub's cache "
                             "on this machine. Name the base model's folder") from error

    @cached_property
    def _places(self) -> Mapping[str, Path]:
        """The file in which each tensor is."""
        places: dict[str, Path] = {}
        for file in models.weight_files(self.path):
            try:
                with safe_open(file, framework="pt") as opened:
                    places |= dict.fromkeys(opened.keys(), file)
            except SafetensorError as error:
                raise ValueError(f"{file} cannot be read ({error}): it is damaged. Fetch the model again") from error
        return places

    def weight(self, adapter: Adapter, target: Target) -> torch.Tensor:
        """Return the weight of an adapted layer in float64, [d_out, d_in] as its ΔW has them.

        Raises:
            ValueError: the model has no such weight, or it does not fit the adapter.
        """
        key = self._key(f"{target.name}.weight")
        with safe_open(self._places[key], framework="pt") as file:
            stored: torch.Tensor = file.get_tensor(key)
        if stored.dtype not in _FLOATS:
            raise ValueError(f"{self.path} holds {key} as {stored.dtype}, which is quantised; name a copy of the model "
                             "whose weights are float32, float16 or bfloat16")
        shape, given = (target.d_out, target.d_in), tuple(stored.shape)
        if shape not in (given, given[::-1]):
            raise ValueError(f"{self.path} holds {key} with shape {given}, and the adapter's update of it has shape "
                             f"{shape}: this is not the model that the adapter was trained on")
        is_turned = shape != given or target.is_embedding or bool(adapter.config.get("fan_in_fan_out"))
        return (stored.T if is_turned and shape == given[::-1] else stored).double()

    def _key(self, name: str) -> str:
        """Return the name under which the files hold a parameter: with or without the name of a part around it."""
        if name in self._places:
            return name
        fits = [key for key in self._places if name.endswith(f".{key}") or key.endswith(f".{name}")]
        if len(fits) != 1:
            raise ValueError(f"{self.path} has {'no' if not fits else 'more than one'} weight for the adapter's "
                             f"{name.removesuffix('.weight')}: this is not the model that the adapter was trained on, "
                             "or its files name its layers otherwise than transformers does")
        return fits[0]
