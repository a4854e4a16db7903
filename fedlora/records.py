"""Tokenised records in flat arrays, and micro-batches made from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

Tokens = Sequence[int] | np.ndarray
"""One text's token ids, or one value for each of its tokens."""

IGNORED = -100
"""Label of a token that does not count in the loss."""


@dataclass(frozen=True)
class Records:
    """The records that a model trains on: n token sequences of any lengths, stored without padding.

    Attributes:
        tokens: [total] int32 token ids, record after record.
        offsets: [n + 1] int64; record i is tokens[offsets[i]:offsets[i + 1]].
        pad_id: the token that pads records to the length of their batch.
        labels: [n] int64 index into the label set, or another number to predict for each record; None for language
            models.
        segments: [total] uint8, 1 for tokens of a pair's second text, if the model distinguishes the two; else None.
        answers: [total] uint8, 1 for the tokens that a language model learns to predict; None for other tasks.
        left_out: number of rows that gave no record, as `fedlora.task.Task.encode` explains.
        units: [n] int64 number of the privacy unit (a patient, say) that each record belongs to. Units are numbered
            from 0 to `units_count` - 1, and each has at least one record. None if each record is its own unit.
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
        """The number of privacy units with at least one record.

        The declared size, the sampling rate and δ refer to units in this sense.
        """
        return len(self) if self.units is None else int(self.units.max(initial=-1)) + 1

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each record, [n] int64."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Batch:
    """A micro-batch on one device.

    Attributes:
        input_ids: [records, length] int64, padded on the right.
        labels: [records] labels of the records, or [records, length] int64 tokens to predict, `IGNORED` elsewhere.
        attention_mask: [records, length] int64. It is there even if no record is padded, so that a model takes the same
            path through its code either way.
        token_type_ids: [records, length] int64, if the model takes them; else None.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor
    token_type_ids: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors of the batch that are not None, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return the model's keyword arguments: all tensors except the labels."""
        return {name: tensor for name, tensor in self.tensors().items() if name != "labels"}

    def to(self, device: str | torch.device) -> Batch:
        """Return the batch with its tensors on another device."""
        return Batch(**{name: tensor.to(device) for name, tensor in self.tensors().items()})


def pack(sequences: Sequence[Tokens], pad_id: int, *, labels: Sequence[int] | np.ndarray | None = None,
         segments: Sequence[Tokens] | None = None, answers: Sequence[Tokens] | None = None, left_out: int = 0,
         units: Sequence[str] | None = None) -> Records:
    """Pack lists of token ids, and the values that belong to each token, into flat arrays.

    Args:
        sequences: the token ids of each record.
        pad_id: the token that pads records to the length of their batch.
        labels: one for each sequence. An array keeps its dtype; other sequences become int64.
        segments: for each sequence, 0 or 1 for each token; see `Records.segments`.
        answers: for each sequence, 0 or 1 for each token; see `Records.answers`.
        left_out: number of rows that gave no record.
        units: the id of each sequence's privacy unit. Units are numbered in the sorted order of their ids.
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
    """Join several sets of records into one, in order, without their units.

    All must come from the same task and tokenizer, and have the same optional arrays.
    """
    def joined(name: str) -> np.ndarray | None:
        return None if getattr(several[0], name) is None else np.concatenate([getattr(one, name) for one in several])

    tokens = joined("tokens")
    assert tokens is not None
    return Records(tokens=tokens, offsets=np.cumsum([0, *(length for one in several for length in one.lengths)]),
                   pad_id=several[0].pad_id, labels=joined("labels"), segments=joined("segments"),
                   answers=joined("answers"), left_out=sum(one.left_out for one in several))


def collate(records: Records, indices: Sequence[int] | np.ndarray, length: int, device: str | torch.device = "cpu", *,
            rows: int | None = None, filler: int = 0) -> Batch:
    """Make a batch of the chosen records, padded on the right to `length` tokens, with constant rows after them.

    Args:
        records: the records to choose from.
        indices: which of them, in this order.
        length: tokens of each row; at least as many as the longest chosen record has.
        device: where to put the tensors.
        rows: number of rows of the batch; None for one row for each record.
        filler: the token that fills each further row. The label of such a row is 0, or this token at every position.
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
