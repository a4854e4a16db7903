"""What each robust reduction computes and withstands, as theorems, and whole runs with them."""

import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedlora import registry
from fedlora.config import ServerConfig, SimulationConfig, read_config
from fedlora.plan import Proposal
from fedlora_server import checkpoint as files
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_server.round_state import RoundOptions
from fedlora_server.rounds import Run, run_federation
from fedlora_server.run_setup import about_the_reduction, fewest_uploads, find_model, prepare, recipe_of
from fedlora_simulations.in_process import InProcessEngine
from fedlora_strategies import FedSVD, FFALoRA, strategy_class
from fedlora_strategies.messages import to_tensors
from fedlora_strategies.recipe import REDUCTIONS
from fedlora_strategies.reductions._blocks import BLOCK
from fedlora_strategies.reductions.mean import Mean
from fedlora_strategies.reductions.median import Median
from fedlora_strategies.reductions.multi_krum import MultiKrum
from fedlora_strategies.reductions.norm_clip import NormClip
from fedlora_strategies.reductions.trimmed_mean import TrimmedMean
from tests.federation import STRATEGIES, LinearSession, layout_of, plan_of, start_of
from tests.server.test_checkpoint import Crashing, crashed, federation, resumed
from tests.server.test_rounds import Federation, replace, same
from tests.server.test_rounds_over_grpc import serve
from tests.strategies.test_screening import Times, clients, one_round

ROBUST = tuple(key for key in registry.keys(REDUCTIONS) if not registry.load(REDUCTIONS, key).REDUCTION.linear)
UNWEIGHTED = Median(), TrimmedMean(), MultiKrum()


def reduced(reduction, rows, weights=None, sent=None):
    """Reduce uploads of one tensor; `rows` are [uploads, values]."""
    gathering = reduction.begin({} if sent is None else {"x": np.float32(sent)})
    for row, weight in zip(np.float32(rows), weights or [1.0] * len(rows), strict=True):
        gathering.add({"x": row}, weight)
    return gathering.result()["x"].astype(np.float64)


def uploads(count, values=7, bound=1e6):
    return arrays(np.float32, (count, values), elements=st.floats(-bound, bound, width=32))


def furthest(result, rows):
    return max(np.linalg.norm(result - row) for row in rows.astype(np.float64))


def diameter(rows):
    return max(furthest(row, rows) for row in rows.astype(np.float64))


def rounding(rows):
    """Return how far float32 can be from the exact result."""
    return 1e-6 * np.abs(rows).max() + 1e-30


@given(uploads(4), uploads(1, bound=2.0**60), st.integers(0, 4))
def test_with_one_of_five_arbitrary_each_value_stays_between_those_of_the_other_four(honest, hostile, place):
    together = np.insert(honest, place, hostile[0], axis=0)
    for reduction in (Median(), TrimmedMean(trim=0.2)):
        assert reduction.withstands(5) >= 1
        result = reduced(reduction, together)
        assert (honest.min(axis=0) <= result).all() and (result <= honest.max(axis=0)).all()


@given(uploads(4), uploads(1, bound=2.0**60), st.integers(0, 4))
def test_with_one_of_five_arbitrary_krum_ends_within_two_diameters_of_the_other_four(honest, hostile, place):
    together = np.insert(honest, place, hostile[0], axis=0)
    for m in (0, 1, 3):
        result = reduced(MultiKrum(f=1, m=m), together)
        assert furthest(result, honest) <= 2 * diameter(honest) + rounding(honest)


@given(uploads(9, values=3), uploads(3, values=3, bound=2.0**60))
def test_with_three_of_twelve_arbitrary_krum_keeps_what_is_as_near_to_an_honest_upload_as_it_says(honest, hostile):
    n, f, apart = 12, 3, diameter(honest)
    near = apart * np.sqrt((n - f - 2) / (n - 2 * f - 1))
    for m in (0, 1):
        result = reduced(MultiKrum(f=f, m=m), np.concatenate([hostile, honest]))
        assert furthest(result, honest) <= near + apart + rounding(honest)


@given(uploads(3), uploads(2, bound=2.0**60), arrays(np.float32, 7, elements=st.floats(-100, 100, width=32)))
def test_with_two_of_five_arbitrary_norm_clip_moves_no_further_than_some_honest_client(honest, hostile, sent):
    moved = reduced(NormClip(), np.concatenate([hostile, honest]), sent=sent) - sent.astype(np.float64)
    longest = furthest(sent.astype(np.float64), honest)
    assert np.linalg.norm(moved) <= longest + rounding(np.array([longest, *sent]))


@given(uploads(5), uploads(1, bound=2.0**60), st.floats(1e-3, 1e3))
def test_with_a_bound_one_arbitrary_upload_of_five_moves_norm_clip_by_two_fifths_of_it(rows, hostile, bound):
    one, other = (reduced(NormClip(bound), np.concatenate([rows[:4], last])) for last in (rows[4:], hostile))
    assert np.linalg.norm(one - other) <= 2 / 5 * bound * (1 + 1e-5) + 1e-30


@given(uploads(6, bound=100.0), st.permutations(range(6)))
def test_the_order_of_clients_changes_no_bit_of_what_is_sorted_and_krum_keeps_the_same_ones(rows, order):
    for reduction in (Median(), TrimmedMean()):
        assert np.array_equal(reduced(reduction, rows), reduced(reduction, rows[order]))
    np.testing.assert_allclose(reduced(MultiKrum(), rows), reduced(MultiKrum(), rows[order]), rtol=1e-5, atol=1e-5)


@given(uploads(5))
def test_equal_uploads_come_out_bit_for_bit(rows):
    alike = np.repeat(rows[:1], 5, axis=0)
    for reduction in (*UNWEIGHTED, NormClip()):
        assert np.array_equal(reduced(reduction, alike), alike[0])


def test_they_are_what_their_formulas_say():
    rows = np.random.default_rng(0).standard_normal((7, 5))
    rows32 = np.float32(rows).astype(np.float64)
    np.testing.assert_allclose(reduced(Median(), rows), np.median(rows32, axis=0), rtol=1e-6)
    np.testing.assert_allclose(reduced(Median(), rows[:6]), np.median(rows32[:6], axis=0), rtol=1e-6)
    np.testing.assert_allclose(reduced(TrimmedMean(0.3), rows), np.sort(rows32, axis=0)[2:5].mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(reduced(TrimmedMean(0), rows), rows32.mean(axis=0), rtol=1e-5)
    scores = []
    for one in rows32:
        squares = sorted(np.square(one - other).sum() for other in rows32)
        scores.append(sum(squares[1:1 + 7 - 2 - 2]))
    kept = np.argsort(scores)[:3]
    np.testing.assert_allclose(reduced(MultiKrum(f=2, m=3), rows), rows32[kept].mean(axis=0), rtol=1e-5)
    sent, weights = np.float32([1, 2, 3, 4, 5]), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    updates = rows32 - sent
    norms = np.linalg.norm(updates, axis=1)
    clipped = updates * np.minimum(1, np.sort(norms)[3] / norms)[:, None]
    np.testing.assert_allclose(reduced(NormClip(), rows, weights, sent),
                               sent + np.average(clipped, axis=0, weights=weights), rtol=1e-5)


def test_a_tensor_of_several_blocks_is_reduced_as_one():
    rows = np.random.default_rng(0).standard_normal((5, 2 * BLOCK + 3)).astype(np.float32)
    np.testing.assert_array_equal(reduced(Median(), rows), np.median(rows, axis=0))
    far = np.argmax([sum(np.square(one - other, dtype=np.float64).sum() for other in rows) for one in rows])
    rows[far] *= 3
    np.testing.assert_allclose(reduced(MultiKrum(), rows), np.delete(rows, far, axis=0).mean(axis=0), atol=1e-5)


def test_a_client_counts_once_whatever_it_claims_but_with_norm_clip_as_in_the_mean():
    rows, claims = np.random.default_rng(0).standard_normal((5, 7)), [1.0, 100.0, 2.0, 50.0, 3.0]
    for reduction in UNWEIGHTED:
        assert np.array_equal(reduced(reduction, rows), reduced(reduction, rows, claims))
    assert not np.allclose(reduced(NormClip(), rows), reduced(NormClip(), rows, claims))
    assert np.array_equal(reduced(NormClip(1e6), rows, claims, rows[0]), reduced(Mean(), rows, claims)), "not clipped"


def test_krum_keeps_all_that_tie_so_that_names_decide_nothing():
    corners = [[0.0, 1.0], [1.0, 0.0], [0.0, -1.0], [-1.0, 0.0], [100.0, 100.0]]
    np.testing.assert_allclose(reduced(MultiKrum(f=1, m=1), corners), [0.0, 0.0], atol=1e-7)


@pytest.mark.parametrize(("reduction", "fewest", "withstood"), [
    (Mean(), 1, 0), (Median(), 3, 4), (TrimmedMean(), 5, 2), (TrimmedMean(0.29), 4, 2), (TrimmedMean(0.1), 10, 1),
    (TrimmedMean(0.4999), 3, 4), (TrimmedMean(0.0), 1, 0), (MultiKrum(), 5, 1), (MultiKrum(f=2), 7, 2),
    (MultiKrum(f=1, m=8), 9, 1), (MultiKrum(f=0), 3, 0), (MultiKrum(f=4), 11, 0), (NormClip(), 3, 4),
    (NormClip(1.0), 1, 4)])
def test_each_says_how_many_uploads_it_needs_and_how_many_of_ten_it_withstands(reduction, fewest, withstood):
    assert (reduction.fewest, reduction.withstands(10)) == (fewest, withstood)
    assert TrimmedMean(0.29).withstands(100) == 29, "not rounded below what was asked for"


@pytest.mark.parametrize(("name", "options", "told"), [
    ("trimmed-mean", {"trim": 0.5}, "below 0.5"), ("trimmed-mean", {"trim": -0.1}, "at least 0"),
    ("multi-krum", {"f": -1}, "at least 0"), ("multi-krum", {"f": 1.5}, "whole number"),
    ("multi-krum", {"n": 3}, "multi-krum has the options f, m"), ("median", {"f": 1}, "median has no options"),
    ("norm-clip", {"bound": -1}, "must be positive"), (None, {"trim": 0.1}, "mean has no options"),
    ("mode", {}, "choose one of")])
def test_an_option_that_is_wrong_is_told(name, options, told):
    with pytest.raises(ValueError, match=told):
        FedSVD.recipe.with_reduction(name, options)


# From the command line.


def given_to(config, *flags):
    return read_config(config, list(flags))


def test_flags_choose_the_reduction_and_its_options():
    options = given_to(ServerConfig, "--reduction=multi-krum", "--reduction-options=f=2,m=3")
    assert recipe_of(options, "fedsvd").reduction == MultiKrum(f=2, m=3)
    assert recipe_of(given_to(ServerConfig), "fedsvd").reduction == Mean()
    with pytest.raises(ValueError, match=r"--reduction-options: trim is 0\.7"):
        recipe_of(given_to(ServerConfig, "--reduction=trimmed-mean", "--reduction-options=trim=0.7"), "fedsvd")


def test_a_reduction_that_does_not_exist_is_told_with_those_that_do(capsys):
    with pytest.raises(SystemExit):
        given_to(ServerConfig, "--reduction=majority")
    assert "trimmed-mean" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "told"), [
    ([], "multi-krum, f 2, m 0 needs at least 7 uploads in a round, and --min-clients is 6; raise --min-clients to 7"),
    (["--clients-per-round=5"], "7 uploads in a round, and --clients-per-round is 5"),
    (["--min-replies=4"], "7 uploads in a round, and --min-replies is 4")])
def test_too_small_a_cohort_is_an_error_with_both_numbers_before_the_run_begins(flags, told):
    options = given_to(ServerConfig, "--reduction=multi-krum", "--reduction-options=f=2", *flags)
    with pytest.raises(ValueError, match=told):
        fewest_uploads(options, "fedsvd", 6 if not flags else 9, "--min-clients")
    assert fewest_uploads(given_to(ServerConfig), "fedsvd", 1, "--min-clients") == 1


def test_a_strategy_whose_average_is_exact_says_that_it_is_so_no_longer():
    options = given_to(SimulationConfig, "--reduction=median")
    assert "no longer exactly the mean" in about_the_reduction(options, "fedsvd")[0]
    assert not about_the_reduction(options, "fedavg-lora"), "it never was"
    assert not about_the_reduction(given_to(SimulationConfig), "fedsvd")
    plan, layout = plan_of("fedsvd"), layout_of("frozen-a")
    robust = FedSVD(plan, layout, recipe=recipe_of(options, "fedsvd"))
    assert not robust.exact and not robust.linear and FedSVD(plan, layout).exact


# Whole rounds and runs.


def recipe_with(strategy, name):
    return strategy_class(strategy).recipe.with_reduction(name, {})


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_hostile_client_that_is_not_screened_does_not_decide_the_state(strategy, name):
    """The state after a round of five, in which one sends a million times its update, is near that of the honest."""
    def state_of(reduction, **how):
        plan = plan_of(strategy)
        layout = layout_of(plan.family)
        made = strategy_class(strategy)(plan, layout, recipe=recipe_with(strategy, reduction))
        made.screen = float("inf")
        arrays, metrics = one_round(made, clients(layout, "c", **how), layout, start_of(layout, 1))
        return to_tensors(arrays), metrics["update_norm"]

    _, usual = state_of("mean")
    _, hostile = state_of("mean", factor=1e6)
    _, robust = state_of(name, factor=1e6)
    assert hostile > 1e4 * usual and robust < 2 * usual


@pytest.mark.parametrize("name", ROBUST)
def test_screening_works_beside_them(name):
    plan = plan_of("ffa-lora")
    layout = layout_of(plan.family)

    def state_of(*hostile):
        strategy = FFALoRA(plan, layout, recipe=recipe_with("ffa-lora", name))
        sessions = [*hostile, *(LinearSession(each, layout) for each in "abdefg")]
        return to_tensors(one_round(strategy, sessions, layout, start_of(layout, 1))[0]), strategy

    (screened, strategy), (without, _) = state_of(Times("c", layout, 1e6)), state_of()
    assert len(strategy.rejected) == 1 and same(screened, without)


def test_a_round_that_is_left_with_too_few_uploads_changes_nothing_and_says_why():
    plan = plan_of("ffa-lora")
    layout = layout_of(plan.family)
    strategy = FFALoRA(plan, layout, recipe=recipe_with("ffa-lora", "multi-krum"))
    assert one_round(strategy, clients(layout, "c", factor=1e6), layout, start_of(layout, 1)) == (None, None)
    assert len(strategy.rejected) == 5
    assert sum("4 usable uploads, and the run's reduction needs 5" in why for why in strategy.rejected.values()) == 4
    assert strategy.usual_norms == () and strategy.memory == strategy.step.begin(start_of(layout, 1))


def test_a_run_goes_on_after_a_round_that_changed_nothing():
    run = Federation("abcde", strategy="ffa-lora", recipe=recipe_with("ffa-lora", "multi-krum"))
    replace(run, "b", Times("b", run.layout, 1e6))
    result = run.run(min_clients=5)
    assert result.ended == "finished" and same(result.state, run.start)
    assert all(len(record.rejected) == 5 and record.update_norm is None for record in result.records)


def test_no_round_closes_with_fewer_uploads_than_the_reduction_needs():
    """One of four does not answer. Half of them would do for a mean; the reduction here needs all."""
    enough = Federation("abcd", silent="d").run(min_clients=4, round_timeout_s=0.5)
    short = Federation("abcd", silent="d").run(min_clients=4, round_timeout_s=0.5, fewest_uploads=4)
    assert enough.ended == "finished" and short.ended == "wait-timeout" and not short.rounds
    assert RoundOptions(seed=0, min_clients=4, fewest_uploads=5).rounds_within(10, 10) == 0


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_is_taken_up_bit_for_bit(strategy, name, tmp_path):
    recipe = recipe_with(strategy, name).with_optimizer("momentum", {"lr": 0.5})
    made = dict(strategy=strategy, recipe=recipe, max_participations=4)
    whole = federation(**made).run(clients_per_round=5)
    first = crashed(tmp_path, Crashing(finished=2), federation(**made), clients_per_round=5)
    result = resumed(tmp_path, first, recipe=recipe, clients_per_round=5)
    assert result.ended == "finished" and result.resumed == (2,) and same(result.state, whole.state)


def test_another_reduction_cannot_take_up_a_run(tmp_path):
    run, krum = federation(), FedSVD.recipe.with_reduction("multi-krum", {"f": 1})
    files.begin(tmp_path, {}, run.plan, {}, (), krum.described())
    left = files.take_up(tmp_path)
    left.check(run.plan, krum.described())
    for other in (FedSVD.recipe, FedSVD.recipe.with_reduction("multi-krum", {"f": 1, "m": 2})):
        with pytest.raises(ValueError, match=r"reduction.*multi-krum.*now"):
            left.check(run.plan, other.described())


@pytest.mark.parametrize("name", ROBUST)
def test_grpc_and_one_process_end_with_the_same_bits(name, tmp_path):
    plan = plan_of("fedsvd", wire_dtype="bf16")
    layout, recipe = layout_of(plan.family), recipe_with("fedsvd", name)
    options = dict(seed=5, min_clients=5, min_replies=5)

    def run_of(engine):
        return run_federation(engine, Run(FedSVD(plan, layout, recipe=recipe), start_of(layout, 1),
                                          RoundOptions(**options, wait_timeout_s=20.0)))

    alone = run_of(InProcessEngine({each: LinearSession(each, layout) for each in "edbca"}, plan.run_id, layout))
    engine = GrpcEngine("127.0.0.1:0", Proposal(plan), tmp_path)
    engine.expect(layout)
    threads = [threading.Thread(target=serve, args=(LinearSession(each, layout), engine.address, 99), daemon=True)
               for each in "abcde"]
    for thread in threads:
        thread.start()
    try:
        over_grpc = run_of(engine)
    finally:
        engine.close("the test is over")
    for thread in threads:
        thread.join(10.0)
    assert over_grpc.ended == alone.ended == "finished" and same(over_grpc.state, alone.state)


@pytest.mark.parametrize("name", ROBUST)
def test_beside_the_uploads_little_is_in_memory(name):
    """Ten uploads of 400,000 values, 16 MB: what is added is a result in float32 or float64, and blocks."""
    values = 400_000
    rows = [{"a": row[:values // 2], "b": row[values // 2:]}
            for row in np.random.default_rng(0).standard_normal((10, values), np.float32)]
    gathering = registry.load(REDUCTIONS, name).REDUCTION().begin(rows[0])
    for row in rows:
        gathering.add(row, 1.0)
    tracemalloc.start()
    gathering.result()
    added = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert added < 8 * values * 4 + 12 * 10 * 8 * BLOCK // 2


def test_the_sketches_of_a_private_start_are_reduced_by_it_too(checkpoint):
    options = given_to(SimulationConfig, f"--model={checkpoint('bert')}", "--init=dp", "--reduction=median")
    made = prepare(options, "fedsvd", find_model(options), ("no", "yes"), 0)
    assert made.start.step.reduction == made.strategy.step.reduction == Median()
