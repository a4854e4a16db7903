"""The leading singular vectors of the loss's gradient on public rows, as in public:FILE.

The gradient of the mean loss with respect to a frozen weight W0, at the base model, is computed on rows that are
nobody's secret. Its leading singular vectors span what the adapter can move. It costs no privacy: no client takes part.

LoRA-SB (arXiv:2411.19557) takes those of the gradient's sign, as Adam's first step does: on MiniLM and SST-2, r = 16,
they express 0.58 of a held-out gradient at the start and 0.13 of one with a trained head, where the gradient's own
express 0.99 and 0.35. It starts R at η·diag(σ), with η of the first warm-up step, which its code sets to some 1e-6
and which is as good as 0. Here R is 0, so that a start decides where the adapter can go and has not gone anywhere yet.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from fedlora.adapters.family import Site
from fedlora.adapters.start import Reads, SingularStart, Source


class Public(SingularStart):
    """Of the public gradient."""

    takes = "FILE"
    reads: ClassVar[Reads] = "public rows"

    def matrix(self, site: Site, source: Source) -> torch.Tensor:
        assert source.gradient is not None, "whoever asks for this start has public rows"
        return source.gradient(site).cpu()


START = Public
