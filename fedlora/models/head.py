"""A checkpoint's own head meets a run's label set: rows follow names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel


def follow_names(model: PreTrainedModel, head: str | None, missing: Sequence[str],
                 own: Mapping[str, str] | None, labels: Sequence[str]) -> str:
    """Write the labels' names into the model's config, and put the rows of its own head in their order.

    Args:
        head: name of the final linear layer; None where the task has none.
        missing: parameters that the checkpoint lacks.
        own: config.json's names of the outputs, by number.
        labels: of the run, in the order of the outputs; () where they are not known.

    Returns:
        What to say where the names of a head that is kept are not the run's; "" otherwise.
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
        return (f"The base model has a head of its own that {named}: in this order they start as {', '.join(labels)}. "
                "Name the outputs in config.json (id2label), or the labels in their order with --labels, if that is "
                "not what they mean.")
    if order != list(range(len(labels))):
        final = model.get_submodule(head)
        assert isinstance(final, nn.Linear), "a task's head is linear"
        with torch.no_grad():
            for parameter in final.parameters(recurse=False):
                parameter.copy_(parameter[order].clone())
    return ""


def _rows(names: Sequence[str], labels: Sequence[str]) -> list[int] | None:
    """For each label the row of its name, up to case and spaces around it; None unless each has one of its own."""
    for key in (str, lambda name: name.strip().casefold()):
        places = {key(name): place for place, name in enumerate(names)}
        rows = [places.get(key(label), -1) for label in labels]
        if len(places) == len(names) and sorted(rows) == list(range(len(labels))):
            return rows
    return None
