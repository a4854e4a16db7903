"""What fedlora-adapter prune-base writes and prints."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import fedlora
from fedlora import models
from fedlora.console import results
from fedlora.files import replace_file
from fedlora.models.reading import config_of, silent_transformers

from .importance import by_public_texts
from .pruning import (
    PIN,
    RECORD,
    Architecture,
    Measure,
    Sizes,
    architecture_of,
    chosen,
    cut,
    magnitude,
    scores,
    sizes_of,
    smaller,
)
from .written import check_new, hashes_of, new_folder, write_json

_INDEX = "model.safetensors.index.json"


def prune_base(model: str, ratio: float, by: str, max_length: int, seed: int, four_bit: bool, out: Path,
               as_json: bool) -> int:
    """Write a base model without some of its heads and neurons, and print how much is left.

    Args:
        model: the full model.
        ratio: share of heads and neurons that goes.
        by: "magnitude", or "public:FILE".
        max_length: tokens kept of a public text.
        seed: seed of what the score of public texts draws.
        four_bit: store the weights in 4 bits.
        out: the new folder.
        as_json: print JSON instead of sentences.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: something does not fit; the message says what.
    """
    check_new(out)
    if four_bit and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--four-bit needs bitsandbytes, which is not installed: pip install 'fedlora[four-bit]', or "
                         "leave --four-bit out")
    path = models.resolve(model)
    config = config_of(path)
    architecture = architecture_of(config, model)
    if config.get("quantization_config"):
        raise ValueError(f"{model} is quantised (quantization_config in config.json); prune the model that it was made "
                         "from")
    full, reference = sizes_of(architecture, config), models.reference(model, path)
    new_config, new = smaller(architecture, config, ratio)
    measure: Measure = magnitude
    if by != "magnitude":
        rows = Path(by.partition(":")[2])
        measure = by_public_texts(path, architecture, rows, max_length, seed)
    kept = chosen(scores(architecture, full, _tensors(path), measure), new)
    if not kept:
        raise ValueError(f"{model} holds no weight that can go: its files name its layers otherwise than transformers "
                         "does. Load it with transformers and save it again")
    with new_folder(out) as made:
        before, after = _write_weights(path, made, architecture, full, kept)
        write_json(made / "config.json", new_config)
        for name in (*models.TOKENIZER_FILES, "generation_config.json"):
            if (path / name).is_file():
                replace_file(made / name, (path / name).read_bytes(), 0o666)
        _check_loads(made, model)
        if four_bit:
            new_config = _store_in_four_bits(made)
        record = {"schema": "fedlora pruned base", "version": 1, "fedlora": fedlora.__version__,
                  "by": by.partition(":")[0], **_public(by, seed), "ratio": ratio,
                  "full": {**hashes_of(reference), "config_settings": _settings(architecture, config),
                           "sizes": asdict(full)},
                  "pruned": {"weights_sha256": models.reference("local", made).weights_sha256, "sizes": asdict(new)},
                  "parameters": {"full": before, "pruned": after}, "kept": kept}
        write_json(made / RECORD, record)
        digest = hashlib.sha256((made / RECORD).read_bytes()).hexdigest()
        write_json(made / "config.json", {**new_config, PIN: digest})
        told = _told(full, new, before, after)
        card = _card(reference.title, told, by.partition(":")[0], four_bit)
        replace_file(made / "README.md", card.encode(), 0o666)
    if as_json:
        print(json.dumps({key: record[key] for key in ("by", "ratio", "full", "pruned", "parameters")}, indent=1))
        return 0
    results().print(f"{told} Wrote {out}.", soft_wrap=True, markup=False)
    return 0


def _public(by: str, seed: int) -> dict[str, Any]:
    """Return what the record says of public texts: the file's name and hash, and the seed."""
    if by == "magnitude":
        return {}
    file = Path(by.partition(":")[2])
    with file.open("rb") as opened:
        return {"public": {"file": file.name, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()},
                "seed": seed}


def _settings(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return those settings of the full model's config that pruning changes, as they are there."""
    names = (architecture.size, *(("num_attention_heads", "num_key_value_heads", "head_dim")
                                  if architecture.has_heads else ()))
    return {name: config.get(name) for name in names}


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and value of each tensor of a model's files, one at a time."""
    for file in models.weight_files(path):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in sorted(opened.keys()):
                    yield name, opened.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read ({error}): it is damaged. Fetch the model again") from error


def _write_weights(path: Path, made: Path, architecture: Architecture, full: Sizes,
                   kept: Mapping[str, Mapping[str, Sequence[int]]]) -> tuple[int, int]:
    """Write the weights that stay, one file for each of the model's, and return the values before and after."""
    before = after = total = 0
    places: dict[str, str] = {}
    files = models.weight_files(path)
    for file in files:
        tensors = {}
        with safe_open(file, framework="pt") as opened:
            for name in sorted(opened.keys()):
                tensor = opened.get_tensor(name)
                tensors[name] = cut(architecture, full, kept, name, tensor)
                before, after = before + tensor.numel(), after + tensors[name].numel()
                total += tensors[name].numel() * tensors[name].element_size()
        save_file(tensors, made / file.name, {"format": "pt"})
        places |= dict.fromkeys(tensors, file.name)
    if len(files) > 1:
        write_json(made / _INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return before, after


def _check_loads(made: Path, model: str) -> None:
    """Check that every tensor has the shape that transformers expects by the new config.

    Raises:
        ValueError: one has not: the architecture has a part that pruning does not know of.
    """
    config = AutoConfig.from_pretrained(made, local_files_only=True)
    with torch.device("meta"):
        whole = _kind(config.model_type).from_config(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}
    for name, tensor in _tensors(made):
        wanted = next((shape for own, shape in shapes.items() if own == name or own.endswith(f".{name}")
                       or name.endswith(f".{own}")), tuple(tensor.shape))
        if wanted != tuple(tensor.shape):
            raise ValueError(f"{model} has a part that pruning does not know of: {name} has shape "
                             f"{tuple(tensor.shape)}, and the pruned config wants {wanted}. Choose another model")


def _kind(model_type: str) -> Any:
    """Return the transformers class that holds all weights of a base checkpoint."""
    return AutoModelForCausalLM if architecture_of({"model_type": model_type}, "").generates else AutoModel


def _store_in_four_bits(made: Path) -> dict[str, Any]:
    """Store a model's weights in 4 bits, as QLoRA does (NF4, with quantised scales), and return its config."""
    from transformers import BitsAndBytesConfig

    # transformers leaves this class without types
    quantised = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16)
    config = AutoConfig.from_pretrained(made, local_files_only=True)
    with silent_transformers():
        whole = _kind(config.model_type).from_pretrained(made, quantization_config=quantised, local_files_only=True)
        for file in (*models.weight_files(made), made / _INDEX):
            file.unlink(missing_ok=True)
        whole.save_pretrained(made)
    return dict(config_of(made))


def _told(full: Sizes, new: Sizes, before: int, after: int) -> str:
    heads = (f"{new.groups * new.queries} of {full.groups * full.queries} heads and " if full.groups else "")
    return (f"In each layer {heads}{new.neurons:,} of {full.neurons:,} neurons are left; {after:,} of {before:,} "
            f"parameters ({after / before:.1%}).")


def _card(title: str, told: str, by: str, four_bit: bool) -> str:
    how = "the smallest weights" if by == "magnitude" else "what matters least by LoRAPrune's score on public texts"
    trained = ("Train adapters on it with PEFT, as QLoRA does; FedLoRA's own runs need 16 or 32 bits."
               if four_bit else "Train adapters on it as on any base model; clients need this folder alone.")
    return (f"# Pruned base model\n\n{told} Gone from {title} are {how} (`fedlora-adapter prune-base`).\n\n"
            "It is a worse model than the full one: it is made to train adapters on (LoRAM, arXiv:2502.13533), and was "
            f"not trained again after pruning.\n\n{trained} Then make them adapters of the full model:\n\n"
            "```\nfedlora-adapter recover ADAPTER --pruned THIS-FOLDER --base FULL-MODEL --out DIR\n```\n\n"
            f"`{RECORD}` says what was kept; config.json holds its hash.\n")
