"""Each runtime check finds the fault that it is for, and stays silent where something only looks like a fault."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from torch import nn

from fedlora.privacy import RandomStream
from fedlora.records import pack
from fedlora.training import loop
from fedlora.training import trainer as trainer_module
from fedlora.training.optimizer import PerRecordOptimizer
from fedlora.training.runtime_checks import GradientCheck
from tests.families import FAMILIES
from tests.fedlora.private_training import clipped_sum, job_of, make_records, make_trainer, plan
from tests.fedlora.test_training_multi_client import make as make_clients

NOTHING = "Nothing of this round was released"


def _train(trainer, run, records, *, rate=1.0, sigma=1.0, key=1, noise=None):
    return trainer.train(job_of(
        run, records, sampling_rate=rate, noise_multiplier=sigma, clip_norm=run.clip_norm,
        sampling=RandomStream.derived(key, "a", 1, "sampling"),
        noise=None if sigma is None else noise or RandomStream.derived(key, "a", 1, "noise")))


def _alarm(trainer, run, records, said, **options):
    with pytest.raises(RuntimeError, match=said) as caught:
        _train(trainer, run, records, **options)
    assert NOTHING in str(caught.value)
    assert not trainer.buffer.armed and all(slot.parameter.grad is None for slot in trainer.buffer.slots)


def _told(trainer, run, records, said, caplog):
    """Check that the fault is in the local log, and that the round releases its result all the same."""
    result = _train(trainer, run, records)
    assert result.steps == run.local_steps and all(np.isfinite(array).all() for array in result.tensors.values())
    assert re.search(said, caplog.text)


@pytest.fixture(params=["rows", "units"])
def private(request):
    run = plan("lora", local_steps=2, clip_norm=0.1)
    trainer = make_trainer("bert", run)
    records = make_records(trainer)
    if request.param == "units":
        records = dataclasses.replace(records, units=np.array([0, 0, 0, 1, 1, 2, 2, 3]))
    return trainer, run, records


def _faulty(monkeypatch, **methods):
    """Make trainers use an optimizer with these methods from now on."""
    monkeypatch.setattr(trainer_module, "PerRecordOptimizer", type("Faulty", (PerRecordOptimizer,), methods))


# shares

def test_a_share_above_the_clip_norm_is_found(private, monkeypatch):
    def __init__(self, *given, **options):
        PerRecordOptimizer.__init__(self, *given, **options)
        self.max_grad_norm *= 1.001  # as an Opacus scheduler of the clip norm does
        self.noise_multiplier /= 1.001  # the noise stays as it was

    trainer, run, records = private
    _train(trainer, run, records)
    _faulty(monkeypatch, __init__=__init__)
    _alarm(trainer, run, records, "share of the sum is longer than the clip norm")


def test_clipping_that_leaves_out_the_head_is_found(private, monkeypatch):
    def clip_and_accumulate(self):
        rows = self.buffer.rows if self.buffer.armed else self._units
        if rows is not None:  # the head's part is hidden from the norm, and put back with its clip factor
            head = next(span for span, scale in self._groups if scale == run.head_scale)
            kept = rows[:, head].clone()
            check = self._checks.note_shares
            rows[:, head] = 0
            self._checks.note_shares = lambda rows, factors: (rows[:, head].copy_(kept), check(rows, factors))
            try:
                PerRecordOptimizer.clip_and_accumulate(self)
            finally:
                del self._checks.note_shares
        else:
            PerRecordOptimizer.clip_and_accumulate(self)

    trainer, run, records = private
    run = dataclasses.replace(run, head_scale=1.5)
    _faulty(monkeypatch, clip_and_accumulate=clip_and_accumulate)
    _alarm(trainer, run, records, "share of the sum")


def test_a_model_without_any_finite_gradient_is_told(private, caplog):
    trainer, run, records = private
    with torch.no_grad():
        trainer.adapted.model.get_input_embeddings().weight.fill_(float("nan"))
    _told(trainer, run, records, "None of the drawn records has a finite gradient", caplog)


# noise

def test_noise_that_is_drawn_while_gradients_are_computed_is_the_same(private, monkeypatch):
    def __init__(self, *given, **options):
        PerRecordOptimizer.__init__(self, *given, **options)
        assert not self.draws_ahead, "a processor that computes has no time to spare"
        self.draws_ahead = True

    trainer, run, records = private
    start, now = trainer.adapted.read("state"), _train(trainer, run, records)
    trainer.adapted.write(start)
    _faulty(monkeypatch, __init__=__init__)
    ahead = _train(trainer, run, records)
    assert all(np.array_equal(now.tensors[name], ahead.tensors[name]) for name in now.tensors)


def _without_noise(self):
    for slot in self.buffer.slots:
        slot.parameter.grad = self._sum[slot.columns].view_as(slot.parameter).float()


def _last_tensor_without_noise(self):
    PerRecordOptimizer.add_noise(self)
    slot = self.buffer.slots[-1]
    slot.parameter.grad = self._sum[slot.columns].view_as(slot.parameter).float() / dict(
        (span.start, scale) for span, scale in self._groups)[self._groups[-1][0].start]


def _scaled_twice(self):
    PerRecordOptimizer.scale_grad(self)
    PerRecordOptimizer.scale_grad(self)


def _noise_twice(self):
    PerRecordOptimizer.add_noise(self)
    first = [slot.parameter.grad for slot in self.buffer.slots]
    PerRecordOptimizer.add_noise(self)
    for slot, before in zip(self.buffer.slots, first, strict=True):
        slot.parameter.grad += before


@pytest.mark.parametrize(("methods", "said"), [
    ({"add_noise": _without_noise}, "without noise"),
    ({"add_noise": _last_tensor_without_noise}, "not the clipped sum with the drawn noise"),
    ({"add_noise": _noise_twice}, "not the clipped sum with the drawn noise"),
    ({"scale_grad": _scaled_twice}, "not the clipped sum with the drawn noise"),
    ({"scale_grad": lambda self: self.original_optimizer.zero_grad()}, "no gradient in a step")])
def test_an_applied_gradient_that_is_not_the_sum_and_the_noise_is_found(private, monkeypatch, methods, said):
    trainer, run, records = private
    _faulty(monkeypatch, **methods)
    _alarm(trainer, run, records, said)


def test_a_hook_that_changes_the_noised_gradient_is_found(private, monkeypatch):
    def __init__(self, *given, **options):
        PerRecordOptimizer.__init__(self, *given, **options)
        self.attach_step_hook(lambda optimizer: optimizer.buffer.slots[0].parameter.grad.mul_(1.0001))

    trainer, run, records = private
    _faulty(monkeypatch, __init__=__init__)
    _alarm(trainer, run, records, "not the clipped sum with the drawn noise")


@pytest.mark.parametrize("factor", [0.0, 0.8, 1.25])
def test_noise_of_another_deviation_is_found(private, monkeypatch, factor):
    class Tampered(RandomStream):
        def gaussian(self, count):
            return factor * super().gaussian(count)

    trainer, run, records = private
    _alarm(trainer, run, records, "times its intended standard deviation", noise=Tampered(b"t" * 32))

    def __init__(self, *given, **options):
        PerRecordOptimizer.__init__(self, *given, **options)
        self.noise_multiplier *= factor  # as an Opacus scheduler of the noise does

    if factor:
        other = make_trainer("bert", run)
        _faulty(monkeypatch, __init__=__init__)
        _alarm(other, run, records, "times its intended standard deviation")


def test_a_small_deviation_of_the_noise_is_found_over_the_run_and_right_noise_is_not():
    run = plan("lora", local_steps=4)
    trainer = make_trainer("bert", run)
    records = make_records(trainer)
    start = trainer.adapted.read("state")
    for key in range(25):
        trainer.adapted.write(start)
        _train(trainer, run, records, key=key, rate=0.5)
    pool = trainer.noise_pool
    assert pool.values == 100 * trainer.buffer.values
    assert abs((pool.squares / pool.values) ** 0.5 - 1) < 4 / (2 * pool.values) ** 0.5

    class Tampered(RandomStream):
        def gaussian(self, count):
            return 0.95 * super().gaussian(count)

    tampered = make_trainer("bert", run)
    rounds = 0
    with pytest.raises(RuntimeError, match="times its intended standard deviation"):
        for key in range(25):
            tampered.adapted.write(start)
            _train(tampered, run, records, rate=0.5, key=key, noise=Tampered(bytes([key]) * 32))
            rounds += 1
    assert rounds >= 1  # a single round's noise would not have shown it


# gradients

@pytest.fixture(params=[False, True], ids=["at once", "at the end"])
def reading(request, monkeypatch):
    """Have the measurements read at once, as on a CPU, or at the end of the round, as on a GPU."""
    make = GradientCheck.__init__

    def __init__(self, *given):
        make(self, *given)
        self.reads_late = request.param

    monkeypatch.setattr(GradientCheck, "__init__", __init__)


def _module_of(trainer, factor):
    """Return the name of this factor in the first adapted module, and its parameter."""
    name = next(spec.name for spec in trainer.adapted.layout.trained if spec.name.endswith(f".{factor}"))
    return name, trainer.adapted.parameter(name)


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_that_the_loss_does_not_depend_on_is_told(family, caplog):
    run = plan(family, local_steps=2)
    trainer = make_trainer("bert", run)
    factor = {"lora": "B", "lora-stack": "B", "frozen-a": "B", "flylora": "B", "dora": "B", "lora-offset": "dB",
              "bra": "R", "bat": "b", "full": "D", "randlora": "lambda"}.get(family, "e")
    name, _ = _module_of(trainer, factor)
    for module in trainer.adapted.model.get_submodule(name.rpartition(".")[0]).delta.modules():
        module.scaling = 0.0
    two = family in ("lora", "lora-stack", "lora-offset", "dora", "randlora", "salt", "row-scale-frozen-a")
    told = rf"no gradient for {2 if two else 1} of \d+ .*{name}"
    _told(trainer, run, make_records(trainer), told, caplog)
    with pytest.raises(ValueError, match=r"of the \d+ tensors .* have no influence on the loss"):
        trainer.rehearse()


@pytest.mark.usefixtures("reading")
def test_of_clients_in_lockstep_each_is_told_of_its_own_draws(caplog, monkeypatch):
    trainer, trainings = make_clients(family="frozen-a")
    name, _ = _module_of(trainer, "B")
    trainer.adapted.model.get_submodule(name.rpartition(".")[0]).delta.scaling = 0.0
    asked = []
    monkeypatch.setattr(loop, "tells", lambda records, indices, losses: asked.append(
        (records, len(indices), losses)) or len(indices) > 0)
    results = trainer.train_together(trainings)
    assert len(re.findall(r"no gradient for 1 of", caplog.text)) == len(trainings)
    drawn = [(id(one.records), count) for one, result in zip(trainings, results, strict=True)
             for count in result.drawn]
    assert sorted((id(records), count) for records, count, _ in asked) == sorted(drawn)
    assert len({losses for _, count, losses in asked if count}) == len([count for _, count in drawn if count])


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_single_tensor_without_gradient_is_told(factor, monkeypatch, caplog):
    run = plan("lora")
    trainer = make_trainer("bert", run)
    name, parameter = _module_of(trainer, factor)
    write = trainer.buffer.write
    monkeypatch.setattr(trainer.buffer, "write", lambda one, values: write(
        one, values * 0 if one is parameter else values))
    _told(trainer, run, make_records(trainer), rf"no gradient for 1 of \d+ trained tensors \({name}\)", caplog)


@pytest.mark.usefixtures("reading")
def test_a_head_without_gradient_is_told(monkeypatch, caplog):
    run = plan("frozen-a")
    trainer = make_trainer("bert", run)
    write = trainer.buffer.write
    head = {id(slot.parameter) for slot in trainer.buffer.slots if slot.group == "head"}
    monkeypatch.setattr(trainer.buffer, "write", lambda one, values: write(
        one, values * 0 if id(one) in head else values))
    _told(trainer, run, make_records(trainer), r"no gradient for 2 of \d+ .*head\.", caplog)


@pytest.mark.usefixtures("reading")
def test_a_has_no_gradient_while_b_is_zero_and_that_is_no_fault(caplog):
    run = plan("lora")
    trainer = make_trainer("bert", run)
    records = make_records(trainer)
    start = trainer.adapted.read("state")
    zero = {name: array * 0 for name, array in start.items() if name.endswith(".B")}
    trainer.adapted.write(zero)
    total = clipped_sum(trainer, run, records, range(8))
    a = {id(trainer.adapted.parameter(name)) for name in start if name.endswith(".A")}
    assert not any(total[slot.columns].any() for slot in trainer.buffer.slots if id(slot.parameter) in a)
    assert _train(trainer, run, records).steps == 1

    # after a step B is not zero any more, so a missing gradient of A is a fault
    name, parameter = _module_of(trainer, "A")
    write = trainer.buffer.write
    trainer.buffer.write = lambda one, values: write(one, values * (one is not parameter))
    trainer.adapted.write(start | zero)
    _train(trainer, run, records)
    trainer.adapted.write(start | zero)
    _told(trainer, dataclasses.replace(run, local_steps=2), records, rf"\({name}\)", caplog)


def test_adapters_under_a_head_of_zeros_have_no_gradient_and_that_is_no_fault():
    run = plan("frozen-a")
    trainer = make_trainer("bert", run)
    records = make_records(trainer)
    trainer.adapted.write({name: array * 0 for name, array in trainer.adapted.read("state").items()
                           if name.startswith("head.")})
    total = clipped_sum(trainer, run, records, range(8))
    assert not any(total[slot.columns].any() for slot in trainer.buffer.slots if slot.group == "adapter")
    assert _train(trainer, run, records).steps == 1


def test_texts_with_nothing_to_attend_to_give_queries_no_gradient_and_that_is_no_fault():
    run = plan("frozen-a")
    trainer = make_trainer("qwen2", run)
    records = pack([[11], [12], [13]], trainer.task.tokenizer.pad_token_id, labels=[0, 1, 0])
    names = {id(parameter): spec.name for spec, parameter in trainer.adapted.trained_parameters()}
    total = clipped_sum(trainer, run, records, range(3))
    queries = [slot for slot in trainer.buffer.slots if "q_proj" in names[id(slot.parameter)]]
    assert queries and all(total[slot.columns].norm() < 1e-6 * total.norm() for slot in queries)
    write = trainer.buffer.write  # no alarm either if rounding left exactly 0
    trainer.buffer.write = lambda one, values: write(
        one, values * (one not in {slot.parameter for slot in queries}))
    assert _train(trainer, run, records).steps == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "task"), [("modernbert", "classification"), ("gpt2", "causal-lm")])
def test_rounds_of_single_short_records_raise_no_alarm(kind, task, family):
    run = plan(family, task)
    trainer = make_trainer(kind, run)
    records = make_records(trainer, count=6)
    start = trainer.adapted.read("state")
    for key in range(12):
        trainer.adapted.write(start)
        _train(trainer, run, records, rate=0.15, key=key)


# frozen tensors

class _Decay(torch.optim.SGD):
    """An optimizer that also shrinks tensors that it does not own."""

    def __init__(self, parameters, lr, *, others, in_data):
        super().__init__(parameters, lr=lr)
        self.others, self.in_data = others, in_data

    def step(self, closure=None):
        for other in self.others:
            if self.in_data:
                other.data.mul_(0.999)  # hidden from PyTorch's count of writes
            else:
                with torch.no_grad():
                    other[-1:] *= 0.999  # hidden from a comparison of the first values
        return super().step(closure)


@pytest.mark.parametrize("sigma", [1.0, None])
@pytest.mark.parametrize("in_data", [False, True])
@pytest.mark.parametrize("which", ["base", "frozen"])
def test_a_frozen_tensor_that_moves_is_found(monkeypatch, which, in_data, sigma):
    run = plan("frozen-a", local_steps=2)
    trainer = make_trainer("bert", run)
    _train(trainer, run, make_records(trainer), sigma=sigma)
    shared = trainer.adapted.parameter(trainer.adapted.layout.frozen[0].name)
    base = trainer.adapted.base_layer(trainer.adapted.layout.modules[0]).weight
    monkeypatch.setattr(trainer_module, "make_optimizer", lambda key, parameters, lr: _Decay(
        parameters, lr, others=[base if which == "base" else shared], in_data=in_data))
    _alarm(trainer, run, make_records(trainer), "frozen tensors", sigma=sigma)


@pytest.mark.parametrize("sigma", [1.0, None])
def test_a_model_whose_tensors_were_replaced_after_it_was_prepared_is_found(sigma):
    run = plan("lora")
    trainer = make_trainer("bert", run)
    for leaf in trainer.adapted.trained_leaves():
        for name, parameter in list(leaf.named_parameters()):
            setattr(leaf, name, nn.Parameter(parameter.detach().clone()))
    before = trainer.adapted.read("state")
    with pytest.raises(RuntimeError, match="not the model's") as caught:
        _train(trainer, run, make_records(trainer), sigma=sigma)
    assert NOTHING in str(caught.value)
    assert all(np.array_equal(array, before[name]) for name, array in trainer.adapted.read("state").items())
