"""LoRA-SB's start from the sign of the mean of the clients' own gradients, for runs without privacy.

As `lora-sb:FILE` takes it from public rows; LoRA-SB (arXiv:2411.19557) itself takes it from rows that are trained on.
The sign of each value of the mean is not in sketches of rank r, so each client sends its gradient whole
(`fedlora.adapters.sketches`): d_out·d_in values for each layer, once.

With privacy the start is refused: a gradient without noise tells of the records that it was computed from.
"""

from __future__ import annotations

from typing import ClassVar

from fedlora.adapters.start import Reads
from fedlora.adapters.starts.lora_sb import LoraSB


class ClientsLoraSB(LoraSB):
    """LoRA-SB's start from the gradients that clients sent as they are."""

    takes = ""
    reads: ClassVar[Reads] = "clients without noise"
    whole: ClassVar[bool] = True
    if_private: ClassVar[str] = "lora-sb:FILE"


START = ClientsLoraSB
