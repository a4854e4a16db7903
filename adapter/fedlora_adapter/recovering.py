"""The way back from a pruned base (LoRAM): an adapter's factors spread over what was kept, and 0 elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedlora import models
from fedlora.algebra import Factors
from fedlora.console import results
from fedlora.models.reading import config_of

from .known_epsilon import known
from .peft_folder import Adapter, read
from .pruning import PIN, RECORD, Architecture, Sizes, architecture_of, features
from .written import NewBase, NewTarget, check_new, hashes_of, write

_OF_LABELS = ("id2label", "label2id", "pad_token_id", "problem_type")
"""Settings of base/config.json that come from the run, not from the base model."""


@dataclass(frozen=True)
class Pruned:
    """A base of fedlora-adapter prune-base.

    Attributes:
        record: the content of its record.
        pin: the record's hash.
        architecture: its architecture.
        full: the full model's sizes.
    """

    record: Mapping[str, Any]
    pin: str
    architecture: Architecture
    full: Sizes


def recover(adapter: Path, base: str, pruned: Path | None, out: Path) -> int:
    """Write the adapter for the full model, and print how many layers it spread.

    Args:
        adapter: the adapter's folder.
        base: the full model.
        pruned: the pruned base's folder; None for the one that the adapter names.
        out: the new folder.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: something does not fit; the message says what.
    """
    check_new(out)
    source = read(adapter)
    pruned = pruned or Path(source.base)
    if (not source.base and pruned == Path()) or not pruned.is_dir():
        raise ValueError(f"{adapter} names its base model {source.base or 'nowhere'}, which is no folder here; name "
                         "the folder that fedlora-adapter prune-base wrote with --pruned DIR")
    found = pruned_base(pruned)
    _check_trained_on(source, found, pruned)
    path = models.resolve(base)
    reference = models.reference(base, path)
    wanted = found.record["full"]["weights_sha256"]
    if reference.weights_sha256 != wanted:
        raise ValueError(f"--base {base} has weights with SHA-256 {reference.weights_sha256}, and {pruned} was made "
                         f"from those with {wanted}: it is another model. Name the one that was pruned")
    targets = {name: spread(source, name, found) for name in source.targets}
    count = sum(target.factors.B.shape[0] != source.targets[name].d_out
                or target.factors.A.shape[1] != source.targets[name].d_in for name, target in targets.items())
    settings = {key: source.base_config[key] for key in _OF_LABELS if key in source.base_config}
    config = {**config_of(path), **settings} if source.base_config else {}
    write(out, [source], targets, {key: source.tensor(key) for key in source.others},
          how={"how": "recover", "layers": count, "pruned_sha256": found.pin},
          told=f"`fedlora-adapter recover` made it of {source.name}, which was trained on a pruned copy of the base "
               f"model. Its factors were spread over the rows and columns that were kept in {count} layers, and are 0 "
               "elsewhere.", known=known([source]),
          base=NewBase(models.base_name(reference), config, hashes_of(reference)))
    results().print(f"{count} of {len(targets)} layers were spread to the full size, and the others taken as they are. "
                    f"Wrote {out}.", soft_wrap=True, markup=False)
    return 0


def pruned_base(folder: Path) -> Pruned:
    """Read what was kept in a pruned base.

    Raises:
        ValueError: it is none, or its record was changed.
    """
    file = folder / RECORD
    if not file.is_file():
        raise ValueError(f"{folder} has no {RECORD}: fedlora-adapter prune-base did not write it")
    content, config = file.read_bytes(), config_of(folder)
    pin = hashlib.sha256(content).hexdigest()
    if config.get(PIN) != pin:
        raise ValueError(f"{file} has the SHA-256 {pin}, and config.json beside it holds {config.get(PIN)}: one of the "
                         "two was changed. Copy the folder again")
    try:
        record = json.loads(content)
        full = Sizes(**record["full"]["sizes"])
        for part in ("full", "pruned"):
            str(record[part]["weights_sha256"])
        dict(record["kept"])
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{file} is no record of fedlora-adapter prune-base, or is damaged; prune the base again"
                         ) from None
    return Pruned(record, pin, architecture_of(config, str(folder)), full)


def _check_trained_on(source: Adapter, found: Pruned, pruned: Path) -> None:
    """Check that an adapter was trained on a pruned base, as far as its folder says, and that it can be spread.

    Raises:
        ValueError: it was not, or it has trained biases.
    """
    wanted = found.record["pruned"]["weights_sha256"]
    pin = source.base_config.get(PIN, found.pin)
    if (source.base_sha256 or wanted) != wanted or pin != found.pin:
        raise ValueError(f"{source.path} was trained on another base model than {pruned}: its base has "
                         + (f"weights with SHA-256 {source.base_sha256}, not {wanted}"
                            if pin == found.pin else f"the {PIN} {pin}, not {found.pin}"))
    for key in source.others:
        layer = key.removeprefix("base_model.model.").rpartition(".")[0]
        if found.architecture.place(layer) is not None:
            raise ValueError(f"{source.path} holds {key}, which was trained whole and has the pruned size; only "
                             "factors can be spread. Train without biases")


def spread(source: Adapter, name: str, found: Pruned) -> NewTarget:
    """Return a layer's update at the full size: the trained values at the kept places, bit for bit, and 0 elsewhere.

    Raises:
        ValueError: the layer's shape is not that of the pruned base.
    """
    target, factors = source.targets[name], source.factors(name)
    B, A = factors.B, factors.A
    place = found.architecture.place(name)
    if place is not None:
        block, side = place
        kept = found.record["kept"].get(block, {}).get(side.unit, [])
        places = features(found.full, side, name, kept)
        size = len(features(found.full, side, name, range(found.full.units(side.unit))))
        has = B.shape[0] if side.is_output else A.shape[1]
        if has != len(places):
            raise ValueError(f"{name} has {has} {'outputs' if side.is_output else 'inputs'} in {source.path}, and "
                             f"{len(places)} in the pruned base: the adapter was trained on another model")
        if side.is_output:
            B = torch.zeros(size, B.shape[1], dtype=B.dtype).index_copy(0, places, B)
        else:
            A = torch.zeros(A.shape[0], size, dtype=A.dtype).index_copy(1, places, A)
    return NewTarget(Factors(B=B, A=A), target.scaling, target.dtype, target.is_embedding)
