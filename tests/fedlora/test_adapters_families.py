"""What single adapter families promise beyond the contract of all: they compute what their papers and PEFT do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, RandLoraConfig, get_peft_model

from fedlora import models
from fedlora.adapters import AdapterLayout, attach_planned, export, family_of, initial_tensors
from fedlora.adapters.family import Leaves, Site, check_private
from tests.fedlora.private_training import loaded, plan
from tests.fedlora.test_adapters import ALPHA, LABELS, RANK, adapted_model, batch, logits, random_state

TARGETS = ["query", "value"]


def base(checkpoint):
    return models.load(checkpoint("bert"), "classification", LABELS).model


def like(adapted, checkpoint, config):
    """Return PEFT's own model of the same base, with the adapted model's head."""
    model = get_peft_model(base(checkpoint), config).eval()
    for name, parameter in adapted.model.named_parameters():
        if name.startswith("classifier"):
            model.base_model.model.get_parameter(name.replace("classifier", "classifier.modules_to_save.default")
                                                 ).data.copy_(parameter.data)
    return model


@pytest.mark.parametrize(("family", "init"), [("lora-offset", "weight-scaled"), ("lora-offset", "orthonormal"),
                                              ("dora", "kaiming"), ("randlora", "none")])
def test_the_start_is_the_base_model_bit_for_bit(family, init, checkpoint):
    adapted = adapted_model(checkpoint("bert"), "classification", family)
    state = initial_tensors(adapted, init=init, seed=1)
    adapted.write(state)
    untouched = base(checkpoint)
    with torch.no_grad():
        for name in adapted.missing:
            untouched.get_parameter(name).copy_(torch.from_numpy(state[f"head.{name}"]))
    assert torch.equal(logits(adapted.model), logits(untouched))


def test_pissa_is_what_peft_trains_after_it_changed_the_weight(checkpoint):
    """PEFT writes W0 − B A into the base and trains A and B; here W0 stays, and the same changes are made."""
    adapted = adapted_model(checkpoint("bert"), "classification", "lora-offset", rank=3, alpha=3.0)
    state = initial_tensors(adapted, init="weight-scaled", seed=1)
    peft = like(adapted, checkpoint, LoraConfig(r=3, lora_alpha=3, target_modules=TARGETS, task_type="SEQ_CLS",
                                                init_lora_weights="pissa"))
    generator = torch.Generator().manual_seed(0)
    for module in adapted.layout.modules:
        layer = peft.base_model.model.get_submodule(module)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        product = torch.from_numpy(state[f"{module}.B"] @ state[f"{module}.A"])
        torch.testing.assert_close(product, (B @ A).detach(), atol=1e-5, rtol=1e-4)
        for factor, values in (("A", A), ("B", B)):
            change = 0.1 * torch.randn(values.shape, generator=generator)
            state |= {f"{module}.{factor}": values.detach().numpy().copy(), f"{module}.d{factor}": change.numpy()}
            values.data += change
    adapted.write(state)
    with torch.no_grad():
        for module in adapted.layout.modules:
            x = torch.randn(5, 32, generator=generator)
            mine, theirs = (model.get_submodule(module)(x) for model in (adapted.model, peft.base_model.model))
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_an_offset_of_zero_makes_lora_and_the_changes_have_its_gradients(checkpoint):
    offset, plain = (adapted_model(checkpoint("bert"), "classification", family) for family in ("lora-offset", "lora"))
    state = random_state(offset)
    factors = {name: state[name] for name in state if name.endswith((".A", ".dB"))}
    offset.write(state | {name: np.zeros_like(state[name]) for name in state if name.endswith((".B", ".dA"))})
    plain.write({spec.name: state[spec.name] for spec in plain.layout.state} | {
        name.replace(".dB", ".B"): values for name, values in factors.items()})
    for adapted in (offset, plain):
        adapted.model(**batch()).logits.square().sum().backward()
    torch.testing.assert_close(logits(offset.model), logits(plain.model), atol=1e-6, rtol=1e-6)
    for module in offset.layout.modules:
        for factor in "AB":
            torch.testing.assert_close(offset.parameter(f"{module}.d{factor}").grad,
                                       plain.parameter(f"{module}.{factor}").grad, atol=1e-5, rtol=1e-4)


def test_dora_has_the_outputs_and_gradients_of_pefts(checkpoint):
    adapted = adapted_model(checkpoint("bert"), "classification", "dora")
    state = random_state(adapted)
    adapted.write(state)
    peft = like(adapted, checkpoint, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, use_dora=True,
                                                task_type="SEQ_CLS"))
    theirs = {}
    for module in adapted.layout.modules:
        layer = peft.base_model.model.get_submodule(module)
        theirs[module] = (layer.lora_A["default"].weight, layer.lora_B["default"].weight,
                          layer.lora_magnitude_vector["default"].weight)
        A, B, m = theirs[module]
        A.data, B.data = (torch.from_numpy(state[f"{module}.{factor}"]) for factor in "AB")
        m.data += torch.from_numpy(state[f"{module}.e"])
    outputs = [model(**batch()).logits for model in (adapted.model, peft)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    for output in outputs:
        output.square().sum().backward()
    for module, parameters in theirs.items():
        for factor, parameter in zip("ABe", parameters, strict=True):
            gradient = adapted.parameter(f"{module}.{factor}").grad
            assert (gradient - parameter.grad).norm() < 1e-4 * parameter.grad.norm()


def test_a_row_of_zeros_is_changed_by_the_factors_alone_and_exports_as_it_is(checkpoint, tmp_path):
    model = base(checkpoint)
    adapted = adapted_model(checkpoint("bert"), "classification", "dora")
    state, module = random_state(adapted), adapted.layout.modules[0]
    state[f"{module}.B"][1] = 0
    for weight in (adapted.base_weight(module), model.get_submodule(module).weight.data):
        weight[1:3] = 0
    adapted.write(state)
    A, B = (torch.from_numpy(state[f"{module}.{factor}"]) for factor in "AB")
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    layer = adapted.model.get_submodule(module)
    with torch.no_grad():
        torch.testing.assert_close((layer(x) - layer.bias)[:, 1:3], ALPHA / RANK * x @ (B @ A)[1:3].T)
        peft = PeftModel.from_pretrained(model, str(export(adapted, state, tmp_path, "tiny"))).eval()
        torch.testing.assert_close(logits(peft), logits(adapted.model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sides", [(7, 5), (5, 7)])
def test_randlora_is_pefts_with_the_columns_of_b_in_the_order_of_the_formula(sides):
    """PEFT pairs the columns of all B_j with the rows of all A in another order; the distribution is the same."""
    site, (d_out, d_in) = Site("layer", *sides, 2, 1.5), sides
    layer = get_peft_model(torch.nn.Sequential(torch.nn.Linear(d_in, d_out)), RandLoraConfig(
        r=2, randlora_alpha=3, target_modules=["0"], init_weights=False)).base_model.model[0]
    layer.randlora_gamma["default"].data.normal_()
    A, B = layer.randlora_A["default"], layer.randlora_B["default"]
    ordered = B.flatten(1).view(7, 2, 3).permute(0, 2, 1)  # B[:, j] as the formula has it, for 3 terms of rank 2
    state = {"shared.7x5.2.A": A[:, 0], "shared.7x5.2.B": ordered.flatten(1),
             "layer.lambda": layer.randlora_lambda["default"].T.flatten(),
             "layer.gamma": layer.randlora_gamma["default"].flatten()}
    state = {name: values.detach().numpy() for name, values in state.items()}
    family, leaves = family_of("randlora"), Leaves(torch.device("cpu"))
    update = torch.from_numpy(site.scaling * family.update(state, site).change(np.zeros(sides))).float()
    torch.testing.assert_close(update, layer.get_delta_weight("default").detach(), atol=1e-5, rtol=1e-5)
    delta = family.build(site, leaves)
    assert {name: getattr(*leaves.made[name]).shape for name in state} == {
        spec.name: spec.shape for spec in AdapterLayout.of(family, [site]).state}
    for name, values in state.items():
        getattr(*leaves.made[name]).data.copy_(torch.from_numpy(values))
    x = torch.randn(4, 3, d_in)
    with torch.no_grad():
        torch.testing.assert_close(delta(x, x, delta), x @ update.T, atol=1e-5, rtol=1e-5)


def test_layers_of_one_size_and_rank_share_random_factors(checkpoint):
    path = checkpoint("bert")
    first = adapted_model(path, "classification").layout.modules[0]
    adapted = adapted_model(path, "classification", "randlora", ranks=((first, 2),))
    state = initial_tensors(adapted, init="none", seed=1)
    shared = [spec for spec in adapted.layout.frozen if spec.name.startswith("shared.")]
    assert {spec.name: len(spec.sites) for spec in shared} == {
        f"shared.32x32.{rank}.{factor}": sites for rank, sites in ((2, 1), (RANK, 3)) for factor in "AB"}
    assert all(np.square(state[spec.name]).mean() == pytest.approx(1, rel=1e-5) for spec in shared)


@pytest.mark.parametrize(("options", "moved", "rank"), [
    ((), False, RANK), ((), True, 32), ((("gamma", 0.0),), False, 32)], ids=["start", "trained", "gamma=0"])
def test_randlora_has_full_rank_once_its_gammas_differ(options, moved, rank, checkpoint):
    adapted = adapted_model(checkpoint("bert"), "classification", "randlora", options=options)
    state, generator = initial_tensors(adapted, init="none", seed=1), np.random.default_rng(0)
    for site in adapted.layout.sites:
        gamma, core = f"{site.name}.gamma", f"{site.name}.lambda"
        np.testing.assert_allclose(np.abs(state[gamma]), 1 / 32)
        state[core] = generator.standard_normal(state[core].shape)
        state[gamma] = state[gamma] + moved * 0.01 * generator.standard_normal(state[gamma].shape)
        change = adapted.layout.family.update(state, site).change(np.zeros((32, 32)))
        assert np.linalg.matrix_rank(change) == rank


def test_with_gamma_frozen_randlora_is_exact_and_fit_for_private_runs():
    site, whole, part = Site("layer", 7, 5, 2, 1.0), family_of("randlora"), family_of("randlora", (("gamma", 0.0),))
    trained = [{spec.name for spec in AdapterLayout.of(family, [site]).trained} for family in (whole, part)]
    assert trained == [{"layer.lambda", "layer.gamma"}, {"layer.lambda"}]
    assert [family.exact_in(names) for family, names in zip((whole, part), trained, strict=True)] == [False, True]
    check_private(part)
    with pytest.raises(ValueError, match=r"randlora is not for private runs: .*--family-options gamma=0, or choose"):
        check_private(whole)
    for private, options in ((True, (("gamma", 0.0),)), (False, ())):
        attach_planned(loaded("bert", "classification"), planned(private, options))
    with pytest.raises(ValueError, match="randlora is not for private runs"):
        attach_planned(loaded("bert", "classification"), planned(True, ()))
    with pytest.raises(ValueError, match="gamma is 2; it must be 1"):
        family_of("randlora", (("gamma", 2.0),))


def planned(private, options):
    return plan("randlora", private=private, family_options=options, targets=("query",))


@pytest.mark.parametrize(("family", "alone"), [("lora-offset", ["dA", "dB"]), ("dora", ["e"])])
def test_what_trains_in_turn_is_exact_where_the_update_is_linear_in_it(family, alone):
    family, site = family_of(family), Site("layer", 7, 5, 2, 1.0)
    every = [spec.name.rpartition(".")[2] for spec in AdapterLayout.of(family, [site]).trained]
    assert [factor for factor in every if family.exact_in([f"layer.{factor}"])] == alone
    assert not family.exact_in([f"layer.{factor}" for factor in every])
