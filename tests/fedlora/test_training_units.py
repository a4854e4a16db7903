"""Units of several records (such as patients) are drawn, averaged and clipped as one; rows as units are unchanged."""

import dataclasses

import numpy as np
import pytest
import torch

from fedlora.privacy import RandomStream
from fedlora.training import trainer as trainer_module
from fedlora.training.gradient_buffer import row_norms
from fedlora.training.sampling import PRIVATE_LENGTHS, Draw, Sampler, micro_batches, poisson
from tests.covering import covering
from tests.families import FAMILIES, TASKS, can
from tests.fedlora.private_training import (
    brute_force_row,
    clipped_sum,
    job_of,
    make_optimizer,
    make_records,
    make_trainer,
    plan,
)
from tests.tiny import KINDS

owners = np.array([0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 3, 4])
"""Units of 3, 2, 1, 5 and 1 of the twelve records, whose lengths fall into several padded lengths."""


def _train(trainer, run, records, *, rate=0.5, sigma=1.0, key=1, **options):
    stop = options.pop("stop", lambda: False)
    return trainer.train(job_of(run, records, sampling_rate=rate, noise_multiplier=sigma, clip_norm=run.clip_norm,
                                sampling=RandomStream.derived(key, "a", 1, "sampling"),
                                noise=None if sigma is None else RandomStream.derived(key, "a", 1, "noise"),
                                **options), stop)


def _sum_of(trainer, run, records):
    return clipped_sum(trainer, run, records, range(12), owners)


@pytest.fixture(params=FAMILIES)
def patients(request):
    """Return (trainer, plan, records with units)."""
    run = plan(request.param)
    trainer = make_trainer("bert", run)
    records = make_records(trainer, count=len(owners))
    return trainer, run, dataclasses.replace(records, units=owners)


@pytest.mark.parametrize(("kind", "task", "clip_norm"), covering(KINDS, TASKS, (0.05, 0.7, 1e4), valid=can))
def test_the_sum_is_that_of_the_units_mean_gradients_each_clipped_once(kind, task, clip_norm):
    run = plan("lora", task, adapter_scale=2.0, head_scale=0.1, clip_norm=clip_norm)
    trainer = make_trainer(kind, run)
    records = make_records(trainer, count=len(owners))
    scale = torch.cat([torch.full((slot.parameter.numel(),), {"adapter": 2.0, "head": 0.1}[slot.group])
                       for slot in trainer.buffer.slots]).double()
    expected = torch.zeros(trainer.buffer.values, dtype=torch.float64)
    for unit in range(5):
        rows = [brute_force_row(trainer, records, int(i)).double() for i in np.flatnonzero(owners == unit)]
        g = torch.stack(rows).mean(0) * scale
        expected += g * min(1.0, clip_norm / g.norm().item())
    error = (_sum_of(trainer, run, records) - expected).norm() / expected.norm()
    assert error < 3e-5  # 1e-5 of it is the margin below the clip norm


def test_a_unit_uses_the_clip_norm_once_however_many_records_it_has(patients):
    trainer, _, records = patients
    run = plan(trainer.adapted.layout.family.name, clip_norm=1e-3)
    for unit in range(5):
        members = np.flatnonzero(owners == unit)
        norm = clipped_sum(trainer, run, records, members, np.zeros(len(members))).norm()
        assert 1e-3 * (1 - 2e-5) <= norm <= 1e-3


@pytest.mark.parametrize(("kind", "task"), [("bert", "classification"), ("llama", "causal-lm")])
def test_a_unit_may_be_spread_over_buckets_micro_batches_and_groups(kind, task, monkeypatch):
    run = plan("lora", task)
    trainer = make_trainer(kind, run)
    records = make_records(trainer, count=len(owners))
    lengths = [{length for length, places in trainer.micro_batches(records, np.flatnonzero(owners == unit))}
               for unit in range(5)]
    assert max(map(len, lengths)) >= 3
    expected = _sum_of(trainer, run, records)
    for micro_batch in (1, 2, 5):
        trainer.micro_batch = micro_batch
        assert (_sum_of(trainer, run, records) - expected).norm() < 1e-5 * expected.norm()
    for units_at_once in (1, 2, 4):
        monkeypatch.setattr(trainer_module, "BUFFER_BYTES", 4 * trainer.buffer.values * units_at_once)
        trainer.micro_batch = None
        assert (_sum_of(trainer, run, records) - expected).norm() < 1e-5 * expected.norm()


def test_groups_are_the_draw_in_order_and_none_is_too_large():
    draw = Draw(np.arange(100, 112), owners)
    assert len(draw) == 5 and len(Draw(np.arange(0), np.arange(0))) == 0
    np.testing.assert_allclose(draw.weights, [1 / 3] * 3 + [1 / 2] * 2 + [1] + [1 / 5] * 5 + [1])
    for most in range(1, 7):
        groups = list(draw.groups(most))
        assert max(map(len, groups)) <= most and sum(map(len, groups)) == 5
        assert np.array_equal(np.concatenate([group.indices for group in groups]), draw.indices)
        np.testing.assert_allclose(np.concatenate([group.weights for group in groups]), draw.weights)
    assert next(iter(Draw(np.arange(3)).groups(1))).indices.tolist() == [0, 1, 2]
    assert list(Draw(np.arange(0), np.arange(0)).groups(2)) == []


def test_an_empty_draw_releases_noise_alone_and_is_a_step(patients):
    trainer, run, records = patients
    start = trainer.adapted.read("trained")
    result = _train(trainer, run, records, rate=1e-12, sigma=2.0)
    assert result.drawn == (0,) and result.steps == 1 and np.isnan(result.mean_loss)
    noise = RandomStream.derived(1, "a", 1, "noise").gaussian(trainer.buffer.values)
    names = {id(parameter): spec.name for spec, parameter in trainer.adapted.trained_parameters()}
    for slot in trainer.buffer.slots:
        scale = run.head_scale if slot.group == "head" else run.adapter_scale
        moved = -run.lr * 2.0 * run.clip_norm * noise[slot.columns] / run.expected_batch / scale
        name = names[id(slot.parameter)]
        np.testing.assert_allclose((result.tensors[name] - start[name]).ravel(), moved, atol=1e-6)


def test_a_record_whose_gradient_is_not_finite_counts_as_zero_within_its_unit(patients):
    trainer, run, records = patients
    run = plan(run.family, clip_norm=1e4)
    rows = [brute_force_row(trainer, records, i).double() for i in range(len(owners))]
    token = int(records.tokens[records.offsets[1]])
    touched = [i for i in range(len(owners)) if token in records.tokens[records.offsets[i]:records.offsets[i + 1]]]
    assert 1 in touched and not {0, 1, 2} <= set(touched)
    with torch.no_grad():
        trainer.adapted.model.get_input_embeddings().weight[token] = float("nan")
    scale = torch.cat([torch.full((slot.parameter.numel(),), {"adapter": 1.0, "head": 0.25}[slot.group])
                       for slot in trainer.buffer.slots]).double()
    expected = scale * sum(rows[i] / np.sum(owners == owners[i]) for i in range(len(owners)) if i not in touched)
    torch.testing.assert_close(_sum_of(trainer, run, records), expected, rtol=1e-4, atol=1e-5)
    result = _train(trainer, run, records, rate=1.0)
    assert result.nonfinite == len(touched) and all(np.isfinite(t).all() for t in result.tensors.values())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_without_clipping_and_noise_the_private_path_is_the_non_private_one(patients, optimizer):
    trainer, _, records = patients
    run = plan(trainer.adapted.layout.family.name, local_steps=3, optimizer=optimizer, clip_norm=1e6, head_scale=1.0)
    start = trainer.adapted.read("state")
    noised = _train(trainer, run, records, sigma=1e-18, rows_per_unit=2)
    trainer.adapted.write(start)
    plain = _train(trainer, run, records, sigma=None, rows_per_unit=2)
    assert noised.drawn == plain.drawn and max(plain.drawn) <= 5
    for name, tensor in plain.tensors.items():
        assert not np.array_equal(tensor, start[name])
        np.testing.assert_allclose(noised.tensors[name], tensor, atol=2e-4 if optimizer == "adamw" else 1e-5)


def test_drawn_and_clipped_count_units_and_the_divisor_does_too(patients):
    trainer, run, records = patients
    run = plan(run.family, clip_norm=1e-3, lr=1.0)
    start = trainer.adapted.read("trained")
    total = clipped_sum(trainer, run, records, range(len(owners)), owners)
    result = _train(trainer, run, records, rate=1.0, sigma=1e-9)
    assert result.drawn == (5,) and result.clipped_share == 1.0
    names = {id(parameter): spec.name for spec, parameter in trainer.adapted.trained_parameters()}
    for slot in trainer.buffer.slots:
        scale = run.head_scale if slot.group == "head" else run.adapter_scale
        name = names[id(slot.parameter)]
        np.testing.assert_allclose((start[name] - result.tensors[name]).ravel(),
                                   total[slot.columns] / scale / run.expected_batch, atol=1e-6)


def test_stopping_within_a_unit_discards_the_unfinished_step():
    run = plan("lora", local_steps=5)
    trainer = make_trainer("bert", run, micro_batch=1)
    records = dataclasses.replace(make_records(trainer, count=len(owners)), units=owners)
    start = trainer.adapted.read("state")
    one = _train(trainer, plan("lora", local_steps=1), records, rate=1.0)
    trainer.adapted.write(start)
    asked = iter(range(10_000))
    stopped = _train(trainer, run, records, rate=1.0, stop=lambda: next(asked) > len(owners) + 3)
    assert stopped.steps == 1
    assert all(np.array_equal(stopped.tensors[name], one.tensors[name]) for name in one.tensors)


def test_units_of_one_record_each_are_rows(patients):
    trainer, run, records = patients
    rows = clipped_sum(trainer, run, records, range(12))
    assert (clipped_sum(trainer, run, records, range(12), range(12)) - rows).norm() < 1e-6 * rows.norm()
    start = trainer.adapted.read("state")
    as_rows = _train(trainer, run, dataclasses.replace(records, units=None))
    trainer.adapted.write(start)
    as_units = _train(trainer, run, dataclasses.replace(records, units=np.arange(12)), rows_per_unit=1)
    assert as_rows.drawn == as_units.drawn
    for name, tensor in as_rows.tensors.items():
        np.testing.assert_allclose(as_units.tensors[name], tensor, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_a_run_by_rows_is_bit_for_bit_the_steps_written_out(patients, micro_batch, precision):
    """A run in which each row is a unit equals the steps written out as if there were no units."""
    run = plan(patients[1].family, local_steps=4)
    trainer = make_trainer("bert", run, micro_batch=micro_batch, precision=precision)
    records = make_records(trainer, count=24)
    start = trainer.adapted.read("state")
    result = _train(trainer, run, records, rate=0.3)
    trainer.adapted.write(start)
    sampling, noise = RandomStream.derived(1, "a", 1, "sampling"), RandomStream.derived(1, "a", 1, "noise")
    buffer, drawn = trainer.buffer, []
    scales = {"adapter": run.adapter_scale, "head": run.head_scale}
    spans = [(slice(min(s.columns.start for s in group), max(s.columns.stop for s in group)), scales[group[0].group])
             for group in ([s for s in buffer.slots if s.group == name] for name in ("adapter", "head"))]
    for _ in range(run.local_steps):
        indices = poisson(24, 0.3, sampling)
        drawn.append(len(indices))
        total = torch.zeros(buffer.values, dtype=torch.float64)
        for length, part in micro_batches(records.lengths, indices, 32, trainer.shapes.rows.__getitem__,
                                          PRIVATE_LENGTHS):
            count = trainer.shapes.rows[length]
            buffer.arm(count)
            with trainer.autocast():
                losses = trainer.task.per_record_loss(trainer.adapted.model,
                                                      trainer.task.collate(records, part, length, rows=count))
            losses.sum().backward()
            rows = buffer.computed
            norms = torch.stack([scale * row_norms(rows[:, span]) for span, scale in spans]).norm(dim=0)
            factors = run.clip_norm * (1 - 1e-5) / norms.clamp(min=run.clip_norm * (1 - 1e-5))
            for row, factor in zip(rows[:len(part)], factors, strict=False):
                for span, scale in spans:
                    total[span] += float(factor * scale) * row[span].double()
            buffer.disarm()
        noised = total + 1.0 * run.clip_norm * torch.from_numpy(noise.gaussian(buffer.values))
        for span, scale in spans:
            noised[span] /= scale
        with torch.no_grad():
            for slot in buffer.slots:
                gradient = noised[slot.columns].view_as(slot.parameter).float() / run.expected_batch
                slot.parameter.add_(gradient, alpha=-run.lr)
    assert result.drawn == tuple(drawn)
    for name, tensor in trainer.adapted.read("trained").items():
        assert tensor.tobytes() == result.tensors[name].tobytes()


def test_units_cannot_be_left_open():
    trainer = make_trainer("bert", plan("lora"))
    optimizer = make_optimizer(trainer, plan("lora"))
    optimizer.open_units(2)
    with pytest.raises(AssertionError):
        optimizer.open_units(2)


def test_a_unit_gives_at_least_one_record():
    with pytest.raises(ValueError, match=r"--rows-per-unit is 0; it must be at least 1"):
        Sampler(3, np.array([0, 0, 1]), 0.5, 0, RandomStream(b"k" * 32))


def test_a_units_gradient_has_the_same_bits_whatever_the_others_are():
    trainer, run = make_trainer("bert", plan("lora")), plan("lora")
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(3, trainer.buffer.values, generator=generator)
    own[2] = -own[:2].sum(0) * (1 + 1e-6)  # the rest is mostly rounding

    def gathered(before, after):
        optimizer = make_optimizer(trainer, run)
        rows = torch.cat([torch.randn(before, own.shape[1], generator=generator), own,
                          torch.randn(after, own.shape[1], generator=generator)])
        optimizer.open_units(before + 1 + after)
        trainer.buffer.arm(len(rows))
        trainer.buffer.rows.copy_(rows)
        trainer.buffer._written = {id(slot.parameter) for slot in trainer.buffer.slots}
        optimizer.gather(np.array([*range(before), *[before] * 3, *range(before + 1, before + 1 + after)]),
                         np.array([1.0] * before + [1 / 3] * 3 + [1.0] * after))
        return optimizer._units[before]

    alone = gathered(0, 0)
    assert alone.any()
    assert all(torch.equal(gathered(before, after), alone) for before in range(6) for after in (0, 1, 5))
