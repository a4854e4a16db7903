"""The traffic of a round on a real connection: the values of the communication table, and hardly a byte more."""

import math
import threading

import numpy as np
import pytest

from fedlora.plan import WIRE_DTYPES, Proposal, Upload
from fedlora_client.connection import Connection, Goodbye
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_server.observer import Observer
from fedlora_server.round_state import RoundOptions
from fedlora_server.rounds import Run, run_federation
from fedlora_strategies import strategy_class
from tests.federation import STRATEGIES, layout_of, plan_of
from tests.server.tcp_proxy import TcpProxy

MINILM = tuple(f"bert.encoder.layer.{i}.attention.self.{part}" for i in range(6) for part in ("query", "value"))
RANK = {"fed-sb": 32, "loldu": 384}
FEW_VALUES = {"loldu", "dora-magnitudes"}
"""Strategies whose rounds are so small that names and numbers of the messages count for more than one per cent."""
ROUNDS = 5
OPTIONS = {"switch-lora": {"interval": 1}}
"""Options with which a strategy changes its frozen tensors in every round, as its traffic counts."""
CLIENTS = {"fedex-lora": 2}
"""Numbers of clients, where one is too few: a lone client's upload is its own mean, so nothing is left to stack."""
HTTP2_BYTES = 400
"""Upper bound on one client's pings, window updates and frame headers in a round, for any size of adapter."""


class Meter(Observer):
    """Records how many bytes have passed the proxy at each round's end."""

    def __init__(self, proxy):
        self.proxy, self.seen = proxy, []

    def finished(self, record):
        self.seen.append((self.proxy.bytes_up, self.proxy.bytes_down))

    def per_round(self):
        """Return (up, down) of each round after the first, which alone carries frozen tensors, names and the plan."""
        return [(last - first) / (ROUNDS - 1) for first, last in zip(self.seen[0], self.seen[-1], strict=True)]


def serve(address, layout, number):
    connection = Connection(address, f"client-{number}", private=False, connect_timeout_s=20.0)
    generator = np.random.default_rng(number)
    tensors = {spec.name: generator.standard_normal(spec.shape, dtype=np.float32) for spec in layout.trained}
    try:
        connection.join()
        connection.ready()
        while True:
            plan, _ = connection.next_request()
            trained = layout.in_round(plan)
            sent = trained.cut({spec.name: tensors[spec.name] for spec in trained.trained})
            connection.send(Upload(*plan.key, tensors=sent, steps=1, num_examples=1))
    except Goodbye:
        pass


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_round_moves_one_per_cent_more_bytes_than_its_values_at_most(strategy, wire_dtype, tmp_path):
    server_step, result, meter = run(strategy, wire_dtype, tmp_path)
    clients = CLIENTS.get(strategy, 1)
    width = clients * {"fp32": 4, "bf16": 2}[wire_dtype]
    counted = [(sum(r.bytes_up for r in result.records[1:]), server_step.traffic.up),
               (sum(r.bytes_down for r in result.records[1:]), server_step.traffic.down)]
    for (total, values), on_tcp in zip(counted, meter.per_round(), strict=True):
        per_round = total / (ROUNDS - 1)
        assert width * values < per_round <= 1.01 * width * values + (400 if strategy in FEW_VALUES else 0)
        assert per_round <= on_tcp <= 1.001 * per_round + clients * HTTP2_BYTES


def test_a_round_of_some_ranks_moves_the_bytes_of_those(tmp_path):
    recipe = strategy_class("ffa-lora").recipe.with_ranks("nested", ROUNDS)
    server_step, result, _ = run("ffa-lora", "fp32", tmp_path, recipe)
    ranks = [next(iter(server_step.step.prefixes(number, {}).values()), 8) for number in range(1, ROUNDS + 1)]
    assert len(set(ranks)) > 1
    for record, rank in zip(result.records[1:], ranks[1:], strict=True):
        values = 4 * len(MINILM) * 384 * rank
        for moved in (record.bytes_up, record.bytes_down):
            assert values < moved <= 1.01 * values + 4_000, "shapes that change are named again"


def test_rolora_uploads_b_in_odd_rounds_and_a_in_even_ones(tmp_path):
    _, result, _ = run("rolora", "fp32", tmp_path, columns=192)
    for record in result.records[1:]:
        values = 4 * len(MINILM) * 8 * (384 if record.round % 2 else 192)
        assert values < record.bytes_up <= 1.01 * values + 4_000, "shapes that change are named again"


def run(strategy, wire_dtype, tmp_path, recipe=None, columns=384):
    """Return the strategy, the result and the meter of a run over real connections."""
    plan = plan_of(strategy, rounds=ROUNDS, max_participations=ROUNDS, wire_dtype=wire_dtype)
    chosen, rank = strategy_class(strategy), RANK.get(strategy, 8)
    recipe = recipe or chosen.recipe.with_options(OPTIONS.get(strategy, {}))
    layout = layout_of(plan.family, rank=rank, modules=MINILM, head=False, rows=384, columns=columns,
                       options=recipe.family_options(rank, ROUNDS))
    draw = np.random.default_rng(1).standard_normal
    start = {spec.name: np.zeros(spec.shape, np.float32) if spec.name.endswith((".C", ".D")) else
             draw(spec.shape, np.float32) for spec in layout.state}
    engine, server_step = GrpcEngine("127.0.0.1:0", Proposal(plan), tmp_path), chosen(plan, layout, recipe=recipe)
    server_step.screen = math.inf  # screening off: no training made what this client sends
    engine.expect(layout)
    proxy = TcpProxy(engine.address)
    meter = Meter(proxy)
    clients = [threading.Thread(target=serve, args=(proxy.address, layout, number), daemon=True)
               for number in range(CLIENTS.get(strategy, 1))]
    for client in clients:
        client.start()
    options = RoundOptions(seed=0, min_clients=len(clients), min_replies=len(clients))
    try:
        result = run_federation(engine, Run(server_step, start, options), observer=meter)
    finally:
        engine.close("the test is over")
    for client in clients:
        client.join(10.0)
    assert result.ended == "finished"
    return server_step, result, meter
