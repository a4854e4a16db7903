"""Adapters of which a round uses the first ranks alone: layouts, views of a model, training and export."""

import dataclasses

import numpy as np
import pytest
import torch
from peft import PeftModel

from fedlora import models, registry
from fedlora.adapters import attach, automatic_targets, export, family_of
from fedlora.adapters.families.lora import Lora
from fedlora.adapters.layout import pasted
from fedlora.plan import RoundPlan
from fedlora.privacy import RandomStream
from tests.covering import few
from tests.federation import COLUMNS, ROWS, layout_of, plan_of
from tests.fedlora.private_training import Given, job_of, make_records, make_trainer, plan

FAMILIES = registry.keys("fedlora.adapters.families")
NARROWING = [key for key in FAMILIES if family_of(key).narrows]
WHOLE = 3


def random_state(layout, seed=0):
    generator = np.random.default_rng(seed)
    return {spec.name: generator.normal(0, 0.5, spec.shape).astype(np.float32) for spec in layout.state}


@pytest.mark.parametrize("key", NARROWING)
def test_the_first_ranks_are_an_adapter_of_their_own_and_the_factor_stays(key):
    """A family that says `narrows` and computes anything else than B·A fails here."""
    layout = layout_of(key, rank=4)
    assert {spec.name.rpartition(".")[2] for spec in layout.state if spec.group == "adapter"} == {"A", "B"}
    narrow = layout.narrowed({"layer.1.q": 2})
    assert [site.rank for site in narrow.sites] == [4, 2] and narrow.sites[1].scaling == layout.sites[1].scaling
    state = random_state(layout)
    part = narrow.cut(state)
    narrow.check(part, "state")
    rest = {**state, "layer.1.q.B": state["layer.1.q.B"] * (np.arange(4) < 2)}
    for whole, site in zip(layout.sites, narrow.sites, strict=True):
        weight = np.ones((ROWS, COLUMNS))
        np.testing.assert_allclose(layout.family.update(part, site).change(weight),
                                   layout.family.update(rest, whole).change(weight), atol=1e-12)
    for name, array in pasted(part, state).items():
        np.testing.assert_array_equal(array, state[name])


@pytest.mark.parametrize("key", [key for key in FAMILIES if key not in NARROWING])
def test_other_families_are_refused_by_name(key):
    with pytest.raises(ValueError, match=f"family {key} cannot"):
        layout_of(key).narrowed({"layer.0.q": 1})


@pytest.mark.parametrize(("prefixes", "why"), [
    ({"layer.0.q": 3}, "from 1 to its own, 2"), ({"layer.0.q": 0}, "from 1 to"), ({"head": 1}, "not adapted")])
def test_ranks_that_the_adapter_does_not_have_are_refused(prefixes, why):
    with pytest.raises(ValueError, match=why):
        layout_of("lora").narrowed(prefixes)


def test_what_travels_is_cut_and_what_is_frozen_is_whole():
    layout = layout_of("frozen-a", rank=4)
    order = RoundPlan(plan_of("ffa-lora", rank=4), 1, 0, "d" * 64, ("layer.0.q.B",), (("layer.0.q", 1),))
    assert {spec.name: spec.shape for spec in layout.in_round(order).trained} == {"layer.0.q.B": (ROWS, 1)}
    shapes = {spec.name: spec.shape for spec in layout.sent_in(dict(order.prefixes)).state}
    assert (shapes["layer.0.q.A"], shapes["layer.0.q.B"], shapes["layer.1.q.B"]) == (
        (4, COLUMNS), (ROWS, 1), (ROWS, 4))
    again = layout.resent({"layer.0.q.B": (ROWS, 1), "layer.1.q.B": (ROWS, 9)})
    assert [spec.shape for spec in again.trained] == [(ROWS, 1), (ROWS, 4)]


@pytest.mark.parametrize("prefixes", [(("q", 0),), (("q", 1), ("q", 1)), (("q", 2), ("k", 1)), (("q", 10**6),)])
def test_an_order_whose_ranks_cannot_be_is_refused(prefixes):
    with pytest.raises(ValueError, match="prefixes"):
        RoundPlan(plan_of("ffa-lora"), 1, 0, "d" * 64, (), prefixes)


def test_a_family_that_adds_to_another_must_say_by_itself_that_its_ranks_can_be_cut():
    class Added(Lora):
        pass

    assert Lora.narrows and not Added.narrows


@pytest.mark.parametrize("key", few(*NARROWING))
def test_a_view_of_smaller_ranks_computes_as_its_export_and_leaves_the_whole_as_it_was(key, checkpoint, tmp_path):
    loaded = models.load(path := checkpoint("bert"), "classification", 2)
    adapted = attach(loaded, family=key, rank=WHOLE, alpha=6.0, targets=automatic_targets(loaded.model),
                     train_head=True)
    state, tokens = random_state(adapted.layout), {"input_ids": torch.arange(12).reshape(2, 6) + 5}
    adapted.write(state)

    def logits(model=adapted.model):
        with torch.no_grad():
            return model(**tokens).logits

    whole = logits()
    ranks = {name: 1 + i % 2 for i, name in enumerate(adapted.layout.modules)}
    view = adapted.activated((), ranks)
    view.write(view.layout.cut(state))
    narrow = logits()
    assert (narrow - whole).abs().max() > 1e-3
    zeros = {name: array * (np.arange(WHOLE) < ranks[name[:-2]]) if name.endswith(".B") else array
             for name, array in state.items()}
    adapted.write(zeros)  # the whole tensors take the view's place again
    torch.testing.assert_close(logits(), narrow, atol=1e-6, rtol=1e-5)
    adapted.write(state)
    assert torch.equal(logits(), whole) and np.array_equal(adapted.read("state")["head.classifier.weight"],
                                                           state["head.classifier.weight"])
    view.take_place()
    torch.testing.assert_close(logits(), narrow, atol=1e-6, rtol=1e-5)
    assert all(np.array_equal(array, state[name]) for name, array in adapted.read("state").items())
    with pytest.raises(ValueError, match="shape"):
        view.write(state)

    export(adapted, state, tmp_path, "org/model", prefixes=ranks)
    base = models.load(path, "classification", 2).model
    peft = PeftModel.from_pretrained(base, tmp_path).eval()
    config = peft.peft_config["default"]
    assert {config.r, *config.rank_pattern.values()} == {1, 2}
    torch.testing.assert_close(logits(peft), narrow, atol=1e-5, rtol=1e-4)


class Counted(RandomStream):
    """A stream that counts the values drawn from it."""

    drawn = 0

    def gaussian(self, count):
        self.drawn += count
        return super().gaussian(count)


@pytest.mark.parametrize("key", few(*NARROWING))
def test_noise_is_drawn_for_active_ranks_alone_and_only_they_move(key):
    run = plan(key, local_steps=2)
    trainer = make_trainer("bert", run)
    records, whole = make_records(trainer), trainer.adapted.read("state")
    prefixes = tuple((name, 1) for name in trainer.adapted.layout.modules)
    layout = trainer.adapted.layout.narrowed(dict(prefixes))
    noise = Counted(b"n" * 32)
    job = dataclasses.replace(job_of(run, records, sampling_rate=1.0, noise_multiplier=1.0, clip_norm=0.5,
                                     sampling=RandomStream(b"s" * 32), noise=noise),
                              prefixes=prefixes, start=layout.cut(whole))
    result = trainer.train(job)
    assert noise.drawn == 2 * layout.num_trained < 2 * trainer.adapted.layout.num_trained
    layout.check(result.tensors, "trained")
    assert all(np.abs(result.tensors[name] - job.start[name]).min() > 0 for name in result.tensors)

    trainer.adapted.write(whole)  # an evaluation between two rounds
    again = trainer.train(dataclasses.replace(job, streams=Given(RandomStream(b"s" * 32), Counted(b"n" * 32))))
    assert all(np.array_equal(again.tensors[name], array) for name, array in result.tensors.items())
    after = trainer.train(dataclasses.replace(job, prefixes=(), start=whole, streams=Given(
        RandomStream(b"s" * 32), Counted(b"n" * 32))))
    trainer.adapted.layout.check(after.tensors, "trained")


def test_a_narrowed_training_is_that_of_an_adapter_of_that_rank_with_the_same_factor():
    """Without noise: rank 1 of 3 with alpha 6 trains as an adapter of rank 1 with alpha 2 does."""
    wide, small = plan("lora"), plan("lora", rank=1, alpha=2.0)
    trainers = [make_trainer("bert", run) for run in (wide, small)]
    layout = trainers[1].adapted.layout
    prefixes = tuple((name, 1) for name in layout.modules)
    start = random_state(layout)
    results = [trainer.train(dataclasses.replace(
        job_of(run, make_records(trainer), sampling_rate=0.9, noise_multiplier=None, clip_norm=0.5,
               sampling=RandomStream(b"s" * 32)), start=start, prefixes=prefixes if run is wide else ()))
        for run, trainer in zip((wide, small), trainers, strict=True)]
    for name, array in results[1].tensors.items():
        np.testing.assert_array_equal(results[0].tensors[name], array)
