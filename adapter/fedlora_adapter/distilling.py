"""Training of an adapter on what another model answers to public prompts (Trans-LoRA, arXiv:2405.17258).

Trans-LoRA has a language model invent the prompts from a few of the private examples, and a discriminator that has seen
private examples choose among them. Neither is done here: the prompts are the user's, and those that the teacher is
sure of can be chosen. What remains reads no private record.

    classifier         T² KL(softmax(teacher / T) ‖ softmax(student / T)), T = 2
    language model     cross entropy of the teacher's answer, token by token, mean over the answer
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from fedlora.adapters import AdaptedModel, attach, initial_tensors
from fedlora.adapters.targets import all_targets, automatic_targets
from fedlora.figures import proportion
from fedlora.memory import memory_advice
from fedlora.models import LoadedModel
from fedlora.records import IGNORED, Records
from fedlora.tasks import Task

from .teacher import Lesson, labelled

TEMPERATURE = 2.0


@dataclass(frozen=True)
class Study:
    """How the student learns.

    Attributes:
        rank: rank of its adapter.
        alpha: its update is multiplied by alpha / rank.
        targets: ends of the names of the layers that it adapts; "all" for each of a block; () for queries and values.
        epochs: passes over the prompts.
        lr: AdamW's learning rate at the beginning; it falls to 0 in a straight line.
        batch_size: prompts of a step.
        seed: seed of the first values and of the order of the prompts.
    """

    rank: int
    alpha: float
    targets: Sequence[str]
    epochs: int
    lr: float
    batch_size: int
    seed: int


class Student:
    """A base model with a new adapter.

    Args:
        loaded: the base model.
        task: its task, with its tokenizer.
        study: how it learns.
        heads: first values of whole tensors such as a head's, by the base model's names; {} to draw them.
        device: where to compute.

    Attributes:
        adapted: the model with its adapter.

    Raises:
        ValueError: a target names no layer, or the rank exceeds a layer's side.
    """

    def __init__(self, loaded: LoadedModel, task: Task, study: Study, heads: Mapping[str, torch.Tensor],
                 device: torch.device) -> None:
        targets = tuple(study.targets) or automatic_targets(loaded.model)
        if targets == ("all",):
            targets = all_targets(loaded.model, private=False)
        self.adapted: AdaptedModel = attach(loaded, family="lora", rank=study.rank, alpha=study.alpha, targets=targets,
                                            train_head=task.has_head)
        tensors = initial_tensors(self.adapted, init="orthonormal", seed=study.seed)
        for name, tensor in heads.items():
            if tensors.get(f"head.{name}", np.empty(0)).shape == tuple(tensor.shape):
                tensors[f"head.{name}"] = tensor.float().numpy()
        self.adapted.write(tensors)
        self._model: Any = self.adapted.model.to(device)  # type: ignore[arg-type]  # transformers annotates `self`
        self._task, self._study, self._device = task, study, device

    @memory_advice("training", "lower --batch-size or --max-length, or choose a smaller --to")
    def learn(self, lesson: Lesson, done: Callable[[int], object], told: Callable[[int, float], object]) -> float:
        """Train the adapter, and return the mean loss of the last pass.

        Args:
            lesson: the teacher's answers.
            done: called after each step with the number of its prompts.
            told: called after each pass with its number, from 1, and its mean loss.

        Raises:
            ValueError: the loss is not finite.
            MemoryError: memory ran out. The message says what helps.
        """
        study, records = self._study, self._records(lesson)
        order = torch.Generator().manual_seed(study.seed)
        steps = study.epochs * -(-len(records) // study.batch_size)
        parameters = [parameter for _, parameter in self.adapted.trained_parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=study.lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        mean = 0.0
        for epoch in range(1, study.epochs + 1):
            total = 0.0
            for chosen in torch.split(torch.randperm(len(records), generator=order), study.batch_size):
                losses = self._losses(lesson, records, chosen.numpy())
                optimizer.zero_grad()
                torch.autograd.backward(losses.mean())
                optimizer.step()
                schedule.step()
                total += float(losses.detach().sum())
                done(len(chosen))
            mean = total / len(records)
            if not np.isfinite(mean):
                raise ValueError(f"the loss is {mean} in pass {epoch}; lower --lr, which is {study.lr:g}")
            told(epoch, mean)
        return mean

    def _records(self, lesson: Lesson) -> Records:
        rows = lesson.rows
        if lesson.logits is not None:
            rows = labelled(rows, self._task.labels)  # type: ignore[attr-defined]  # every classification task's
        return self._task.encode(rows)

    def _losses(self, lesson: Lesson, records: Records, chosen: np.ndarray) -> torch.Tensor:
        batch = self._task.collate(records, chosen, int(records.lengths[chosen].max()), self._device)
        if lesson.logits is None:
            return self._task.per_record_loss(self._model, batch)
        student = self._model(**batch.inputs()).logits.float() / TEMPERATURE
        teacher = lesson.logits[torch.from_numpy(chosen)].to(self._device) / TEMPERATURE
        return TEMPERATURE**2 * F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)

    @torch.no_grad()
    def agreement(self, lesson: Lesson) -> dict[str, float]:
        """Return how often the model agrees with the teacher, with the interval.

        For a classifier it is the share of prompts with the same label; for a language model the share of the answers'
        tokens that it finds, each given the teacher's tokens before it.
        """
        records = self._records(lesson)
        hits = []
        for start in range(0, len(records), 32):
            chosen = np.arange(start, min(start + 32, len(records)))
            batch = self._task.collate(records, chosen, int(records.lengths[chosen].max()), self._device)
            found = self._model(**batch.inputs()).logits.argmax(-1).cpu()
            if lesson.logits is not None:
                hits.append(found == lesson.logits[torch.from_numpy(chosen)].argmax(-1))
            else:
                wanted = batch.labels[:, 1:].cpu()
                hits.append((found[:, :-1] == wanted)[wanted != IGNORED])
        return proportion("agreement", torch.cat(hits).numpy())

    def values(self) -> dict[str, np.ndarray]:
        """Return the adapter's tensors for its export."""
        return self.adapted.read("state")
