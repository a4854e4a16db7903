"""The part of `fedlora-client check` that needs the base model: tokens, records as it sees them, time and memory."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from rich.console import Console
from rich.padding import Padding

from fedlora import models
from fedlora.config.client import CheckConfig
from fedlora.data import Rows
from fedlora.kit import Kit
from fedlora.memory import most_used
from fedlora.models import LoadedModel
from fedlora.plan import MOST_ANNOUNCED
from fedlora.privacy import RunStreams, RunTerms, nominal_size
from fedlora.tasks import Records, Task, task_for, task_named
from fedlora.training import Trainer, TrainingJob
from fedlora.training.batch_invariance import Findings
from fedlora.training.timing import alike, seconds_of_steps

from . import check_report, row_figures
from .check_report import section
from .data_holder import check_model_named
from .installed import find_kit_model
from .paths import batch_invariance
from .trainers import make_trainer, try_out
from .usual_plan import on_model, usual_plan

STEPS = 5
"""Number of training steps. The first one is not counted: it prepares what the others use."""

ENOUGH_S = 20.0
"""Seconds after which no further step is measured."""

SHOWN = 3
"""Number of records that are shown."""

ANY_LABELS = ("0", "1")
"""Stand for the labels where they are not known, to try the model."""

WHOLE = 1 << 20
"""Number of tokens that no record has: with this limit, nothing is cut."""


class TrainingCheck:
    """The trial of a base model on the data holder's rows, and on this machine.

    Args:
        options: the options of `fedlora-client check`.
        kit: the coordinator's kit; None for a usual plan.
        rows: the rows; None if they cannot be read.
        labels: the label set as far as it is known.
        terms: the terms of the kit's or the usual run; None without privacy, or if they cannot be kept.
        console: where the report is printed.
    """

    def __init__(self, options: CheckConfig, kit: Kit | None, rows: Rows | None, labels: Sequence[str],
                 terms: RunTerms | None, console: Console) -> None:
        self._options, self._kit, self._terms, self._console = options, kit, terms, console
        self._maybe_rows = rows
        plan = usual_plan(options) if kit is None else kit.plan
        if task_named(plan.task).has_labels and not plan.labels:
            known = tuple(labels) if 2 <= len(labels) <= MOST_ANNOUNCED else ANY_LABELS
            plan = dataclasses.replace(plan, labels=known)
        self._plan = plan

    @property
    def _rows(self) -> Rows:
        assert self._maybe_rows is not None, "the caller goes on only with rows"
        return self._maybe_rows

    def find(self) -> str:
        """Find the base model, and check that it fits the task.

        Raises:
            ValueError: it is not here, or does not fit.
            Refused: this FedLoRA cannot do what the kit says; the log says why.
        """
        options, plan = self._options, self._plan
        check_model_named(options)
        if self._kit is not None:
            self._path = find_kit_model(options, plan, self._maybe_rows.kind if self._maybe_rows is not None else "")
            return f"{plan.model.title}; weights, configuration and tokenizer are the kit's"
        assert options.model is not None, "the caller has asked"
        self._path = models.resolve(options.model, allow_download=options.allow_download)
        models.check_task(self._path, plan.task, plan.max_length)
        self._plan = dataclasses.replace(plan, model=models.reference(options.model, self._path))
        return f"{self._plan.model.title} in {self._path}"

    def load(self) -> str:
        """Load the base model.

        Raises:
            ValueError: it cannot be loaded.
            MemoryError: the memory does not suffice.
        """
        self._loaded: LoadedModel = models.load(self._path, self._plan.task, self._plan.labels)
        if self._kit is None:
            self._plan = on_model(self._plan, self._loaded)
        self._task: Task = task_for(self._plan, self._loaded.tokenizer)
        return ""

    def encode(self) -> str:
        """Tokenise the rows, and show their lengths and, on a terminal, a few records.

        Raises:
            ValueError: no row can be trained on, or the tokenizer cannot write the rows.
        """
        plan, rows = self._plan, self._rows
        whole = task_for(dataclasses.replace(plan, max_length=WHOLE), self._loaded.tokenizer).encode(rows, Counter())
        left_out: Counter[str] = Counter()
        self._records: Records = self._task.encode(rows, left_out)
        if len(whole):
            section(self._console, f"Tokens, of which the run keeps {plan.max_length}", check_report.tokens(
                row_figures.lengths(whole.lengths, plan.max_length), len(whole), left_out))
        if not len(self._records):
            raise ValueError("no row can be trained on: every row lacks a label, or an answer within --max-length")
        if self._options.records and self._console.is_terminal:
            self._show(rows)
        elif self._options.records:
            self._console.print("\nRecords, and labels that are not declared, are shown on a terminal alone.")
        return ""

    def _show(self, rows: Rows) -> None:
        self._console.print(f"\n{SHOWN} records as the model sees them", style="bold")
        found = 0
        for row in np.random.default_rng(0).permutation(len(rows)).tolist():
            records = self._task.encode(rows.take([row]), Counter())
            if not len(records):
                continue
            label = f", label {self._plan.labels[records.labels[0]]}" if records.labels is not None else ""
            self._console.print(f"  {rows.where(row)}{label}, {records.lengths[0]:,} tokens", soft_wrap=True)
            self._console.print(Padding(check_report.as_seen(self._task, records), (0, 0, 0, 4)))
            if (found := found + 1) == SHOWN:
                break

    def measure(self) -> str:
        """Train a few steps on made-up records as long as the rows, and show time and memory.

        Raises:
            ValueError: the model or this machine cannot train as the plan says, or the training failed.
            MemoryError: the memory does not suffice; the message names the options that help.
            Refused: the kit's plan does not fit the model; the log says why.
        """
        plan = self._plan
        try:
            with self._console.status("training on made-up records"):
                trainer, steps = self._train()
        except RuntimeError as error:  # a check at run time, or a layer of the model, found a fault
            raise ValueError(f"training on made-up records failed ({type(error).__name__}: {error}). Choose another "
                             "--model, --device or --precision, or report it") from error
        on_gpu = trainer.device.type == "cuda"
        section(self._console, f"This machine ({trainer.device}, {trainer.precision}), with made-up records as long as "
                               "yours", [
            *check_report.time_of(steps, plan.local_steps, plan.max_participations),
            check_report.memory(plan.expected_batch, most_used(trainer.device), _memory_of(trainer.device),
                                "the GPU" if on_gpu else "this process")])
        return ""

    def _train(self) -> tuple[Trainer, list[float]]:
        """Return the trainer, and the seconds of the steps that count."""
        options, plan, terms = self._options, self._plan, self._terms
        trainer = make_trainer(options, plan, self._loaded, self._task, Findings(batch_invariance(), writes=False))
        try_out(trainer, plan, 1 if self._records.units is None else options.rows_per_unit)
        records = alike(self._records, trainer)
        rate = terms.sampling_rate if terms else min(1.0, plan.expected_batch / (
            options.declared_size or nominal_size(records.units_count)))
        noise = terms.noise_multiplier if terms else 1.0
        job = TrainingJob(plan, records, None, sampling_rate=rate, noise_multiplier=noise if plan.private else None,
                          clip_norm=plan.clip_norm, streams=RunStreams("check", 0), rows_per_unit=options.rows_per_unit)
        return trainer, seconds_of_steps(trainer, job, STEPS, enough_s=ENOUGH_S)[1:]


def _memory_of(device: torch.device) -> int | None:
    """Return the bytes of memory of a GPU, or else of this machine; None if the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
