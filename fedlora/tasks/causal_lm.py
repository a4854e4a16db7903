"""Language modelling: continue a text. A record's loss is the mean over its own answer tokens.

The loss of a record does not depend on the other records of its batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from typing_extensions import override

from fedlora.data import RowFormat, Rows
from fedlora.data.rows import Message
from fedlora.figures import perplexity, proportion
from fedlora.records import IGNORED, Batch, Records, pack
from fedlora.task import Task
from fedlora.tasks._conversations import written


class CausalLM(Task):
    """The task of learning whole texts, completions of prompts, or the assistant's turns of conversations."""

    name = "causal-lm"
    model_is = "a causal language model"
    has_labels = False
    has_head = False
    rows = RowFormat((("messages", ("messages",)), ("completion", ("prompt", "completion")), ("text", ("text",))))
    auto_class = AutoModelForCausalLM
    model_types = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    metric = "perplexity"
    peft_type = "CAUSAL_LM"
    scored_by = "token_probability"

    @classmethod
    @override
    def why_not(cls, model_type: str, *, encoder: bool) -> str:
        return (f"is an encoder (model type {model_type}): it cannot be a causal language model. Choose --task "
                "classification, or a decoder such as Llama, Qwen2 or GPT-2.") if encoder else ""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        super().__init__(tokenizer, max_length)
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-text token, so a model would never learn to stop. "
                             "Choose a model made for text generation")

    @override
    def encode(self, rows: Rows, unusable: Counter[str] | None = None) -> Records:
        """Tokenise rows, append the end-of-text token, and cut on the right.

        Rows that have no answer token left are left out.
        """
        tokens: list[np.ndarray] = []  # a list of Python's integers takes ten times the memory
        answers: list[np.ndarray] = []
        kept: list[int] = []
        if rows.messages is not None:
            self._check_conversations()

        def tokenize(some: Sequence[int]) -> list[tuple[list[int], list[int]]]:
            texts = [rows.texts[row] for row in some]
            if rows.messages is not None:
                return [self._conversation(rows.messages[row], rows.where(row)) for row in some]
            if rows.seconds is None:
                return [(ids := self._ended(one), [1] * len(ids)) for one in self._tokenize(texts, special=True)]
            prompts = self._tokenize(texts, special=True)
            completions = self._tokenize([rows.seconds[row] for row in some], special=False)
            return [self._completion(*both) for both in zip(prompts, completions, strict=True)]

        for chunk in self._chunks(rows):
            for row, (ids, learned) in self._each(chunk, tokenize, unusable):
                ids, learned = ids[:self.max_length], learned[:self.max_length]
                if any(learned[1:]):  # the first token cannot be predicted, because nothing comes before it
                    tokens.append(np.array(ids, np.int32))
                    answers.append(np.array(learned, np.uint8))
                    kept.append(row)
                elif unusable is not None:
                    unusable["no answer within the run's maximum length"] += 1
        return pack(tokens, self.tokenizer.pad_token_id, answers=answers, left_out=len(rows) - len(tokens),
                    units=rows.take(kept).units)

    def _tokenize(self, texts: list[str], *, special: bool) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=special, truncation=True, max_length=self.max_length,
            return_attention_mask=False, return_token_type_ids=False)["input_ids"]
        return ids

    def _ended(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if ids and ids[-1] == end else [*ids, end]

    def _completion(self, prompt: list[int], completion: list[int]) -> tuple[list[int], list[int]]:
        if prompt and prompt[-1] == self.tokenizer.eos_token_id:
            prompt = prompt[:-1]  # some tokenizers end every text
        completion = self._ended(completion)
        return prompt + completion, [0] * len(prompt) + [1] * len(completion)

    def _check_conversations(self) -> None:
        """Check that the tokenizer can write conversations.

        Raises:
            ValueError: it has no chat template, or cannot map tokens to characters.
        """
        why = ("has no chat template" if not self.tokenizer.chat_template
               else "" if self.tokenizer.is_fast else "cannot tell which characters a token stands for")
        if why:
            raise ValueError(f"the tokenizer {why}, but the rows hold messages. Give prompt and completion instead of "
                             "messages, or choose a model made for conversations")

    def _conversation(self, messages: tuple[Message, ...], where: str) -> tuple[list[int], list[int]]:
        """Tokenise a conversation as its chat template writes it.

        Returns:
            The token ids; and for each token 1 if it belongs to an assistant's turn or the turn's end mark, else 0.
        """
        text, spans = written(self.tokenizer, messages, where)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        learned = [int(any(start <= begin < stop for start, stop in spans))
                   for begin, _ in encoded["offset_mapping"]]
        ids = list(encoded["input_ids"])
        if self.tokenizer.eos_token not in text and messages[-1][0] == "assistant":
            ids, learned = self._ended(ids), [*learned, 1]
        return ids, learned

    @override
    def made_up(self, tokens: Sequence[Sequence[int]]) -> Records:
        """Return one record for each sequence of tokens. All tokens except the first are answer tokens."""
        return pack(tokens, self.tokenizer.pad_token_id, answers=[[0] + [1] * (len(one) - 1) for one in tokens])

    @property
    @override
    def outputs_per_token(self) -> int:
        """The size of the vocabulary."""
        return len(self.tokenizer)

    @override
    def per_record_loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean cross entropy over each record's own answer tokens, [records] float32."""
        losses, counts = _token_losses(model(**batch.inputs()).logits, batch)
        return losses / counts

    @override
    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        inputs = batch.inputs()
        logits = model(**inputs).logits
        losses, counts = _token_losses(logits, batch)
        targets = batch.labels[:, 1:]
        wrong = (targets != IGNORED) & (logits[:, :-1].argmax(-1) != targets)
        return {"loss": losses, "tokens": counts, "exact": ~wrong.any(1),
                "prompted": counts < inputs["attention_mask"].sum(1) - 1}

    @override
    def score(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the geometric mean of the probabilities of each record's answer tokens."""
        probability: np.ndarray = np.exp(-values["loss"] / values["tokens"])
        return probability

    @override
    def summarize(self, values: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Return the perplexity with its interval, the exact match, the mean loss per answer token, and the count.

        The exact match is the share of answers of which the model finds every token, each given the right ones before
        it; greedy generation then writes the same answer. It is left out where records have no prompt.
        """
        figures = perplexity(values["loss"], values["tokens"])
        prompted = values["prompted"] > 0
        if prompted.any():
            figures |= proportion("exact_match", values["exact"][prompted] > 0)
        return {**figures, "loss": float(values["loss"].sum() / values["tokens"].sum()), "count": len(values["loss"])}


def _token_losses(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each record the sum of its answer tokens' losses, and their number: [records] float32 each.

    The loss of every token is computed, so that no shape depends on how many answer tokens a batch has. With such a
    shape, the host would have to wait for the GPU, and the rounding of a record could depend on other records.

    Args:
        logits: [records, tokens, vocabulary] the model's outputs.
        batch: the records.
    """
    targets = batch.labels[:, 1:]
    answer = targets != IGNORED
    losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED,
                             reduction="none").view_as(targets)
    return losses.sum(1), answer.sum(1).float()


TASK = CausalLM
