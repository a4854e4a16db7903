r"""Scaled gradient descent: precondition each LoRA factor's gradient by the other factor.

Zhang and Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models", arXiv:2402.02347, after the
scaled gradient descent of Tong, Ma and Chi, arXiv:2005.08898.

    g_B  <-  g_B (A A^T + λ I)^-1            g_A  <-  (B^T B + λ I)^-1 g_A

The distance that a step moves the update B A then depends little on the lengths of A and B. Where A is frozen, only the
first line applies; it makes up for a frozen A whose rows are not orthonormal.

The paper sets λ to 1e-6. But every LoRA starts at B = 0, where g_A is nothing but noise, and a λ of 1e-6 would multiply
this noise by a million. Here λ is `DAMPING` times m, the mean square length of A's rows plus that of B's columns. So no
direction of the gradient is multiplied by more than 1 / (`DAMPING` · m).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from typing_extensions import override

from fedlora.adapters import AdapterLayout
from fedlora.training.adjustments import Adjustment

DAMPING = 0.1


class ScaledGD(Adjustment):
    """The preconditioner. Gradients of tensors that are no factor of an update, such as the head's, stay unchanged."""

    @staticmethod
    @override
    def fits(layout: AdapterLayout) -> str:
        names = {spec.name for spec in layout.state}
        trained = [spec.name for spec in layout.trained if spec.group == "adapter"]
        if all(name[-2:] in (".A", ".B") and _other(name) in names for name in trained) and trained:
            return ""
        return ("it scales the gradients of the two factors of an update B A, and this run trains none; choose a "
                "strategy that does, like fedavg-lora, and not --targets none")

    @override
    def __call__(self, gradients: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor],
                 start: Mapping[str, torch.Tensor], layout: AdapterLayout, step: int) -> Mapping[str, torch.Tensor]:
        def scaled(name: str, gradient: torch.Tensor) -> torch.Tensor:
            if name[-2:] not in (".A", ".B") or _other(name) not in tensors:
                return gradient
            mine, other = _rows(name, tensors[name]), _rows(_other(name), tensors[_other(name)])
            damping = DAMPING * (mine.square().sum() + other.square().sum()) / len(other)
            damping = torch.where(damping > 0, damping, 1.0)  # if both factors are zero there is no scale to go by
            metric = other @ other.T + damping * torch.eye(len(other), device=other.device)
            # the damped metric is invertible; `solve` would make the host wait for a GPU to check that
            return _rows(name, torch.linalg.solve_ex(metric, _rows(name, gradient)).result).contiguous()

        return {name: scaled(name, gradient) for name, gradient in gradients.items()}


def _other(name: str) -> str:
    """Return the name of the other factor of the same update."""
    return name[:-1] + {"A": "B", "B": "A"}[name[-1]]


def _rows(name: str, values: torch.Tensor) -> torch.Tensor:
    """Return A [r, d_in] as it is and B [d_out, r] transposed: one row for each rank. It is its own inverse."""
    return values if name.endswith(".A") else values.T


ADJUSTMENT = ScaledGD
