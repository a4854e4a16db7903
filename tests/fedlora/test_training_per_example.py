"""Per-record gradients compared with a brute-force loop and with Opacus' hooks."""

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from torch import nn

from benchmarks.peers import plain_layers
from fedlora.adapters.leaves import Linear
from fedlora.training.gradient_buffer import GradientBuffer, row_norms
from tests.covering import covering
from tests.families import MODELS, TASKS, can
from tests.fedlora.private_training import CASES, brute_force_row, make_records, make_trainer, per_record_rows, plan
from tests.tiny import KINDS

OF_LINEAR_LEAVES = ("lora", "frozen-a", "bra")
"""Families whose leaves Opacus has hooks for."""


def _relative_errors(rows, references):
    return ((rows - references).norm(dim=1) / references.norm(dim=1)).max().item()


@pytest.mark.parametrize(("kind", "task", "family"), MODELS)
def test_every_row_is_the_gradient_of_that_record_alone(kind, task, family):
    run = plan(family, task)
    trainer = make_trainer(kind, run)
    records = make_records(trainer)
    rows = per_record_rows(trainer, records, range(len(records)))
    references = torch.stack([brute_force_row(trainer, records, i) for i in range(len(records))])
    assert references.norm(dim=1).min() > 1e-3
    assert _relative_errors(rows, references) < 1e-5
    for slot in trainer.buffer.slots:
        error = (rows[:, slot.columns] - references[:, slot.columns]).norm()
        assert error <= 1e-5 * references[:, slot.columns].norm() + 1e-7


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(("kind", "task", "family"), covering(KINDS, TASKS, OF_LINEAR_LEAVES, valid=can))
def test_every_row_is_what_opacus_hooks_compute(kind, task, family):
    run = plan(family, task)
    trainer = make_trainer(kind, run)
    records = make_records(trainer)
    indices = np.arange(len(records))
    rows = per_record_rows(trainer, records, indices)
    for layer in plain_layers(trainer.adapted):  # Opacus does not handle subclasses
        layer.train()  # Opacus records nothing in evaluation mode
    hooked = GradSampleModule(trainer.adapted.model, loss_reduction="sum", strict=False)
    for length, part in trainer.micro_batches(records, indices):
        trainer.task.per_record_loss(hooked, trainer.task.collate(records, part, length)).sum().backward()
        oracle = torch.cat([slot.parameter.grad_sample.flatten(1) for slot in trainer.buffer.slots], dim=1)
        assert _relative_errors(rows[part], oracle) < 1e-5
        hooked.zero_grad()
    hooked.remove_hooks()


def _layer(bias=True):
    layer = Linear(5, 4, bias=bias)
    layer.sink = buffer = GradientBuffer([(parameter, "adapter") for parameter in layer.parameters()])
    return layer, buffer


@pytest.mark.parametrize("shape", [(3, 5), (3, 6, 5), (3, 2, 6, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_inputs_may_have_any_number_of_positions(shape, bias):
    layer, buffer = _layer(bias)
    inputs = torch.randn(shape, requires_grad=True)
    buffer.arm(3)
    (layer(inputs) ** 2).sum().backward()
    arrived = inputs.grad.clone()
    rows = buffer.rows.clone()
    buffer.disarm()
    for i in range(3):
        layer.zero_grad()
        (layer(inputs[i]) ** 2).sum().backward()
        expected = torch.cat([p.grad.flatten() for p in layer.parameters()])
        torch.testing.assert_close(rows[i], expected, rtol=1e-5, atol=1e-5)
    inputs.grad = None
    (layer(inputs) ** 2).sum().backward()
    torch.testing.assert_close(arrived, inputs.grad)


def test_a_layer_that_is_applied_twice_adds_up():
    layer, buffer = _layer()
    inputs = torch.randn(3, 5)
    buffer.arm(3)
    (layer(inputs).sum() + layer(2 * inputs).sum()).backward()
    torch.testing.assert_close(buffer.rows[:, :20].view(3, 4, 5), (3 * inputs)[:, None].expand(3, 4, 5))


def test_an_unarmed_layer_is_a_plain_linear_layer():
    layer, _ = _layer()
    inputs = torch.randn(3, 5)
    layer(inputs).sum().backward()
    torch.testing.assert_close(layer.weight.grad, inputs.sum(0).expand(4, 5))
    torch.testing.assert_close(layer(inputs), nn.functional.linear(inputs, layer.weight, layer.bias))


def test_a_flattened_batch_is_refused():
    layer, buffer = _layer()
    buffer.arm(3)
    with pytest.raises(ValueError, match="6 rows for 3 records"):
        layer(torch.randn(6, 5)).sum().backward()


def test_a_tensor_that_no_gradient_reaches_is_noticed():
    layer, buffer = _layer()
    buffer.arm(3)
    nn.functional.linear(torch.randn(3, 5), layer.weight).sum().backward()
    with pytest.raises(RuntimeError, match="no gradient reached 2 of 2"):
        buffer.check_complete()


@pytest.mark.parametrize("values", [1, 255, 256, 1000, 3_000_000])
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e-22, 1e-30, 1e15])
def test_norms_are_right_however_many_and_however_small_the_values_are(values, size):
    """Float32's own sum of a million equal squares is 5e-4 too small, and the squares of 1e-23 are 0 in it."""
    rows = torch.stack([torch.full((values,), 0.3), torch.randn(values), torch.zeros(values)]) * size
    rows[1, 0] = 0
    expected = torch.linalg.vector_norm(rows.double(), dim=1)
    assert row_norms(rows).dtype == torch.float64
    torch.testing.assert_close(row_norms(rows), expected, rtol=1e-6, atol=0)


def test_a_row_with_large_and_vanishing_values_and_one_without_finite_ones():
    rows = torch.full((3, 1000), 1e-21)
    rows[0, 0], rows[1, 5], rows[2, 7] = 1e-8, float("inf"), float("nan")
    assert row_norms(rows)[0].item() == pytest.approx(1e-8, rel=1e-6) and not row_norms(rows)[1:].isfinite().any()


def test_a_layer_that_is_not_plain_is_refused():
    class Special(nn.Linear):
        pass

    layer = Special(2, 2)
    with pytest.raises(ValueError, match="Special"):
        Linear.of(layer)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_non_reentrant_checkpointing_gives_the_same_rows():
    run = plan("lora")
    trainer = make_trainer("bert", run)
    records = make_records(trainer)
    expected = per_record_rows(trainer, records, range(8))
    trainer.adapted.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in trainer.adapted.model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # this module's own switch; dropout stays off
    torch.testing.assert_close(per_record_rows(trainer, records, range(8)), expected)


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_bf16_rows_are_float32_and_near_those_of_float32(kind, task):
    run = plan("lora", task)
    trainer = make_trainer(kind, run)
    records = make_records(trainer)
    exact = per_record_rows(trainer, records, range(8))
    rounded = per_record_rows(make_trainer(kind, run, precision="bf16"), records, range(8))
    assert rounded.dtype == torch.float32
    assert 0 < ((rounded - exact).norm() / exact.norm()).item() < 0.1
