"""Tokenised records in flat arrays, and micro-batches made from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

Tokens = Sequence[int] | np.ndarray
"""One text's token ids, or one value for each."""

IGNORED = -100
"""Label of a token that no loss is taken on."""


@dataclass(frozen=True)
class Records:
    """What is trained on: n records of differing length, without any padding.

    Attributes:
        tokens: [total] int32 token ids, record after record.
        offsets: [n + 1] int64; record i is tokens[offsets[i]:offsets[i + 1]].
        pad_id: the token that fills a batch.
        labels: [n] int64 index into the label set, or another number to be predicted of each; None for language models.
        segments: [total] uint8, 1 for tokens of a pair's second text, if the model tells them apart; else None.
        answers: [total] uint8, 1 for the tokens that a language model is to predict; else None.
        left_out: how many rows were not taken, see `fedlora.task.Task.encode`.
        units: [n] int64, which unit of privacy (a patient, say) each record belongs to, from 0 to `units_count` - 1,
            each of which has at least one record; None if each record is a unit of its own.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    pad_id: int
    labels: np.ndarray | None = None
    segments: np.ndarray | None = None
    answers: np.ndarray | None = None
    left_out: int = 0
    units: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def units_count(self) -> int:
        """The number of units that have a record: what n̂, q and δ are about."""
        return len(self) if self.units is None else int(self.units.max(initial=-1)) + 1

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64 number of tokens of each record."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Batch:
    """A micro-batch on one device.

    Attributes:
        input_ids: [records, length] int64, padded on the right.
        labels: [records] the records' own, or [records, length] int64 tokens to predict, `IGNORED` elsewhere.
        attention_mask: [records, length] int64, also where nothing is padded: what a model does must not follow that.
        token_type_ids: [records, length] int64, if the model takes them.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor
    token_type_ids: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that there are, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def inputs(self) -> dict[str, torch.Tensor]:
        """The model's keyword arguments: all but the labels."""
        return {name: tensor for name, tensor in self.tensors().items() if name != "labels"}

    def to(self, device: str | torch.device) -> Batch:
        """The same on another device."""
        return Batch(**{name: tensor.to(device) for name, tensor in self.tensors().items()})


def pack(sequences: Sequence[Tokens], pad_id: int, *, labels: Sequence[int] | np.ndarray | None = None,
         segments: Sequence[Tokens] | None = None, answers: Sequence[Tokens] | None = None, left_out: int = 0,
         units: Sequence[str] | None = None) -> Records:
    """Lists of token ids, and what belongs to each token, as flat arrays.

    Args:
        labels: one for each sequence; an array keeps its type.
        units: the id of each sequence's unit; they are numbered in the order of the ids.
    """
    def flat(lists: Sequence[Tokens] | None, dtype: type) -> np.ndarray | None:
        return None if lists is None else np.concatenate([np.asarray(one, dtype=dtype) for one in [[], *lists]],
                                                         dtype=dtype)

    tokens = flat(sequences, np.int32)
    assert tokens is not None
    numbers = {name: number for number, name in enumerate(sorted(set(units or ())))}
    return Records(tokens=tokens, offsets=np.cumsum([0, *map(len, sequences)], dtype=np.int64), pad_id=pad_id,
                   labels=labels if labels is None or isinstance(labels, np.ndarray) else np.asarray(labels, np.int64),
                   segments=flat(segments, np.uint8), answers=flat(answers, np.uint8), left_out=left_out,
                   units=None if units is None else np.array([numbers[name] for name in units], dtype=np.int64))


def concatenate(several: Sequence[Records]) -> Records:
    """The records of several, one after the other, without their units. They are of one task, tokenizer and kind."""
    def joined(name: str) -> np.ndarray | None:
        return None if getattr(several[0], name) is None else np.concatenate([getattr(one, name) for one in several])

    tokens = joined("tokens")
    assert tokens is not None
    return Records(tokens=tokens, offsets=np.cumsum([0, *(length for one in several for length in one.lengths)]),
                   pad_id=several[0].pad_id, labels=joined("labels"), segments=joined("segments"),
                   answers=joined("answers"), left_out=sum(one.left_out for one in several))


def collate(records: Records, indices: Sequence[int] | np.ndarray, length: int, device: str | torch.device = "cpu", *,
            rows: int | None = None, filler: int = 0) -> Batch:
    """Records `indices`, padded on the right to `length` tokens, and constant rows after them.

    Args:
        length: at least the longest of these records.
        rows: of the batch; None for one for each record.
        filler: the token that each further row consists of; its label is 0, or that token at every position.
    """
    index = np.asarray(indices, dtype=np.int64)
    count = len(index) if rows is None else rows
    lengths = np.full(count, length)
    lengths[:len(index)] = records.lengths[index]
    assert count >= len(index) and lengths.max(initial=0) <= length, "no record is longer than its batch, or left out"
    inside = np.arange(length) < lengths[:, None]
    own = inside[:len(index)]
    source = (records.offsets[index, None] + np.arange(length))[own]

    def padded(values: np.ndarray, fill: int, further: int) -> torch.Tensor:
        full = np.full(inside.shape, further, dtype=np.int64)
        full[:len(index)] = fill
        full[:len(index)][own] = values[source]
        return torch.from_numpy(full).to(device)

    if records.answers is None:
        assert records.labels is not None
        whole = np.zeros(count, records.labels.dtype)
        whole[:len(index)] = records.labels[index]
        labels = torch.from_numpy(whole).to(device)
    else:
        labels = padded(np.where(records.answers, records.tokens, IGNORED), IGNORED, filler)
    return Batch(
        input_ids=padded(records.tokens, records.pad_id, filler), labels=labels,
        attention_mask=torch.from_numpy(inside.astype(np.int64)).to(device),
        token_type_ids=None if records.segments is None else padded(records.segments, 0, 0))
