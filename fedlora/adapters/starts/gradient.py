"""The singular vectors of the clients' gradients without noise, for runs without privacy.

Each client sends the two sketches that `dp` asks for (`fedlora.adapters.sketches`), of its mean gradient over a round's
steps, neither clipped nor noised. A becomes the right singular vectors of the mean Z. If the family freezes B too, B
becomes the left singular vectors of the mean Y. LoRA-GA (arXiv:2407.05000) and LoRA-SB (arXiv:2411.19557) take their
starts from such gradients; a sketch of rank r travels here in place of a whole gradient.

With privacy the start is refused: a gradient without noise tells of the records that it was computed from.
"""

from __future__ import annotations

from typing import ClassVar

from fedlora.adapters.start import Reads
from fedlora.adapters.starts.dp import NoisedGradients


class Gradients(NoisedGradients):
    """The start from the sketches of the gradient that clients sent as they are."""

    reads: ClassVar[Reads] = "clients without noise"


START = Gradients
