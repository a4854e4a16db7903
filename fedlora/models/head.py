"""Reordering of a checkpoint's own classification head, so that its outputs follow the run's label set by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel


def follow_names(model: PreTrainedModel, head: str | None, missing: Sequence[str],
                 own: Mapping[str, str] | None, labels: Sequence[str]) -> str:
    """Write the labels' names into the model's config, and put the rows of the checkpoint's own head in their order.

    Args:
        model: the loaded model.
        head: name of the head's final linear layer; None if the task has no head.
        missing: names of the parameters that the checkpoint lacks.
        own: the names of the outputs in config.json (id2label), by number.
        labels: the run's labels in the order of the outputs; () if they are not known.

    Returns:
        A message for the user if the checkpoint has a head whose names are not those of the run; else "".
    """
    if head is None or not labels:
        return ""
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: number for number, label in enumerate(labels)}
    if f"{head}.weight" in missing:
        return ""
    names = [str((own or {}).get(str(number), f"LABEL_{number}")) for number in range(len(labels))]
    order = _rows(names, labels)
    if order is None:
        named = (f"calls its outputs {', '.join(names)}" if names != [f"LABEL_{number}" for number in range(len(names))]
                 else "has no names for its outputs")
        return (f"The base model has a head of its own that {named}. Its outputs start, in this order, as "
                f"{', '.join(labels)}. If they mean something else, name the outputs in config.json (id2label), or "
                "give the labels in the right order with --labels.")
    if order != list(range(len(labels))):
        final = model.get_submodule(head)
        assert isinstance(final, nn.Linear), "a task's head is linear"
        with torch.no_grad():
            for parameter in final.parameters(recurse=False):
                parameter.copy_(parameter[order].clone())
    return ""


def _rows(names: Sequence[str], labels: Sequence[str]) -> list[int] | None:
    """Return the row of each label's name, ignoring capitals and outer blanks if needed; None if names do not match."""
    for key in (str, lambda name: name.strip().casefold()):
        places = {key(name): place for place, name in enumerate(names)}
        rows = [places.get(key(label), -1) for label in labels]
        if len(places) == len(names) and sorted(rows) == list(range(len(labels))):
            return rows
    return None
