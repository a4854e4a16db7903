"""A record's gradient does not depend on the other records or on its place, whatever tensors a server sends."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MixtralConfig, MixtralForCausalLM

from fedlora.training import batch_invariance
from fedlora.training.batch_invariance import Findings, content_dependent
from fedlora.training.gradient_buffer import row_norms
from fedlora.training.sampling import PRIVATE_LENGTHS, lengths_up_to
from tests.fedlora.private_training import CASES, clipped_sum, make_records, make_trainer, plan

BIG = plan("lora", expected_batch=32, clip_norm=1e3)


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch):
    monkeypatch.setattr(batch_invariance, "IN_MEMORY", Findings())


def fresh(kind="bert", run=BIG, **options):
    trainer = make_trainer(kind, run, **options)
    trainer.findings = Findings()
    return trainer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "task"), CASES)
def test_what_a_record_adds_to_the_sum_is_what_it_adds_alone(kind, task, precision):
    run = plan("lora", task, expected_batch=16, clip_norm=1e3)
    trainer = make_trainer(kind, run, precision=precision)
    records = make_records(trainer, count=16)
    whole = clipped_sum(trainer, run, records, range(16))
    for left_out in (0, 7, 15):
        others = [i for i in range(16) if i != left_out]
        moved = whole - clipped_sum(trainer, run, records, others)
        torch.testing.assert_close(moved, clipped_sum(trainer, run, records, [left_out]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_no_tensors_of_a_server_have_one_record_move_the_sum_by_more_than_the_clip_norm(precision, data):
    run = plan("lora", expected_batch=32, clip_norm=1.0, head_scale=1.0)
    trainer = make_trainer("bert", run, precision=precision)
    count = data.draw(st.integers(1, 40), "records")
    records = make_records(trainer, count=count, seed=data.draw(st.integers(0, 9)))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    scales = {group: 10.0 ** data.draw(st.integers(-3, 15), group) for group in ("adapter", "head")}
    trainer.adapted.write({spec.name: (scales[spec.group] * random.standard_normal(spec.shape)).astype(np.float32)
                           for spec in trainer.adapted.layout.state})
    left_out = data.draw(st.integers(0, count - 1), "left out")
    moved = clipped_sum(trainer, run, records, range(count)) - clipped_sum(
        trainer, run, records, [i for i in range(count) if i != left_out])
    assert moved.norm() <= run.clip_norm


def test_the_check_leaves_the_tensors_as_they_were():
    trainer = fresh()
    before = trainer.adapted.read("state")
    shapes = trainer.show_batch_invariance(BIG)
    assert sorted(shapes.rows) == lengths_up_to(32, PRIVATE_LENGTHS)
    assert not shapes.one_at_a_time and not trainer.buffer.armed
    assert all(np.array_equal(array, before[name]) for name, array in trainer.adapted.read("state").items())


def spoilt(trainer, monkeypatch, spoil):
    """Return the trainer with its losses changed by `spoil`: (losses, batch) → losses."""
    loss = trainer.task.per_record_loss
    monkeypatch.setattr(trainer.task, "per_record_loss", lambda model, batch: spoil(loss(model, batch), batch))
    return trainer


@pytest.mark.parametrize(("spoil", "most"), [
    (lambda losses, batch: losses * torch.where(torch.arange(len(losses)) < 4, 1.0, 1.0 + 2e-7), 4),
    (lambda losses, batch: losses * (1 + 1e-6 * (batch.input_ids != batch.input_ids[0]).any().float()), 1),
    (lambda losses, batch: losses * (1 + 1e-6 * losses.flip(0).detach()), 1),
], ids=["by place", "by any companion", "by one companion"])
def test_shapes_in_which_a_record_depends_on_others_are_not_used(spoil, most, monkeypatch, caplog):
    trainer = spoilt(fresh(), monkeypatch, spoil)
    rows = trainer.show_batch_invariance(BIG).rows
    assert max(rows.values()) == most and f"trained {most} at a time" in caplog.text
    records = make_records(trainer, count=9)
    whole, alone = clipped_sum(trainer, BIG, records, range(9)), clipped_sum(trainer, BIG, records, [4])
    moved = whole - clipped_sum(trainer, BIG, records, [i for i in range(9) if i != 4])
    torch.testing.assert_close(moved, alone, rtol=1e-9, atol=1e-9)


def test_a_machine_that_computes_otherwise_each_time_does_not_train_privately(monkeypatch):
    turns = iter(range(10**6))
    trainer = spoilt(fresh(), monkeypatch, lambda losses, batch: losses * (1 + 1e-6 * next(turns)))
    with pytest.raises(ValueError, match="does not compute the same gradient twice"):
        trainer.show_batch_invariance(BIG)


def test_mixtures_of_experts_are_trained_one_record_at_a_time():
    small = MixtralConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
    assert "mixture of experts" in content_dependent(MixtralForCausalLM(small))
    trainer = fresh()
    assert content_dependent(trainer.adapted.model) == ""
    trainer.adapted.model.config.num_experts = 8
    shapes = trainer.show_batch_invariance(BIG)
    assert set(shapes.rows.values()) == {1} and "num_experts = 8" in shapes.one_at_a_time


def test_what_was_shown_is_remembered_under_all_that_it_depends_on(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("fedlora.training.rehearsal.show_shapes", lambda *given: (
        shown.append(given), batch_invariance.show_shapes(*given))[1])
    file = tmp_path / "shown.json"

    def check(run=BIG, **options):
        trainer = make_trainer("bert", run, **options)
        trainer.findings = Findings(file)
        return trainer.show_batch_invariance(run)

    first = check()
    assert check() == first and len(shown) == 1
    check(precision="bf16")
    check(replace(BIG, rank=2))
    check(replace(BIG, model=replace(BIG.model, weights_sha256="1" * 64)))
    check(replace(BIG, expected_batch=8))
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    check()
    assert len(shown) == 6
    monkeypatch.delenv("MKL_CBWR")
    table = json.loads(file.read_text())
    assert len(table) == 6 and check() == first and len(shown) == 6
    file.write_text(file.read_text()[:-9])
    assert check() == first and len(shown) == 7, "a damaged file costs the check again"
    assert check() == first and len(shown) == 7


def test_a_shape_that_needs_more_memory_than_there_is_fails_before_anything_is_charged(monkeypatch):
    trainer = fresh()
    trainer.show_batch_invariance(BIG)

    def exhausted(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    again = fresh()
    again.findings = trainer.findings
    monkeypatch.setattr(again.task, "per_record_loss", exhausted)
    with pytest.raises(MemoryError, match="--micro-batch"):
        again.show_batch_invariance(BIG)


def test_fillers_are_constant_and_stand_after_the_records():
    trainer = fresh()
    one, other = make_records(trainer, seed=1), make_records(trainer, seed=2)
    batches = [trainer.task.collate(records, np.array([0, 1]), 16, rows=8) for records in (one, other)]
    for tensor, same in zip(batches[0].tensors().values(), batches[1].tensors().values(), strict=True):
        assert len(tensor) == 8 and torch.equal(tensor[2:], same[2:])
    assert not torch.equal(batches[0].input_ids[:2], batches[1].input_ids[:2])
    assert batches[0].attention_mask[2:].all() and len(batches[0].input_ids[2:].unique()) == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 64), st.integers(1, 3000), st.integers(-20, 10), st.integers(0, 99))
def test_a_rows_norm_does_not_depend_on_the_number_of_rows(rows, values, exponent, seed):
    drawn = torch.randn(rows, values, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    norms = row_norms(drawn)
    for row in {0, rows // 2, rows - 1}:
        assert row_norms(drawn[row:row + 1])[0] == norms[row]


def a_key():
    trainer = fresh()
    return batch_invariance.key_of(BIG, trainer.adapted.model, {8: 4}, device=trainer.device, precision="fp32",
                                   compiled=False)


def test_the_key_is_that_of_other_processes_too():
    code = "from tests.fedlora.test_batch_invariance import a_key\nprint(a_key())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert len(told) == 64 and told == a_key()
