"""A folder of several adapters that PEFT loads with Arrow routing (arXiv:2405.11157).

PEFT's `create_arrow_model` builds the router from the adapters alone when it loads them: nothing of it is trained, and
its directions are not kept in files. So the folder holds the adapters, the router's settings, and the code that loads
both. PEFT stacks the factors of all adapters in each layer, so all need the same layers and one rank; smaller ranks are
filled up with zeros, which changes no update.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch

import fedlora
from fedlora.algebra import Factors
from fedlora.console import results
from fedlora.files import replace_file
from fedlora.models import TOKENIZER_FILES
from fedlora.tasks import task_named

from .agreement import read_agreeing
from .known_epsilon import Known, known
from .peft_folder import CONFIG, TASKS, Adapter
from .written import NewTarget, check_new, config_of_new, hand_on_cards, new_folder, write_json, write_tensors

RECORD = "fedlora_route.json"


def route(adapters: Sequence[Path], top_k: int, temperature: float, seed: int, same_base: bool, out: Path) -> int:
    """Write the folder, and print what it holds.

    Args:
        adapters: the adapters' folders.
        top_k: adapters that a token takes.
        temperature: temperature of the router's softmax.
        seed: seed of the search for the leading directions.
        same_base: the base models are the same, although their names differ.
        out: the new folder.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: something does not fit; the message says what.
    """
    check_new(out)
    sources = read_agreeing(adapters, "route", same_base=same_base)
    _check_routable(sources)
    privacy = known(sources)
    rank = max(target.rank for source in sources for target in source.targets.values())
    with new_folder(out) as made:
        folders = []
        for number, source in enumerate(sources, 1):
            folders.append(f"experts/{number}")
            targets = {name: filled(source, name, rank) for name in source.targets}
            (made / folders[-1]).mkdir(parents=True)
            write_tensors(made / folders[-1], targets, {})
            write_json(made / folders[-1] / CONFIG, config_of_new(source, targets))
        for name in (*TOKENIZER_FILES, "base/config.json"):
            if (sources[0].path / name).is_file():
                replace_file(made / name, (sources[0].path / name).read_bytes(), 0o666)
        experts = [{"folder": folder, **about} for folder, about in
                   zip(folders, hand_on_cards(made, sources), strict=True)]
        write_json(made / RECORD, {
            "schema": "fedlora route", "version": 1, "fedlora": fedlora.__version__, "experts": experts,
            "arrow": {"top_k": top_k, "router_temperature": temperature, "rng_seed": seed},
            "privacy": privacy.to_dict()})
        replace_file(made / "README.md", _card(sources, top_k, privacy).encode(), 0o666)
    results().print(f"{len(sources)} adapters of {len(sources[0].targets)} layers at rank {rank}, of which a token "
                    f"takes {top_k}. Wrote {out}; its README.md has the code that loads it. {privacy.sentence()}",
                    soft_wrap=True, markup=False)
    return 0


def _check_routable(sources: Sequence[Adapter]) -> None:
    """Check what PEFT's Arrow needs of adapters.

    Raises:
        ValueError: they adapt different layers, an embedding, or only some of the layers of a name; or have heads.
    """
    first = sources[0]
    for source in sources:
        if source.others:
            raise ValueError(f"{source.path} holds {sorted(source.others)[0]}, which is no factor of a layer. Arrow "
                             "routes factors alone, and a head or a bias would be lost. fedlora-adapter combine makes "
                             "one adapter of several with heads")
        if embedding := next((target.name for target in source.targets.values() if target.is_embedding), None):
            raise ValueError(f"{source.path} adapts the embedding {embedding}, and Arrow routes linear layers alone")
        if different := sorted(first.targets.keys() ^ source.targets.keys()):
            raise ValueError(f"{different[0]} is adapted by only one of {first.path} and {source.path}; Arrow needs "
                             "adapters of the same layers. fedlora-adapter combine takes different ones")
    blocks = first.base_config.get("num_hidden_layers") or first.base_config.get("n_layer")
    by_name: dict[str, int] = {}
    for name in first.targets:
        if re.search(r"\.\d+\.", name):
            last = name.rpartition(".")[2]
            by_name[last] = by_name.get(last, 0) + 1
    for last, count in by_name.items():
        if isinstance(blocks, int) and count < blocks:
            raise ValueError(f"the adapters change {last} in {count} of {blocks} blocks, and PEFT's Arrow puts a "
                             f"router on every layer of this name; it needs adapters that change {last} in all blocks")


def filled(source: Adapter, name: str, rank: int) -> NewTarget:
    """Return a layer's update at a larger rank: the same factors, with columns and rows of zeros."""
    target, factors = source.targets[name], source.factors(name)
    lacking = rank - target.rank
    B = torch.cat((factors.B, factors.B.new_zeros(factors.B.shape[0], lacking)), dim=1)
    A = torch.cat((factors.A, factors.A.new_zeros(lacking, factors.A.shape[1])))
    return NewTarget(Factors(B=B, A=A), target.scaling, target.dtype, target.is_embedding)


def _card(sources: Sequence[Adapter], top_k: int, privacy: Known) -> str:
    first = sources[0]
    name, _, revision = first.base.partition("@")
    from_hub = bool(name) and not Path(name).is_absolute() and ":" not in name
    task = TASKS.get(str(first.config.get("task_type")))
    auto = task_named(task).auto_class.__name__ if task else "AutoModel"
    base = json.dumps(name if from_hub else "…", ensure_ascii=False)
    pinned = f", revision={json.dumps(revision)}" if revision else ""
    return f"""---
library_name: peft
tags:
- lora
- arrow
---

# Adapters with Arrow routing

{len(sources)} LoRA adapters: {", ".join(source.name for source in sources)}. In each layer, each token takes {top_k} of
them: those whose leading input direction is most like it ([Arrow](https://arxiv.org/abs/2405.11157), as PEFT has it).
`fedlora-adapter route` put them together. Nothing was trained.

## Privacy

{privacy.sentence()}

## Use

```python
import json

from peft import ArrowConfig, create_arrow_model
from transformers import {auto}, AutoTokenizer

base, folder = {base}, "route"  # the base model, and this folder
route = json.load(open(f"{{folder}}/{RECORD}"))
model = {auto}.from_pretrained(base{pinned})
model = create_arrow_model(model, [f"{{folder}}/{{one['folder']}}" for one in route["experts"]],
                           ArrowConfig(**route["arrow"]))
tokenizer = AutoTokenizer.from_pretrained(folder)
```
"""
