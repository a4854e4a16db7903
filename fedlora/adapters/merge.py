"""Merging of an adapter into its base model: one folder that transformers loads without PEFT.

    config.json, model.safetensors (or its shards)      the model, with the labels in order and the pad token
    tokenizer.json, tokenizer_config.json, …            the run's tokenizer, as beside an exported adapter
    generation_config.json                              for a language model, the base's
    README.md                                           the model card, with the code that loads the model

No file contains a path of this machine.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers.pytorch_utils import Conv1D

from fedlora.adapters.attach import AdaptedModel
from fedlora.adapters.card import card
from fedlora.adapters.export import hand_on_tokenizer, split_name
from fedlora.adapters.provenance import Provenance
from fedlora.adapters.targets import outputs_for_made_up
from fedlora.models.reading import silent_transformers
from fedlora.plan import Tensors

MOST_DIFFERENCE = 1e-3
"""Largest difference between a merged model's outputs and the adapter's, relative to the largest output.

float32 rounds x(W0 + sBA) and xW0 + s(xA)B differently. After the layers of a model that is around 1e-5 of the outputs'
size, while an update that is left out, or counts twice, changes far more than this."""


def merge(adapted: AdaptedModel, tensors: Tensors, out_dir: Path, base_name: str, *, max_length: int | None = None,
          run: Provenance | None = None, dtype: torch.dtype = torch.float32) -> Path:
    """Write the base model with the adapter in its weights, as a folder that transformers loads without PEFT.

    The sum W0 + ΔW of each adapted layer is computed in float64 and rounded to float32, in which the run computed,
    and then to `dtype`. Before anything is written, the merged model's outputs for made-up records are compared with
    those of the adapter on its base.

    Args:
        adapted: the adapted model, on the CPU in float32. It is merged in place, and holds no adapter afterwards.
        tensors: the values of all tensors of `adapted.layout.state`.
        out_dir: the folder to write. It is created if needed; files of the same names are replaced.
        base_name: the base model's name, as for `fedlora.adapters.export`.
        max_length: tokens that the run kept of a record, as for `fedlora.adapters.export`.
        run: the facts about the run, for the model card; None to say nothing of it.
        dtype: dtype of the weights.

    Returns:
        `out_dir`.

    Raises:
        ValueError: the tensors do not fit the adapter; `base_name` is an alias or a path of this machine; or what the
            adapter does cannot be written into the weights.
    """
    adapted.layout.check(tensors, "state")
    repository, commit = split_name(base_name)
    adapted.write(tensors)
    before = outputs_for_made_up(adapted.model)
    _into_weights(adapted, tensors)
    worst = _difference(outputs_for_made_up(adapted.model), before)
    if not worst <= MOST_DIFFERENCE:
        raise ValueError(f"the adapter family {adapted.layout.family.name} cannot be merged into the weights of this "
                         f"model: its outputs would change by {worst:.2g} of their size. Hand on the adapter itself")
    model = adapted.model.to(dtype)  # type: ignore[arg-type]  # transformers annotates it for `self` alone
    model.config.use_cache = True  # training turned the cache off, and generation needs it
    out_dir.mkdir(parents=True, exist_ok=True)
    with silent_transformers():
        model.save_pretrained(out_dir)
    hand_on_tokenizer(adapted, out_dir, max_length)
    text = card(model, adapted.task, repository, commit or None, run=run, merged=str(dtype).removeprefix("torch."))
    (out_dir / "README.md").write_text(text, encoding="utf-8")
    return out_dir


def _into_weights(adapted: AdaptedModel, tensors: Tensors) -> None:
    """Add each site's update to the weight of its layer, in place, and take the adapter's modules out of the model."""
    for site in adapted.layout.sites:
        base, weight = adapted.base_layer(site.name), adapted.base_weight(site.name).double().numpy()
        change = torch.from_numpy(site.scaling * adapted.layout.family.update(tensors, site).change(weight))
        merged = base.weight.data.double() + (change.T if isinstance(base, Conv1D) else change)
        base.weight.data = merged.to(base.weight.dtype)
        adapted.model.set_submodule(site.name, base)


def _difference(outputs: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference of two tensors, relative to the largest expected value; NaN if one has a NaN."""
    return float((outputs - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
