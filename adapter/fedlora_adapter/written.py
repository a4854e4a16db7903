"""Writing of adapters that are made of others: a new folder in PEFT's format, complete or not there at all.

    adapter_config.json, adapter_model.safetensors    what `PeftModel.from_pretrained` loads
    base/config.json, tokenizer.json, …               those of the first source, if it has them
    README.md                                         how this adapter was made, what is known of ε, how to load it
    sources/1.md, …                                   the README.md of each source, if it has one
    fedlora_adapter.json                              the same for programs, with what is known of ε

No file contains a path of this machine, unless the source's own config names its base model by one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes

import fedlora
from fedlora.adapters.card import loading_code
from fedlora.algebra import Factors
from fedlora.files import replace_file
from fedlora.models import TOKENIZER_FILES, ModelRef

from .known_epsilon import Known
from .peft_folder import CONFIG, RECORD, TASKS, WEIGHTS, Adapter, read

_SETTLED: Mapping[str, Any] = {
    "use_rslora": False, "layers_to_transform": None, "layers_pattern": None, "exclude_modules": None,
    "eva_config": None, "corda_config": None, "lora_ga_config": None, "loftq_config": {}, "init_lora_weights": True}
"""Settings that only say how training started or which layers a pattern meant; the folder names its layers itself."""


@dataclass(frozen=True)
class NewTarget:
    """The update of one layer, as it is written: `scaling` times B A, with B and A rounded to `dtype`."""

    factors: Factors
    scaling: float
    dtype: torch.dtype
    is_embedding: bool

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return self.factors.A.shape[0]

    def rounded(self) -> Factors:
        """Return the factors as a reader of the file finds them, in float64."""
        return Factors(B=self.factors.B.to(self.dtype).double(), A=self.factors.A.to(self.dtype).double())


@dataclass(frozen=True)
class NewBase:
    """The base model of an adapter whose sources had another one.

    Attributes:
        name: its hub id, with "@" and the commit if that is known, or a title if it is not from the hub.
        config: the content of base/config.json; empty to write none.
        hashes: the hashes of its content.
    """

    name: str
    config: Mapping[str, Any]
    hashes: Mapping[str, str]

    def named(self) -> dict[str, str | None]:
        """Return the settings of adapter_config.json that name the base model."""
        name, _, revision = self.name.partition("@")
        return {"base_model_name_or_path": name, "revision": revision or None}


def hashes_of(base: ModelRef) -> dict[str, str]:
    """Return a base model's title and the hashes of its content, as a run's export writes them."""
    return asdict(base) | {"name": base.title}


def check_new(out: Path) -> None:
    """Check that a folder can be made, before anything is computed.

    Raises:
        ValueError: there is something of this name already.
    """
    if out.exists() or out.is_symlink():
        raise ValueError(f"--out {out} is there already, and nothing is overwritten; name a new folder")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to fill. It gets its name when the block ends; after an error nothing is left of it.

    Raises:
        ValueError: there is something of this name already.
        OSError: the folder cannot be made.
    """
    check_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        mask = os.umask(0)
        os.umask(mask)
        made.chmod(0o777 & ~mask)
        yield made
        made.rename(out)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def write(out: Path, sources: Sequence[Adapter], targets: Mapping[str, NewTarget], others: Mapping[str, torch.Tensor],
          *, how: Mapping[str, Any], told: str, known: Known, weights: Sequence[float] | None = None,
          base: NewBase | None = None) -> None:
    """Write an adapter into a new folder.

    Args:
        out: the folder, which must not exist.
        sources: the adapters that it was made of. The first one's config and tokenizer are handed on.
        targets: layer name → its new update.
        others: name in the file → tensor, such as those of a classifier.
        how: how the adapter was made, for `fedlora_adapter.json`.
        told: the same in sentences, for the card.
        known: what is known of its ε.
        weights: the weight of each source; None if there are none.
        base: the base model, if it is not the sources'.

    Raises:
        ValueError: the folder exists.
        OSError: it cannot be written. Nothing is left of it then.
    """
    source = sources[0]
    with new_folder(out) as made:
        write_tensors(made, targets, others)
        write_json(made / CONFIG, config_of_new(source, targets) | ({} if base is None else base.named()))
        for name in (*TOKENIZER_FILES, *(("base/config.json",) if base is None else ())):
            if (source.path / name).is_file():
                replace_file(made / name, (source.path / name).read_bytes(), 0o666)
        if base is not None and base.config:
            write_json(made / "base" / "config.json", base.config)
        describe(made, sources, how=how, told=told, known=known, weights=weights,
                 hashes=source.origin.get("base") if base is None else base.hashes)


def write_tensors(made: Path, targets: Mapping[str, NewTarget], others: Mapping[str, torch.Tensor]) -> None:
    """Write an adapter's weights as PEFT names them.

    Args:
        made: the adapter's folder.
        targets: layer name → its update.
        others: name in the file → tensor.
    """
    tensors = {**others}
    for name, target in targets.items():
        ends = ("lora_embedding_B", "lora_embedding_A") if target.is_embedding else ("lora_B.weight", "lora_A.weight")
        for end, factor in zip(ends, (target.factors.B, target.factors.A), strict=True):
            tensors[f"base_model.model.{name}.{end}"] = factor.to(target.dtype)
    content = to_bytes({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"})
    replace_file(made / WEIGHTS, content, 0o666)


def describe(made: Path, sources: Sequence[Adapter], *, how: Mapping[str, Any], told: str, known: Known,
             hashes: object = None, weights: Sequence[float] | None = None) -> None:
    """Write the card, the sources' cards, and the record of how an adapter was made, beside its config and weights.

    Args:
        made: the adapter's folder.
        sources: the adapters that it was made of.
        how: how it was made, for `fedlora_adapter.json`.
        told: the same in sentences, for the card.
        known: what is known of its ε.
        hashes: those of the base model, if they are known.
        weights: the weight of each source; None if there are none.
    """
    about = hand_on_cards(made, sources, weights)
    write_json(made / RECORD, {"schema": "fedlora adapter", "version": 1, "fedlora": fedlora.__version__, **how,
                               **({"base": hashes} if hashes else {}), "sources": about, "privacy": known.to_dict()})
    card = _card(read(made), told, known, with_cards=(made / "sources").exists())
    replace_file(made / "README.md", card.encode(), 0o666)


def hand_on_cards(made: Path, sources: Sequence[Adapter],
                  weights: Sequence[float] | None = None) -> list[dict[str, object]]:
    """Copy the sources' cards into a folder, and return name, hash and weight of each source for its record."""
    for number, one in enumerate(sources, 1):
        if (one.path / "README.md").is_file():
            replace_file(made / "sources" / f"{number}.md", (one.path / "README.md").read_bytes(), 0o666)
    return [_described(one) | ({} if weights is None else {"weight": weights[number]})
            for number, one in enumerate(sources)]


def _described(adapter: Adapter) -> dict[str, object]:
    """Return an adapter's name and the SHA-256 of its weights."""
    with (adapter.path / WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": adapter.name, "weights_sha256": digest}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file for people and programs."""
    replace_file(path, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(), 0o666)


def config_of_new(source: Adapter, targets: Mapping[str, NewTarget]) -> dict[str, Any]:
    """Return the source's config with the new ranks and alphas; the layers are named in full."""
    config = dict(source.config) | {name: value for name, value in _SETTLED.items() if name in source.config}
    if targets:
        ranks = {name: target.rank for name, target in targets.items()}
        alphas = {name: _integral(target.scaling * target.rank) for name, target in targets.items()}
        config |= {"target_modules": sorted(targets), "r": next(iter(ranks.values())),
                   "lora_alpha": next(iter(alphas.values())),
                   "rank_pattern": _pattern(ranks), "alpha_pattern": _pattern(alphas)}
    return config


def _pattern(values: Mapping[str, float]) -> dict[str, float]:
    """Return PEFT's pattern for values of layers: nothing if they are all the same.

    PEFT takes the first name that the layer's name ends with. Longer names come first, so that each finds its own.
    """
    if len(set(values.values())) == 1:
        return {}
    return {name: values[name] for name in sorted(values, key=lambda name: (-len(name), name))}


def _integral(value: float) -> int | float:
    """Return a value as an integer if it is one up to rounding, as PEFT writes alpha."""
    return round(value) if abs(value - round(value)) < 1e-9 else value


def _card(source: Adapter, told: str, known: Known, *, with_cards: bool) -> str:
    name, _, revision = source.base.partition("@")
    from_hub = bool(name) and not Path(name).is_absolute() and ":" not in name
    task = TASKS.get(str(source.config.get("task_type")))
    metadata = ["library_name: peft", *([f"base_model: {name}", "base_model_relation: adapter"] if from_hub else []),
                "tags:", "- lora"]
    about = f"A LoRA adapter for {name if from_hub else 'a model that is not from the hub'}."
    if source.labels and task == "classification":
        about += f" Its outputs are {', '.join(json.dumps(label, ensure_ascii=False) for label in source.labels)}, in "
        about += "this order."
    base = json.dumps(name if from_hub else "…", ensure_ascii=False)
    if task is not None and source.base_config:
        code = loading_code(task, base, '"adapter"', "  # this folder" if from_hub else
                            "  # the base model's folder, and this one", revision=revision or None)
    else:
        code = 'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base, "adapter")  # this folder\n'
    cards = ["", "Cards of the adapters that it was made of are in `sources/`. Figures on them are theirs, not this "
             "adapter's."]
    lines = ["---", *metadata, "---", "", "# LoRA adapter", "", about, "", "## How this adapter was made", "", told,
             *(cards if with_cards else []), "", "## Privacy", "", known.sentence(), "", "## Use", "",
             f"```python\n{code}```", ""]
    return "\n".join(lines)
