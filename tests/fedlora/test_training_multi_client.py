"""Clients that train in lockstep get the same result as when each trains alone."""

import dataclasses

import numpy as np
import pytest
import torch

from fedlora.privacy import RandomStream, RunStreams
from fedlora.tasks import concatenate
from fedlora.training import Trainer, TrainingJob
from fedlora.training import trainer as trainer_module
from fedlora.training.optimizer import PerRecordOptimizer
from tests.covering import covering
from tests.families import FAMILIES
from tests.fedlora.private_training import CASES, make_records, make_trainer, plan

COUNTS = (12, 5, 9)
"""The records of each client."""


def make(kind="bert", task="classification", *, family="lora", units=False, **changes):
    run = plan(family, task, **{"local_steps": 3, "optimizer": "adamw", "lr": 1e-2} | changes)
    trainer = make_trainer(kind, run)
    return trainer, [training(trainer, run, number, units) for number in range(len(COUNTS))]


def training(trainer, run, number, units=False):
    """Make one client's task, with its own records, trained tensors, sampling rate, clip norm and streams."""
    records = make_records(trainer, count=COUNTS[number], seed=number)
    if units:
        records = dataclasses.replace(records, units=np.arange(COUNTS[number]) // 3)
    generator = np.random.default_rng(number)
    own = {name: array + 0.1 * generator.standard_normal(array.shape).astype(np.float32)
           for name, array in trainer.adapted.read("trained").items()}
    return TrainingJob(run, records, trainer.adapted.read("frozen") | own, sampling_rate=(0.5, 1.0, 0.2)[number],
                    noise_multiplier=0.7 if run.private else None, clip_norm=run.clip_norm * (1 + number),
                    lr=run.lr * (1 + number), rows_per_unit=2, streams=RunStreams(f"client-{number}", 3), round=1,
                    attempt=0)


def assert_same(together, alone):
    assert (together.steps, together.drawn, together.nonfinite) == (alone.steps, alone.drawn, alone.nonfinite)
    assert together.clipped_share == alone.clipped_share
    assert together.mean_loss == pytest.approx(alone.mean_loss, rel=1e-5, nan_ok=True)
    assert together.tensors.keys() == alone.tensors.keys()
    for name, array in alone.tensors.items():
        assert together.tensors[name].dtype == array.dtype
        np.testing.assert_allclose(together.tensors[name], array, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("kind", "task", "family", "private"), covering(
    (("bert", "classification"), ("llama", "causal-lm")), FAMILIES, (True, False)))
def test_together_is_alone(kind, task, family, private):
    trainer, trainings = make(kind, task, family=family, private=private)
    together = trainer.train_together(trainings)
    for mine, one in zip(together, trainings, strict=True):
        assert_same(mine, trainer.train(one))
    moved = [max(abs(mine.tensors[name] - one.start[name]).max() for name in mine.tensors)
             for mine, one in zip(together, trainings, strict=True)]
    assert min(moved) > 1e-3, "this test would not see a step that is lost"


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_together_is_alone_for_every_model(kind, task):
    trainer, trainings = make(kind, task, optimizer="sgd", local_steps=1, lr=0.1)
    for mine, one in zip(trainer.train_together(trainings), trainings, strict=True):
        assert_same(mine, trainer.train(one))


@pytest.mark.parametrize("private", [True, False])
def test_units_of_several_records_are_drawn_and_clipped_as_alone_and_may_take_turns(private, monkeypatch):
    trainer, trainings = make(units=True, private=private)
    alone = [trainer.train(one) for one in trainings]
    monkeypatch.setattr(Trainer, "most_rows", 3)  # one unit of each client at a time
    for mine, one in zip(trainer.train_together(trainings), alone, strict=True):
        assert_same(mine, one)


def test_a_client_that_draws_nothing_makes_its_steps_of_noise():
    trainer, trainings = make()
    trainings[1] = dataclasses.replace(trainings[1], sampling_rate=1e-9)
    together = trainer.train_together(trainings)
    assert together[1].drawn == (0, 0, 0)
    for mine, one in zip(together, trainings, strict=True):
        assert_same(mine, trainer.train(one))
    nobody = [dataclasses.replace(one, sampling_rate=1e-9) for one in trainings]
    for mine, one in zip(trainer.train_together(nobody), nobody, strict=True):
        assert_same(mine, trainer.train(one))


def test_a_client_s_result_does_not_depend_on_who_trains_with_it():
    trainer, trainings = make()
    other = dataclasses.replace(trainings[1], records=make_records(trainer, count=30, seed=9), clip_norm=9.0)
    assert_same(trainer.train_together([trainings[0], other])[0], trainer.train_together(trainings)[0])


def test_in_bf16_too_up_to_its_rounding():
    run = plan("lora", optimizer="sgd", lr=0.1)
    trainer = make_trainer("bert", run, precision="bf16")
    trainings = [training(trainer, run, number) for number in range(3)]
    for mine, one in zip(trainer.train_together(trainings), trainings, strict=True):
        for name, array in trainer.train(one).tensors.items():
            np.testing.assert_allclose(mine.tensors[name], array, atol=2e-3, err_msg=name)


def test_records_are_routed_no_more_even_after_a_failure(monkeypatch):
    trainer, trainings = make()
    monkeypatch.setattr(trainer.task, "per_record_loss", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train_together(trainings)
    trainer.buffer.arm(2)
    assert {trainer.buffer.routed(parameter) for _, parameter in trainer.adapted.trained_parameters()} == {None}


def test_what_does_not_go_together_is_refused():
    trainer, (one, other, _) = make(family="frozen-a")
    longer = dataclasses.replace(other, run=dataclasses.replace(other.run, local_steps=9))
    frozen = next(spec.name for spec in trainer.adapted.layout.frozen)
    stale = dataclasses.replace(other, start=other.start | {frozen: other.start[frozen] + 1})
    for misfit in (longer, stale):
        with pytest.raises(ValueError, match="share the plan, the active tensors, their ranks and the frozen tensors"):
            trainer.train_together([one, misfit])
    trainer, trainings = make(dropout=0.1)
    with pytest.raises(ValueError, match="--dropout 0"):
        trainer.train_together(trainings)


def test_a_tensor_that_is_cut_off_from_the_loss_raises_for_many_as_for_one(monkeypatch):
    trainer, trainings = make()
    [leaf, *_] = trainer.adapted.trained_leaves()
    monkeypatch.setattr(leaf, "write", lambda inputs, gradient, sink: None)
    with pytest.raises(RuntimeError, match="no gradient reached"):
        trainer.train_together(trainings)


def test_concatenated_records_are_the_records_one_after_the_other():
    trainer, trainings = make("llama", "causal-lm")
    several = [one.records for one in trainings]
    whole = concatenate(several)
    assert len(whole) == sum(COUNTS) and whole.lengths.tolist() == [n for one in several for n in one.lengths]
    last = trainer.task.collate(several[2], np.arange(9), 32)
    same = trainer.task.collate(whole, np.arange(17, 26), 32)
    assert torch.equal(last.input_ids, same.input_ids) and torch.equal(last.labels, same.labels)


@pytest.mark.parametrize(("fault", "said"), [
    (lambda noise: 0 * noise, "standard deviation"),
    (lambda noise: 1.5 * noise, "standard deviation"),
    (lambda noise: np.nan * noise, "not the clipped sum with the drawn noise"),
])
def test_noise_that_is_not_what_it_should_be_is_found_before_the_round_is_released(fault, said, monkeypatch):
    trainer, trainings = make()
    gaussian = RandomStream.gaussian
    monkeypatch.setattr(RandomStream, "gaussian", lambda self, count: fault(gaussian(self, count)))
    with pytest.raises(RuntimeError, match=said):
        trainer.train_together(trainings)


def test_a_step_that_is_not_made_as_it_should_be_is_found_before_the_round_is_released(monkeypatch):
    def scaled_twice(self):
        PerRecordOptimizer.scale_grad(self)
        PerRecordOptimizer.scale_grad(self)

    trainer, trainings = make()
    monkeypatch.setattr(trainer_module, "PerRecordOptimizer",
                        type("Faulty", (PerRecordOptimizer,), {"scale_grad": scaled_twice}))
    with pytest.raises(RuntimeError, match="not the clipped sum with the drawn noise"):
        trainer.train_together(trainings)


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("part", [".weight", ".bias", ".A"])
def test_together_is_alone_where_a_part_of_the_tensors_trains_even_of_a_layer(part, private):
    trainer, trainings = make(private=private)
    active = tuple(spec.name for spec in trainer.adapted.layout.trained if spec.name.endswith(part))
    first = trainings[0].start
    trainings = [dataclasses.replace(one, active=active, start={
        name: one.start[name] if name in active else array for name, array in first.items()}) for one in trainings]
    for mine, one in zip(trainer.train_together(trainings), trainings, strict=True):
        assert mine.tensors.keys() == set(active)
        assert_same(mine, trainer.train(one))
    assert all(np.array_equal(array, first[name]) for name, array in trainer.adapted.read("state").items()
               if name not in active), "the others stay as they are"
