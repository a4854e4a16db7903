import numpy as np
import pytest
import torch

from fedlora import models
from fedlora.adapters import family_of, initial_tensors, start_of
from tests.families import FAMILIES
from tests.fedlora.test_adapters import ALPHA, CASES, LABELS, RANK, adapted_model, logits
from tests.tiny import KINDS, tiny_checkpoint

STARTS = [(family, init) for family in FAMILIES for init in ("kaiming", "orthonormal", "weight")
          if not start_of(init)[0].lacks(family_of(family))]


@pytest.mark.parametrize(("family", "init"), STARTS)
@pytest.mark.parametrize(("kind", "task"), CASES)
def test_every_start_is_a_full_state_whose_update_is_zero(kind, task, family, init, checkpoint):
    adapted = adapted_model(checkpoint(kind), task, family)
    state = initial_tensors(adapted, init=init, seed=1)
    adapted.layout.check(state, "state")
    adapted.write(state)
    base = models.load(checkpoint(kind), task, LABELS).model
    with torch.no_grad():
        for name in adapted.missing:
            base.get_parameter(name).copy_(torch.from_numpy(state[f"head.{name}"]))
    torch.testing.assert_close(logits(adapted.model), logits(base), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("family", "init"), STARTS)
def test_the_seed_decides_every_bit(family, init, checkpoint):
    first, again = (initial_tensors(adapted_model(checkpoint("roberta"), "classification", family), init=init, seed=1)
                    for _ in range(2))
    other = initial_tensors(adapted_model(checkpoint("roberta"), "classification", family), init=init, seed=2)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    drawn = [name for name in first if not name.endswith((".bias", ".R"))
             and not (name.endswith(".B") and family != "bra") and not (init == "weight" and "head." not in name)]
    assert drawn and all(not np.array_equal(first[name], other[name]) for name in drawn)


def test_no_two_layers_start_alike(checkpoint):
    state = initial_tensors(adapted_model(checkpoint("bert"), "classification"), init="kaiming", seed=1)
    factors = [array for name, array in state.items() if name.endswith(".A")]
    correlations = np.corrcoef([array.ravel() for array in factors])
    assert np.abs(correlations - np.eye(len(factors))).max() < 0.5


@pytest.mark.parametrize("family", ["lora", "frozen-a"])
def test_kaiming_rows_are_uniform_with_norm_one_over_root_three(family, checkpoint):
    adapted = adapted_model(checkpoint("bert"), "classification", family, rank=32)
    values = np.concatenate([array for name, array in initial_tensors(adapted, init="kaiming", seed=1).items()
                             if name.endswith(".A")])
    bound = 32**-0.5
    assert np.abs(values).max() <= bound and np.abs(values).max() > 0.99 * bound
    assert abs(np.linalg.norm(values, axis=1).mean() - 3**-0.5) < 0.02


@pytest.mark.parametrize("init", ["orthonormal", "weight"])
@pytest.mark.parametrize("kind", KINDS)
def test_fixed_factors_of_bra_are_orthonormal(kind, init, checkpoint):
    adapted = adapted_model(checkpoint(kind), "classification", "bra")
    state = initial_tensors(adapted, init=init, seed=1)
    for module in adapted.layout.modules:
        A, B = state[f"{module}.A"], state[f"{module}.B"]
        np.testing.assert_allclose(A @ A.T, np.eye(RANK), atol=1e-6)
        np.testing.assert_allclose(B.T @ B, np.eye(RANK), atol=1e-6)
        if init == "weight":
            leading = np.linalg.svd(adapted.base_weight(module).double().numpy(), compute_uv=False)[:RANK]
            np.testing.assert_allclose(B.T @ adapted.base_weight(module).numpy() @ A.T, np.diag(leading), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_head_is_drawn_at_the_scale_that_the_config_names(kind, checkpoint):
    adapted = adapted_model(checkpoint(kind), "classification")
    state = initial_tensors(adapted, init="kaiming", seed=1)
    weights = np.concatenate([state[f"head.{name}"].ravel() for name in adapted.missing
                              if state[f"head.{name}"].ndim == 2])
    assert abs(weights.std() / adapted.model.config.initializer_range - 1) < 0.25
    for name in adapted.missing:
        if name.endswith("bias"):
            assert not state[f"head.{name}"].any()
        elif "norm" in name:
            assert (state[f"head.{name}"] == 1).all()


def test_a_head_of_the_checkpoint_keeps_its_values(tmp_path):
    path = tiny_checkpoint("bert", tmp_path)
    head = models.load(path, "classification", LABELS).model
    head.save_pretrained(path)
    state = initial_tensors(adapted_model(path, "classification"), init="kaiming", seed=1)
    np.testing.assert_array_equal(state["head.classifier.weight"], head.classifier.weight.detach().numpy())


@pytest.mark.parametrize(("family", "init", "rank", "message"), [
    ("lora", "gaussian", 2, "choose one of dp, kaiming, orthonormal, public, weight"),
    ("bra", "kaiming", 2, "orthonormal, weight or public"),
    ("frozen-a", "orthonormal", 33, r"rank 33 exceeds the smaller side of bert.*\(32 × 32\)"),
    ("bra", "weight", 33, "choose a smaller --rank")])
def test_an_impossible_start_is_refused(family, init, rank, message, checkpoint):
    adapted = adapted_model(checkpoint("bert"), "classification", family, rank=rank, alpha=ALPHA)
    with pytest.raises(ValueError, match=message):
        initial_tensors(adapted, init=init, seed=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_from_the_weight_holds_its_leading_right_singular_vectors(family, checkpoint):
    adapted = adapted_model(checkpoint("bert"), "classification", family)
    state = initial_tensors(adapted, init="weight", seed=1)
    for module in adapted.layout.modules:
        leading = np.linalg.svd(adapted.base_weight(module).double().numpy())[2][:RANK]
        np.testing.assert_allclose(np.abs(leading @ state[f"{module}.A"].T), np.eye(RANK), atol=1e-5)
