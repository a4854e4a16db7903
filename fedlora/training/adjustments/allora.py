r"""ALLoRA: steps of each row of B become shorter as the row becomes longer.

Huang and Balestriero, "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws", arXiv:2410.09692.

    the step of row i of B  is multiplied by  1 / sqrt(|B_i| + 1/η^2)

B_i is the row before the step, one for each output of the layer, and |B_i| its L2 norm. At B = 0 the factor is η; here
η is `ETA`, 1, so that no step becomes longer than without the adjustment. A has no factor.

The paper states the factor for the gradient. It is applied here to the optimizer's step. For SGD this is the same,
while Adam would divide a factor on the gradient out again. The factor follows from noised values alone. The paper also
drops dropout and α / r. Neither needs an adjustment: leave out --dropout, and an --alpha equal to --rank gives s = 1.
The formula was not compared with the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from typing_extensions import override

from fedlora.adapters import AdapterLayout
from fedlora.training.adjustments import Adjustment, StepAdjustment

ETA = 1.0


class ALLoRA(Adjustment, StepAdjustment):
    """The adjustment of the steps of every B that trains. Gradients, and steps of all other tensors, stay unchanged."""

    @staticmethod
    @override
    def fits(layout: AdapterLayout) -> str:
        names = {spec.name for spec in layout.state}
        if any(spec.name.endswith(".B") and f"{spec.name[:-2]}.A" in names for spec in layout.trained):
            return ""
        return ("it shortens the steps of the rows of B in an update B A, and this run trains no B; choose a strategy "
                "that does, like fedavg-lora or ffa-lora, and not --targets none")

    @override
    def __call__(self, gradients: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor],
                 start: Mapping[str, torch.Tensor], layout: AdapterLayout, step: int) -> Mapping[str, torch.Tensor]:
        return gradients

    @override
    def moved(self, changes: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor], layout: AdapterLayout,
              step: int) -> Mapping[str, torch.Tensor]:
        def shortened(name: str, change: torch.Tensor) -> torch.Tensor:
            if not name.endswith(".B"):
                return change
            lengths = torch.linalg.vector_norm(before[name], dim=1, keepdim=True)
            return change * torch.rsqrt(lengths + 1 / ETA**2)

        return {name: shortened(name, change) for name, change in changes.items()}


ADJUSTMENT = ALLoRA
