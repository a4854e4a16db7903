"""Clients that train the first ranks of an adapter alone: what they get and send, and what is made of it."""

import numpy as np
import pytest

from fedlora.plan import WIRE_DTYPES
from fedlora_server.round_state import RoundOptions
from fedlora_server.rounds import Run, run_federation
from fedlora_simulations.in_process import InProcessEngine
from fedlora_strategies import strategy_class
from fedlora_strategies.messages import read_reply, to_record, to_tensors
from fedlora_strategies.screening import Measured, Reach, left_out
from tests.federation import COLUMNS, ROWS, STRATEGIES, LinearSession, layout_of, plan_of, start_of, update_of
from tests.server.test_rounds_over_grpc import federate

RANKS = {"a": 1, "c": 1, "d": 2}
"""Those of three of four clients; the adapter's rank is 3."""


def federation(**changes):
    plan = plan_of("flexlora", **changes)
    layout = layout_of("lora", rank=3)
    engine = InProcessEngine({name: LinearSession(name, layout) for name in "abcd"}, plan.run_id, layout)
    return engine, strategy_class("flexlora")(plan, layout), start_of(layout, 1)


def orders_of(engine, strategy, number, arrays):
    nodes = sorted(engine.get_node_ids())
    ranks = [RANKS.get(engine.name_of(node), 99) for node in nodes]
    return strategy.configure_train(number, arrays, {"nodes": nodes, "ranks": ranks}, engine)


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
def test_each_client_trains_its_ranks_and_the_mean_of_the_products_is_cut_to_the_adapters(wire_dtype):
    engine, strategy, state = federation(wire_dtype=wire_dtype)
    arrays = to_record(state)
    for number in (1, 2):
        before, sent = to_tensors(arrays), engine.bytes_down
        messages = orders_of(engine, strategy, number, arrays)
        assert engine.bytes_down == sent
        replies = list(engine.send_and_receive(messages))
        uploads = {engine.name_of(one.metadata.src_node_id): read_reply(one, wire_dtype).tensors for one in replies}
        for name, tensors in uploads.items():
            rank = RANKS.get(name, 3)
            for module in strategy.layout.modules:
                assert tensors[f"{module}.A"].shape == (rank, COLUMNS)
                assert tensors[f"{module}.B"].shape == (ROWS, rank)
        values = 2 * (1 + 3 + 1 + 2) * (ROWS + COLUMNS) + 4 * 3
        assert engine.bytes_down - sent == values * (4 if wire_dtype == "fp32" else 2)
        arrays, figures = strategy.aggregate_train(number, replies)
        after = to_tensors(arrays)
        assert figures["replies"] == 4 and not strategy.rejected
        for module in strategy.layout.modules:
            mean = sum(update_of(tensors, module) for tensors in uploads.values()) / 4
            U, S, Vt = np.linalg.svd(mean)
            np.testing.assert_allclose(update_of(after, module), U[:, :3] * S[:3] @ Vt[:3], atol=1e-6)
            first = {name: array[..., :1] if name.endswith(".B") else array[:1] for name, array in after.items()}
            np.testing.assert_allclose(update_of(first, module), S[0] * np.outer(U[:, 0], Vt[0]), atol=1e-6)
        np.testing.assert_allclose(after["head.out.bias"], sum(t["head.out.bias"] for t in uploads.values()) / 4,
                                   atol=1e-7)
    assert any(not np.array_equal(before[name], after[name]) for name in after)


def test_an_upload_of_another_rank_than_was_ordered_is_left_out():
    engine, strategy, state = federation()
    messages = orders_of(engine, strategy, 1, to_record(state))
    replies = list(engine.send_and_receive(messages))
    strategy._round.ranks.clear()  # as if all had been ordered to train the whole rank
    _, figures = strategy.aggregate_train(1, replies)
    assert figures["replies"] == 1
    assert {engine.name_of(node) for node in strategy.rejected} == set(RANKS)


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
def test_over_grpc_and_in_one_process_the_bits_are_the_same(wire_dtype, tmp_path):
    ranks = {"a": 1, "c": 1}
    over_grpc, _ = federate("flexlora", tmp_path, wire_dtype=wire_dtype, client_ranks=ranks)
    plan, layout = plan_of("flexlora", wire_dtype=wire_dtype), layout_of("lora")
    engine = InProcessEngine({name: LinearSession(name, layout) for name in "abcd"}, plan.run_id, layout)
    alone = run_federation(engine, Run(strategy_class("flexlora")(plan, layout), start_of(layout, 1),
                                       RoundOptions(seed=5, min_clients=4, client_ranks=ranks)))
    assert over_grpc.ended == alone.ended == "finished" and not alone.records[-1].rejected
    assert all(np.array_equal(over_grpc.state[name], alone.state[name]) for name in alone.state)
    whole = run_federation(InProcessEngine({name: LinearSession(name, layout) for name in "abcd"}, plan.run_id, layout),
                           Run(strategy_class("flexlora")(plan, layout), start_of(layout, 1),
                               RoundOptions(seed=5, min_clients=4)))
    assert alone.records[-1].bytes_up < whole.records[-1].bytes_up
    assert any(not np.array_equal(whole.state[name], alone.state[name]) for name in alone.state)


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "flexlora"])
def test_every_other_strategy_refuses_them_by_name(name):
    plan = plan_of(name)
    strategy = strategy_class(name)(plan, layout_of(plan.family))
    with pytest.raises(ValueError, match=f"--client-ranks: {name} averages tensors of one shape"):
        strategy.check_ranks([1])


def test_a_rank_above_the_adapters_is_refused():
    _, strategy, _ = federation()
    strategy.check_ranks([1, 3])
    with pytest.raises(ValueError, match="--client-ranks has a rank of 4, and the adapter's is 3"):
        strategy.check_ranks([1, 4])


def test_updates_of_fewer_ranks_are_compared_as_if_they_had_all():
    """Three clients of rank 1 and an honest one of rank 36, whose update is six times as long."""
    small = {node: Measured(1.0, longer=6.0) for node in (1, 2, 3)}
    assert not left_out({**small, 4: Measured(6.0)}, 5.0, (), Reach())
    assert left_out({**small, 4: Measured(31.0)}, 5.0, (), Reach()).keys() == {4}
    assert left_out({**small, 4: Measured(6.0), 5: Measured(5.1, longer=6.0)}, 5.0, (), Reach()).keys() == {5}
    assert not left_out({**small, 4: Measured(6.0)}, 5.0, (), Reach(6.0, 0.0, "3 steps")), "the reach is of the norm"
