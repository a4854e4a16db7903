"""The leading singular vectors of the sign of the loss's gradient on public rows, as in lora-sb:FILE.

Ponkshe et al. (LoRA-SB), 2024, arXiv:2411.19557. Adam's first step changes every value of W0 by the learning rate η,
along the sign of the gradient G that is summed over some records. The paper takes the best B·R·A to that step:

    η·sign(G) ≈ U_r diag(σ_r) V_r    B = U_r,  A = V_r,  R = diag(σ_r)

B and A are so here. R is not: it starts at 0, as do all starts here, so that every client begins with the base model.

It differs from `public` by the sign alone. Small and large values have the same sign, so a sign's leading vectors hold
less of the gradient itself; `fedlora.adapters.starts.public` has figures.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from typing_extensions import override

from fedlora.adapters.family import Site
from fedlora.adapters.start import Reads, SingularStart, Source


class LoraSB(SingularStart):
    """The start from Adam's first step on public rows."""

    takes = "FILE"
    reads: ClassVar[Reads] = "public rows"

    @override
    def matrix(self, site: Site, source: Source) -> torch.Tensor:
        assert source.gradient is not None, "this start is only made with a gradient"
        return -source.gradient(site).cpu().sign()


START = LoraSB
