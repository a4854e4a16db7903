"""Contract tests for tasks: they run on every task that is installed."""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch

from fedlora import models, registry
from fedlora.data import Rows
from fedlora.models import LoadedModel
from fedlora.plan.found import TaskFacts, task_facts
from fedlora.tasks import Records, Task, read, task_named
from tests.federation import plan_of
from tests.tiny import KINDS

TEXTS = ["the patient reports chest pain", "a small cut", "the plot is dull and the jokes are old", "warm", "now"]

CELLS: dict[str, Callable[[str], dict[str, Any]]] = {
    "text": lambda text: {0: text},
    "pair": lambda text: {0: text, 1: text[::-1]},
    "completion": lambda text: {0: "Q: " + text, 1: text},
    "messages": lambda text: {0: [{"role": "user", "content": "Q"}, {"role": "assistant", "content": text}]},
}
"""Kind of rows → a function from a text to a row's cells, by the positions of their columns."""


@dataclass(frozen=True)
class Made:
    """A task with a tiny model that can do it."""

    key: str
    task: Task
    loaded: LoadedModel

    def rows(self, kind: int = 0, *, answered: bool = True) -> Rows:
        """Return rows of one of the kinds that the task reads. The answers are 0 and 1, which every task takes."""
        form = self.task.rows
        name, columns = form.kinds[kind]
        lines = []
        for i, text in enumerate(TEXTS):
            line = {columns[place]: cell for place, cell in CELLS[name](text).items()}
            if form.answer is not None:
                line[form.answer.column] = i % 2 if answered else None
            lines.append(json.dumps(line) + "\n")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            file.write_text("".join(lines))
            return read(file, self.key)

    def records(self) -> Records:
        return self.task.encode(self.rows())

    def losses(self, records: Records, indices, length: int) -> torch.Tensor:
        return self.task.per_record_loss(self.loaded.model, self.task.collate(records, np.asarray(indices), length))


@pytest.fixture(params=registry.keys("fedlora.tasks"))
def made(request, checkpoint) -> Made:
    return _made(request.param, checkpoint)


@functools.cache
def _made(key: str, checkpoint: Callable[[str], Path]) -> Made:
    base = next(folder for folder in map(checkpoint, KINDS) if _can_do(folder, key))
    labels = ("0", "1") if task_named(key).has_labels else ()
    loaded = models.load(base, key, len(labels))
    run: Any = SimpleNamespace(labels=labels, max_length=48)  # the fields of a plan that tasks read
    return Made(key, task_named(key).of(run, loaded.tokenizer), loaded)


def _can_do(folder: Path, key: str) -> bool:
    try:
        models.check_task(folder, key)
        return True
    except ValueError:
        return False


def test_a_task_is_called_as_its_file_and_says_in_a_line_what_it_is(made):
    assert type(made.task).name == made.key
    assert registry.titles("fedlora.tasks")[made.key] and made.task.model_is.startswith(("a ", "an "))


def test_what_plans_are_held_against_is_read_from_the_file_as_the_class_has_it(made):
    task = type(made.task)
    assert task_facts(made.key) == TaskFacts(task.model_is, task.has_labels, task.has_head)


def test_a_task_s_answers_are_never_taken_for_names_of_classes_unless_it_says_so(made):
    rows = made.rows()
    assert (rows.labels is not None) == made.task.has_labels
    assert (rows.answers is not None) == (made.task.rows.answer is not None)


def test_rows_of_each_kind_become_records_within_the_maximum_length(made):
    for kind in range(len(made.task.rows.kinds)):
        records = made.task.encode(made.rows(kind))
        assert (len(records), records.left_out) == (len(TEXTS), 0)
        assert records.lengths.min() > 0 and records.lengths.max() <= made.task.max_length


def test_a_row_without_an_answer_is_left_out_and_no_error(made):
    if made.task.rows.answer is None:
        pytest.skip("its rows themselves are the answer")
    rows, unusable = made.rows(answered=False), Counter()
    for records in (made.task.encode(rows), made.task.encode(rows, unusable)):
        assert (len(records), records.left_out) == (0, len(TEXTS))
    assert unusable.total() == len(TEXTS)
    with pytest.raises(ValueError, match=f"north.csv has no {made.task.rows.answer.column}s"):
        made.task.check_answered(rows, "north.csv", "this")


def test_what_is_no_answer_is_an_error_with_its_line_and_a_remedy_and_is_never_shown(made, tmp_path):
    answer, (_, columns) = made.task.rows.answer, made.task.rows.kinds[0]
    if answer is None:
        pytest.skip("its rows themselves are the answer")
    row, file = dict.fromkeys(columns, "a text"), tmp_path / "rows.jsonl"
    for wrong, said in ((row | {answer.column: ["secret"]}, f"rows.jsonl:1: the {answer.column} is of type list. "
                                                            f"{answer.remedy}"),
                        (row, f"there is no column {answer.column}; its columns are: {', '.join(columns)}. "
                              f"Name yours with --column {answer.column}=NAME"),
                        ({"note": "secret"}, f"rows.jsonl:1: {made.key} needs the columns {columns[0]}")):
        file.write_text(json.dumps(wrong) + "\n")
        with pytest.raises(ValueError, match=re.escape(said)) as error:
            read(file, made.key)
        assert "secret" not in str(error.value)
    file.write_text(json.dumps(row | {"said": 1}) + "\n")
    assert read(file, made.key, columns={answer.column: "said"}).answers not in (None, (None,))


def test_a_record_s_loss_depends_on_no_other_record_and_no_padding(made):
    records = made.records()
    order = [3, 1, 0, 4, 2]
    with torch.no_grad():
        together = made.losses(records, order, made.task.max_length)
        alone = torch.cat([made.losses(records, [i], int(records.lengths[i])) for i in order])
        filled = made.task.per_record_loss(made.loaded.model, made.task.collate(
            records, np.array(order), made.task.max_length, rows=8))[:len(order)]
    assert together.shape == (len(order),) and together.dtype == torch.float32
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(filled, alone, rtol=1e-4, atol=1e-5)
    assert len(set(alone.tolist())) == len(order), "this test would not see losses that are mixed up"


def test_figures_over_batches_are_those_over_one_record_at_a_time(made):
    records = made.records()
    together = made.task.evaluate(made.loaded.model, records)
    assert made.task.evaluate(made.loaded.model, records, micro_batch=1) == pytest.approx(together, rel=1e-4)
    assert together["count"] == len(TEXTS) and isinstance(together["count"], int)
    assert np.isfinite([together[made.task.metric], together["loss"]]).all()


def test_made_up_records_train_the_model_as_real_ones_do(made):
    texts = [[11, 12, 13, 14, 15], [16, 17], [18]]
    records = made.task.made_up(texts)
    assert [part.tolist() for part in np.split(records.tokens, records.offsets[1:-1])] == texts
    made.loaded.model.zero_grad()
    made.losses(records, [0, 1], 5).sum().backward()
    gradients = [parameter.grad for parameter in made.loaded.model.parameters() if parameter.grad is not None]
    assert all(bool(one.isfinite().all()) for one in gradients) and any(bool(one.any()) for one in gradients)


def test_a_head_is_a_linear_module_that_base_checkpoints_may_lack(made):
    name = made.task.head(made.loaded.model)
    assert (name is not None) == made.task.has_head
    if name is not None:
        assert isinstance(made.loaded.model.get_submodule(name), torch.nn.Linear)
    assert made.task.has_head or not made.loaded.missing


def test_peft_knows_the_type_of_what_is_exported(made):
    assert peft.TaskType(made.task.peft_type)


def test_a_plan_with_what_the_task_has_not_is_refused(made):
    labels = ("0", "1") if made.task.has_labels else ()
    plan_of("fedsvd", task=made.key, labels=labels, train_head=made.task.has_head)
    with pytest.raises(ValueError, match="labels is"):
        plan_of("fedsvd", task=made.key, labels=("0",) if labels else ("0", "1"), train_head=False)
    assert plan_of("fedsvd", task=made.key, labels=(), train_head=False).labels_open is made.task.has_labels
    if not made.task.has_head:
        with pytest.raises(ValueError, match=r"train_head is True; .* has no task head"):
            plan_of("fedsvd", task=made.key, labels=labels, train_head=True)
