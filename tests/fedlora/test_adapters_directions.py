"""Starts that choose directions: LoRA-GA's, LoRA-SB's, and the one that leaves public inputs as they are."""

import numpy as np
import pytest
import torch

from fedlora.adapters import initial_tensors, start_of
from fedlora.adapters.family import Site
from fedlora.adapters.start import Source
from fedlora_strategies.refactorizations.svd import Svd
from tests.fedlora.test_adapters import adapted_model

SITE, G = Site("q", 32, 24, 4, 1.0), np.random.default_rng(0).standard_normal((32, 24))
SOURCE = Source(0, lambda site: torch.zeros(32, 24), gradient=lambda site: torch.from_numpy(G).float())


def bases(init, site=SITE):
    made = start_of(f"{init}:file")[0].bases(site, SOURCE)
    return made.A.numpy(), made.B.numpy()


def test_lora_ga_moves_the_weight_in_twice_as_many_leading_directions_as_it_has_ranks():
    A, B = bases("lora-ga")
    U, singular, V = np.linalg.svd(G.astype(np.float32).astype(np.float64))
    length = 32**0.25 / 4
    np.testing.assert_allclose(np.abs(A @ V[:4].T), length * np.eye(4), atol=1e-9)
    np.testing.assert_allclose(np.abs(U[:, 4:8].T @ B), length * np.eye(4), atol=1e-9)
    step = B @ (B.T @ G) + (G @ A.T) @ A  # of W, where A moves along Bᵀ G, and B along G Aᵀ
    np.testing.assert_allclose(np.linalg.svd(step)[1][:8], length**2 * singular[:8], rtol=1e-5)
    np.testing.assert_allclose(B.T @ G @ A.T, 0, atol=1e-5)  # so that a core between the two would not move


def test_lora_ga_is_refused_where_a_is_frozen_and_where_the_rank_leaves_no_second_vectors(checkpoint):
    for family in ("frozen-a", "bra"):
        with pytest.raises(ValueError, match="it freezes A, for which --init public:FILE has the same directions"):
            initial_tensors(adapted_model(checkpoint("bert"), "classification", family), init="lora-ga", seed=0)
    with pytest.raises(ValueError, match="rank 13 exceeds half of the smaller side of q"):
        start_of("lora-ga:file")[0].check_rank(Site("q", 32, 24, 13, 1.0))


def test_lora_sb_takes_the_best_core_to_the_step_of_adam_and_not_to_the_gradient():
    A, B = bases("lora-sb")
    step = -np.sign(G)
    best = np.linalg.norm(np.linalg.svd(step)[1][:4])
    assert np.linalg.norm(B.T @ step @ A.T) == pytest.approx(best, rel=1e-9)
    of_public = bases("public")
    assert np.linalg.norm(B.T @ G @ A.T) < np.linalg.norm(of_public[1].T @ G @ of_public[0].T)


@pytest.mark.parametrize("family", ["frozen-a", "bra", "diagonal"])
def test_a_protected_input_gives_the_outputs_of_the_base_whatever_is_trained(family, checkpoint):
    adapted = adapted_model(checkpoint("bert"), "classification", family)
    inputs, draw = torch.randn(20, 32, generator=torch.Generator().manual_seed(1)), np.random.default_rng(2)
    state = initial_tensors(adapted, init="protect", seed=0, inputs=lambda site: inputs)
    for spec in adapted.layout.trained:
        state[spec.name] = draw.normal(0, 0.5, spec.shape).astype(np.float32)
    turned = [Svd().apply(state, adapted.layout, {}, 1, np.random.default_rng(0)).state] if family == "frozen-a" else []
    mixed = torch.from_numpy(draw.standard_normal((50, 20))).float() @ inputs
    mixed /= mixed.norm(dim=1, keepdim=True)
    for trained in (state, *turned):
        adapted.write(trained)
        for module in adapted.layout.modules:
            layer, base = adapted.model.get_submodule(module), adapted.base_layer(module)
            with torch.no_grad():
                torch.testing.assert_close(layer(mixed), base(mixed), atol=1e-6, rtol=1e-6)
                other = torch.eye(32)
                assert (layer(other) - base(other)).abs().max() > 0.1, "the layer is adapted elsewhere"


@pytest.mark.parametrize("family", ["lora", "row-scale"])
def test_protection_is_not_promised_where_training_would_end_it(family, checkpoint):
    adapted = adapted_model(checkpoint("bert"), "classification", family)
    told = {"lora": "which would read the protected ones after its first step; choose --init avoid:FILE",
            "row-scale": "gives no V"}
    with pytest.raises(ValueError, match=told[family]):
        initial_tensors(adapted, init="protect", seed=0, inputs=lambda site: torch.eye(32))
