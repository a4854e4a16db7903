"""Starts from noised gradients: clients release sketches of the gradient, which reveal its singular vectors."""

import dataclasses

import numpy as np
import pytest
import torch

from fedlora import models
from fedlora.adapters import attach_planned, initial_tensors
from fedlora.adapters.family import Bases
from fedlora.adapters.sketches import PLAIN_STEP, private_start, sketch_layout, sketch_plan, sketch_tensors
from fedlora.adapters.starts.lora_sb import LoraSB
from fedlora.data import Rows
from fedlora.plan import ModelRef, RunPlan
from fedlora.privacy import RandomStream
from fedlora.tasks import task_for
from fedlora.training import Trainer
from fedlora_strategies.private_start import PrivateStart
from tests.fedlora.private_training import job_of

RANK = 3


def rows(count=24):
    rng = np.random.default_rng(0)
    texts = tuple(" ".join(rng.choice(["good", "bad", "the", "film", "was", "day"], 5)) for _ in range(count))
    labels = tuple(str(i % 2) for i in range(count))
    return Rows("text", texts, None, None, labels, ("rows.jsonl",), np.zeros(count, np.int64), np.arange(1, count + 1))


def case(checkpoint, family, strategy, **changes):
    loaded = models.load(checkpoint("bert"), "classification", 2)
    plan = RunPlan(**{
        "run_id": "ab" * 8, "fedlora_version": "0.1.0", "strategy": strategy, "family": family, "private": True,
        "model": ModelRef("local", "a" * 64, "b" * 64, "c" * 64), "task": "classification", "labels": ("0", "1"),
        "max_length": 16, "rank": RANK, "alpha": 2.0, "targets": ("query", "value"), "train_head": True,
        "dropout": 0.0, "rounds": 3, "max_participations": 2, "local_steps": 1, "expected_batch": 24,
        "optimizer": "adamw", "lr": 0.1, "clip_norm": 0.5, "adapter_scale": 1.0, "head_scale": 1.0,
        "weight_by_examples": False, "private_start": True} | changes)
    adapted = attach_planned(loaded, plan)
    return plan, adapted, initial_tensors(adapted, init="orthonormal", seed=3)


def released(checkpoint, plan, layout, tensors, noise=1e-9):
    """Return how far the release's steps move the factors, with hardly any noise; and the records."""
    own = sketch_plan(plan)
    loaded = models.load(checkpoint("bert"), "classification", 2)
    adapted = attach_planned(loaded, own)
    assert adapted.layout == layout
    task = task_for(own, loaded.tokenizer)
    records = task.encode(rows())
    adapted.write(tensors)
    result = Trainer(adapted, task, device="cpu", precision="fp32").train(job_of(
        own, records, sampling_rate=1.0, noise_multiplier=noise, clip_norm=own.clip_norm,
        sampling=RandomStream.derived(0, "a", 0, "sampling"), noise=RandomStream.derived(0, "a", 0, "noise")))
    return {name: array.astype(np.float64) - tensors[name] for name, array in result.tensors.items()}, task, records


@pytest.mark.parametrize(("family", "strategy"), [("bra", "fed-sb"), ("frozen-a", "ffa-lora"), ("lora", "fedavg-lora")])
def test_the_release_is_the_mean_of_each_records_normalised_sketches_at_the_base_model(checkpoint, family, strategy):
    plan, adapted, state = case(checkpoint, family, strategy)
    layout = sketch_layout(plan, adapted.layout, adapted.missing)
    tensors = sketch_tensors(layout, state, seed=5)
    moved, task, records = released(checkpoint, plan, layout, tensors)
    base = models.load(checkpoint("bert"), "classification", 2).model
    with torch.no_grad():
        for name in adapted.missing:
            base.get_parameter(name).copy_(torch.from_numpy(state[f"head.{name}"]))
    weights = [base.get_submodule(module).weight for module in layout.modules]
    expected = {spec.name: np.zeros(spec.shape) for spec in layout.trained}
    for i in range(len(records)):
        batch = task.collate(records, np.array([i]), int(records.lengths[i]))
        gradients = torch.autograd.grad(task.per_record_loss(base, batch).sum(), weights)
        sketches = {}
        for module, gradient in zip(layout.modules, gradients, strict=True):
            G, Q, P = gradient.double().numpy(), tensors[f"{module}.B"], tensors[f"{module}.A"]
            np.testing.assert_allclose(P @ P.T, np.eye(RANK), atol=1e-5)
            np.testing.assert_allclose(Q.T @ Q, np.eye(RANK), atol=1e-5)
            sketches |= {f"{module}.A": Q.T @ G, f"{module}.B": G @ P.T}
        norm = np.sqrt(sum((sketch**2).sum() for sketch in sketches.values()))
        for name, sketch in sketches.items():
            expected[name] += sketch / norm / len(records)
    largest = max(np.abs(array).max() for array in expected.values())
    for name, array in expected.items():
        np.testing.assert_allclose(-moved[name] / 1e-2, array, atol=2e-3 * largest, err_msg=name)


def test_a_second_step_releases_the_same_sketches(checkpoint):
    plan, adapted, state = case(checkpoint, "bra", "fed-sb")
    layout = sketch_layout(plan, adapted.layout, adapted.missing)
    tensors = sketch_tensors(layout, state, seed=5)
    one, _, _ = released(checkpoint, plan, layout, tensors)
    two, _, _ = released(checkpoint, dataclasses.replace(plan, local_steps=2), layout, tensors)
    for name in one:
        np.testing.assert_allclose(two[name], 2 * one[name], atol=0.02 * np.abs(one[name]).max())


@pytest.mark.parametrize(("family", "strategy"), [("bra", "fed-sb"), ("frozen-a", "ffa-lora")])
def test_the_start_spans_a_gradient_of_low_rank_and_moves_nothing_yet(checkpoint, family, strategy):
    plan, adapted, state = case(checkpoint, family, strategy)
    layout = sketch_layout(plan, adapted.layout, adapted.missing)
    drawn, rng, sketches, gradients = sketch_tensors(layout, state, seed=5), np.random.default_rng(1), {}, {}
    for module in layout.modules:
        d_out, d_in = drawn[f"{module}.B"].shape[0], drawn[f"{module}.A"].shape[1]
        G = gradients[module] = rng.standard_normal((d_out, RANK - 1)) @ rng.standard_normal((RANK - 1, d_in))
        sketches |= {f"{module}.A": drawn[f"{module}.B"].T @ G, f"{module}.B": G @ drawn[f"{module}.A"].T}
    start = private_start(plan, adapted.layout, "dp", state, 3, sketches)
    adapted.layout.check(start, "state")
    for module, G in gradients.items():
        A, B = start[f"{module}.A"], start[f"{module}.B"]
        np.testing.assert_allclose(A @ A.T, np.eye(RANK), atol=1e-5)
        caught = G @ A.T
        if family == "bra":
            np.testing.assert_allclose(B.T @ B, np.eye(RANK), atol=1e-5)
            assert not start[f"{module}.R"].any()
            caught = B.T @ caught
        else:
            assert not B.any()
        assert np.linalg.norm(caught) == pytest.approx(np.linalg.norm(G), rel=1e-4)
    for name in (name for name in state if name.startswith("head.")):
        np.testing.assert_array_equal(start[name], state[name])


def test_such_a_start_needs_something_to_start(checkpoint):
    with pytest.raises(ValueError, match="private_start"):
        case(checkpoint, "frozen-a", "ffa-lora", targets=())


def gradients_of(checkpoint, adapted, task, records, state):
    """Return the gradient of the records' mean loss with respect to each adapted weight of the base model."""
    base = models.load(checkpoint("bert"), "classification", 2).model
    with torch.no_grad():
        for name in adapted.missing:
            base.get_parameter(name).copy_(torch.from_numpy(state[f"head.{name}"]))
    weights = [base.get_submodule(module).weight for module in adapted.layout.modules]
    batch = task.collate(records, np.arange(len(records)), int(records.lengths.max()))
    found = torch.autograd.grad(task.per_record_loss(base, batch).mean(), weights)
    return dict(zip(adapted.layout.modules, found, strict=True))


def test_without_privacy_the_same_steps_send_the_sketches_of_the_mean_gradient(checkpoint):
    plan, adapted, state = case(checkpoint, "bra", "fed-sb", private=False)
    layout = sketch_layout(plan, adapted.layout, adapted.missing)
    tensors = sketch_tensors(layout, state, seed=5)
    moved, task, records = released(checkpoint, plan, layout, tensors, noise=None)
    for module, gradient in gradients_of(checkpoint, adapted, task, records, state).items():
        G, Q, P = gradient.double().numpy(), tensors[f"{module}.B"], tensors[f"{module}.A"]
        for factor, sketch in (("A", Q.T @ G), ("B", G @ P.T)):
            np.testing.assert_allclose(-moved[f"{module}.{factor}"] / PLAIN_STEP, sketch,
                                       atol=2e-3 * np.abs(sketch).max())


@pytest.mark.parametrize(("init", "family"), [
    ("lora-ga-clients", "lora-offset"), ("lora-sb-clients", "lora-offset"), ("lora-sb-clients", "salt")])
def test_whole_gradients_give_the_start_that_public_rows_would_give_if_they_were_the_clients(checkpoint, init, family):
    plan, adapted, state = case(checkpoint, family, family, private=False, whole_gradients=True,
                                ranks=(("bert.encoder.layer.0.attention.self.query", 2),))
    layout = sketch_layout(plan, adapted.layout, adapted.missing)
    tensors = sketch_tensors(layout, state, seed=5)
    moved, task, records = released(checkpoint, plan, layout, tensors, noise=None)
    gradients = gradients_of(checkpoint, adapted, task, records, state)
    for module, G in gradients.items():
        np.testing.assert_allclose(-moved[f"{module}.D"] / PLAIN_STEP, G, atol=1e-5 * G.abs().max().item())
    start = private_start(plan, adapted.layout, init, state, 3, moved)
    expected = initial_tensors(adapted, init=init.removesuffix("-clients"), seed=3,
                               gradient=lambda site: gradients[site.name])
    for name, values in expected.items():
        np.testing.assert_allclose(start[name], values, atol=2e-3 * np.abs(values).max() + 1e-9, err_msg=name)


def test_a_start_is_given_the_mean_gradient_itself_however_many_steps_its_clients_do(checkpoint, monkeypatch):
    given = {}

    def bases(self, site, source):
        given[site.name] = source.gradient(site)
        return Bases(A=torch.zeros(site.rank, site.d_in), B=torch.zeros(site.d_out, site.rank))

    monkeypatch.setattr(LoraSB, "bases", bases)
    plan, adapted, state = case(checkpoint, "bra", "fed-sb", private=False, whole_gradients=True, local_steps=2)
    moved, task, records = released(checkpoint, plan, (layout := sketch_layout(plan, adapted.layout, adapted.missing)),
                                    sketch_tensors(layout, state, seed=5), noise=None)
    private_start(plan, adapted.layout, "lora-sb-clients", state, 3, moved)
    for module, G in gradients_of(checkpoint, adapted, task, records, state).items():
        np.testing.assert_allclose(given[module], G, atol=1e-3 * G.abs().max().item())


def test_a_rank_for_which_the_gradient_has_too_few_directions_is_found_before_clients_are_asked(checkpoint):
    plan, adapted, state = case(checkpoint, "lora", "fedavg-lora", private=False, whole_gradients=True, rank=17)
    with pytest.raises(ValueError, match=r"rank 17 exceeds half of the smaller side of .*two singular vectors"):
        PrivateStart(plan, adapted, "lora-ga-clients", state, 0)
