"""Contract tests for adapter families: they run on every family that is installed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from peft import PeftModel

from fedlora import models, registry
from fedlora.adapters import AdapterLayout, attach, automatic_targets, export, family_of, initial_tensors
from fedlora.adapters.family import Bases, Leaves, Site, TensorSpec
from fedlora.adapters.leaves import Leaf
from tests.families import rank_of
from tests.fedlora.test_adapters import random_state as random_state_of

PACKAGE = "fedlora.adapters.families"
SITES = (Site("layer.0.q", 8, 6, 2, 2.0), Site("layer.1.q", 6, 9, 3, 1.5))


@pytest.fixture(params=registry.keys(PACKAGE))
def key(request):
    return request.param


def adapted_model(key, path, **changes):
    loaded = models.load(path, "classification", 2)
    return attach(loaded, **{"family": key, "rank": rank_of(key), "alpha": 6.0, "train_head": True,
                             "targets": automatic_targets(loaded.model)} | changes)


def random_state(layout, seed=0):
    rng = np.random.default_rng(seed)
    return {spec.name: rng.normal(0, 0.5, spec.shape).astype(np.float32) for spec in layout.state}


def bases(site, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A, B, V = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (
        (site.rank, site.d_in), (site.d_out, site.rank), (site.d_out,)))
    return Bases(A, B, V.abs())


def weight_of(site):
    return np.random.default_rng(list(site.name.encode())).normal(0, 1, (site.d_out, site.d_in))


def started(family, site):
    made = family.initial(site, bases(site), lambda name, shape: torch.ones(shape, dtype=torch.float64))
    return {name: np.asarray(values, np.float32) for name, values in made.items()}


def test_it_has_a_line_that_says_what_it_is_and_the_name_of_its_file(key):
    assert registry.titles(PACKAGE)[key] and family_of(key).name == key
    assert set(family_of(key).bases) <= {"A", "B", "V"}


def test_its_options_are_numbers_and_another_is_refused_by_name(key):
    assert all(isinstance(value, int | float) for value in dataclasses.asdict(family_of(key)).values())
    with pytest.raises(ValueError, match="no option 'colour'"):
        family_of(key, (("colour", 1.0),))


def test_its_tensors_are_named_once_shaped_by_the_sites_and_some_of_each_site_train(key):
    layout = AdapterLayout.of(family_of(key), SITES)
    assert {site for spec in layout.trained for site in spec.sites} == {site.name for site in SITES}
    assert all(spec.group == "adapter" and spec.sites for spec in layout.state)
    assert layout == AdapterLayout.of(family_of(key), SITES[::-1]), "whatever order the model has"


def test_it_starts_with_all_its_tensors_and_an_update_of_zero(key):
    family = family_of(key)
    made = {name: values for site in SITES for name, values in started(family, site).items()}
    assert {name: values.shape for name, values in made.items()} == {
        spec.name: spec.shape for spec in AdapterLayout.of(family, SITES).state}
    for site in SITES:
        update = family.update(made, site).change(weight_of(site))
        assert update.shape == (site.d_out, site.d_in) and not update.any()


def test_its_module_computes_the_update_that_it_tells(key):
    family, leaves = family_of(key), Leaves(torch.device("cpu"))
    deltas = [family.build(site, leaves).double() for site in SITES]
    layout = AdapterLayout.of(family, SITES)
    state = random_state(layout)
    assert leaves.made.keys() == state.keys()
    for name, (leaf, parameter) in leaves.made.items():
        assert isinstance(leaf, Leaf)
        getattr(leaf, parameter).data.copy_(torch.from_numpy(state[name]))
    for site, delta in zip(SITES, deltas, strict=True):
        x = torch.randn(4, 3, site.d_in, dtype=torch.float64)
        base = torch.nn.Linear(site.d_in, site.d_out, dtype=torch.float64)
        update = torch.from_numpy(family.update(state, site).change(base.weight.detach().numpy()))
        torch.testing.assert_close(delta(x, base(x), base), site.scaling * x @ update.T)


def test_exact_means_that_the_mean_of_the_models_is_the_model_of_the_mean(key):
    family, layout = family_of(key), AdapterLayout.of(family_of(key), SITES)
    one = {name: array.astype(np.float64) for name, array in random_state(layout).items()}
    other = one | {spec.name: array for spec, array in (
        (spec, random_state(layout, 1)[spec.name].astype(np.float64)) for spec in layout.trained)}
    mean = {name: (one[name] + other[name]) / 2 for name in one}
    def updates(state):
        return np.concatenate([family.update(state, site).change(weight_of(site)).ravel() for site in SITES])
    error = np.abs(updates(mean) - (updates(one) + updates(other)) / 2).max()
    assert bool(error < 1e-12) is family.exact


def test_every_record_has_the_gradient_that_it_has_alone(key, checkpoint):
    """Compare the leaves' gradients of one pass with autograd's gradient of each record alone."""
    from tests.fedlora.private_training import brute_force_row, make_records, make_trainer, per_record_rows, plan

    trainer = make_trainer("bert", plan(key))
    records = make_records(trainer, count=4)
    rows = per_record_rows(trainer, records, range(4))
    alone = torch.stack([brute_force_row(trainer, records, i) for i in range(4)])
    assert ((rows - alone).norm(dim=1) / alone.norm(dim=1)).max() < 1e-5


def test_clients_in_lockstep_end_where_each_ends_alone(key):
    from tests.fedlora.test_training_multi_client import assert_same, make

    trainer, jobs = make(family=key)
    for together, job in zip(trainer.train_together(jobs), jobs, strict=True):
        assert_same(together, trainer.train(job))


def test_ranks_may_differ_by_module_and_plain_peft_computes_the_same(key, checkpoint, tmp_path):
    from transformers import AutoModelForSequenceClassification

    path = checkpoint("bert")
    first = adapted_model(key, path).layout.modules[0]
    adapted = adapted_model(key, path, ranks=((first, 2),))
    assert {site.rank for site in adapted.layout.sites} == {2, rank_of(key)}
    state = random_state_of(adapted)
    adapted.write(state)
    ids = torch.randint(10, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = adapted.model(input_ids=ids).logits
        base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
        loaded = PeftModel.from_pretrained(base, str(export(adapted, state, tmp_path, "tiny"))).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_only_the_named_tensors_train_where_some_are_left_out(key, checkpoint):
    adapted = adapted_model(key, checkpoint("bert"))
    kept = adapted.layout.trained[:1]
    view = adapted.activated([spec.name for spec in kept])
    assert view.layout.trained == kept and len(view.layout.state) == len(adapted.layout.state)
    assert [spec.name for spec in view.layout.state if view.parameter(spec.name).requires_grad] == [kept[0].name]
    adapted.activated(())
    assert sum(adapted.parameter(spec.name).requires_grad for spec in adapted.layout.state) == len(
        adapted.layout.trained)
    with pytest.raises(ValueError, match="cannot train"):
        adapted.activated(["nowhere"])


def test_a_start_that_lacks_what_it_freezes_is_refused(key, checkpoint):
    adapted = adapted_model(key, checkpoint("bert"))
    if not adapted.layout.family.bases:
        with pytest.raises(ValueError, match=r"gives factors, and the .* takes none; choose --init none"):
            initial_tensors(adapted, init="kaiming", seed=0)
    elif lacking := set(adapted.layout.family.bases) - {"A"}:
        with pytest.raises(ValueError, match=f"gives no {' and no '.join(lacking)}; choose --init"):
            initial_tensors(adapted, init="kaiming", seed=0)
    else:
        assert initial_tensors(adapted, init="kaiming", seed=0)


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two tensors"):
        AdapterLayout.of(family_of("lora"), SITES, [TensorSpec("layer.0.q.A", (1,), "head")])


def test_a_core_that_sites_share_keeps_what_every_family_promises(checkpoint, tmp_path):
    """Each record's gradient is the sum over the sites, clients in lockstep end where each ends alone, PEFT agrees."""
    from transformers import AutoModelForSequenceClassification

    from tests.fedlora.private_training import brute_force_row, make_records, make_trainer, per_record_rows, plan
    from tests.fedlora.test_training_multi_client import assert_same, make

    tied = (("tie", 1.0),)
    trainer = make_trainer("bert", plan("bra", family_options=tied))
    records = make_records(trainer, count=4)
    alone = torch.stack([brute_force_row(trainer, records, i) for i in range(4)])
    error = (per_record_rows(trainer, records, range(4)) - alone).norm(dim=1) / alone.norm(dim=1)
    assert error.max() < 1e-5
    trainer, jobs = make(family="bra", family_options=tied)
    for together, job in zip(trainer.train_together(jobs), jobs, strict=True):
        assert_same(together, trainer.train(job))
    adapted = adapted_model("bra", checkpoint("bert"), options=tied)
    assert [spec.size for spec in adapted.layout.trained if spec.group == "adapter"] == [9]
    state = random_state(adapted.layout)
    adapted.write(state)
    ids = torch.randint(10, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        base = AutoModelForSequenceClassification.from_pretrained(checkpoint("bert"), num_labels=2)
        loaded = PeftModel.from_pretrained(base, str(export(adapted, state, tmp_path, "tiny"))).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, adapted.model(input_ids=ids).logits, atol=1e-5,
                                   rtol=1e-5)
