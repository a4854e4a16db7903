"""The adapter stays where it is, and the head alone is trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedlora.adapters import AdapterLayout


class HeadAlone:
    """Zeros in place of the adapter's noised gradients."""

    @staticmethod
    def fits(layout: AdapterLayout) -> str:
        """Return why an adapter cannot be trained so, or "" where it can."""
        return "" if any(spec.group == "head" for spec in layout.trained) else "no head is trained; use --head train"

    def __call__(self, gradients: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor],
                 start: Mapping[str, torch.Tensor], layout: AdapterLayout, step: int) -> Mapping[str, torch.Tensor]:
        """Return the gradients that the optimizer steps by."""
        heads = {spec.name for spec in layout.trained if spec.group == "head"}
        return {name: gradient if name in heads else torch.zeros_like(gradient)
                for name, gradient in gradients.items()}


ADJUSTMENT = HeadAlone
