"""The model that teaches another: a base model with the adapter that is to be transferred, and what it answers."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from fedlora import models
from fedlora.data import Rows
from fedlora.memory import memory_advice
from fedlora.models import LoadedModel
from fedlora.models.reading import silent_transformers
from fedlora.tasks import Task
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.classification import Classification

from .peft_folder import TASKS, Adapter

_AT_ONCE = 8
"""Prompts that a language model answers together."""

_HEADS = ("classifier", "score")
"""Names that PEFT knows a classifier's head by."""


@dataclass(frozen=True)
class Lesson:
    """What the teacher answers.

    Attributes:
        rows: the prompts. A language model's have the answers with them, as rows to train on.
        logits: [rows, labels] a classifier's outputs, float32; None for a language model.
        confidence: [rows] how sure the teacher is: the largest probability, or the geometric mean of the probabilities
            of an answer's tokens.
    """

    rows: Rows
    logits: torch.Tensor | None
    confidence: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: np.ndarray) -> Lesson:
        """Return the prompts at these places, in their order."""
        return Lesson(self.rows.take(indices), None if self.logits is None else self.logits[indices],
                      self.confidence[indices])


class Teacher:
    """A base model with an adapter.

    Args:
        adapter: the adapter, of any type of PEFT's.
        base: its base model; None for the one that it names.
        max_length: tokens kept of a prompt and its answer.
        device: where to compute.

    Attributes:
        task: key of its task.
        labels: a classifier's labels, in the order of its outputs.
        base: the base model's folder.

    Raises:
        ValueError: the base is not on this machine, or the adapter does not fit it.
    """

    def __init__(self, adapter: Adapter, base: str | None, max_length: int, device: torch.device) -> None:
        self.base = _base(adapter, base)
        self.task = TASKS[str(adapter.config["task_type"])]
        loaded = models.load(self.base, self.task, adapter.labels or _outputs(adapter, self.base)
                             if self.task == "classification" else ())
        named = (loaded.model.config.id2label or {}) if self.task == "classification" else {}
        self.labels = adapter.labels or tuple(map(str, named.values()))
        self.encoder = task_of(loaded, self.labels, max_length)
        try:
            with silent_transformers():
                self._model: Any = PeftModel.from_pretrained(loaded.model, str(adapter.path), local_files_only=True)
        except (RuntimeError, ValueError, KeyError, ImportError) as error:
            why = " ".join(str(error).split())[:200]
            raise ValueError(f"PEFT cannot put {adapter.path} on the base model in {self.base} ({why}). Name the model "
                             "that it was trained on with --base MODEL") from error
        self._model.to(device).eval()
        self._device, self._max_length = device, max_length

    def teach(self, rows: Rows, most_new: int, done: Callable[[int], object]) -> Lesson:
        """Return what the model answers to prompts.

        Args:
            rows: the prompts; each must be one that the model can read (`usable`).
            most_new: most tokens of a language model's answer.
            done: called with the number of further prompts.

        Raises:
            MemoryError: memory ran out. The message says what helps.
        """
        if isinstance(self.encoder, Classification):
            logits = class_logits(self.encoder, self._model, labelled(rows, self.labels), self._device, done)
            return Lesson(rows, logits, logits.double().softmax(-1).amax(-1).numpy())
        answers: list[str] = []
        for start in range(0, len(rows), _AT_ONCE):
            some = rows.take(range(start, min(start + _AT_ONCE, len(rows))))
            answers += self._answers(some, most_new)
            done(len(some))
        rows = answered(rows, answers)
        kept = usable(self.encoder, rows)
        rows = rows.take(kept)
        if not len(rows):
            return Lesson(rows, None, np.empty(0))
        measured = self.encoder.measured(self._model, self.encoder.encode(rows), device=self._device)
        return Lesson(rows, None, np.exp(-measured["loss"] / measured["tokens"]))

    def _answers(self, rows: Rows, most_new: int) -> list[str]:
        """Return the likeliest continuation of each prompt, token by token."""
        tokenizer: Any = copy.copy(self.encoder.tokenizer)
        tokenizer.padding_side = "left"  # a model continues a text after its last token
        prompts = [ids[:self._max_length - 1] for ids in _prompt_tokens(tokenizer, rows)]
        batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self._device)
        length = batch["input_ids"].shape[1]
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        room = positions - length if isinstance(positions, int) else most_new
        config = copy.deepcopy(self._model.generation_config)
        config.update(do_sample=False, num_beams=1, use_cache=True, pad_token_id=tokenizer.pad_token_id,
                      max_new_tokens=max(1, min(most_new, room, self._max_length - min(map(len, prompts)))),
                      eos_token_id=tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id)
        with torch.no_grad(), silent_transformers(), memory_advice("writing", "lower --max-new-tokens"):
            found = self._model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                                         generation_config=config)
        texts: list[str] = tokenizer.batch_decode(found[:, length:], skip_special_tokens=True)
        return texts


def _base(adapter: Adapter, given: str | None) -> Path:
    name = given or adapter.base
    if not name:
        raise ValueError(f"{adapter.path} does not name its base model; name it with --base MODEL")
    try:
        return models.resolve("minilm" if name == models.MINILM_REPOSITORY else name)
    except ValueError as error:
        if given is not None and (Path(given).is_dir() or given == "minilm"):
            raise
        whose = f"--base {given}" if given is not None else f"{adapter.path} names the base model {name}"
        raise ValueError(f"{whose}: there is no such folder, and no model of this name in the hub's cache on this "
                         "machine. Name the base model's folder with --base") from error


def _outputs(adapter: Adapter, base: Path) -> int:
    """Return the number of labels of an adapter whose folder does not name them: the rows of its head, or the base's.

    The head's last layer is the one with the fewest rows.
    """
    named = {*_HEADS, *(adapter.config.get("modules_to_save") or ())}
    rows = [shape[0] for key, shape in adapter.others.items()
            if len(shape) == 2 and key.endswith(".weight") and named & set(key.split("."))]
    if rows:
        return min(rows)
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(base, local_files_only=True).num_labels)


def task_of(loaded: LoadedModel, labels: Sequence[str], max_length: int) -> Task:
    """Return the task of a loaded model, with its tokenizer.

    Raises:
        ValueError: the tokenizer does not fit the task, or records can be longer than the model's positions.
    """
    models.check_task(loaded.path, loaded.task, max_length)
    if loaded.task == "classification":
        return Classification(loaded.tokenizer, labels, max_length)
    return CausalLM(loaded.tokenizer, max_length)


def labelled(rows: Rows, labels: Sequence[str]) -> Rows:
    """Return rows for a classifier with a label each, without which they could not be encoded. No one looks at it."""
    return dataclasses.replace(rows, labels=(labels[0],) * len(rows), otherwise=None)


def answered(rows: Rows, answers: Sequence[str]) -> Rows:
    """Return a language model's prompts with their answers, as rows to train on."""
    if rows.messages is not None:
        return dataclasses.replace(rows, messages=tuple(
            (*turns, ("assistant", answer)) for turns, answer in zip(rows.messages, answers, strict=True)))
    return dataclasses.replace(rows, kind="completion", seconds=tuple(answers))


def usable(task: Task, rows: Rows) -> list[int]:
    """Return the rows of which the task makes a record."""
    def search(some: Sequence[int]) -> Iterator[int]:
        left_out = task.encode(rows.take(some)).left_out
        if not left_out:
            yield from some
        elif len(some) > 1:
            yield from search(some[:len(some) // 2])
            yield from search(some[len(some) // 2:])

    return list(search(range(len(rows)))) if len(rows) else []


@torch.no_grad()
def class_logits(task: Classification, model: torch.nn.Module, rows: Rows, device: torch.device,
                 done: Callable[[int], object] = lambda count: None) -> torch.Tensor:
    """Return a classifier's outputs for rows, [rows, labels] float32 on the CPU, in their order."""
    values = task.measured(model, task.encode(rows), device=device, done=done)
    return torch.from_numpy(np.log(np.maximum(values["probabilities"], math.exp(-80)))).float()


def _prompt_tokens(tokenizer: Any, rows: Rows) -> list[list[int]]:
    """Return the tokens of each prompt, as the record with its answer begins."""
    if rows.messages is None:
        found = [tokenizer(text)["input_ids"] for text in rows.texts]
        found = [ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids for ids in found]
    else:
        found = []
        for row, turns in enumerate(rows.messages):
            try:
                text = tokenizer.apply_chat_template(
                    [{"role": role, "content": content} for role, content in turns], tokenize=False,
                    add_generation_prompt=True)
            except Exception as error:  # a template is a program, and may raise anything
                raise ValueError(f"{rows.where(row)}: the chat template of the adapter's base model cannot write this "
                                 f"prompt ({type(error).__name__}); give prompts as text") from None
            found.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    empty = [row for row, ids in enumerate(found) if not ids]
    if empty:
        raise ValueError(f"{rows.where(empty[0])}: the prompt has no token; write at least a word")
    return found
