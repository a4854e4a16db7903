"""What a strategy makes of the sum that secure aggregation opens: the same step as from the clients' uploads."""

from dataclasses import replace

import numpy as np
import pytest

from fedlora.plan import AGGREGATE, Upload
from fedlora.secure_sum.integers import Grid
from fedlora.secure_sum.packages import sent_digest
from fedlora.wire import tensors_digest
from fedlora_strategies import Diverged, strategy_class
from fedlora_strategies.messages import read_train_messages, reply, to_record, to_tensors
from fedlora_strategies.recipe import STEPS_AT_SERVER
from tests.federation import STRATEGIES, layout_of, plan_of
from tests.strategies.test_strategies import federation

FACTORS = {"flexlora", "fedex-lora"}
"""Strategies whose reduction reads each client's factors."""

LINEAR = [name for name in STRATEGIES if name not in FACTORS]
CLIENTS = 4


def secure(plan, **changes):
    return replace(plan, mechanism=AGGREGATE, private=True, least_members=3, local_steps=1, optimizer="sgd",
                   weight_by_examples=False, **changes)


def pair(name, recipe=None, **changes):
    """Return a strategy for sums, one for uploads, an engine that knows the clients' ids, and a start."""
    engine, _, state = federation(name, CLIENTS)
    plan = secure(plan_of(name, **{"clip_norm": 2.0, "adapter_scale": 0.5, "head_scale": 3.0} | changes))
    layout = layout_of(plan.family)
    made = recipe or strategy_class(name).recipe
    by_sum = strategy_class(name)(plan, layout, recipe=made)
    by_uploads = strategy_class(name)(replace(plan, mechanism="dp-sgd", least_members=0), layout, recipe=made)
    by_uploads.screen = float("inf")
    return by_sum, by_uploads, engine, state


def rounds_of(by_sum, by_uploads, engine, state, count=3):
    """Run rounds with the same random gradients on both ways; yield (round, state by sum, state by uploads)."""
    generator, arrays = np.random.default_rng(5), {0: to_record(state), 1: to_record(state)}
    plan = by_sum.plan
    grid = Grid.fitting(by_sum.layout.num_trained, clip_norm=plan.clip_norm, expected_batch=plan.expected_batch,
                        members=CLIENTS, noise=1.0)
    for number in range(1, count + 1):
        messages = list(by_uploads.configure_train(number, arrays[1], {}, engine))
        order = by_sum.sum_order(number, arrays[0])
        uploads, total = [], np.zeros(order.values, np.int64)
        for message, order_of, received in read_train_messages(messages):
            active = by_uploads.layout.in_round(order_of)
            assert active.num_trained == order.values
            moved = {}
            for spec in active.trained:
                scale = plan.head_scale if spec.group == "head" else plan.adapter_scale
                drawn = generator.standard_normal(spec.shape) * plan.clip_norm / 10
                summed = np.rint(drawn / grid.step)  # on the grid, so that nothing is rounded on the one way alone
                moved[spec.name] = summed.astype(np.int64)
                change = order_of.lr * summed * grid.step / (plan.expected_batch * scale)
                received = {**received, spec.name: (received[spec.name] - change).astype(np.float32)}
            total += np.concatenate([moved[spec.name].ravel() for spec in active.trained])
            uploads.append(reply(Upload(*order_of.key, tensors={name: received[name] for name in moved}, steps=1,
                                        delta=1e-5, noise_multiplier=1.0), message))
        one, metrics = by_sum.aggregate_sum(number, total, grid, CLIENTS)
        two, said = by_uploads.aggregate_train(number, uploads)
        assert (metrics["replies"], metrics["steps"], metrics["rejected"]) == (CLIENTS, CLIENTS, 0)
        assert metrics["update_norm"] == pytest.approx(said["update_norm"], rel=1e-3)
        arrays = {0: one, 1: two}
        yield number, to_tensors(one), to_tensors(two)


@pytest.mark.parametrize("name", LINEAR)
def test_a_sum_moves_the_state_as_the_uploads_of_its_clients_do(name):
    by_sum, by_uploads, engine, state = pair(name)
    for _, one, two in rounds_of(by_sum, by_uploads, engine, state):
        for key in two:
            np.testing.assert_allclose(one[key], two[key], atol=2e-5, err_msg=key)
    assert any(np.abs(two[key] - state[key]).max() > 1e-3 for key in state), "this test would not see a lost step"


@pytest.mark.parametrize("name", ["fedsvd", "rolora", "switch-lora", "fed-sb"])
def test_adam_at_the_server_remembers_the_same_of_sums_as_of_uploads(name):
    """Also through a refactorization, which turns its memory, and in rounds in which a factor is idle."""
    recipe = replace(strategy_class(name).recipe, optimizer=replace(STEPS_AT_SERVER, tau=1e-3))
    by_sum, by_uploads, engine, state = pair(name, recipe)
    for number, one, two in rounds_of(by_sum, by_uploads, engine, state):
        for key in two:
            np.testing.assert_allclose(one[key], two[key], atol=1e-4, err_msg=f"{key} in round {number}")
        for key, moment in by_uploads.memory.items():
            np.testing.assert_allclose(by_sum.memory[key], moment, rtol=1e-2, atol=1e-6, err_msg=key)


def test_the_memory_of_a_factor_that_is_idle_stays_as_it_is():
    recipe = replace(strategy_class("rolora").recipe, optimizer=STEPS_AT_SERVER)
    by_sum, by_uploads, engine, state = pair("rolora", recipe)
    steps = []
    for _ in rounds_of(by_sum, by_uploads, engine, state):
        steps.append({name.rpartition(".")[2]: int(array[0]) for name, array in by_sum.memory.items()
                      if name.startswith("optimizer/steps/layer.0.q")})
    assert steps == [{"A": 0, "B": 1}, {"A": 1, "B": 1}, {"A": 1, "B": 2}]


def test_adam_s_second_moments_turn_with_fedsvd_s_factors():
    recipe = replace(strategy_class("fedsvd").recipe, optimizer=STEPS_AT_SERVER)
    by_sum, by_uploads, engine, state = pair("fedsvd", recipe)
    before = by_sum.step.begin(state)
    for number, one, _ in rounds_of(by_sum, by_uploads, engine, state, 1):
        moment = by_sum.memory["optimizer/v/layer.0.q.B"]
        assert not np.array_equal(moment, before["optimizer/v/layer.0.q.B"]) and (moment >= 0).all()
        turned = one["layer.0.q.A"] @ state["layer.0.q.A"].T  # takes old coordinates to new ones
        np.testing.assert_allclose(turned @ turned.T, np.eye(2), atol=1e-5)
        assert number == 1 and not np.allclose(np.abs(turned), np.eye(2), atol=1e-2)


@pytest.mark.parametrize("wire_dtype", ["fp32", "bf16"])
def test_the_digest_that_a_cohort_is_told_is_that_of_what_its_members_receive(wire_dtype):
    by_sum, _, engine, state = pair("ffa-lora", wire_dtype=wire_dtype)
    order = by_sum.sum_order(1, to_record(state))
    messages = by_sum.configure_train(1, to_record(state), {}, engine)
    for _, plan, arrays in read_train_messages(messages):
        received = to_tensors(to_record(arrays), wire_dtype)
        trained = {spec.name: received[spec.name] for spec in by_sum.layout.trained}
        assert order.sent == sent_digest(tensors_digest(trained), plan.frozen_sha256)
    assert by_sum.sum_order(1, to_record(state)) == order, "another attempt starts from the same tensors"


@pytest.mark.parametrize("name", sorted(FACTORS))
def test_a_strategy_that_reads_each_client_s_factors_is_refused_for_sums(name):
    plan = secure(plan_of(name))
    with pytest.raises(ValueError, match=r"needs each client's own factors A and B\. Choose a strategy that averages"):
        strategy_class(name)(plan, layout_of(plan.family))


def test_a_robust_reduction_is_refused_for_sums():
    plan = secure(plan_of("ffa-lora"))
    recipe = strategy_class("ffa-lora").recipe.with_reduction("median", {})
    with pytest.raises(ValueError, match=r"its reduction median needs each upload by itself\. Choose --reduction mean"):
        strategy_class("ffa-lora")(plan, layout_of(plan.family), recipe=recipe)


def test_a_sum_whose_state_is_no_good_is_dropped_and_so_is_what_was_remembered_of_it():
    recipe = replace(strategy_class("ffa-lora").recipe, optimizer=STEPS_AT_SERVER)
    strategy, _, _, state = pair("ffa-lora", recipe)
    grid = Grid(2.0, 10, 64, 1 << 40)
    for attempt in range(2):
        order = strategy.sum_order(1, to_record(state))
        memory = strategy.memory
        after, _ = strategy.aggregate_sum(1, np.full(order.values, 1 << 20), grid, 3)
        assert strategy.memory is not memory and after is not None and attempt < 2
        with pytest.raises(Diverged, match="its loss is not finite"):
            strategy.aggregate_again(1, (), "its loss is not finite")
        assert strategy.memory is memory


def test_a_sum_that_leaves_the_range_of_float32_diverges_without_a_second_try():
    strategy, _, _, state = pair("ffa-lora", lr=1e30)
    strategy.sum_order(1, to_record(state))
    memory = strategy.memory
    with pytest.raises(Diverged):
        strategy.aggregate_sum(1, np.full(strategy.layout.num_trained, 1 << 40), Grid(2.0, 10, 64, 1 << 40), 3)
    assert strategy.memory is memory


def test_a_sum_of_another_size_or_of_another_round_is_a_mistake():
    strategy, _, _, state = pair("ffa-lora")
    grid = Grid(2.0, 10, 32, 1 << 20)
    with pytest.raises(ValueError, match="round 1 was not configured"):
        strategy.aggregate_sum(1, np.zeros(3, np.int64), grid, 3)
    values = strategy.sum_order(1, to_record(state)).values
    with pytest.raises(ValueError, match="the sum of round 1 has the shape"):
        strategy.aggregate_sum(1, np.zeros(values + 1, np.int64), grid, 3)
