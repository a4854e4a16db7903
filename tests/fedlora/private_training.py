"""A tiny model with its trainer, a few records, and the clipped sum that the trainer forms before noise."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from fedlora.adapters import attach, automatic_targets
from fedlora.models import LoadedModel, load
from fedlora.plan import ModelRef, RunPlan
from fedlora.privacy import RandomStream
from fedlora.records import pack
from fedlora.tasks import Records, task_for
from fedlora.training import Trainer, TrainingJob
from fedlora.training.accumulation import PrivateStep
from fedlora.training.loop import take_groups
from fedlora.training.optimizer import PerRecordOptimizer
from fedlora.training.runtime_checks import GradientCheck
from fedlora.training.sampling import Draw
from fedlora.training.trainer import Alone
from tests.families import rank_of
from tests.tiny import DECODERS, ENCODERS, VOCABULARY, tiny_checkpoint

CASES = [(kind, "classification") for kind in (*ENCODERS, *DECODERS)] + [(kind, "causal-lm") for kind in DECODERS]
"""Every model type with each task that it supports."""

LENGTHS = (9, 5, 12, 7, 8, 3, 20, 11)
"""The lengths of the test records: different ones, some padded, some exactly as long as their padded length."""


def plan(family: str = "lora", task: str = "classification", **changes: object) -> RunPlan:
    values = {
        "run_id": "0" * 16, "fedlora_version": "0", "strategy": "ffa-lora", "family": family, "private": True,
        "model": ModelRef("local", "0" * 64, "0" * 64, "0" * 64), "task": task,
        "labels": ("no", "yes") if task == "classification" else (), "max_length": 32,
        "rank": rank_of(family), "alpha": 1.0 if family in ("bat", "full") else 6.0,  # they reach all of the weight
        "targets": ("any",), "train_head": task == "classification", "dropout": 0.0, "rounds": 1,
        "max_participations": 1, "local_steps": 1, "expected_batch": 4, "optimizer": "sgd", "lr": 0.1,
        "clip_norm": 0.5, "adapter_scale": 1.0, "head_scale": 0.25, "weight_by_examples": False}
    return RunPlan(**(values | changes))  # type: ignore[arg-type]


@functools.cache
def _checkpoint(kind: str) -> Path:
    return tiny_checkpoint(kind, Path(tempfile.mkdtemp(prefix="fedlora-test-")))


def loaded(kind: str, task: str) -> LoadedModel:
    return load(_checkpoint(kind), task, 2)


SPREADS = {"C": 0.03, "D": 0.03, "dA": 0.1, "dB": 0.1}
"""The standard deviations of tensors that are drawn smaller than others, by their last name."""


def make_trainer(kind: str, run: RunPlan, *, precision: str = "fp32", micro_batch: int | None = None,
                 model: LoadedModel | None = None,
                 device: str = "cpu", compiled: bool = False) -> Trainer:
    """Make a trainer whose tensors are all random and, but for a stack and changes of factors, not small.

    So no gradient is 0, and no update is so large that float32 loses digits of its gradients.
    """
    model = model or loaded(kind, run.task)
    adapted = attach(model, family=run.family, rank=run.rank, alpha=run.alpha, dropout=run.dropout,
                     targets=automatic_targets(model.model), train_head=run.train_head, options=run.family_options,
                     ranks=run.ranks)
    generator = np.random.default_rng(0)
    adapted.write({spec.name: (SPREADS.get(spec.name.rpartition(".")[2], 0.3) * generator.standard_normal(
        spec.shape)).astype(np.float32) for spec in adapted.layout.state})
    return Trainer(adapted, task_for(run, model.tokenizer), device=device, precision=precision,
                   micro_batch=micro_batch, threads=1, compiled=compiled)


@dataclass(frozen=True)
class Given:
    """Fixed streams for each purpose, the same in every round."""

    sampling: RandomStream
    noise: RandomStream | None = None

    def stream(self, round: int, purpose: str, attempt: int = 0) -> RandomStream:
        found = getattr(self, purpose)
        assert found is not None, f"nobody gave a stream for {purpose}"
        return found


def job_of(run: RunPlan, records: Records, *, sampling_rate: float, noise_multiplier: float | None, clip_norm: float,
           sampling: RandomStream, noise: RandomStream | None = None, **more) -> TrainingJob:
    """Make a training task that starts from the tensors that the model holds."""
    return TrainingJob(run, records, None, sampling_rate, noise_multiplier, clip_norm, Given(sampling, noise), **more)


def make_records(trainer: Trainer, *, count: int = len(LENGTHS), seed: int = 1,
                 lengths: Sequence[int] = LENGTHS) -> Records:
    """Make records of random tokens, which is all that a gradient needs. A language model's are half prompt."""
    generator = np.random.default_rng(seed)
    lengths = [lengths[i % len(lengths)] for i in range(count)]
    tokens = [generator.integers(10, VOCABULARY, size=n).tolist() for n in lengths]
    pad = trainer.task.tokenizer.pad_token_id
    if trainer.task.name == "classification":
        return pack(tokens, pad, labels=generator.integers(0, 2, size=count).tolist())
    return pack(tokens, pad, answers=[[0] * (n // 2) + [1] * (n - n // 2) for n in lengths])


def make_optimizer(trainer: Trainer, run: RunPlan, *, noise_multiplier: float = 1.0) -> PerRecordOptimizer:
    parameters = [slot.parameter for slot in trainer.buffer.slots]
    return PerRecordOptimizer(
        torch.optim.SGD(parameters, lr=run.lr), trainer.buffer, clip_norm=run.clip_norm,
        scales={"adapter": run.adapter_scale, "head": run.head_scale}, noise_multiplier=noise_multiplier,
        expected_batch_size=run.expected_batch, noise=RandomStream(b"n" * 32))


def clipped_sum(trainer: Trainer, run: RunPlan, records: Records, indices, owners=None) -> torch.Tensor:
    """Return the sum before noise, [values] float64, if exactly these records of these units were drawn."""
    trainer.show_batch_invariance(run)
    optimizer = make_optimizer(trainer, run)
    adapted = trainer.active
    step = PrivateStep(optimizer, GradientCheck(adapted.layout, adapted.parameters(), trainer.buffer))
    draw = Draw(np.asarray(indices, dtype=np.int64), None if owners is None else np.asarray(owners, dtype=np.int64))
    client = SimpleNamespace(step=step, losses=[], first=0)
    take_groups(Alone(trainer, private=True), [client], records, [list(draw.groups(trainer.most_rows))])
    return optimizer.clipped_sum.clone()


def per_record_rows(trainer: Trainer, records: Records, indices) -> torch.Tensor:
    """Return the gradients as the buffer holds them, [records, values], in the order of `indices`."""
    indices = np.asarray(indices, dtype=np.int64)
    rows = torch.empty(len(indices), trainer.buffer.values)
    for length, places in trainer.micro_batches(records, indices):
        trainer.buffer.arm(len(places))
        with trainer.autocast():
            losses = trainer.task.per_record_loss(trainer.adapted.model,
                                                  trainer.task.collate(records, indices[places], length))
        losses.sum().backward()
        trainer.buffer.check_complete()
        rows[places] = trainer.buffer.rows
        trainer.buffer.disarm()
    return rows


def brute_force_row(trainer: Trainer, records: Records, index: int) -> torch.Tensor:
    """Return the same gradient, [values], from plain autograd on the record alone and without padding."""
    batch = trainer.task.collate(records, np.array([index]), int(records.lengths[index]))
    loss = trainer.task.per_record_loss(trainer.adapted.model, batch).sum()
    gradients = torch.autograd.grad(loss, [slot.parameter for slot in trainer.buffer.slots])
    return torch.cat([gradient.flatten() for gradient in gradients])
