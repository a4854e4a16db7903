import numpy as np
import pytest
import torch
from peft import MissConfig, get_peft_model

from fedlora import models, registry
from fedlora.adapters import family_of, initial_tensors, start_of
from tests.covering import covering
from tests.families import FAMILIES, TASKS, can
from tests.fedlora.test_adapters import ALPHA, LABELS, RANK, adapted_model, batch, logits
from tests.tiny import KINDS, tiny_checkpoint

OFFLINE = [key for key in registry.keys("fedlora.adapters.starts")
           if registry.load("fedlora.adapters.starts", key).START.reads in ("nothing", "weights")]


def fits(family, init):
    """Return whether a start gives what a family takes of one, and does not say why it is unfit."""
    start, chosen = start_of(init)[0], family_of(family)
    return not start.lacks(chosen) and not start.unfit(chosen)


FITTING = [(family, init) for family in FAMILIES for init in OFFLINE if fits(family, init)]


@pytest.mark.parametrize(("kind", "task", "family", "init"), covering(
    KINDS, TASKS, FAMILIES, OFFLINE, valid=lambda kind, task, family, init: can(kind, task) and fits(family, init)))
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


@pytest.mark.parametrize(("family", "init"), [
    (family, init) for family, init in FITTING if family == "frozen-a" or init in ("orthonormal", "lu", "weight")])
def test_the_seed_decides_every_bit_that_is_drawn(family, init, checkpoint):
    adapted = adapted_model(checkpoint("roberta"), "classification", family)
    first, again, other = (initial_tensors(adapted, init=init, seed=seed) for seed in (1, 1, 2))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    zero = {name for name, values in first.items() if not values.any()}
    drawn = {name for name in first if not np.array_equal(first[name], other[name])}
    of_start = {spec.name for spec in adapted.layout.state if spec.name[-2:] in (".A", ".B", ".V")}
    from_seed = start_of(init)[0].reads == "nothing" and init != "block"
    assert drawn == first.keys() - zero - (set() if from_seed else of_start)


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
    ("lora", "gaussian", 2, "choose one of .*block, dp, .*kaiming, .*nystrom, orthonormal, .*public, .*weight"),
    ("row-scale", "orthonormal", 2, "gives no V; choose --init row-norms"),
    ("diagonal", "lu", 33, r"rank 33 exceeds the smaller side of bert.*LU"),
    ("bra", "kaiming", 2, "gives no B; choose --init .*block, dp, .*lu, .*public:FILE, weight or weight-scaled"),
    ("frozen-a", "orthonormal", 33, r"rank 33 exceeds the smaller side of bert.*\(32 × 32\)"),
    ("bra", "weight", 33, "choose a smaller --rank")])
def test_an_impossible_start_is_refused(family, init, rank, message, checkpoint):
    adapted = adapted_model(checkpoint("bert"), "classification", family, rank=rank, alpha=ALPHA)
    with pytest.raises(ValueError, match=message):
        initial_tensors(adapted, init=init, seed=1)


@pytest.mark.parametrize("family", [family for family in FAMILIES if fits(family, "weight")])
def test_a_from_the_weight_holds_its_leading_right_singular_vectors(family, checkpoint):
    adapted = adapted_model(checkpoint("bert"), "classification", family)
    state = initial_tensors(adapted, init="weight", seed=1)
    for module in adapted.layout.modules:
        A = state[f"{module}.A"]
        leading = np.linalg.svd(adapted.base_weight(module).double().numpy())[2][:len(A)]
        np.testing.assert_allclose(np.abs(leading @ A.T), np.eye(len(A)), atol=1e-5)


def test_nystrom_factors_span_the_first_rows_and_columns_of_the_weight(checkpoint):
    adapted = adapted_model(checkpoint("llama"), "classification", "bra")
    state = initial_tensors(adapted, init="nystrom", seed=1)
    for module in adapted.layout.modules:
        W0, A, B = adapted.base_weight(module).numpy(), state[f"{module}.A"], state[f"{module}.B"]
        np.testing.assert_allclose(W0[:RANK] @ A.T @ A, W0[:RANK], atol=1e-5)
        np.testing.assert_allclose(B @ B.T @ W0[:, :RANK], W0[:, :RANK], atol=1e-5)


def test_a_quarter_of_a_sparse_a_is_drawn_in_rows_of_length_one(checkpoint):
    adapted = adapted_model(checkpoint("bert"), "classification", "frozen-a", rank=32)
    state = initial_tensors(adapted, init="sparse", seed=1)
    for module in adapted.layout.modules:
        A = state[f"{module}.A"]
        assert (np.count_nonzero(A, axis=1) == 32 / 4).all()
        assert len(np.unique(A != 0, axis=0)) == len(A), "two rows were drawn at the same places"
        np.testing.assert_allclose(np.linalg.norm(A, axis=1), 1, rtol=1e-6)


def test_weight_scaled_factors_have_the_root_of_the_singular_values_on_either_side(checkpoint):
    adapted = adapted_model(checkpoint("llama"), "classification", "bra")
    state = initial_tensors(adapted, init="weight-scaled", seed=1)
    for module in adapted.layout.modules:
        A, B = state[f"{module}.A"], state[f"{module}.B"]
        U, S, Vh = np.linalg.svd(adapted.base_weight(module).double().numpy())
        np.testing.assert_allclose(np.abs(A @ Vh[:RANK].T), np.diag(S[:RANK] ** 0.5), atol=1e-5)
        np.testing.assert_allclose(np.abs(U[:, :RANK].T @ B), np.diag(S[:RANK] ** 0.5), atol=1e-5)
        np.testing.assert_allclose(B @ A, U[:, :RANK] * S[:RANK] @ Vh[:RANK], atol=1e-5)


@pytest.mark.parametrize(("family", "options"), [
    ("frozen-a", {}), ("bra", {"init_weights": "mini", "mini_r": 4})], ids=["whole", "mini"])
def test_miss_is_a_start_of_blocks_with_the_same_trained_values(family, options, checkpoint):
    """PEFT's own layer computes what ours does with B = Dᵀ, or R = Dᵀ, times the lengths of the blocks' ones."""
    base = models.load(checkpoint("bert"), "classification", LABELS).model
    miss = MissConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", **options)
    peft = get_peft_model(base, miss).eval()
    adapted = adapted_model(checkpoint("bert"), "classification", family, rank=4, alpha=4.0)
    state, generator = initial_tensors(adapted, init="block", seed=1), torch.Generator().manual_seed(0)
    length = (32 / 4) ** 0.5  # of a row of ones, where this start's rows have length 1
    x = torch.randn(5, 32, generator=generator)
    for module in adapted.layout.modules:
        assert np.unique(state[f"{module}.A"]).tolist() == pytest.approx([0, 1 / length])
        D = peft.base_model.model.get_submodule(module).miss_block["default"]
        D.data = torch.randn(D.shape, generator=generator)
        trained, factor = ("B", length) if family == "frozen-a" else ("R", length**2)
        state[f"{module}.{trained}"] = (D.detach().T * factor).numpy()
    adapted.write(state)
    with torch.no_grad():
        for module in adapted.layout.modules:
            mine, theirs = (model.get_submodule(module)(x) for model in (adapted.model, peft.base_model.model))
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_a_diagonal_from_lu_takes_the_place_of_the_weights_own(checkpoint):
    """With e = −D and s = 1, what the first r pivots contribute to the weight P·L·D·U is gone."""
    adapted = adapted_model(checkpoint("bert"), "classification", "diagonal", rank=3, alpha=3.0)
    state = initial_tensors(adapted, init="lu", seed=1)
    for site in adapted.layout.sites:
        W0 = adapted.base_weight(site.name).double()
        P, L, U = torch.linalg.lu(W0)
        state[f"{site.name}.e"] = -U.diagonal()[:3].float().numpy()
        rest = (P @ L[:, 3:] @ U[3:]).numpy()
        changed = W0.numpy() + adapted.layout.family.update(state, site).change(W0.numpy())
        np.testing.assert_allclose(changed, rest, atol=1e-7)
        assert np.abs(rest - W0.numpy()).max() > 0.01


def test_a_row_of_zeros_has_no_length_to_train(checkpoint):
    adapted = adapted_model(checkpoint("bert"), "classification", "row-scale")
    with torch.no_grad():
        adapted.base_weight(adapted.layout.modules[0])[1:3] = 0
    with pytest.raises(ValueError, match=r"2 of the 32 rows of .* are all 0"):
        initial_tensors(adapted, init="row-norms", seed=1)


@pytest.mark.parametrize("tie", [1, 2])
def test_a_core_that_sites_share_has_the_sum_of_their_gradients(tie, checkpoint):
    apart = adapted_model(checkpoint("bert"), "classification", "bra")
    tied = adapted_model(checkpoint("bert"), "classification", "bra", options=(("tie", float(tie)),))
    state = initial_tensors(apart, init="orthonormal", seed=1)
    cores = {spec.name: spec.sites for spec in tied.layout.trained if spec.name.startswith("shared.")}
    assert len(cores) == tie and sorted(sum(cores.values(), ())) == sorted(apart.layout.modules)
    apart.write(state)
    tied.write({name: state[name] for name in state if name in tied.parameters()})
    for adapted in (apart, tied):
        adapted.model(**batch()).logits.square().sum().backward()
    for name, sites in cores.items():
        total = sum(apart.parameter(f"{site}.R").grad for site in sites)
        torch.testing.assert_close(tied.parameter(name).grad, total, atol=1e-6, rtol=1e-5)


def test_sites_of_different_ranks_share_no_core(checkpoint):
    first = adapted_model(checkpoint("bert"), "classification", "bra").layout.modules[0]
    tied = adapted_model(checkpoint("bert"), "classification", "bra", options=(("tie", 1.0),), ranks=((first, 2),))
    assert {spec.shape for spec in tied.layout.trained if spec.group == "adapter"} == {(2, 2), (RANK, RANK)}
    with pytest.raises(ValueError, match="tie is 3; it must be"):
        family_of("bra", (("tie", 3.0),))
