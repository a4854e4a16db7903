"""What fedlora-adapter transfer writes and prints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedlora import models
from fedlora.adapters import export
from fedlora.console import messages, results, tell
from fedlora.training.precision import resolve_device

from .distilling import Student, Study
from .known_epsilon import known
from .peft_folder import TASKS, Adapter, read_any
from .prompts import Prompts, read_prompts
from .teacher import Lesson, Teacher, answered, labelled, task_of, usable
from .written import check_new, describe, hashes_of, new_folder


def transfer(adapter: Path, to: str, prompts: Path, base: str | None, column: Mapping[str, str], rank: int | None,
             alpha: float | None, targets: Sequence[str] | None, epochs: int, lr: float, batch_size: int,
             max_length: int, max_new_tokens: int, min_confidence: float, held_out: float, seed: int, device: str,
             out: Path, as_json: bool) -> int:
    """Train an adapter of another base model on what this one answers, write it, and print how far they agree.

    Args:
        adapter: the adapter's folder.
        to: the new base model.
        prompts: file with public prompts.
        base: the adapter's base model; None for the one that it names.
        column: the prompts' names of columns.
        rank: rank of the new adapter; None for the old one's.
        alpha: its scale; None for twice the rank.
        targets: layers that it adapts; None for queries and values.
        epochs: passes over the prompts.
        lr: learning rate.
        batch_size: prompts of a step.
        max_length: tokens kept of a prompt and its answer.
        max_new_tokens: most tokens of a language model's answer.
        min_confidence: how sure the teacher must be of a prompt that is used.
        held_out: share of the prompts that are not trained on.
        seed: seed of all that is drawn.
        device: where to compute.
        out: the new folder.
        as_json: print JSON instead of sentences.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: something does not fit; the message says what.
    """
    check_new(out)
    source = read_any(adapter)
    if source.config.get("task_type") not in TASKS:
        raise ValueError(f"{adapter} has the task type {source.config.get('task_type')!r}; transferred can be "
                         f"{' and '.join(TASKS)}")
    where, privacy = resolve_device(device), known([source])
    target = _found(to)
    given = read_prompts(prompts, TASKS[str(source.config["task_type"])], column)
    teacher = Teacher(source, base, max_length, where)
    lesson = _lesson(teacher, given, max_new_tokens)
    reference = models.reference(to, target)
    same = models.reference("local", teacher.base).weights_sha256 == reference.weights_sha256
    labels, kind = teacher.labels, teacher.task
    del teacher  # two models at once would need twice the memory
    loaded = models.load(target, kind, labels)
    task = task_of(loaded, labels, max_length)
    lesson = lesson.take(np.array(usable(task, labelled(lesson.rows, labels) if kind == "classification"
                                         else lesson.rows), np.int64))
    sure = lesson.take(np.flatnonzero(lesson.confidence >= min_confidence))
    taught, tested = _split(sure, held_out, seed, min_confidence, given)
    rank = rank or _rank(source)
    study = Study(rank, alpha or 2 * rank, tuple(targets or ()), epochs, lr, batch_size, seed)
    heads = {key.removeprefix("base_model.model."): source.tensor(key) for key in source.others} if same else {}
    student = Student(loaded, task, study, heads, where)
    before = student.agreement(tested)["agreement"]
    with _bar("training", epochs * len(taught)) as (console, bar, job):
        loss = student.learn(taught, lambda count: bar.advance(job, count), lambda epoch, mean: tell(
            console, f"pass {epoch} of {epochs}: loss {mean:.4f}", "training"))
    figures = student.agreement(tested)
    what = "label" if kind == "classification" else "next token"
    told = (f"On {len(tested):,} held-out prompts it gives the same {what} as {source.name} in "
            f"{figures['agreement']:.1%} of cases (95 % interval {figures['agreement/low']:.1%} to "
            f"{figures['agreement/high']:.1%}); before training {before:.1%}.")
    with new_folder(out) as made:
        student.adapted.model.to("cpu")  # type: ignore[arg-type]  # transformers annotates it for `self`
        export(student.adapted, student.values(), made, models.base_name(reference), max_length=max_length)
        describe(made, [source], how={
            "how": "transfer", "prompts": {"file": given.file, "sha256": given.sha256, "used": len(taught),
                                           "held_out": len(tested)},
            "min_confidence": min_confidence, "epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed,
            "agreement": figures, "agreement_before": before}, known=privacy, hashes=hashes_of(reference),
            told=f"`fedlora-adapter transfer` trained it on what {source.name} answers to {len(taught):,} public "
                 f"prompts ({given.file}, SHA-256 {given.sha256}), in {epochs} passes with learning rate {lr:g} and "
                 f"seed {seed}. This is post-processing: no record was read. {told}")
    if as_json:
        print(json.dumps({**figures, "agreement_before": before, "loss": loss, "trained_on": len(taught),
                          "held_out": len(tested), "left_out": len(given.rows) - len(sure), "same_base": same,
                          "privacy": privacy.to_dict()}, indent=1, allow_nan=False))
        return 0
    console = results()
    left_out = len(given.rows) - len(sure)
    console.print(f"{told} Trained on {len(taught):,} prompts"
                  + (f"; {left_out:,} were left out, because the model cannot read them or is not sure enough of them"
                     if left_out else "") + ".", soft_wrap=True, markup=False)
    console.print(f"Wrote {out}. {privacy.sentence()}", soft_wrap=True, markup=False)
    return 0


def _found(to: str) -> Path:
    try:
        return models.resolve(to)
    except ValueError as error:
        if Path(to).is_dir() or to == "minilm":
            raise
        raise ValueError(f"--to {to}: there is no such folder, and no model of this name in the hub's cache on this "
                         "machine. Name the new base model's folder") from error


def _rank(source: Adapter) -> int:
    rank = source.config.get("r")
    return rank if isinstance(rank, int) and rank > 0 else 8


def _lesson(teacher: Teacher, given: Prompts, most_new: int) -> Lesson:
    """Return what the teacher answers to those prompts that it can read."""
    rows = given.rows
    tried = labelled(rows, teacher.labels) if teacher.task == "classification" else answered(rows, ["a"] * len(rows))
    rows = rows.take(usable(teacher.encoder, tried))
    if not len(rows):
        raise ValueError(f"--prompts {given.file}: the adapter's base model can read none of its {len(given.rows):,} "
                         "rows, or none leaves room for an answer; raise --max-length, or give other prompts")
    with _bar("answers of the old model", len(rows)) as (_, bar, job):
        return teacher.teach(rows, most_new, lambda count: bar.advance(job, count))


def _split(lesson: Lesson, held_out: float, seed: int, min_confidence: float, given: Prompts) -> tuple[Lesson, Lesson]:
    """Return the prompts that are trained on, and those that are held out."""
    count = max(1, round(held_out * len(lesson)))
    if len(lesson) - count < 1:
        raise ValueError(f"--prompts {given.file}: {len(lesson)} of {len(given.rows):,} rows can be used, and at least "
                         "2 are needed" + ("; lower --min-confidence" if min_confidence else ""))
    order = torch.randperm(len(lesson), generator=torch.Generator().manual_seed(seed)).numpy()
    return lesson.take(np.sort(order[count:])), lesson.take(np.sort(order[:count]))


@contextmanager
def _bar(doing: str, total: int) -> Iterator[tuple[Console, Progress, TaskID]]:
    """Show on a terminal how much is done and how long the rest will take."""
    console = messages()
    with Progress(TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
                  TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal) as bar:
        yield console, bar, bar.add_task(doing, total=total)
