"""LoRA adapters in PEFT's format, read from their folder one target at a time: neither PEFT nor the base is needed.

    adapter = read(Path("adapter"))
    factors = adapter.factors("model.layers.0.self_attn.q_proj")     # ΔW = scaling · B A

What a folder can hold beside the two factors of each target either has no bearing on ΔW (dropout, how training
started), is a tensor that is handed on whole (`Adapter.others`: heads, biases), or makes ΔW something else than a
product of two factors. The last kind is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fedlora.algebra import Factors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

RECORD = "fedlora_adapter.json"
"""File in an adapter's folder that says how it was made of others."""

EXPORTED = "fedlora.json"
"""File in a folder that `fedlora-server export` wrote: the run and the base model that it comes from."""

OWN_FORM = "adapter.json"
"""File in the folder of an adapter in FedLoRA's own form (`fedlora.adapters.save`): its family, and how to build it."""

TASKS = {"SEQ_CLS": "classification", "CAUSAL_LM": "causal-lm"}
"""PEFT's task type → key of our task."""

REFUSED = {
    "use_dora": "DoRA also rescales the rows of the base's weight",
    "lora_bias": "its factors have biases of their own",
    "arrow_config": "Arrow mixes several adapters from token to token",
    "kasa_config": "KaSA puts a diagonal between the factors and changes the base",
    "use_bdlora": "its factors are block-diagonal",
    "use_qalora": "QA-LoRA averages the inputs first",
    "velora_config": "VeLoRA is not supported",
    "monteclora_config": "MonteCLoRA draws its factors at random",
    "target_parameters": "it adapts parameters that are not those of a layer",
    "layer_replication": "it repeats layers of the base",
    "alora_invocation_tokens": "it acts only after certain tokens",
}
"""Settings of adapter_config.json under which an adapter is refused → why."""

_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<name>.+)\.(?:lora_(?P<linear>[AB])\.weight|"
                     r"lora_embedding_(?P<embedding>[AB]))")


@dataclass(frozen=True)
class Target:
    """One adapted layer.

    Attributes:
        name: the layer's name in the base model.
        rank: r.
        scaling: factor of B A: alpha / r, or alpha / √r of a rank-stabilised adapter.
        d_out: rows of ΔW; for an embedding, the features of a token.
        d_in: columns of ΔW; for an embedding, the number of tokens.
        is_embedding: whether the layer is an embedding, whose weight is ΔW's transpose.
        keys: names of B and A in the file.
        dtype: dtype of the factors in the file.
    """

    name: str
    rank: int
    scaling: float
    d_out: int
    d_in: int
    is_embedding: bool
    keys: tuple[str, str]
    dtype: torch.dtype


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in its folder.

    Attributes:
        path: the folder.
        config: content of adapter_config.json.
        targets: layer name → target, in the order of their names.
        others: name → shape of the tensors that are not factors, as those of a classifier.
    """

    path: Path
    config: Mapping[str, Any]
    targets: Mapping[str, Target]
    others: Mapping[str, tuple[int, ...]]

    @property
    def name(self) -> str:
        """The adapter's name in tables: that of its folder, or of the one above if it is just called "adapter"."""
        path = self.path.absolute()
        return path.parent.name if path.name == "adapter" else path.name

    def factors(self, name: str) -> Factors:
        """Return B (d_out, r) and A (r, d_in) of a target, in float64. ΔW is `scaling` times their product.

        Raises:
            ValueError: a value is not finite.
        """
        target = self.targets[name]
        B, A = (self.tensor(key).double() for key in target.keys)
        for key, factor in zip(target.keys, (B, A), strict=True):
            if not bool(torch.isfinite(factor).all()):
                raise ValueError(f"{self.path / WEIGHTS}: {key} holds a value that is not finite: the adapter is "
                                 "damaged, or its training diverged")
        return Factors(B=B, A=A)

    def tensor(self, key: str) -> torch.Tensor:
        """Return one tensor of the file as it is."""
        with safe_open(self.path / WEIGHTS, framework="pt") as file:
            found: torch.Tensor = file.get_tensor(key)
        return found

    @cached_property
    def labels(self) -> tuple[str, ...] | None:
        """The label names in the order of the outputs; None if the folder does not say.

        An adapter that FedLoRA exported has them in base/config.json.
        """
        named = self.base_config.get("id2label")
        if not isinstance(named, Mapping) or not named:
            return None
        try:
            return tuple(str(named[key]) for key in sorted(named, key=int))
        except ValueError:
            return None

    @cached_property
    def base_config(self) -> Mapping[str, Any]:
        """The base model's config, if the folder has it as base/config.json, or else nothing."""
        file = self.path / "base" / "config.json"
        if not file.is_file():
            return {}
        return _object(file)

    @cached_property
    def origin(self) -> Mapping[str, Any]:
        """What FedLoRA wrote about the adapter: "run", its id, and "base", the base model's hashes, if they are known.

        A run's export has them in fedlora.json, an adapter made of others the base in fedlora_adapter.json.
        """
        for name in (EXPORTED, RECORD):
            if (self.path / name).is_file():
                return _object(self.path / name)
        return {}

    @property
    def base_sha256(self) -> str | None:
        """SHA-256 of the base model's weights; None if it is not known."""
        base = self.origin.get("base")
        found = base.get("weights_sha256") if isinstance(base, Mapping) else None
        return found if isinstance(found, str) else None

    @property
    def base(self) -> str:
        """The base model's name, with "@" and its revision if that is given; "" if there is no name."""
        name, revision = self.config.get("base_model_name_or_path"), self.config.get("revision")
        return f"{name or ''}{f'@{revision}' if name and revision else ''}"


def read(path: Path) -> Adapter:
    """Read what an adapter's folder holds. Tensors are read when they are asked for.

    Raises:
        ValueError: the folder is no LoRA adapter, is damaged, or is of a kind that is refused.
    """
    config = _config_in(path)
    _check_kind(path, config)
    shapes, dtypes = _checked_tensors(path)
    targets: dict[str, dict[str, str]] = {}
    others: dict[str, tuple[int, ...]] = {}
    for key, shape in shapes.items():
        if match := _FACTOR.fullmatch(key):
            targets.setdefault(match["name"], {})[match["linear"] or match["embedding"]] = key
        elif ".lora_" in key:
            raise ValueError(f"{path / WEIGHTS} holds {key}, which is neither of the two factors of a linear layer or "
                             "embedding; such an adapter cannot be read here")
        else:
            others[key] = shape
    found = {name: _target(path, config, name, keys, shapes, dtypes) for name, keys in sorted(targets.items())}
    return Adapter(path, config, found, others)


def read_any(path: Path) -> Adapter:
    """Read the folder of an adapter of any of PEFT's types, for uses that leave its update to PEFT.

    All its tensors are among the others, and it has no targets.

    Raises:
        ValueError: the folder is no adapter, or is damaged.
    """
    config = _config_in(path)
    return Adapter(path, config, {}, _checked_tensors(path)[0])


def _config_in(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}; name a folder that holds {CONFIG} and {WEIGHTS}")
    if not (path / CONFIG).is_file():
        inner = path / "adapter"
        for folder in (path, inner):
            _check_not_own_form(folder)
        hint = (f"The adapter is in {inner}" if (inner / CONFIG).is_file()
                else "Name the folder that save_pretrained wrote")
        raise ValueError(f"{path} is no adapter: it has no {CONFIG}. {hint}")
    return _object(path / CONFIG)


def _check_not_own_form(folder: Path) -> None:
    """Check that a folder holds no adapter in FedLoRA's own form, which is for families that PEFT cannot hold.

    Raises:
        ValueError: it does.
    """
    family = _object(folder / OWN_FORM).get("family") if (folder / OWN_FORM).is_file() else None
    if isinstance(family, str):
        raise ValueError(f"{folder} holds an adapter of the family {family} in FedLoRA's own form, which is for "
                         "families that have no form in PEFT: these tools cannot take it. fedlora.adapters.load loads "
                         "it; for these tools, train another family")


def _checked_tensors(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.dtype]]:
    if not (path / WEIGHTS).is_file():
        raise ValueError(f"{path} has no {WEIGHTS}; other formats can run code and are not read. Load the adapter "
                         "with PEFT and save it again")
    return _tensors(path)


def _object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object: it is damaged. Copy or save the adapter again")
    return content


def _check_kind(path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path} is of PEFT's type {kind!r}, and only LORA can be read here. PEFT's save_as_lora "
                         "writes many other types as LoRA")
    for name, why in REFUSED.items():
        if config.get(name):
            raise ValueError(f"{path} was trained with {name}: {why}, so that its update is not a product of two "
                             "factors alone. Such adapters cannot be read here")


def _tensors(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.dtype]]:
    """Return shape and dtype of every tensor of the file."""
    try:
        with safe_open(path / WEIGHTS, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in sorted(file.keys())}
            shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
            return shapes, {key: _DTYPES.get(part.get_dtype(), torch.uint8) for key, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS} cannot be read ({error}): the file is damaged. Copy it again") from error


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _target(path: Path, config: Mapping[str, Any], name: str, keys: Mapping[str, str],
            shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]) -> Target:
    if set(keys) != {"A", "B"}:
        raise ValueError(f"{path / WEIGHTS} holds only one factor of {name}: the file is damaged. Copy it again")
    B, A = shapes[keys["B"]], shapes[keys["A"]]
    if len(A) != 2 or len(B) != 2:
        raise ValueError(f"{path}: {name} is adapted by factors of shapes {B} and {A}, as a convolution is; only "
                         "linear layers and embeddings can be read here")
    if dtypes[keys["A"]] == torch.uint8 or dtypes[keys["B"]] == torch.uint8:
        raise ValueError(f"{path}: the factors of {name} are neither float32, float16, bfloat16 nor float64. Save the "
                         "adapter in one of these")
    rank = _pattern(path, config, "rank_pattern", name, config.get("r"))
    if not A[0] == B[1] == rank or rank < 1:
        raise ValueError(f"{path}: {name} has factors of shapes {B} and {A}, but {CONFIG} gives it rank {rank}: the "
                         "two files are not of the same adapter")
    alpha = _pattern(path, config, "alpha_pattern", name, config.get("lora_alpha"))
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Target(name, rank, scaling, B[0], A[1], "lora_embedding_" in keys["A"], (keys["B"], keys["A"]),
                  torch.promote_types(dtypes[keys["A"]], dtypes[keys["B"]]))


def _pattern(path: Path, config: Mapping[str, Any], pattern: str, name: str, default: object) -> Any:
    """Return a target's rank or alpha: that of the first expression that fits the end of its name, or the default."""
    value = default
    for expression, own in (config.get(pattern) or {}).items():
        try:
            fits = re.match(rf"(.*\.)?({expression})$", name)
        except re.error as error:
            raise ValueError(f"{path / CONFIG}: {expression!r} in {pattern} is not a regular expression: "
                             f"{error}") from None
        if fits:
            value = own
            break
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{path / CONFIG}: {value!r} is not a number, as {pattern.partition('_')[0]} of {name}")
    return value
