"""Checks that several adapters can become one: the same base, the same layers' shapes, the same head and labels."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .peft_folder import Adapter, read

_OF_NO_MATTER = {"id2label", "label2id", "transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache",
                 "architectures", "problem_type", "pad_token_id"}
"""Settings of a base model's config that do not decide what its weights are."""

_ALIKE = ("task_type", "fan_in_fan_out", "bias", "trainable_token_indices")
"""Settings of adapter_config.json in which the adapters must agree."""


def read_agreeing(paths: Sequence[Path], command: str, *, same_base: bool) -> list[Adapter]:
    """Read adapters that are to become one, and print remarks about what could not be checked to stderr.

    Args:
        paths: their folders, at least two.
        command: the sub-command that speaks.
        same_base: as for `check_agreement`.

    Raises:
        ValueError: one cannot be read, or two of them do not fit.
    """
    adapters = [read(path) for path in paths]
    for remark in check_agreement(adapters, same_base=same_base):
        print(f"fedlora-adapter {command}: {remark}", file=sys.stderr)
    return adapters


def check_agreement(adapters: Sequence[Adapter], *, same_base: bool = False) -> list[str]:
    """Check that adapters can be combined, and return remarks about what could not be checked.

    Args:
        adapters: at least two.
        same_base: the user says that the base models are the same, although they have different names.

    Raises:
        ValueError: two of them do not fit. The message has both values.
    """
    first, remarks = adapters[0], []
    for other in adapters[1:]:
        _check_base(first, other, same_base=same_base)
        _check_whole(first, other)
        for key in _ALIKE:
            mine, theirs = first.config.get(key), other.config.get(key)
            if (mine or None) != (theirs or None):
                raise ValueError(f"{key} is {mine!r} in {first.path} and {theirs!r} in {other.path}; such adapters "
                                 "cannot be combined")
        for name in first.targets.keys() & other.targets.keys():
            a, b = first.targets[name], other.targets[name]
            if (a.d_out, a.d_in, a.is_embedding) != (b.d_out, b.d_in, b.is_embedding):
                raise ValueError(f"{name} has shape {a.d_out} × {a.d_in} in {first.path} and {b.d_out} × {b.d_in} in "
                                 f"{other.path}: the adapters are of different base models")
    unnamed = [str(adapter.path) for adapter in adapters if adapter.labels is None]
    if unnamed and first.others:
        remarks.append(f"the labels of {' and '.join(unnamed)} are not named in the folder; that they are the same, in "
                       "the same order, could not be checked")
    return remarks


def _check_base(first: Adapter, other: Adapter, *, same_base: bool) -> None:
    mine, theirs = (adapter.base.partition("@") for adapter in (first, other))
    differs = mine[0] != theirs[0] or (mine[2] and theirs[2] and mine[2] != theirs[2])
    if differs and not same_base:
        raise ValueError(f"the base model is {first.base or 'not named'} in {first.path} and "
                         f"{other.base or 'not named'} in {other.path}. Adapters of different models cannot be "
                         "combined; if these are two names of one model, add --same-base")
    hashes = first.base_sha256, other.base_sha256
    if all(hashes) and hashes[0] != hashes[1] and not same_base:
        raise ValueError(f"the base model's weights have the SHA-256 {hashes[0]} for {first.path} and {hashes[1]} for "
                         f"{other.path}. Adapters of different models cannot be combined; if these are two copies of "
                         "one model, as in different precisions, add --same-base")
    configs = _decisive(first.base_config), _decisive(other.base_config)
    if all(configs):
        for key in sorted(configs[0].keys() & configs[1].keys()):
            if configs[0][key] != configs[1][key]:
                raise ValueError(f"the base model's {key} is {configs[0][key]!r} in {first.path} and "
                                 f"{configs[1][key]!r} in {other.path}: the adapters are of different base models")


def _decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _OF_NO_MATTER}


def _check_whole(first: Adapter, other: Adapter) -> None:
    if first.labels is not None and other.labels is not None and first.labels != other.labels:
        raise ValueError(f"the labels are {', '.join(first.labels)} in {first.path} and {', '.join(other.labels)} in "
                         f"{other.path}, in the order of the outputs. They must be the same")
    if first.others != other.others:
        raise ValueError(f"the adapters have different whole tensors, such as those of a head: {_listed(first)} in "
                         f"{first.path}; {_listed(other)} in {other.path}. They must be the same")


def _listed(adapter: Adapter) -> str:
    return ", ".join(f"{name.removeprefix('base_model.model.')} {shape}" for name, shape in adapter.others.items()
                     ) or "none"
