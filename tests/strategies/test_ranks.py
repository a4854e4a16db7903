"""Ranks that change from round to round: what the server decides, what travels, and what stays as it was."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from fedlora import registry
from fedlora_server import checkpoint
from fedlora_strategies import strategy_class
from fedlora_strategies.messages import read_train_messages, to_record, to_tensors
from fedlora_strategies.schedules._ranks import noise_limit, scored
from fedlora_strategies.schedules.grow import Grow
from fedlora_strategies.schedules.nested import Nested
from fedlora_strategies.schedules.shrink import Shrink
from fedlora_strategies.step import kept_ranks
from tests.covering import WHOLE, few
from tests.federation import COLUMNS, ROWS, layout_of, plan_of, start_of, update_of
from tests.server.test_checkpoint import Crashing, crashed, federation, resumed
from tests.server.test_rounds import same

MODULES = ("a.q", "b.q", "c.q", "d.q")
CHANGING = ("grow:3", "shrink:3", "nested")
"""Forms of --ranks that fit the linear clients' adapters: two layers of rank 2."""

WAYS = list(itertools.product(["ffa-lora", "fedavg-lora"], CHANGING))
runs = pytest.mark.parametrize(("strategy", "ranks"), WAYS if WHOLE else WAYS[1::2])


def changing(strategy, ranks, rounds=4):
    return strategy_class(strategy).recipe.with_ranks(ranks, rounds)


def decided(schedule, changes, rank=4, family="frozen-a"):
    """Return (layout, state before, state after, memory) of a decision, after B has changed by `changes`."""
    layout = layout_of(family, rank=rank, modules=MODULES, head=False)
    start = start_of(layout, 0)
    own = schedule.begin(layout, start)
    state = {**start, **{f"{m}.B": np.asarray(B, np.float32) for m, B in zip(MODULES, changes, strict=True)}}
    after, own = schedule.between(state, layout, own, schedule.last, np.random.default_rng(0))
    return layout, state, after, own


def eighths(shape, seed=0):
    """Return values of which every sum of a few products is exact."""
    return np.round(8 * np.random.default_rng(seed).standard_normal(shape)) / 8


def test_the_score_of_pure_noise_has_mean_one_and_the_spread_that_the_limit_assumes():
    d_out, columns = 384, 400
    z = np.concatenate(scored([np.random.default_rng(i).normal(0, 3.0, (d_out, 40)) for i in range(columns // 40)]))
    spread = math.sqrt(2 / d_out)
    assert abs(z.mean() - 1) < 3 * spread / math.sqrt(columns) + 2 / (3 * d_out)
    assert z.std() == pytest.approx(spread, rel=0.15)
    assert 0.9 < (z < noise_limit(d_out)).mean() < 1


def test_what_has_not_changed_at_all_scores_as_noise():
    assert [list(z) for z in scored([np.zeros((7, 2)), np.zeros((7, 1))])] == [[1.0, 1.0], [1.0]]


def test_growth_gives_the_layers_that_change_most_new_ranks_and_changes_no_update():
    changes = [np.pad(scale * np.ones((ROWS, 1)), ((0, 0), (0, 3))) for scale in (1, 3, 2, 0.5)]
    for total, ranks in ((4, [1, 1, 1, 1]), (7, [1, 3, 2, 1]), (12, [2, 4, 4, 2]), (16, [4] * 4)):
        layout, state, after, own = decided(Grow(total), changes)
        assert own["ranks"].tolist() == ranks and same(after, state)
        assert Grow(total).prefixes(3, layout, own, None) == {
            m: rank for m, rank in zip(MODULES, ranks, strict=True) if rank < 4}


def test_growth_gives_half_of_the_new_ranks_first_and_begins_with_one_in_each_layer():
    layout, schedule = layout_of("lora", rank=4, modules=MODULES), Grow(12, first=2, last=4)
    state = start_of(layout, 0)
    own, seen = schedule.begin(layout, state), []
    for number in range(1, 7):
        seen.append(sum(schedule.prefixes(number, layout, own, None).get(m, 4) for m in MODULES))
        state, own = schedule.between(state, layout, own, number, np.random.default_rng(0))
    assert seen == [4, 4, 8, 8, 12, 12]


def test_a_decision_whose_round_had_no_usable_uploads_is_made_after_the_next():
    layout, schedule = layout_of("lora", rank=4, modules=MODULES), Grow(12, first=2, last=4)
    state = start_of(layout, 0)
    own, seen = schedule.begin(layout, state), []
    for number in (1, 3, 5, 6):
        state, own = schedule.between(state, layout, own, number, np.random.default_rng(0))
        seen.append(own["ranks"].sum())
    assert seen == [4, 8, 12, 12]


@pytest.mark.parametrize("family", ["frozen-a", "lora"])
def test_ranks_that_noise_explains_go_and_the_others_move_to_the_front_with_their_rows(family):
    changes = [eighths((ROWS, 4), seed) for seed in range(4)]
    for m, j in ((0, 1), (0, 3), (1, 2), (2, 0), (3, 0), (3, 3)):
        changes[m][:, j] *= 64
    layout, state, after, own = decided(Shrink(6, last=2), changes, family=family)
    assert own["ranks"].tolist() == [2, 1, 1, 2] and kept_ranks(layout, {"schedule/ranks": own["ranks"]}) == {
        "a.q": 2, "b.q": 1, "c.q": 1, "d.q": 2}
    np.testing.assert_array_equal(after["a.q.B"][:, :2], state["a.q.B"][:, [1, 3]])
    np.testing.assert_array_equal(after["a.q.A"], state["a.q.A"][[1, 3, 0, 2]])
    assert not after["a.q.B"][:, 2:].any() and np.array_equal(state["a.q.B"], changes[0]), "the state given is whole"
    layout.check(after, "state")


def test_retiring_ranks_whose_column_is_zero_changes_no_update():
    changes = [eighths((ROWS, 4), seed) for seed in range(4)]
    for m, j in ((0, 1), (1, 0), (2, 2), (3, 3)):
        changes[m][:, j] = 0
    exact = {f"{m}.A": eighths((4, COLUMNS), seed).astype(np.float32) for seed, m in enumerate(MODULES)}
    layout = layout_of("frozen-a", rank=4, modules=MODULES, head=False)
    state = {**exact, **{f"{m}.B": B.astype(np.float32) for m, B in zip(MODULES, changes, strict=True)}}
    schedule = Shrink(12)
    own = schedule.begin(layout, {**state, **{f"{m}.B": np.zeros((ROWS, 4), np.float32) for m in MODULES}})
    after, own = schedule.between(state, layout, own, schedule.last, np.random.default_rng(0))
    assert own["ranks"].tolist() == [3] * 4
    for m in MODULES:
        np.testing.assert_array_equal(update_of(after, m), update_of(state, m))


def test_only_noise_is_retired_at_first_and_each_layer_keeps_a_rank():
    loud = [np.ones((ROWS, 4)) for _ in MODULES]
    for m, j in ((0, 0), (0, 1), (1, 2), (2, 0), (3, 3)):
        loud[m][:, j] *= 64
    layout, schedule = layout_of("frozen-a", rank=4, modules=MODULES, head=False), Shrink(4, first=1, last=2)
    state = start_of(layout, 0)
    own = schedule.begin(layout, state)
    for number, ranks in ((1, [2, 1, 1, 1]), (2, [1, 1, 1, 1])):
        state = {**state, **{f"{m}.B": B.astype(np.float32) for m, B in zip(MODULES, loud, strict=True)}}
        state, own = schedule.between(state, layout, own, number, np.random.default_rng(0))
        assert own["ranks"].tolist() == ranks


def test_nested_draws_every_rank_and_the_same_one_for_all_layers_whenever_it_is_asked():
    layout, drawn = layout_of("lora", rank=4), []
    for number in range(1, 60):
        found = [Nested().prefixes(number, layout, {}, np.random.default_rng((0, number))) for _ in range(2)]
        assert found[0] == found[1] and len(set(found[0].values())) <= 1 and len(found[0]) in (0, 2)
        drawn.append(next(iter(found[0].values()), 4))
    assert set(drawn) == {1, 2, 3, 4}


@runs
def test_bytes_are_those_of_the_active_ranks_and_nothing_else_moves(strategy, ranks):
    run = federation(strategy=strategy, recipe=changing(strategy, ranks, 8), rounds=8, max_participations=8)
    sizes = []
    configure = run.strategy.configure_train

    def watched(number, arrays, *rest):
        messages = configure(number, arrays, *rest)
        [(_, plan, sent), *_] = read_train_messages(messages)
        layout = run.layout.in_round(plan)
        shapes = {spec.name: spec.shape for spec in (*run.layout.frozen, *layout.trained)}
        assert all(array.shape == shapes[name] for name, array in sent.items())
        sizes.append(layout.num_trained)
        return messages

    run.strategy.configure_train = watched
    result = run.run()
    assert result.ended == "finished"
    assert [record.bytes_up for record in result.records] == [4 * 6 * size for size in sizes]
    assert len(set(sizes)) > 1, "the ranks change"
    if ranks != "nested":
        kept = {"layer.0.q": 2, "layer.1.q": 2} | kept_ranks(run.layout, run.strategy.memory)
        assert sum(kept.values()) == 3
        assert not any(result.state[f"{module}.B"][:, rank:].any() for module, rank in kept.items())
        assert run.strategy.traffic.up == pytest.approx(np.mean(sizes), rel=0.2)
    else:
        assert run.strategy.traffic.up == round(np.mean(sizes))
    losses = [np.mean([s.loss(state) for s in run.sessions.values()]) for state in (run.start, result.state)]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("wire_dtype", ["fp32", "bf16"])
def test_what_takes_no_part_in_a_round_stays_as_the_server_has_it(wire_dtype):
    run = federation(strategy="ffa-lora", wire_dtype=wire_dtype, recipe=dataclasses.replace(
        strategy_class("ffa-lora").recipe, schedule=Nested()))
    run.strategy.step = dataclasses.replace(run.strategy.step, seed=next(
        seed for seed in range(50) if dataclasses.replace(run.strategy.step, seed=seed).prefixes(1, {})))
    state = {name: np.random.default_rng(0).standard_normal(array.shape).astype(np.float32)
             for name, array in run.start.items()}
    messages = run.strategy.configure_train(1, to_record(state), {}, run.engine)
    arrays, _ = run.strategy.aggregate_train(1, run.engine.send_and_receive(messages))
    after = to_tensors(arrays)
    for module in run.layout.modules:
        assert np.array_equal(after[f"{module}.B"][:, 1:], state[f"{module}.B"][:, 1:])
        assert np.abs(after[f"{module}.B"][:, :1] - state[f"{module}.B"][:, :1]).min() > 0


@runs
def test_a_run_is_taken_up_with_its_ranks_bit_for_bit(strategy, ranks, tmp_path):
    recipe = changing(strategy, ranks)
    whole = federation(strategy=strategy, recipe=recipe).run(clients_per_round=3)
    for when in few(2, 1, 3):
        folder = tmp_path / str(when)
        folder.mkdir()
        first = crashed(folder, Crashing(finished=when), federation(strategy=strategy, recipe=recipe))
        result = resumed(folder, first, recipe=recipe)
        assert result.ended == "finished" and same(result.state, whole.state)
        assert [record.bytes_up for record in result.records] == [record.bytes_up for record in whole.records]


def test_the_memory_of_other_ranks_is_refused(tmp_path):
    recipe = changing("ffa-lora", "grow:3")
    first = crashed(tmp_path, Crashing(finished=1), federation(strategy="ffa-lora", recipe=recipe))
    assert {name.partition("/")[0] for name in checkpoint.take_up(tmp_path).memory} == {"schedule"}
    with pytest.raises(ValueError, match="another server step"):
        resumed(tmp_path, first, recipe=strategy_class("ffa-lora").recipe)


def test_uploads_of_few_ranks_are_the_measure_of_later_ones_by_their_number_of_values():
    """With two clients, earlier rounds are the measure: 1 rank of 64 would otherwise make the whole rank too long."""
    layout, plan = layout_of("frozen-a", rank=4, head=False), plan_of("ffa-lora", rank=4)
    strategy = strategy_class("ffa-lora")(plan, layout, recipe=changing("ffa-lora", "grow:8"))
    under_way = strategy._begin(1, to_record(start_of(layout, 0)))
    assert under_way.longer == pytest.approx(math.sqrt(4)) and strategy.layout.narrowed({}) is strategy.layout
    assert under_way.active.num_trained == 2 * ROWS and layout.num_trained == 2 * 4 * ROWS


@pytest.mark.parametrize(("strategy", "ranks", "why"), [
    ("ffa-lora", "grow:1", "TOTAL from 2 to 4"), ("ffa-lora", "shrink:5", "TOTAL from 2 to 4"),
    ("fed-sb", "nested", "lora or frozen-a"), ("loldu", "grow:3", "lora or frozen-a"),
    ("fedsvd", "nested", "rewrites its factors"), ("rolora", "grow:3", "one-factor")])
def test_what_does_not_fit_is_refused_with_a_remedy(strategy, ranks, why):
    chosen = strategy_class(strategy)
    plan = plan_of(strategy)
    with pytest.raises(ValueError, match=why):
        chosen(plan, layout_of(plan.family), recipe=changing(strategy, ranks))


def test_a_server_optimizer_is_refused():
    with pytest.raises(ValueError, match="--server-optimizer none"):
        strategy_class("ffa-lora")(plan_of("ffa-lora"), layout_of("frozen-a"), recipe=changing(
            "ffa-lora", "nested").with_optimizer("momentum", {}))


def test_each_form_is_that_of_its_file():
    forms = {key: registry.load("fedlora_strategies.schedules", key).SCHEDULE.form
             for key in registry.keys("fedlora_strategies.schedules")}
    assert {key: form.partition(":")[0] for key, form in forms.items() if form} == {
        "grow": "grow", "shrink": "shrink", "nested": "nested"}
