"""Adapters in FedLoRA's own form, for families that PEFT cannot hold, and the function that loads them.

    adapter.json                        the family and its options, ranks, targets, task, labels and the base's name
    adapter.safetensors                 every tensor that is not in the base checkpoint
    tokenizer.json, README.md, …        as beside an exported adapter

No file contains a path of this machine.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as to_bytes

import fedlora
from fedlora import models
from fedlora.adapters.attach import AdaptedModel, attach
from fedlora.adapters.card import card
from fedlora.adapters.export import export, hand_on_tokenizer, split_name
from fedlora.adapters.provenance import Provenance
from fedlora.files import replace_file
from fedlora.plan import Tensors
from fedlora.tasks import task_named

ABOUT, TENSORS = "adapter.json", "adapter.safetensors"


def hand_on(adapted: AdaptedModel, tensors: Tensors, out_dir: Path, base_name: str, *, max_length: int | None = None,
            run: Provenance | None = None, prefixes: Mapping[str, int] | None = None) -> Path:
    """Write an adapter as a PEFT folder, or in our own form if its family adds to each token in another way.

    Arguments, result and errors are those of `fedlora.adapters.export`.
    """
    layout = adapted.layout
    if any(layout.family.by_token(site) for site in layout.sites):
        return save(adapted, tensors, out_dir, base_name, max_length=max_length, run=run)
    return export(adapted, tensors, out_dir, base_name, max_length=max_length, run=run, prefixes=prefixes)


def save(adapted: AdaptedModel, tensors: Tensors, out_dir: Path, base_name: str, *, max_length: int | None = None,
         run: Provenance | None = None) -> Path:
    """Write an adapter of any family in our own form, which `load` reads.

    Arguments, result and errors are those of `fedlora.adapters.export`.
    """
    layout = adapted.layout
    layout.check(tensors, "state")
    repository, commit = split_name(base_name)
    named = adapted.model.config.id2label if task_named(adapted.task).has_labels else None
    labels = {int(place): str(label) for place, label in (named or {}).items()}
    about = {
        "fedlora": fedlora.__version__, "base": base_name, "task": adapted.task,
        "labels": [labels[place] for place in sorted(labels)],
        "family": layout.family.name, "options": dataclasses.asdict(layout.family),
        "ranks": {site.name: site.rank for site in layout.sites},
        "alpha": next((site.scaling * site.rank for site in layout.sites), 1.0),
        "head": any(spec.group == "head" for spec in layout.trained)}
    out_dir.mkdir(parents=True, exist_ok=True)
    replace_file(out_dir / TENSORS, to_bytes({name: np.ascontiguousarray(array) for name, array in tensors.items()}),
                 0o666)
    replace_file(out_dir / ABOUT, f"{json.dumps(about, indent=1, ensure_ascii=False)}\n".encode(), 0o666)
    hand_on_tokenizer(adapted, out_dir, max_length)
    text = card(adapted.model, adapted.task, repository, commit or None, run=run, family=layout.family.name)
    (out_dir / "README.md").write_text(text, encoding="utf-8")
    return out_dir


def load(folder: str | Path, base: str | Path | None = None, *, allow_download: bool = False) -> AdaptedModel:
    """Load an adapter that `save` wrote, on its base model. The logits are those of the run.

    Args:
        folder: the adapter's folder.
        base: the base model: an alias, a folder, or a hub id with or without "@<commit>". None for the one that the
            adapter names, if that is on the hub.
        allow_download: fetch a hub model that is not in the hub's cache on this machine.

    Returns:
        The adapted model, on the CPU in float32 and in eval mode. `AdaptedModel.model` is the module to call.

    Raises:
        ValueError: the folder holds no such adapter, or the base model cannot be found or is another one.
    """
    try:
        about = json.loads((Path(folder) / ABOUT).read_text(encoding="utf-8"))
        tensors = load_file(Path(folder) / TENSORS)
        task, labels, ranks = str(about["task"]), tuple(map(str, about["labels"])), dict(about["ranks"])
        named, family, alpha = str(about["base"]), str(about["family"]), float(about["alpha"])
        options, head = tuple(sorted(dict(about["options"]).items())), bool(about["head"])
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no adapter in FedLoRA's own form: {type(error).__name__}, {error}. A folder "
                         "with adapter_config.json is loaded with PEFT") from None
    if base is None and not models.is_hub_name(named):
        raise ValueError(f"the adapter in {folder} does not say where its base model {named} is; name its folder")
    path = models.resolve(str(base if base is not None else named), allow_download=allow_download)
    adapted = attach(models.load(path, task, labels), family=family, rank=max(ranks.values(), default=1), alpha=alpha,
                     targets=tuple(ranks), train_head=head, options=options, ranks=tuple(sorted(ranks.items())))
    try:
        adapted.layout.check(tensors, "state")
    except ValueError as error:
        raise ValueError(f"the adapter in {folder} does not fit the base model in {path}: {error}") from None
    adapted.write(tensors)
    return adapted
