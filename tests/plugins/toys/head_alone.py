"""Head alone: make no step for the adapter, whatever its gradient; a toy, which no package knows."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedlora.adapters import AdapterLayout


class HeadAlone:
    @staticmethod
    def fits(layout: AdapterLayout) -> str:
        return "" if any(spec.group == "head" for spec in layout.trained) else "no head is trained"

    def __call__(self, gradients: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor],
                 start: Mapping[str, torch.Tensor], layout: AdapterLayout, step: int) -> Mapping[str, torch.Tensor]:
        heads = {spec.name for spec in layout.trained if spec.group == "head"}
        return {name: gradient if name in heads else torch.zeros_like(gradient)
                for name, gradient in gradients.items()}


ADJUSTMENT = HeadAlone
