"""Export of an adapter as a standard PEFT folder that gives, wherever it is loaded, the predictions of the run.

    adapter_config.json, adapter_model.safetensors      what `PeftModel.from_pretrained` loads
    tokenizer.json, tokenizer_config.json, …            the run's tokenizer, with its pad token; for a language model
                                                        it pads on the left, as `generate` needs it
    base/config.json                                    the base model's config, with the labels in order and the pad
                                                        token
    README.md                                           the model card, with the code that loads the adapter

The config is in a folder of its own, because transformers takes a folder with both a config and an adapter for a model.
No file contains a path of this machine.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, PeftConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import save as to_bytes
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlora import models
from fedlora.adapters.attach import AdaptedModel
from fedlora.adapters.card import card, padding_side
from fedlora.adapters.family import Site
from fedlora.adapters.provenance import Provenance
from fedlora.adapters.updates import OtherType, Update
from fedlora.files import replace_file
from fedlora.plan import Tensors
from fedlora.tasks import task_named

_PREFIX = "base_model.model."  # PEFT puts this before the base model's own parameter names
_TITLE = re.compile("local:[0-9a-f]{12}")  # the title of a model that is not from the hub

_NOT_HANDED_ON = ("name_or_path", "is_local", "local_files_only", "tokenizer_file", "vocab_file", "merges_file",
                  "special_tokens_map_file")
"""Tokenizer settings that are left out of the export, because they describe the machine it was loaded on."""


def export(adapted: AdaptedModel, tensors: Tensors, out_dir: Path, base_name: str, *,
           max_length: int | None = None, run: Provenance | None = None,
           prefixes: Mapping[str, int] | None = None) -> Path:
    """Write an adapter as a PEFT folder.

    What the family's `update` returns says how PEFT holds it (`fedlora.adapters.updates`), mostly as plain LoRA. If
    ranks differ between modules, PEFT's rank and alpha patterns hold them. The classifier, and all other parameters
    that are missing from the base checkpoint, are written whole as PEFT's modules_to_save. If only the head was
    trained, PEFT's placeholder stands in for the target modules.

    Args:
        adapted: the adapted model. It gives names and shapes; its current values are not used.
        tensors: the values of all tensors of `adapted.layout.state`.
        out_dir: the folder to write. It is created if needed; files of the same names are replaced.
        base_name: the base model's name for those who load the adapter: its hub id, with "@<commit>" if that is known
            (`fedlora.models.hub_name`), or the title of its `ModelRef` if it has no hub id.
        max_length: tokens that the run kept of a record. A classifier's tokenizer is set to cut there. None for the
            tokenizer's own limit.
        run: the facts about the run, for the model card; None to say nothing of it.
        prefixes: module → rank, for modules of which only the first ranks are written. The factor on their update
            stays.

    Returns:
        `out_dir`.

    Raises:
        ValueError: the tensors or the ranks do not fit the adapter, or `base_name` is an alias or a path of this
            machine.
    """
    adapted.layout.check(tensors, "state")
    layout = adapted.layout.narrowed(prefixes or {})
    tensors = layout.cut(tensors)
    repository, commit = split_name(base_name)
    updates = [layout.family.update(tensors, site) for site in layout.sites]
    held = _of_other_type(adapted, layout.sites, updates) or _as_lora(adapted, layout.sites, updates)
    files = {f"{_PREFIX}{site.name}.{name}": values
             for site, of_site in zip(layout.sites, held.tensors, strict=True) for name, values in of_site.items()}
    for spec in layout.state:
        if spec.group == "head":
            files[f"{_PREFIX}{spec.name.removeprefix('head.')}"] = torch.tensor(tensors[spec.name])
    files |= {f"{_PREFIX}{name}": value for name, value in adapted.classifier.items()}
    config = held.config(
        task_type=task_named(adapted.task).peft_type,
        base_model_name_or_path=repository, revision=commit or None, inference_mode=True,
        target_modules=list(layout.modules) or DUMMY_TARGET_MODULES,
        modules_to_save=_modules_to_save(adapted) or None, **held.settings)
    out_dir.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(out_dir))
    weights = to_bytes({name: value.contiguous() for name, value in files.items()}, metadata={"format": "pt"})
    replace_file(out_dir / "adapter_model.safetensors", weights, 0o666)
    hand_on_tokenizer(adapted, out_dir, max_length)
    base = copy.deepcopy(adapted.model.config)
    base.use_cache = True  # training turned the cache off, and generation needs it
    base.save_pretrained(out_dir / "base")
    text = card(adapted.model, adapted.task, repository, commit or None, run=run, form=held.form)
    (out_dir / "README.md").write_text(text, encoding="utf-8")
    return out_dir


class _Held(NamedTuple):
    """The updates of all sites in one of PEFT's types.

    Attributes:
        form: the type's name, for people.
        config: the type's configuration.
        settings: the arguments of the configuration that belong to the type.
        tensors: each site's float32 tensors, by the end of their names.
    """

    form: str
    config: Callable[..., PeftConfig]
    settings: Mapping[str, Any]
    tensors: Sequence[Mapping[str, torch.Tensor]]


def _as_lora(adapted: AdaptedModel, sites: Sequence[Site], updates: Sequence[Update]) -> _Held:
    """Return the updates of all sites as PEFT's LoRA holds them."""
    ranks: dict[str, int] = {}
    alphas: dict[str, int | float] = {}
    tensors = []
    for site, update in zip(sites, updates, strict=True):
        held = update.for_peft(site.scaling, partial(_weight, adapted, site.name))
        ranks[site.name], alphas[site.name] = held.rank, _integral(held.alpha)
        tensors.append(_float32(held.tensors))
    first_rank, first_alpha = next(iter(ranks.values()), 1), next(iter(alphas.values()), 1)
    bases = [adapted.base_layer(site.name) for site in sites]
    use_dora = any("lora_magnitude_vector" in of_site for of_site in tensors)
    return _Held("DoRA" if use_dora else "LoRA", LoraConfig, {
        "r": first_rank, "lora_alpha": first_alpha,
        "rank_pattern": {name: own for name, own in ranks.items() if own != first_rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != first_alpha},
        "use_dora": use_dora,
        "fan_in_fan_out": bool(bases) and all(isinstance(base, Conv1D) for base in bases)}, tensors)


def _of_other_type(adapted: AdaptedModel, sites: Sequence[Site], updates: Sequence[Update]) -> _Held | None:
    """Return the updates of all sites as another of PEFT's types holds them; None unless one holds all of them.

    None too where PEFT, which merges other types than LoRA less well, would fail on a head of several layers.
    """
    heads = [adapted.model.get_submodule(name) for name in _modules_to_save(adapted)]
    if not sites or any(isinstance(adapted.base_layer(site.name), Conv1D) for site in sites) or not all(
            hasattr(head, "weight") for head in heads):
        return None
    held: list[OtherType] = []
    for site, update in zip(sites, updates, strict=True):
        one = update.of_other_type(site.scaling)
        if one is None or (held and one[:3] != held[0][:3]):
            return None
        held.append(one)
    return _Held(*held[0][:3], [_float32(one.tensors) for one in held])


def _float32(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values.astype(np.float32)) for name, values in tensors.items()}


def _weight(adapted: AdaptedModel, site: str) -> np.ndarray:
    """Return a site's weight W0, (d_out, d_in) float64."""
    weight: np.ndarray = adapted.base_weight(site).double().cpu().numpy()
    return weight


def split_name(base_name: str) -> tuple[str, str]:
    """Return a base model's hub id, or its title, and its commit on the hub ("" if there is none).

    Raises:
        ValueError: the name means something on this machine alone.
    """
    if not models.is_hub_name(base_name) and not _TITLE.fullmatch(base_name):
        raise ValueError(f"{base_name!r} names the base model on this machine alone. Give its hub id, as org/model or "
                         "org/model@<commit>, or the title of the run's ModelRef (plan.model.title)")
    repository, _, commit = base_name.partition("@")
    return repository, commit


def hand_on_tokenizer(adapted: AdaptedModel, out_dir: Path, max_length: int | None) -> None:
    """Write the tokenizer as the run used it; see `export` for the arguments."""
    adapted.tokenizer.save_pretrained(out_dir)
    settings = out_dir / "tokenizer_config.json"
    said = {name: value for name, value in json.loads(settings.read_text(encoding="utf-8")).items()
            if name not in _NOT_HANDED_ON}
    said["padding_side"] = padding_side(adapted.task)
    said["model_input_names"] = adapted.tokenizer.model_input_names
    if adapted.tokenizer.split_special_tokens:
        said["split_special_tokens"] = True
    if max_length is not None and task_named(adapted.task).has_labels:
        said["model_max_length"] = max_length
    settings.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _modules_to_save(adapted: AdaptedModel) -> list[str]:
    """Return the largest modules whose parameters are all written: those missing from the base, and the classifier.

    PEFT saves the module "classifier" or "score" of a sequence classifier whether it is listed or not, and it cannot
    save only a part of that module. So the classifier is written whole, even the parts that are in the base checkpoint.
    """
    written = {spec.name.removeprefix("head.") for spec in adapted.layout.state if spec.group == "head"}
    written |= adapted.classifier.keys()
    covered = {name for name, module in adapted.model.named_modules() if name and _is_covered(name, module, written)}
    return sorted(name for name in covered if not any(name.startswith(f"{other}.") for other in covered))


def _is_covered(name: str, module: nn.Module, written: set[str]) -> bool:
    parameters = [f"{name}.{parameter}" for parameter, _ in module.named_parameters()]
    return bool(parameters) and written.issuperset(parameters)


def _integral(value: float) -> int | float:
    """Return a value as an integer if it is one up to rounding, as PEFT writes alpha."""
    return round(value) if abs(value - round(value)) < 1e-9 else value
