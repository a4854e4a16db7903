"""Families of single papers: what each promises beyond the contract of all families."""

import json

import numpy as np
import pytest
import torch
from peft import MissConfig, PeftModel, get_peft_model

from fedlora import models
from fedlora.adapters import Site, export, family_of, hand_on, initial_tensors, load, merge, save
from fedlora.adapters.family import Leaves
from fedlora.adapters.updates import LEAST_FACTOR
from tests.contracts.test_families import bases
from tests.fedlora.private_training import brute_force_row, make_records, make_trainer, per_record_rows, plan
from tests.fedlora.test_adapters import LABELS, adapted_model, batch, logits, random_state
from tests.fedlora.test_adapters_export import assert_export_computes_the_same, fresh_base
from tests.fedlora.test_handing_on import loaded_as_printed
from tests.fedlora.test_training_multi_client import assert_same, make

ROUTED = (("k", 2.0),)


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


# --- bat ---

def test_bat_is_what_peft_computes_with_the_same_blocks(checkpoint):
    """With s = 1, b is PEFT's tensor, block below block."""
    adapted = adapted_model(checkpoint("bert"), "classification", "bat", rank=4, alpha=4.0)
    miss = MissConfig(r=4, init_weights="bat", target_modules=list(adapted.layout.modules), task_type="SEQ_CLS")
    theirs = get_peft_model(models.load(checkpoint("bert"), "classification", LABELS).model, miss).eval()
    state = random_state(adapted)
    adapted.write(state)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    for name in adapted.layout.modules:
        layer = theirs.base_model.model.get_submodule(name)
        layer.miss_block["default"].data = torch.from_numpy(state[f"{name}.b"]).reshape(8, 4, 4)
        close(adapted.model.get_submodule(name)(x), layer(x))


@pytest.mark.parametrize(("kind", "options", "kind_of_adapter"), [
    ("bert", {}, "MISS"), ("llama", {"train_head": False, "task": "causal-lm"}, "MISS"), ("gpt2", {}, "LORA"),
    ("roberta", {}, "LORA"), ("bert", {"mixed": True}, "LORA")])
def test_bat_is_exported_as_miss_where_peft_can_hold_and_merge_it_so(kind, options, kind_of_adapter, checkpoint,
                                                                     tmp_path):
    options = dict(options)
    task, path = options.pop("task", "classification"), checkpoint(kind)
    if options.pop("mixed", False):
        options["ranks"] = ((adapted_model(path, task, "bat").layout.modules[0], 8),)
    adapted = adapted_model(path, task, "bat", **options)
    assert_export_computes_the_same(adapted, random_state(adapted), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == kind_of_adapter and config["r"] == (4 if kind_of_adapter == "MISS" else 32)
    form = {"MISS": "MiSS", "LORA": "LoRA"}[kind_of_adapter]
    assert f"A {form} adapter for tiny, trained" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(("kind", "rank", "told"), [
    ("bert", 3, r"rank 3 does not divide both sides of bert.*\(32 × 32\).* Ranks that fit there: 1, 2, 4, 8, 16, 32$"),
    ("llama", 32, r"rank 32 does not divide both sides of model.*v_proj \(16 × 32\).*: 1, 2, 4, 8, 16$")])
def test_bat_refuses_a_rank_that_does_not_divide_a_layer_and_names_those_that_do(kind, rank, told, checkpoint):
    with pytest.raises(ValueError, match=told):
        adapted_model(checkpoint(kind), "classification", "bat", rank=rank)


# --- salt ---

def test_salt_without_its_rest_is_the_diagonal_of_the_leading_singular_values(checkpoint):
    path, k = checkpoint("bert"), 3
    salt = adapted_model(path, "classification", "salt", rank=5, alpha=5.0, options=(("top", float(k)),))
    diagonal = adapted_model(path, "classification", "diagonal", rank=k, alpha=float(k))
    mine, other = (initial_tensors(adapted, init="weight", seed=1) for adapted in (salt, diagonal))
    generator = np.random.default_rng(0)
    for name in salt.layout.modules:
        mine[f"{name}.e"] = other[f"{name}.e"] = generator.standard_normal(k).astype(np.float32)
    shared = {name: array for name, array in mine.items() if name in other}
    assert shared.keys() == other.keys()
    for adapted, state in ((salt, mine), (diagonal, other)):
        adapted.write(state)
    close(logits(salt.model), logits(diagonal.model))


def test_salts_rest_neither_writes_nor_reads_the_leading_directions(checkpoint):
    adapted = adapted_model(checkpoint("gpt2"), "classification", "salt", rank=6, alpha=6.0)
    state = initial_tensors(adapted, init="weight", seed=1)
    for site in adapted.layout.sites:
        A, B, P = (state[f"{site.name}.{factor}"] for factor in "ABP")
        state[f"{site.name}.Y"] = np.random.default_rng(0).standard_normal((3, site.d_in)).astype(np.float32)
        np.testing.assert_allclose(P.T @ P, np.eye(3), atol=1e-6)
        change = adapted.layout.family.update(state, site).change(adapted.base_weight(site.name).numpy())
        assert np.linalg.norm(change) > 1 and np.linalg.matrix_rank(change, tol=1e-4) == 3
        np.testing.assert_allclose(B.T @ change, 0, atol=1e-5)
        np.testing.assert_allclose(change @ A.T, 0, atol=1e-5)


@pytest.mark.parametrize(("top", "rank", "told"), [
    (4, 4, r"top is 4, and layer\.0\.q has rank 4, which counts .*; choose a smaller top"),
    (0, 1, r"salt needs rank 2 or more, and layer\.0\.q has rank 1"), (-1, 4, "top is -1; it must be at least 1")])
def test_salt_needs_something_of_the_rank_for_each_part(top, rank, told):
    with pytest.raises(ValueError, match=told):
        family_of("salt", (("top", float(top)),)).specs([Site("layer.0.q", 8, 8, rank, 1.0)])


# --- row-scale-frozen-a ---

def test_lengths_beside_a_low_rank_change_are_a_dora_adapter_also_where_a_row_nearly_vanishes(checkpoint, tmp_path):
    for place, factor in enumerate((0.5, LEAST_FACTOR / 10)):
        adapted = adapted_model(checkpoint("bert"), "classification", "row-scale-frozen-a", rank=4, alpha=8.0)
        state = random_state(adapted)
        for site in adapted.layout.sites:
            state[f"{site.name}.e"] = 0.3 * state[f"{site.name}.e"]
            state[f"{site.name}.e"][2] = (factor - 1) / (site.scaling * state[f"{site.name}.V"][2])
        assert_export_computes_the_same(adapted, state, tmp_path / str(place))
        config = json.loads((tmp_path / str(place) / "adapter_config.json").read_text())
        assert config["use_dora"] and config["r"] == (32 if place else 4)


def test_lengths_and_a_frozen_a_add_up_to_the_two_families_apart(checkpoint):
    both = adapted_model(checkpoint("bert"), "classification", "row-scale-frozen-a")
    state, site = random_state(both), both.layout.sites[0]
    weight = both.base_weight(site.name).double().numpy()
    apart = sum(family_of(key).update(state, site).change(weight) for key in ("row-scale", "frozen-a"))
    np.testing.assert_allclose(both.layout.family.update(state, site).change(weight), apart)
    A = initial_tensors(both, init="row-norms", seed=1)[f"{site.name}.A"]
    np.testing.assert_allclose(np.linalg.norm(A, axis=1), 1, rtol=1e-6)


# --- flylora ---

def test_a_token_adds_what_its_k_largest_values_add():
    site, family = Site("layer.0.q", 6, 9, 4, 1.5), family_of("flylora", ROUTED)
    leaves = Leaves(torch.device("cpu"))
    delta, made = family.build(site, leaves), family.initial(site, bases(site), lambda *_: None)
    A, B = made["layer.0.q.A"].float(), torch.randn(6, 4)
    for name, tensor in (("layer.0.q.A", A), ("layer.0.q.B", B)):
        leaf, parameter = leaves.made[name]
        getattr(leaf, parameter).data.copy_(tensor)
    base = torch.nn.Linear(9, 6)
    for x in torch.randn(20, 9):
        kept = (A @ x).abs().argsort(descending=True)[:2]
        close(delta(x, base(x), base), 1.5 * B[:, kept] @ (A @ x)[kept])


def test_routed_adapters_keep_what_every_exact_family_promises():
    """Each record has the gradient that it has alone, lockstep is alone, and means of models are models of means."""
    trainer = make_trainer("bert", plan("flylora", family_options=ROUTED))
    records = make_records(trainer, count=4)
    alone = torch.stack([brute_force_row(trainer, records, i) for i in range(4)])
    error = (per_record_rows(trainer, records, range(4)) - alone).norm(dim=1) / alone.norm(dim=1)
    assert error.max() < 1e-5
    trainer, jobs = make(family="flylora", family_options=ROUTED)
    for together, job in zip(trainer.train_together(jobs), jobs, strict=True):
        assert_same(together, trainer.train(job))
    layer = trainer.adapted.model.get_submodule(trainer.adapted.layout.modules[0]).double()
    x, added = torch.randn(50, 32, dtype=torch.float64), []
    B = layer.delta.B.weight.data
    one, other = torch.randn_like(B), torch.randn_like(B)
    for values in (one, other, (one + other) / 2):
        B.copy_(values)
        added.append((layer(x) - layer.base(x)).detach())
    close((added[0] + added[1]) / 2, added[2])


def test_it_is_refused_by_name_where_a_matrix_is_asked_for_unless_k_is_the_rank(checkpoint, tmp_path):
    routed = adapted_model(checkpoint("bert"), "classification", "flylora", rank=4, options=ROUTED)
    for write in (export, merge):
        with pytest.raises(ValueError, match=r"family flylora chooses 2 of 4 rows .* k=4, where nothing is chosen"):
            write(routed, random_state(routed), tmp_path / "out", "tiny")
    assert not list(tmp_path.iterdir())
    whole = adapted_model(checkpoint("bert"), "classification", "flylora", rank=4, options=(("k", 4.0),))
    frozen = adapted_model(checkpoint("bert"), "classification", "frozen-a", rank=4)
    state = random_state(whole)
    frozen.write(state)
    assert_export_computes_the_same(whole, state, tmp_path / "whole")
    close(logits(whole.model), logits(frozen.model.double()))
    with pytest.raises(ValueError, match="k is 0; each token must use at least 1"):
        family_of("flylora", (("k", 0.0),))


@pytest.mark.parametrize(("kind", "task"), [("bert", "classification"), ("llama", "causal-lm")])
def test_it_is_handed_on_in_our_own_form_and_loads_with_equal_logits(kind, task, checkpoint, tmp_path):
    path = checkpoint(kind)
    first = adapted_model(path, task, "flylora").layout.modules[0]
    adapted = adapted_model(path, task, "flylora", options=ROUTED, ranks=((first, 5),))
    state = random_state(adapted)
    adapted.write(state)
    folder = hand_on(adapted, state, tmp_path / "adapter", "local:0123456789ab", max_length=20)
    assert not (folder / "adapter_config.json").exists()
    assert not any(str(path) in file.read_text(errors="replace") for file in folder.iterdir())
    again = load(folder, path)
    assert again.layout == adapted.layout
    torch.testing.assert_close(logits(again.model), logits(adapted.model), atol=0, rtol=0)
    model, tokenizer = loaded_as_printed(folder, path)
    torch.testing.assert_close(logits(model), logits(adapted.model), atol=0, rtol=0)
    assert tokenizer.pad_token_id is not None
    if task == "classification":
        assert model.config.id2label == adapted.model.config.id2label and tokenizer.model_max_length == 20


def test_what_is_no_such_adapter_or_does_not_fit_is_refused(checkpoint, tmp_path):
    adapted = adapted_model(checkpoint("bert"), "classification", "bra", options=(("tie", 1.0),))
    folder = save(adapted, random_state(adapted), tmp_path / "adapter", "local:0123456789ab")
    assert load(folder, checkpoint("bert")).layout == adapted.layout
    with pytest.raises(ValueError, match="does not say where its base model local:0123456789ab is; name its folder"):
        load(folder)
    with pytest.raises(ValueError, match="layers end in"):
        load(folder, checkpoint("gpt2"))
    for change in ("{", "[]", '{"task": 1}'):
        (folder / "adapter.json").write_text(change)
        with pytest.raises(ValueError, match="holds no adapter in FedLoRA's own form"):
            load(folder, checkpoint("bert"))
    with pytest.raises(ValueError, match=r"A folder with adapter_config\.json is loaded with PEFT"):
        load(tmp_path, checkpoint("bert"))


def test_families_that_peft_holds_are_handed_on_in_its_format(checkpoint, tmp_path):
    adapted = adapted_model(checkpoint("bert"), "classification", "flylora")
    state = random_state(adapted)
    adapted.write(state)
    base = fresh_base(adapted.base_path, adapted.task, None)
    loaded = PeftModel.from_pretrained(base, hand_on(adapted, state, tmp_path, "tiny")).eval()
    with torch.no_grad():
        close(loaded(**batch()).logits, logits(adapted.model))
