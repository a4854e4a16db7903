"""Classification of a text, or of a pair of texts, into the labels of the plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
from typing_extensions import override

from fedlora.data import (
    Answer,
    RowFormat,
    Rows,
    check_labels,
    labelled_by,
    labelled_otherwise,
    normalize_label,
)
from fedlora.figures import of_classes
from fedlora.plan import RunPlan
from fedlora.records import Batch, Records, pack
from fedlora.task import Task


class Classification(Task):
    """The task of predicting the label of a text or of a pair of texts.

    Attributes:
        labels: the label set, in the order of the classifier's outputs.
    """

    name = "classification"
    model_is = "a classifier"
    has_labels = True
    has_head = True
    rows = RowFormat(
        (("text", ("text",)), ("pair", ("text_a", "text_b")), ("pair", ("sentence1", "sentence2"))),
        Answer("label", normalize_label, "Write it as a whole number or a name"),
        otherwise=", or train a language model with --task causal-lm")
    auto_class = AutoModelForSequenceClassification
    model_types = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    metric = "accuracy"
    peft_type = "SEQ_CLS"
    scored_by = "accuracy"

    def __init__(self, tokenizer: Any, labels: Sequence[str], max_length: int) -> None:
        super().__init__(tokenizer, max_length)
        self.labels = tuple(labels)
        # set for models that read a text at its end-of-text token, which the words of a text then cannot produce
        # (`fedlora.models.tokenizer`)
        self._end: int | None = tokenizer.eos_token_id if getattr(tokenizer, "split_special_tokens", False) else None

    @classmethod
    @override
    def of(cls, run: RunPlan, tokenizer: Any) -> Self:
        return cls(tokenizer, run.labels, run.max_length)

    @classmethod
    @override
    def model_options(cls, labels: int) -> Mapping[str, Any]:
        return {"num_labels": labels}

    @override
    def encode(self, rows: Rows, unusable: Counter[str] | None = None) -> Records:
        """Tokenise texts or pairs, with the tokenizer's special tokens. Rows without a label are left out.

        Raises:
            ValueError: `unusable` was not given, and a label is outside the label set. The message names file and line,
                and the allowed labels.
        """
        if rows.labels is None or rows.kind not in ("text", "pair"):
            raise ValueError(f"these rows were read as {rows.kind} without labels; classification needs text and label")
        classes = {name: index for index, name in enumerate(self.labels)}
        rows = labelled_by(rows, classes)
        assert rows.labels is not None
        if unusable is None:
            check_labels(rows, self.labels)
        else:
            unusable["no label"] += rows.labels.count(None)
            unusable["a label outside of the run's set"] += len(labelled_otherwise(rows, self.labels))
        ends = self._ends(rows)
        tokens: list[np.ndarray] = []  # a list of Python's integers takes ten times the memory
        segments: list[np.ndarray] = []
        kept: list[int] = []
        classes_of_kept: list[int] = []

        def tokenize(some: Sequence[int]) -> list[tuple[list[int], list[int] | None]]:
            columns = [[column[row] for row in some] for column in (rows.texts, rows.seconds) if column is not None]
            found = self.tokenizer(*columns, truncation=True, max_length=self.max_length, return_attention_mask=False)
            types = found.get("token_type_ids")
            if types and rows.kind != "pair" and not any(map(any, types)):
                types = None  # nearly every model takes zeros for a single text if none are given
            return list(zip(found["input_ids"], types or [None] * len(some), strict=True))

        for chunk in self._chunks(rows):
            labelled = [row for row in chunk if rows.labels[row] in classes]
            for row, (ids, types) in self._each(labelled, tokenize, unusable):
                ids = ids[:self.max_length]  # tokenizers do not cut if their special tokens alone exceed the length
                if not ids:
                    if unusable is not None:
                        unusable["no token"] += 1
                    continue
                if self._end is not None and ids.count(self._end) != ends:
                    if unusable is not None:
                        unusable["cut before the end that the model reads it at"] += 1
                    continue
                tokens.append(np.array(ids, np.int32))
                if types is not None:
                    segments.append(np.array(types[:self.max_length], np.uint8))
                kept.append(row)
                classes_of_kept.append(classes[rows.labels[row]])  # type: ignore[index]
        return pack(tokens, self.tokenizer.pad_token_id, labels=classes_of_kept,
                    segments=segments or None, left_out=len(rows) - len(kept),
                    units=rows.take(kept).units)

    def _ends(self, rows: Rows) -> int:
        """Return the number of end-of-text tokens in each tokenised row; 0 if the model does not look for them."""
        if self._end is None:
            return 0
        found = self.tokenizer(*["a"] * (1 + (rows.seconds is not None)))["input_ids"]
        if found[-1:] != [self._end]:
            raise ValueError("the model reads its texts at an end-of-text token, but its tokenizer ends no "
                             f"{rows.kind} with one. Give the tokenizer a post-processor that does, or choose another "
                             "model")
        return int(found.count(self._end))

    @override
    def collate(self, records: Records, indices: np.ndarray, length: int, device: str | torch.device = "cpu", *,
                rows: int | None = None) -> Batch:
        """Make a batch of records as every task does.

        If the model reads a text at its end, the further rows end with as many end-of-text tokens as the records.
        """
        batch = super().collate(records, indices, length, device, rows=rows)
        if self._end is not None and len(batch.labels) > len(indices):
            ends = int((records.tokens[:records.offsets[:2][-1]] == self._end).sum())
            batch.input_ids[len(indices):, length - max(1, ends):] = self._end
        return batch

    @override
    def made_up(self, tokens: Sequence[Sequence[int]]) -> Records:
        """Return one record for each sequence of tokens, with the first two labels in turn."""
        if self._end is not None:
            tokens = [[*(token for token in one[:-1] if token != self._end), self._end] for one in tokens]
        return pack(tokens, self.tokenizer.pad_token_id, labels=[i % 2 for i in range(len(tokens))])

    @override
    def per_record_loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return the cross entropy of each record, [records] float32."""
        return self.measure(model, batch)["loss"]

    @override
    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        logits = model(**batch.inputs()).logits.float()
        return {"loss": F.cross_entropy(logits, batch.labels, reduction="none"),
                "probabilities": logits.softmax(-1), "label": batch.labels}

    @override
    def score(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return 1 for each record whose label is the most probable one, and 0 for the others."""
        right: np.ndarray = values["probabilities"].argmax(1) == values["label"]
        return right.astype(np.float64)

    @override
    def summarize(self, values: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Return a classifier's figures (`fedlora.figures.of_classes`), the mean loss, and the number of records."""
        return {**of_classes(values["probabilities"], values["label"].astype(np.int64), self.labels),
                "loss": float(values["loss"].mean()), "count": len(values["loss"])}


TASK = Classification
