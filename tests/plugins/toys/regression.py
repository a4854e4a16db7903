"""Predict a number from a text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
from typing_extensions import override

from fedlora.data import Answer, RowFormat, Rows
from fedlora.records import Batch, Records, pack
from fedlora.task import Task


def number(cell: object) -> float | None:
    """Return a cell's finite number; None for an empty cell."""
    if cell is None or cell == "":
        return None
    try:
        value = float(cell)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"of type {type(cell).__name__}") from None
    if not math.isfinite(value):
        raise TypeError("no finite number")
    return value


class Regression(Task):
    """The model has one output; a record's loss is its squared distance from the record's number."""

    name = "regression"
    model_is = "a regression model"
    has_labels = False
    has_head = True
    rows = RowFormat((("text", ("text",)),),
                     Answer("score", number, "Write it as a number, as in 3.5"))
    auto_class = AutoModelForSequenceClassification
    model_types = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    metric = "rmse"
    peft_type = "SEQ_CLS"

    @classmethod
    @override
    def model_options(cls, labels: int) -> Mapping[str, Any]:
        return {"num_labels": 1}

    @override
    def encode(self, rows: Rows, unusable: Counter[str] | None = None) -> Records:
        assert rows.values is not None
        tokens: list[np.ndarray] = []
        kept: list[int] = []

        def tokenize(some: Sequence[int]) -> list[list[int]]:
            return self.tokenizer([rows.texts[row] for row in some], truncation=True,
                                  max_length=self.max_length)["input_ids"]

        for chunk in self._chunks(rows):
            scored = [row for row in chunk if rows.values[row] is not None]
            for row, ids in self._each(scored, tokenize, unusable):
                tokens.append(np.array(ids, np.int32))
                kept.append(row)
        if unusable is not None:
            unusable["no score"] += rows.values.count(None)
        return pack(tokens, self.tokenizer.pad_token_id, left_out=len(rows) - len(kept), units=rows.take(kept).units,
                    labels=np.array([rows.values[row] for row in kept], np.float32))

    @override
    def made_up(self, tokens: Sequence[Sequence[int]]) -> Records:
        return pack(tokens, self.tokenizer.pad_token_id, labels=np.arange(len(tokens), dtype=np.float32))

    @override
    def per_record_loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return (model(**batch.inputs()).logits[:, 0].float() - batch.labels).square()

    @override
    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        losses = self.per_record_loss(model, batch)
        return {"loss": losses}

    @override
    def summarize(self, values: Mapping[str, np.ndarray]) -> dict[str, float]:
        loss = float(values["loss"].mean())
        return {"rmse": math.sqrt(loss), "loss": loss, "count": len(values["loss"])}


TASK = Regression
