"""Random orthonormal bases whose A reads none of the inputs that public safety texts span, as in protect:FILE.

AlignGuard-LoRA (2025, arXiv:2508.02079) keeps an update off the directions that alignment depends on, by penalties on
the loss. This is the part of it that can be proved. Let the rows of V be the 32 leading right singular vectors of a
layer's inputs, uncentred, at about a thousand tokens of the file, or as many as the layer has inputs to spare. The rows
of A are drawn as for `orthonormal`, and made orthogonal to V. Then

    A x = 0, and so ΔW x = 0, for every x in the span of V, whatever is trained after A

up to float32 rounding: at such inputs the adapted layer's output is the base layer's. That holds as long as the rows of
A stay in the space that they span now, so only families that freeze A are accepted. FedSVD's refactorization turns A
within that space. For an input outside of the span of V, the output changes as with any start; and an adapted layer
further down may have changed the input already. The start protects layers, not answers.
"""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from fedlora.adapters.family import Family
from fedlora.adapters.start import OrthogonalStart, Reads, reads_inputs


class Protect(OrthogonalStart):
    """The start that leaves a layer's outputs on public safety texts as they are."""

    takes = "FILE"
    reads: ClassVar[Reads] = "public texts"
    directions: ClassVar[int] = 32

    @override
    def unfit(self, family: Family) -> str:
        if any(read := reads_inputs(family).values()):
            return "it trains a factor that reads the inputs, which would read the protected ones after its first step"
        return "" if len(read) == 1 else "it reads the inputs by more than A, or by none"


START = Protect
