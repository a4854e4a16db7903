"""How much each weight of a language model matters by public texts: the score of LoRAPrune (arXiv:2305.18403).

With g the gradients of an adapter's factors, the score of a weight is |(g_B A + B g_A − g_B g_A) ∘ (W + s B A)|. Here
it is taken at the start of training, where B and therefore g_A are 0: |(g_B A) ∘ W|, averaged over batches. LoRAPrune
goes on pruning while it trains; that is not built. The gradient of W itself is never formed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fedlora import models, tasks
from fedlora.adapters import attach, initial_tensors
from fedlora.adapters.public_rows import some_rows
from fedlora.tasks.causal_lm import CausalLM

from .pruning import Architecture, Measure

_RANK, _ROWS, _BATCH = 8, 512, 32
"""Rank of the adapter; most rows that are used, chosen by the seed from more; rows of a batch."""


def by_public_texts(model: Path, architecture: Architecture, rows: Path, max_length: int, seed: int) -> Measure:
    """Return LoRAPrune's score for each weight that can go.

    Args:
        model: the model's folder.
        architecture: its architecture.
        rows: a file with public texts.
        max_length: tokens kept of a text.
        seed: seed of the adapter's A, and of the choice of rows.

    Raises:
        ValueError: the model is no language model, or no row can be used.
    """
    if not architecture.generates:
        raise ValueError(f"--by public:FILE is for language models, and {model} is an encoder; choose --by magnitude")
    models.check_task(model, "causal-lm", max_length)
    texts = some_rows(tasks.read(rows, "causal-lm", held_out=True), _ROWS, seed)
    loaded = models.load(model, "causal-lm", ())
    task = CausalLM(loaded.tokenizer, max_length)
    records = task.encode(texts)
    if not len(records):
        raise ValueError(f"--by public:{rows}: no row has a token to predict within --max-length {max_length}")
    adapted = attach(loaded, family="lora", rank=_RANK, alpha=float(_RANK), train_head=False,
                     targets=tuple(side.layer for side in architecture.sides))
    adapted.write(initial_tensors(adapted, init="orthonormal", seed=seed))
    factors = {layer: (adapted.parameter(f"{layer}.B"), adapted.parameter(f"{layer}.A").detach())
               for layer in adapted.layout.modules}
    gradients: dict[str, list[torch.Tensor]] = {layer: [] for layer in factors}
    order = np.argsort(records.lengths, kind="stable")
    for start in range(0, len(order), _BATCH):
        some = order[start:start + _BATCH]
        batch = task.collate(records, some, int(records.lengths[some].max()))
        loss = task.per_record_loss(adapted.model, batch).mean()
        found = torch.autograd.grad(loss, [B for B, _ in factors.values()])
        for layer, gradient in zip(factors, found, strict=True):
            gradients[layer].append(gradient)

    def measure(layer: str, weight: torch.Tensor) -> torch.Tensor:
        name = next((full for full in factors if f".{full}".endswith(f".{layer}") or f".{layer}".endswith(f".{full}")),
                    None)
        if name is None:
            raise ValueError(f"{model} names a weight {layer}, otherwise than transformers does. Load it with "
                             "transformers and save it again")
        A = factors[name][1]
        total = torch.zeros(weight.shape, dtype=torch.float32)
        for gradient in gradients[name]:
            product = gradient @ A
            total += ((product.T if architecture.is_turned else product) * weight.float()).abs()
        return total / len(gradients[name])

    return measure
