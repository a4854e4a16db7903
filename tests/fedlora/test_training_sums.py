"""A job with an encoding ends with the integers of a secure sum: the clipped sum on the grid, with rounded noise."""

import dataclasses

import numpy as np
import pytest

from fedlora.privacy import RandomStream, RunStreams
from fedlora.secure_sum.integers import Grid
from fedlora.secure_sum.packages import SUM
from fedlora.secure_sum.rounding import rounded_noise
from fedlora.training import Encoding, TrainingJob
from fedlora.training import trainer as trainer_module
from fedlora.training.optimizer import PerRecordOptimizer
from tests.families import FAMILIES
from tests.fedlora.private_training import Given, clipped_sum, make_records, make_trainer, plan

SILENT = 1e-12
"""A noise multiplier whose noise on the grid rounds to 0."""


def encoding_of(trainer, run, sigma, clip_norm=None):
    values = trainer.adapted.layout.num_trained
    grid = Grid.fitting(values, clip_norm=run.clip_norm, expected_batch=run.expected_batch, members=3, noise=1.0)
    return Encoding(grid, sigma * grid.sensitivity(values, clip_norm or run.clip_norm))


def job_of(trainer, run, records, *, sigma=SILENT, clip_norm=None, rate=1.0, key=1, **more):
    clip_norm = clip_norm or run.clip_norm
    return TrainingJob(run, records, trainer.adapted.read("state"), rate, sigma, clip_norm,
                       Given(RandomStream.derived(key, "a", 1, "sampling"), RandomStream.derived(key, "a", 1, "noise")),
                       encoding=encoding_of(trainer, run, sigma, clip_norm), **more)


def in_order(trainer, values):
    """Return [values] of the buffer's columns in the order of the tensors' names."""
    columns = {id(slot.parameter): slot.columns for slot in trainer.buffer.slots}
    own = trainer.active.parameters()
    return np.concatenate([values[columns[id(own[spec.name])]] for spec in trainer.active.layout.trained])


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_integers_are_the_clipped_sum_on_the_grid(family, units):
    run = plan(family)
    trainer = make_trainer("bert", run)
    records = make_records(trainer)
    owners = [0, 0, 0, 1, 1, 2, 2, 3] if units else None
    before = trainer.adapted.read("state")
    expected = in_order(trainer, clipped_sum(trainer, run, records, range(8), owners).numpy())
    job = job_of(trainer, run, dataclasses.replace(records, units=np.array(owners)) if units else records)
    result = trainer.train(job)
    assert result.tensors.keys() == {SUM} and result.steps == 1 and result.drawn == (4 if units else 8,)
    integers, grid = result.tensors[SUM], job.encoding.grid
    assert integers.dtype == np.int64 and np.array_equal(integers, grid.encode(expected)) and integers.any()
    assert np.abs(grid.decode(grid.wrapped(integers)) - expected).max() <= grid.step / 2
    assert all(np.array_equal(before[name], array) for name, array in trainer.adapted.read("state").items())


def test_the_order_is_that_of_the_names_where_head_and_adapter_interleave():
    run = plan("lora")
    trainer = make_trainer("roberta", run)
    names = [spec.name for spec in trainer.adapted.layout.trained]
    own = trainer.adapted.parameters()
    by_column = sorted(names, key=lambda name: next(slot.start for slot in trainer.buffer.slots
                                                    if slot.parameter is own[name]))
    assert names == sorted(names) and names != by_column, "this test would not see another order"
    records = make_records(trainer)
    integers = trainer.train(job_of(trainer, run, records)).tensors[SUM]
    step = dataclasses.replace(job_of(trainer, run, records), encoding=None)
    start, moved = trainer.adapted.read("trained"), trainer.train(step).tensors
    grid = encoding_of(trainer, run, SILENT).grid
    scales = {spec.name: run.head_scale if spec.group == "head" else run.adapter_scale
              for spec in trainer.adapted.layout.trained}
    said = np.split(grid.decode(grid.wrapped(integers)), np.cumsum([start[name].size for name in names])[:-1])
    for name, values in zip(names, said, strict=True):
        change = -run.lr / run.expected_batch / scales[name] * values.reshape(start[name].shape)
        np.testing.assert_allclose(moved[name] - start[name], change, atol=1e-6 + grid.step, err_msg=name)


def test_the_noise_is_the_rounded_noise_of_the_run_s_noise_stream():
    run = plan("lora")
    trainer = make_trainer("bert", run)
    records = make_records(trainer)
    silent = trainer.train(job_of(trainer, run, records)).tensors[SUM]
    noised = trainer.train(job_of(trainer, run, records, sigma=0.7)).tensors[SUM]
    deviation = encoding_of(trainer, run, 0.7).deviation
    assert np.array_equal(noised - silent,
                          rounded_noise(RandomStream.derived(1, "a", 1, "noise"), deviation, len(silent)))


def test_a_step_that_draws_nobody_releases_noise_alone():
    run = plan("lora")
    trainer = make_trainer("bert", run)
    result = trainer.train(job_of(trainer, run, make_records(trainer), sigma=0.7, rate=1e-9))
    assert result.drawn == (0,)
    assert np.array_equal(result.tensors[SUM], rounded_noise(
        RandomStream.derived(1, "a", 1, "noise"), encoding_of(trainer, run, 0.7).deviation,
        trainer.adapted.layout.num_trained))


def test_a_training_that_was_stopped_releases_nothing():
    run = plan("lora")
    trainer = make_trainer("bert", run)
    result = trainer.train(job_of(trainer, run, make_records(trainer)), stop=lambda: True)
    assert (result.steps, dict(result.tensors)) == (0, {})


def test_clients_in_lockstep_release_the_integers_that_each_releases_alone():
    run = plan("lora")
    trainer = make_trainer("bert", run)
    jobs = [dataclasses.replace(
        job_of(trainer, run, make_records(trainer, count=count, seed=count), sigma=0.7, rate=0.5),
        streams=RunStreams(f"client-{count}", 3)) for count in (12, 5, 9)]
    for together, job in zip(trainer.train_together(jobs), jobs, strict=True):
        alone = trainer.train(job)
        assert (together.drawn, together.clipped_share) == (alone.drawn, alone.clipped_share)
        apart = np.abs(together.tensors[SUM] - alone.tensors[SUM]).max() * job.encoding.grid.step
        assert apart < 1e-4 * run.clip_norm  # passes of other sizes are rounded in another way


@pytest.mark.parametrize("units", [False, True])
def test_a_round_of_some_tensors_and_ranks_has_their_values_alone(units):
    run = plan("lora")
    trainer = make_trainer("bert", run)
    records = make_records(trainer)
    records = dataclasses.replace(records, units=np.arange(8) // 3) if units else records
    layout = trainer.adapted.layout
    active = tuple(spec.name for spec in layout.trained if spec.name.endswith(".A"))
    prefixes = tuple((module, 1) for module in layout.modules)
    narrow = layout.narrowed(dict(prefixes)).activated(active)
    job = job_of(trainer, run, records, active=active, prefixes=prefixes)
    job = dataclasses.replace(job, start=narrow.cut(job.start))
    integers = trainer.train(job).tensors[SUM]
    assert integers.shape == (narrow.num_trained,) and 0 < narrow.num_trained < layout.num_trained
    whole = clipped_sum(trainer, run, records, range(8), records.units)  # of the tensors that the round trains
    assert np.array_equal(integers, job.encoding.grid.encode(in_order(trainer, whole.numpy())))


def test_a_smaller_clip_norm_of_the_client_keeps_the_grid_of_the_plan():
    run = plan("lora")
    trainer = make_trainer("bert", run)
    job = job_of(trainer, run, make_records(trainer), clip_norm=run.clip_norm / 10)
    grid = job.encoding.grid
    total = grid.decode(grid.wrapped(trainer.train(job).tensors[SUM]))
    assert grid.clip_norm == run.clip_norm and 0 < np.linalg.norm(total) <= 8 * run.clip_norm / 10


@pytest.mark.parametrize(("changes", "sigma"), [({"local_steps": 2}, 1.0), ({"private": False}, None)])
def test_a_sum_needs_privacy_and_one_step(changes, sigma):
    run = plan("lora")
    trainer = make_trainer("bert", run)
    job = job_of(trainer, run, make_records(trainer))
    with pytest.raises(ValueError, match="a secure sum takes the clipped and noised sum of one step"):
        dataclasses.replace(job, run=dataclasses.replace(run, **changes), noise_multiplier=sigma)


# faults

class _Quiet:
    """A stream whose noise is a multiple of what it should be."""

    def __init__(self, factor):
        self._factor, self._stream = factor, RandomStream.derived(1, "a", 1, "noise")

    def gaussian(self, count):
        return self._factor * self._stream.gaussian(count)


@pytest.mark.parametrize("factor", [0, 0.5, 1.5])
def test_noise_of_another_deviation_is_found(factor):
    run = plan("lora")
    trainer = make_trainer("bert", run)
    job = job_of(trainer, run, make_records(trainer), sigma=1.0)
    trainer.train(job)
    with pytest.raises(RuntimeError, match="times its intended standard deviation"):
        trainer.train(dataclasses.replace(job, streams=Given(job.streams.sampling, _Quiet(factor))))


def test_a_value_that_is_not_noised_is_found(monkeypatch):
    run = plan("lora")
    trainer = make_trainer("bert", run)
    encode = Grid.encode

    def with_less(grid, values):
        integers = encode(grid, values)
        integers[-1] -= 12345  # as if another value's noise had been added
        return integers

    monkeypatch.setattr(Grid, "encode", with_less)
    with pytest.raises(RuntimeError, match="not the clipped sum with the drawn noise"):
        trainer.train(job_of(trainer, run, make_records(trainer), sigma=1.0))


def test_noise_below_the_promised_multiplier_is_found():
    run = plan("lora")
    trainer = make_trainer("bert", run)
    job = job_of(trainer, run, make_records(trainer), sigma=1.0)
    with pytest.raises(RuntimeError, match="below the client's own noise multiplier"):
        trainer.train(dataclasses.replace(job, noise_multiplier=1.2))


def test_a_share_above_the_clip_norm_is_found_before_a_sum_is_released(monkeypatch):
    def __init__(self, *given, **options):
        PerRecordOptimizer.__init__(self, *given, **options)
        self.max_grad_norm *= 1.001

    run = plan("lora", clip_norm=0.1)
    trainer = make_trainer("bert", run)
    monkeypatch.setattr(trainer_module, "PerRecordOptimizer", type("Faulty", (PerRecordOptimizer,), {
        "__init__": __init__}))
    with pytest.raises(RuntimeError, match="share of the sum is longer than the clip norm"):
        trainer.train(job_of(trainer, run, make_records(trainer)))
