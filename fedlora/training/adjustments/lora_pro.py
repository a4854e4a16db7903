r"""LoRA-Pro: turn the gradients of A and B so that a step of both comes closest to a step of full fine-tuning.

Wang, Liang, He, Wang and Tan, "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", ICLR 2025, arXiv:2407.18242.

    g_A'  =  s^-2 (B^T B)^+ g_A + X A
    g_B'  =  s^-2 (I - B (B^T B)^+ B^T) g_B (A A^T)^+ - B X        B^T B X + X A A^T = -s^-2 (B^T B)^+ g_A A^T

Let G be the gradient of the update itself, of which the factors see g_A = s B^T G and g_B = s G A^T. The adjusted pair
moves the update along s B g_A' + s g_B' A = P_B G + G P_A - P_B G P_A, which is the part of G that the two factors can
express. P_B and P_A project on the columns of B and the rows of A. X changes nothing of that; the Sylvester equation
that it solves keeps the pair close to (g_A, g_B). Where one factor alone trains in a round, its gradient becomes
(B^T B)^+ g_A or g_B (A A^T)^+.

Two things differ from the paper, because noise is in g_A and g_B:

    Norms        Each of g_A' and g_B' is scaled to the length of g_A or g_B. Every run starts at B = 0, and (B^T B)^+
                 would multiply the noise in g_A by 1/|B|^2. So a step has the direction of the paper's for each factor,
                 and the length of ordinary LoRA's; s^-2 cancels. The formula above for the step of the update holds
                 before this scaling, not after it.
    Optimizer    The authors' Adam keeps moments of the whole G, m n values for each layer. Here the optimizer of the
                 run keeps moments of the adjusted g_A' and g_B'.

The pseudo-inverse leaves out directions whose eigenvalue is below `CUT` times the largest. At B = 0 that is all of
them: g_A' is 0, and B alone moves in the first step, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from typing_extensions import override

from fedlora.adapters import AdapterLayout
from fedlora.training.adjustments import Adjustment

CUT = 1e-6


class LoraPro(Adjustment):
    """The adjustment of both factors of each layer. Gradients of other tensors, such as the head's, stay unchanged."""

    @staticmethod
    @override
    def fits(layout: AdapterLayout) -> str:
        if layout.family.name == "lora" and layout.sites:
            return ""
        return (f"it turns the gradients of the two factors of LoRA, and the adapter family is {layout.family.name!r}"
                f"{'' if layout.sites else ' without adapted layers'}; choose a strategy of the family 'lora', like "
                "fedavg-lora, and not --targets none")

    @override
    def __call__(self, gradients: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor],
                 start: Mapping[str, torch.Tensor], layout: AdapterLayout, step: int) -> Mapping[str, torch.Tensor]:
        adjusted = dict(gradients)
        for site in layout.sites:
            names = {factor: f"{site.name}.{factor}" for factor in "AB"}
            given = {factor: gradients[name] for factor, name in names.items() if name in gradients}
            if not given:
                continue
            A, B = (_wide(tensors[names[factor]]) for factor in "AB")
            if len(given) == 2:
                turned = closest(_wide(given["A"]), _wide(given["B"]), A, B, site.scaling)._asdict()
            elif "A" in given:
                turned = {"A": _spectrum(B.T @ B).inverse @ _wide(given["A"])}
            else:
                turned = {"B": _wide(given["B"]) @ _spectrum(A @ A.T).inverse}
            for factor, gradient in given.items():
                adjusted[names[factor]] = _as_long(turned[factor], gradient)
        return adjusted


class Pair(NamedTuple):
    """Gradients of the two factors.

    Attributes:
        A: (r, d_in)
        B: (d_out, r)
    """

    A: torch.Tensor
    B: torch.Tensor


def closest(g_A: torch.Tensor, g_B: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float) -> Pair:
    """Return the adjusted gradients of one layer, before their lengths are put back.

    Args:
        g_A: (r, d_in) gradient of A.
        g_B: (d_out, r) gradient of B.
        A: (r, d_in) factor.
        B: (d_out, r) factor.
        scaling: s, the factor on the update B A.
    """
    of_A, of_B = _spectrum(A @ A.T), _spectrum(B.T @ B)
    first = of_B.inverse @ g_A
    sums = of_B.values[:, None] + of_A.values
    # in the eigenvectors' coordinates the Sylvester equation is one division for each value of X
    turned = of_B.vectors.T @ (first @ A.T) @ of_A.vectors / torch.where(sums > 0, sums, 1.0)
    X = -of_B.vectors @ turned @ of_A.vectors.T
    rest = g_B - B @ (of_B.inverse @ (B.T @ g_B))
    return Pair((first + X @ A) / scaling**2, (rest @ of_A.inverse - B @ X) / scaling**2)


class _Spectrum(NamedTuple):
    values: torch.Tensor
    vectors: torch.Tensor
    inverse: torch.Tensor


def _spectrum(gram: torch.Tensor) -> _Spectrum:
    """Return the eigenvalues, eigenvectors and pseudo-inverse of a Gram matrix (r, r).

    They are computed on the CPU, which is quicker for so small a matrix and exists for every kind of device.
    """
    values, vectors = torch.linalg.eigh(gram.cpu())
    values = torch.where(values > CUT * values.max(), values, 0.0)
    reciprocals = torch.where(values > 0, 1 / torch.where(values > 0, values, 1.0), 0.0)
    return _Spectrum(*(part.to(gram.device) for part in (values, vectors, vectors * reciprocals @ vectors.T)))


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values if values.device.type == "mps" else values.double()


def _as_long(turned: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return `turned` with the length and dtype of `gradient`; zeros stay zeros."""
    length = torch.linalg.vector_norm(turned)
    factor = torch.linalg.vector_norm(gradient.to(turned.dtype)) / torch.where(length > 0, length, 1.0)
    adjusted: torch.Tensor = (turned * factor).to(gradient.dtype).contiguous()
    return adjusted


ADJUSTMENT = LoraPro
