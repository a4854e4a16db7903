"""Different singular vectors of the loss's gradient for A and for B, of LoRA-GA's lengths, as in lora-ga:FILE.

Wang et al. (LoRA-GA), NeurIPS 2024, arXiv:2407.05000. With U S V the singular value decomposition of the gradient on
public rows, of an m × n weight, and γ = 16,

    A = m^¼ / √γ · V[0:r]    B = m^¼ / √γ · U[:, r:2r]

so that a first step of both factors moves the weight in 2r of the gradient's leading directions: A's step writes to the
outputs of B, and B's reads the inputs of A. The length is the paper's "stable" one, with which outputs keep their size
as the layer grows.

The start is for families that train A. Where A is frozen, its directions are those of `public`; and where B is frozen
too, a core between the two would have no gradient at all, because U[:, r:2r] and V[0:r] belong to different singular
values. The paper takes s·B·A off the weight, so that its model starts as the base model. Only a family that keeps such
an offset starts B there; in the family `lora` B starts at 0 and A alone is LoRA-GA's.
"""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from fedlora.adapters.family import Bases, Family, Site
from fedlora.adapters.start import Reads, Source, Start, reads_inputs
from fedlora.algebra import leading_factors

GAMMA = 16.0
"""The paper's γ: the larger it is, the shorter both factors."""


class LoraGA(Start):
    """The start in which the first step of A and that of B go to different directions of the gradient.

    Attributes:
        if_frozen: class attribute, the start with the same directions for families that freeze A.
    """

    takes = "FILE"
    reads: ClassVar[Reads] = "public rows"
    orthonormal: ClassVar[bool] = False
    if_frozen: ClassVar[str] = "public:FILE"

    @override
    def bases(self, site: Site, source: Source) -> Bases:
        assert source.gradient is not None, "this start is only made with a gradient"
        leading = leading_factors(source.gradient(site).cpu(), 2 * site.rank)
        length = site.d_out**0.25 / GAMMA**0.5
        return Bases(A=length * leading.A[:site.rank], B=length * leading.B[:, site.rank:])

    @override
    def check_rank(self, site: Site) -> None:
        if 2 * site.rank > min(site.d_out, site.d_in):
            raise ValueError(f"rank {site.rank} exceeds half of the smaller side of {site.name} ({site.d_out} × "
                             f"{site.d_in}), and this start needs two singular vectors for each rank; choose a smaller "
                             "--rank")

    @override
    def unfit(self, family: Family) -> str:
        read = reads_inputs(family)
        return "" if read.get("A") or read.get("dA") else (
            f"it freezes A, for which --init {self.if_frozen} has the same directions, with those that belong to them "
            "for a frozen B")


START = LoraGA
