"""The leading singular vectors of the loss's gradient on public rows, as in public:FILE.

The gradient of the mean loss with respect to a frozen weight W0, at the base model, is computed on public rows. Its
leading singular vectors span the directions in which the adapter can move the weight. No client takes part, so this
start costs no privacy.

LoRA-SB (arXiv:2411.19557) uses the singular vectors of the gradient's sign, as in Adam's first step. On MiniLM and
SST-2 with r = 16, those express 0.58 of a held-out gradient at the start, and 0.13 of one with a trained head. The
gradient's own singular vectors express 0.99 and 0.35. LoRA-SB starts R at η·diag(σ), where η is the learning rate of
the first warm-up step; its code sets that to about 1e-6, practically 0. Here R starts at 0: the start decides in which
directions the adapter can move, and does not move it yet.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from typing_extensions import override

from fedlora.adapters.family import Site
from fedlora.adapters.start import Reads, SingularStart, Source


class Public(SingularStart):
    """The start from the gradient on public rows."""

    takes = "FILE"
    reads: ClassVar[Reads] = "public rows"

    @override
    def matrix(self, site: Site, source: Source) -> torch.Tensor:
        assert source.gradient is not None, "this start is only made with public rows"
        return source.gradient(site).cpu()


START = Public
