"""Held-out records: who they are, what they add to a secure sum, and what the server can tell from it."""

import dataclasses
import math

import numpy as np
import pytest

from fedlora.privacy import RunStreams
from fedlora.records import pack
from fedlora.secure_sum.integers import Grid
from fedlora.secure_sum.packages import SUM
from fedlora.training import Encoding, TrainingJob
from fedlora.training.hold_out import mean_score, parted, scored, take
from tests.fedlora.private_training import make_records, make_trainer, plan

SILENT = 1e-12
"""A noise multiplier whose noise on the grid rounds to 0."""


def made(sizes, units=None, seed=0):
    """Return records of these lengths with random tokens, and a label each."""
    rng = np.random.default_rng(seed)
    records = pack([rng.integers(5, 90, size) for size in sizes], 0, labels=rng.integers(0, 2, len(sizes)))
    return dataclasses.replace(records, units=None if units is None else np.array(units))


def texts(records):
    """Return the tokens of each record."""
    return [records.tokens[a:b].tolist() for a, b in zip(records.offsets, records.offsets[1:], strict=False)]


def secure(task="classification", **changes):
    return plan("lora", task, **{"mechanism": "distributed-gaussian", "least_members": 3, "hold_out": 0.4, **changes})


@pytest.mark.parametrize("units", [None, [0, 0, 1, 2, 2, 2, 3, 4]])
def test_whether_a_unit_is_held_out_depends_on_its_own_content_alone(units):
    records = made([5, 7, 4, 9, 6, 8, 5, 7], units)
    whole = texts(parted(records, 0.5)[1])
    owner = list(range(8)) if units is None else units
    for gone in range(max(owner) + 1):
        left = [i for i in range(8) if owner[i] != gone]
        lost = [text for i, text in enumerate(texts(records)) if owner[i] == gone]
        assert texts(parted(take(records, np.array(left)), 0.5)[1]) == [t for t in whole if t not in lost]
    shuffled = np.random.default_rng(1).permutation(8)
    assert sorted(texts(parted(take(records, shuffled), 0.5)[1])) == sorted(whole)


def test_a_unit_is_held_out_as_a_whole_and_the_parts_make_up_all_records():
    records = made([4] * 60, np.repeat(np.arange(20), 3))
    trained, held = parted(records, 0.5)
    assert sorted(texts(trained) + texts(held)) == sorted(texts(records)) and 0 < len(held) < 60
    for part in (trained, held):
        assert (np.bincount(part.units) == 3).all()


def test_the_share_that_is_held_out_is_the_plans_and_a_larger_one_holds_out_the_same_records_too():
    records = made(np.full(4000, 6))
    held = texts(parted(records, 0.2)[1])
    assert abs(len(held) - 800) < 5 * math.sqrt(4000 * 0.2 * 0.8)
    more = {tuple(text) for text in texts(parted(records, 0.3)[1])}
    assert len(more) > len(held) and {tuple(text) for text in held} < more
    assert len(parted(records, 0.0)[1]) == 0


def job_of(trainer, run, trained, held, clip_norm=None, rate=1.0):
    values = trainer.adapted.layout.num_trained + run.counted
    clip_norm = clip_norm or run.clip_norm
    grid = Grid.fitting(values, clip_norm=run.clip_norm, expected_batch=run.expected_batch, members=3, noise=1.0)
    deviation = SILENT * grid.sensitivity(values, clip_norm)
    return TrainingJob(run, trained, trainer.adapted.read("state"), rate, SILENT, clip_norm, RunStreams("a", 3),
                       encoding=Encoding(grid, deviation), held_out=held)


@pytest.mark.parametrize(("kind", "task"), [("bert", "classification"), ("llama", "causal-lm")])
def test_the_sum_ends_with_the_scores_of_the_held_out_records(kind, task):
    run = secure(task)
    trainer = make_trainer(kind, run)
    records = make_records(trainer)
    trained, held = take(records, np.arange(4)), take(records, np.arange(4, 8))
    job = job_of(trainer, run, trained, held, clip_norm=0.25)
    integers, grid = trainer.train(job).tensors[SUM], job.encoding.grid
    assert len(integers) == trainer.adapted.layout.num_trained + 2
    scores = trainer.task.score(trainer.task.measured(trainer.adapted.model, held))
    assert ((scores >= 0) & (scores <= 1)).all()
    expected = 0.25 / math.sqrt(2) * np.array([(2 * scores - 1).sum(), 4.0])
    assert np.abs(grid.decode(grid.wrapped(integers))[-2:] - expected).max() <= grid.step
    without = trainer.train(job_of(trainer, run, trained, take(held, np.zeros(0, np.int64)))).tensors[SUM]
    plain = trainer.train(job_of(trainer, run, trained, held)).tensors[SUM]
    assert np.array_equal(without[:-2], plain[:-2]) and not without[-2:].any(), "each unit adds to one part alone"


@pytest.mark.parametrize("units", [None, [0, 0, 0, 1, 2, 2]])
def test_one_unit_moves_the_scores_by_at_most_the_clip_norm(units):
    run = secure()
    trainer = make_trainer("bert", run)
    held = dataclasses.replace(take(make_records(trainer), np.arange(6)), units=units and np.array(units))
    owner = np.arange(6) if units is None else held.units
    trained = take(held, np.zeros(0, np.int64))

    def added(some):
        return scored(job_of(trainer, run, trained, some), trainer.adapted, trainer.task)

    whole = added(held)
    for gone in range(owner.max() + 1):
        moved = np.linalg.norm(whole - added(take(held, np.flatnonzero(owner != gone))))
        assert 0 < moved <= run.clip_norm * (1 + 1e-12)


def test_clients_in_lockstep_give_the_scores_that_each_gives_alone():
    run = secure()
    trainer = make_trainer("bert", run)
    records = make_records(trainer, count=12)
    jobs = [job_of(trainer, run, take(records, own), take(records, own[:kept] + 3))
            for own, kept in ((np.arange(3), 3), (np.arange(6, 9), 2))]
    alone = [trainer.train(job).tensors[SUM] for job in jobs]
    together = [result.tensors[SUM] for result in trainer.train_together(jobs)]
    assert all(np.array_equal(a[-2:], b[-2:]) for a, b in zip(alone, together, strict=True))
    assert not np.array_equal(alone[0][-2:], alone[1][-2:])


def test_a_job_without_the_records_that_its_plan_holds_out_is_refused():
    run = secure()
    trainer = make_trainer("bert", run)
    with pytest.raises(ValueError, match=r"holds out a share of 0\.4, and the job has no held-out records"):
        job_of(trainer, run, make_records(trainer), None)


def test_the_server_finds_the_mean_score_and_how_far_it_may_be_off():
    rng, clip_norm, deviation, truth = np.random.default_rng(2), 2.0, 3.0, 0.8
    off = []
    for _ in range(300):
        counts = rng.poisson(150, 8)
        sums = [(clip_norm / math.sqrt(2) * (2 * rng.binomial(n, truth) - n) + rng.normal(0, deviation),
                 clip_norm / math.sqrt(2) * n + rng.normal(0, deviation), deviation) for n in counts]
        found = mean_score(sums, clip_norm)
        off.append((found.mean - truth) / found.error)
    assert abs(np.mean(off)) < 0.3 and 0.85 < np.std(off) < 1.15
    assert mean_score([], clip_norm) is None
    assert mean_score([(1.0, 2.0, deviation)], clip_norm) is None, "noise alone tells nothing"
    quiet, loud = (mean_score([(70.0, 100.0, 1.0)] * 3 + [(70.0, 100.0, last)], clip_norm) for last in (1.0, 30.0))
    assert quiet.mean == loud.mean and quiet.error < loud.error, "each round has its own noise"
