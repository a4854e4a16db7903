"""Classify a text, or a pair of texts, into the plan's label set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from fedlora.data import Rows, check_labels
from fedlora.tasks.records import Batch, Records, pack
from fedlora.tasks.task import Task


class Classification(Task):
    """Attributes: labels, the label set in the order of the classifier's outputs."""

    name = "classification"

    def __init__(self, tokenizer: Any, labels: Sequence[str], max_length: int) -> None:
        super().__init__(tokenizer, max_length)
        self.labels = tuple(labels)

    def encode(self, rows: Rows) -> Records:
        """Tokenise texts or pairs, with the tokenizer's special tokens. Rows without a label are left out.

        Raises:
            ValueError: a label is outside the set; names file and line and the allowed labels.
        """
        if rows.labels is None or rows.kind not in ("text", "pair"):
            raise ValueError(f"these rows were read as {rows.kind} without labels; classification needs text and label")
        classes = {name: index for index, name in enumerate(self.labels)}
        check_labels(rows, self.labels)
        tokens: list[np.ndarray] = []  # a list of Python's integers takes ten times the memory
        segments: list[np.ndarray] = []
        kept: list[int] = []
        classes_of_kept: list[int] = []
        for chunk in self._chunks(rows):
            labelled = [row for row in chunk if rows.labels[row] is not None]
            if not labelled:
                continue
            columns = [[column[row] for row in labelled] for column in (rows.texts, rows.seconds) if column is not None]
            encoded = self.tokenizer(*columns, truncation=True, max_length=self.max_length,
                                     return_attention_mask=False)
            tokens += [np.array(ids, np.int32) for ids in encoded["input_ids"]]
            if rows.kind == "pair":
                segments += [np.array(ids, np.uint8) for ids in encoded.get("token_type_ids", [])]
            kept += labelled
            classes_of_kept += [classes[label] for row in labelled if (label := rows.labels[row]) is not None]
        return pack(tokens, self.tokenizer.pad_token_id, labels=classes_of_kept,
                    segments=segments or None, left_out=len(rows) - len(kept),
                    units=rows.take(kept).units)

    def per_record_loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """[records] float32: cross entropy of each record."""
        return self.measure(model, batch)["loss"]

    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        logits = model(**batch.inputs()).logits.float()
        return {"loss": F.cross_entropy(logits, batch.labels, reduction="none"),
                "right": logits.argmax(-1) == batch.labels, "count": torch.ones(len(logits))}

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """accuracy and mean loss over `count` records."""
        return {"accuracy": sums["right"] / sums["count"], "loss": sums["loss"] / sums["count"],
                "count": int(sums["count"])}
