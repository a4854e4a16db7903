"""LoRA-GA's start from the mean of the clients' own gradients, for runs without privacy.

As `lora-ga:FILE` takes it from public rows. Singular vectors r … 2r are not in sketches of rank r, so each client sends
its gradient whole (`fedlora.adapters.sketches`): d_out·d_in values for each layer, once.

With privacy the start is refused: a gradient without noise tells of the records that it was computed from.
"""

from __future__ import annotations

from typing import ClassVar

from fedlora.adapters.start import Reads
from fedlora.adapters.starts.lora_ga import LoraGA


class ClientsLoraGA(LoraGA):
    """LoRA-GA's start from the gradients that clients sent as they are."""

    takes = ""
    reads: ClassVar[Reads] = "clients without noise"
    whole: ClassVar[bool] = True
    if_private: ClassVar[str] = "lora-ga:FILE"
    if_frozen: ClassVar[str] = "gradient"


START = ClientsLoraGA
