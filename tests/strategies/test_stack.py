"""What the server puts into the stack beside an adapter: the model stays as it was, or what is lost is told."""

import logging

import numpy as np
import pytest

from fedlora.config import ServerConfig
from fedlora_server.run_setup import find_model, prepare
from fedlora_strategies import FedExLoRA, FedSVD, FedSVDRefresh, FlexLoRA, SwitchLoRA
from fedlora_strategies.refactorizations.exchange import Exchange
from fedlora_strategies.refactorizations.svd_refresh import SvdRefresh
from fedlora_strategies.stack import fold, fresh
from tests.federation import COLUMNS, ROWS, layout_of, plan_of, start_of, update_of
from tests.server.test_checkpoint import Crashing, crashed, federation, resumed
from tests.server.test_rounds import same

MODULE = "layer.0.q"
EXCHANGES = [Exchange(interval=1), Exchange(interval=1, rows=1), SvdRefresh(), SvdRefresh(refresh=2)]


def stacked(slots=0, **changes):
    return layout_of("lora-stack", options=(("slots", float(slots)),), **changes)


def learned(layout, state, seed):
    """Return the state after a round in which B alone has moved."""
    generator = np.random.default_rng(seed)
    return dict(state) | {spec.name: state[spec.name] + generator.standard_normal(spec.shape, np.float32)
                          for spec in layout.trained if spec.name.endswith(".B")}


def rounds_of(part, layout, count):
    """Yield (state before, state after, factors) of each of `count` rounds."""
    state, own = start_of(layout, 0), {}
    for number in range(1, count + 1):
        before = learned(layout, state, number)
        state, own, factors = part.apply(before, layout, own, number, np.random.default_rng(number))
        yield before, state, factors


@pytest.mark.parametrize("part", EXCHANGES, ids=str)
def test_an_exchange_does_not_change_the_model_and_takes_A_out_of_its_row_space(part):
    layout = stacked()
    rows = start_of(layout, 0)[f"{MODULE}.A"].astype(np.float64)
    for before, after, factors in rounds_of(part, layout, 6):  # more than the stack has slots
        layout.check(after, "state")
        for module in layout.modules:
            np.testing.assert_allclose(update_of(after, module), update_of(before, module), atol=3e-6)
            np.testing.assert_allclose(before[f"{module}.B"] @ factors[f"{module}.B"], after[f"{module}.B"], atol=1e-5)
            A = after[f"{module}.A"]
            np.testing.assert_allclose(A @ A.T, np.eye(2), atol=1e-6)
            assert not after[f"{module}.B"][:, -1].any() or part == Exchange(interval=1, rows=1)
    assert np.linalg.norm(after[f"{MODULE}.A"] - after[f"{MODULE}.A"] @ rows.T @ rows) > 0.1


def test_rows_are_exchanged_in_turn_at_their_interval_and_keep_their_lengths():
    layout, part = stacked(), Exchange(interval=2, rows=1)
    for number, (before, after, factors) in enumerate(rounds_of(part, layout, 8), start=1):
        changed = [row for row in range(2) if not np.array_equal(before[f"{MODULE}.A"][row], after[f"{MODULE}.A"][row])]
        assert changed == ([] if number % 2 else [(number // 2 - 1) % 2]) and bool(factors) == bool(changed)
        assert all(not after[f"{MODULE}.B"][:, row].any() for row in changed)
        np.testing.assert_allclose(np.linalg.norm(after[f"{MODULE}.A"], axis=1), 1.0, rtol=1e-6)


def test_what_is_folded_into_empty_slots_keeps_its_bits():
    layout = stacked(4)
    state = learned(layout, start_of(layout, 0), 1)
    B, A = state[f"{MODULE}.B"], state[f"{MODULE}.A"]
    folded = fold(state, MODULE, B, A)
    assert not folded.lost and np.array_equal(folded.stack[f"{MODULE}.D"][:, :2], B)
    again = fold({**state, **folded.stack}, MODULE, A=2 * A, B=B)
    assert np.array_equal(again.stack[f"{MODULE}.C"], np.vstack([A, 2 * A])) and not again.lost


def test_a_stack_that_is_too_small_keeps_the_best_approximation_and_says_what_is_lost(caplog):
    layout, generator = stacked(3), np.random.default_rng(0)
    state = start_of(layout, 0)
    B, A = generator.standard_normal((ROWS, 5), np.float32), generator.standard_normal((5, COLUMNS), np.float32)
    folded = fold(state, MODULE, B, A)
    strengths = np.linalg.svd(B.astype(np.float64) @ A, compute_uv=False)
    off = folded.stack[f"{MODULE}.D"] @ folded.stack[f"{MODULE}.C"] - B @ A
    assert np.linalg.norm(off) == pytest.approx(np.linalg.norm(strengths[3:]), rel=1e-5)
    assert folded.lost == pytest.approx(np.linalg.norm(strengths[3:]) / np.linalg.norm(strengths), rel=1e-5)
    with caplog.at_level(logging.WARNING):
        list(rounds_of(Exchange(interval=1), layout, 1))
        assert not caplog.records
        list(rounds_of(Exchange(interval=1), layout, 3))
    assert "A stack of 3 slots" in caplog.text and "--family-options slots=N" in caplog.text


def test_an_export_has_the_slots_in_use_and_no_more():
    layout = stacked(4)
    state, [site, _] = learned(layout, start_of(layout, 0), 1), layout.sites
    assert layout.family.update(state, site).A.shape == (2, COLUMNS)
    folded = fold(state, MODULE, state[f"{MODULE}.B"][:, :1], state[f"{MODULE}.A"][:1])
    whole = layout.family.update({**state, **folded.stack}, site)
    assert (whole.B.shape, whole.A.shape) == ((ROWS, 3), (3, COLUMNS))
    np.testing.assert_allclose(whole.B @ whole.A, update_of({**state, **folded.stack}, MODULE), atol=1e-6)
    with pytest.raises(ValueError, match="slots is -1"):
        stacked(-1)


def test_fresh_rows_are_orthogonal_to_what_stays_and_fill_the_space():
    rng = np.random.default_rng(0)
    kept = rng.standard_normal((2, 5))
    rows = fresh(kept, np.array([1.0, 2.0, 3.0]), rng)
    np.testing.assert_allclose(rows @ rows.T, np.diag([1.0, 4.0, 9.0]), atol=1e-12)
    np.testing.assert_allclose(rows @ kept.T, 0.0, atol=1e-12)


def combined(strategy, state, uploads, weights):
    gathering = strategy.step.reduction.begin(state)
    for upload, weight in zip(uploads, weights, strict=True):
        gathering.add(upload, weight)
    return {**state, **gathering.result()}


def uploads_of(layout, count):
    generator = np.random.default_rng(7)
    return [{spec.name: generator.standard_normal(spec.shape, np.float32) for spec in layout.trained}
            for _ in range(count)]


def mean_update(state, uploads, weights, module):
    return np.average([update_of({**state, **one}, module) for one in uploads], axis=0, weights=weights)


def test_fedex_lora_ends_at_the_mean_of_the_models_round_after_round():
    layout, weights = stacked(), [3.0, 1.0, 2.0]
    strategy, state = FedExLoRA(plan_of("fedex-lora"), layout), start_of(layout, 0)
    assert strategy.exact and not strategy.linear
    for _ in range(3):
        uploads = uploads_of(layout, 3)
        after = combined(strategy, state, uploads, weights)
        for module in layout.modules:
            mean = mean_update(state, uploads, weights, module)
            np.testing.assert_allclose(update_of(after, module), mean, atol=2e-6)
        average = np.average([one[f"{MODULE}.A"] for one in uploads], axis=0, weights=weights)
        np.testing.assert_allclose(after[f"{MODULE}.A"], average, atol=1e-6)
        state = after


def test_fedex_lora_leaves_the_stack_as_it_is_where_all_agree():
    layout = stacked()
    [upload], state = uploads_of(layout, 1), start_of(layout, 0)
    result = FedExLoRA(plan_of("fedex-lora"), layout).step.reduction.begin(state)
    for _ in range(3):
        result.add(upload, 1.0)
    assert result.result().keys() == upload.keys()


def test_fedex_lora_with_a_small_stack_is_not_exact_and_says_so(caplog):
    layout, weights = stacked(1), [1.0, 1.0, 1.0]
    strategy, state, uploads = FedExLoRA(plan_of("fedex-lora"), layout), start_of(layout, 0), uploads_of(layout, 3)
    after = combined(strategy, state, uploads, weights)
    off = update_of(after, MODULE) - mean_update(state, uploads, weights, MODULE)
    assert not strategy.exact and np.linalg.norm(off) > 0.1 and "A stack of 1 slots" in caplog.text
    moved = FedExLoRA.recipe.with_optimizer("momentum", {})
    assert not FedExLoRA(plan_of("fedex-lora"), stacked(), recipe=moved).exact


def test_flexlora_ends_at_the_best_approximation_of_the_mean_of_the_products():
    layout, weights = layout_of("lora"), [3.0, 1.0, 2.0]
    strategy, state, uploads = FlexLoRA(plan_of("flexlora"), layout), start_of(layout, 0), uploads_of(layout, 3)
    after = combined(strategy, state, uploads, weights)
    mean = mean_update(state, uploads, weights, MODULE)
    lost = np.linalg.norm(np.linalg.svd(mean, compute_uv=False)[2:])
    assert np.linalg.norm(update_of(after, MODULE) - mean) == pytest.approx(lost, rel=1e-5)
    B, A = after[f"{MODULE}.B"], after[f"{MODULE}.A"]
    np.testing.assert_allclose(B.T @ B, A @ A.T, atol=1e-5)


def test_flexlora_of_one_product_is_that_product_and_a_direction_without_strength_can_learn():
    layout = layout_of("lora")
    [upload], state = uploads_of(layout, 1), start_of(layout, 0)
    strategy = FlexLoRA(plan_of("flexlora"), layout)
    after = combined(strategy, state, [upload] * 3, [1.0] * 3)
    np.testing.assert_allclose(update_of(after, MODULE), update_of(upload, MODULE), atol=1e-5)
    upload[f"{MODULE}.B"][:, 1] = 0.0
    after = combined(strategy, state, [upload], [1.0])
    np.testing.assert_allclose(update_of(after, MODULE), update_of(upload, MODULE), atol=1e-5)
    assert (np.linalg.norm(after[f"{MODULE}.A"], axis=1) > 0.1).all()
    upload[f"{MODULE}.B"][:] = 0.0
    assert np.array_equal(combined(strategy, state, [upload], [1.0])[f"{MODULE}.A"], upload[f"{MODULE}.A"])


@pytest.mark.parametrize("optimizer", ["none", "adam"])
def test_an_exchange_is_taken_up_bit_for_bit(optimizer, tmp_path):
    """The server is lost after the checkpoint of round 2 of 4; the rows that it draws depend on seed and round."""
    recipe = SwitchLoRA.recipe.with_options({"interval": 1, "rows": 1}).with_optimizer(optimizer, {})
    whole = federation(strategy="switch-lora", recipe=recipe).run(clients_per_round=3)
    first = crashed(tmp_path, Crashing(finished=2), federation(strategy="switch-lora", recipe=recipe))
    result = resumed(tmp_path, first, recipe=recipe)
    assert result.ended == "finished" and result.resumed == (2,) and same(result.state, whole.state)
    assert whole.state["layer.0.q.D"].any(axis=0).sum() == 4


def test_the_plan_has_as_many_slots_as_the_rounds_fill():
    for recipe, expected in ((SwitchLoRA.recipe, 4 * 3),
                             (SwitchLoRA.recipe.with_options({"interval": 2, "rows": 1}), 10),
                             (FedSVDRefresh.recipe.with_options({"refresh": 2, "warmup": 1}), 2 * 19),
                             (FedExLoRA.recipe, 64), (FedExLoRA.recipe.with_reduction("median", {}), 1)):
        assert recipe.family_options(rank=3, rounds=20) == (("slots", float(expected)),)
    assert SwitchLoRA.recipe.family_options(rank=3, rounds=4) == (("slots", 1.0),)
    assert FedSVD.recipe.family_options(rank=3, rounds=20) == ()


@pytest.mark.parametrize(("given", "slots"), [((), 6), ((("slots", 3.0),), 3)])
def test_clients_are_told_the_slots_in_the_plan(given, slots, checkpoint):
    options = ServerConfig(model=str(checkpoint("bert")), strategy="switch-lora", strategy_options=(("interval", 1.0),),
                           rank=2, rounds=3, max_length=16, labels=("no", "yes"), family_options=given)
    run = prepare(options, "switch-lora", find_model(options), ("no", "yes"), 0)
    assert run.plan.family_options == (("slots", float(slots)),)
    assert {run.state[spec.name].shape[0] for spec in run.adapted.layout.frozen if spec.name.endswith(".C")} == {slots}


def test_what_fills_a_stack_refuses_adapters_without_one_and_wrong_numbers():
    for part in (Exchange(), SvdRefresh()):
        with pytest.raises(ValueError, match="needs adapters of the family 'lora-stack'"):
            part.check(layout_of("frozen-a"))
        with pytest.raises(ValueError, match=r"rank 6 exceeds the smaller side of layer\.0\.q, 4"):
            part.check(stacked(rank=6))
    for family, other in (("frozen-a", "layer.0.q.A"), ("lora-stack", "layer.0.q.C")):
        with pytest.raises(ValueError, match=f"two trained factors.*'{other}'"):
            FlexLoRA.recipe.reduction.check(layout_of(family))
    for options, told in (({"interval": 0}, "interval must be at least 1"), ({"rows": -1}, "rows at least 0")):
        with pytest.raises(ValueError, match=told):
            SwitchLoRA.recipe.with_options(options)
    with pytest.raises(ValueError, match="refresh is 0"):
        FedSVDRefresh.recipe.with_options({"refresh": 0})
