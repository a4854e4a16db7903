"""Bytes of a round over gRPC against the values it moves, in fp32 and bf16, and accuracy with bf16.

Whole gRPC messages are counted, in the rounds after the first, because the plan and the frozen tensors travel once.
Accuracy is compared without privacy, where no noise hides the rounding, on equally many rows of each label. A model
that gives all rows the same label loses nothing by rounding; it does not reach the target.

Fed-SB with r = 8 uploads only 768 values a round, so that the bytes of headers weigh more; it is also counted with
r = 32.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from fedlora import registry, wire
from fedlora.config import SimulationConfig, read_config
from fedlora.data import Rows, label_names, partition
from fedlora.plan import WIRE_DTYPES, Proposal
from fedlora_client.connection import Connection, Goodbye
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_server.round_state import RoundOptions
from fedlora_server.rounds import Run, run_federation
from fedlora_server.run_setup import find_model
from fedlora_simulations.population import Method, Population
from fedlora_simulations.simulated_run import simulate
from fedlora_strategies import strategy_class
from fedlora_strategies.recipe import RECIPES

from ..federations import MINILM, Echo, layout, plan, tensors
from ..measure import RATIO, Figure, Row, Settings, Value, exactly
from ..subjects import rows_of

ROUNDS = 20
"""Rounds of a run, as in the private presets."""

CASES = (*((strategy, 8) for strategy in registry.keys(RECIPES)), ("fed-sb", 32))
"""Strategies and ranks whose bytes are counted."""

SHORT = ("--privacy=off", "--epsilon=inf", "--rounds=4", "--local-steps=8", "--batch-size=64", "--max-length=64",
         "--precision=fp32")
"""Options of a run that takes seconds on a GPU and half a minute on a core."""

LEARNED = 1.2
"""Least accuracy, in multiples of guessing: a model below has learned too little to lose any of it by rounding."""


def measure(settings: Settings) -> Iterator[Row]:
    """Yield one row for each strategy, rank and wire type, then one for each accuracy that is compared."""
    for strategy, rank in CASES:
        whole = (0.0, 0.0)
        for wire_dtype in WIRE_DTYPES:
            values, moved = _round(strategy, rank, wire_dtype, quick=settings.quick)
            width = wire.ARRAY_DTYPES[wire_dtype].itemsize
            row = {f"{way} ÷ values": exactly(total / (width * count), RATIO, better="lower", target=1.01)
                   for way, total, count in zip(("up", "down"), moved, values, strict=True)}
            if wire_dtype == "fp32":
                whole = moved
            else:
                row["÷ fp32"] = exactly(sum(moved) / sum(whole), RATIO, better="lower")
            yield Row(f"{strategy} r={rank}, {wire_dtype}", row | {
                "up": exactly(moved[0], "bytes"), "down": exactly(moved[1], "bytes")})
    rows = balanced(rows_of(settings))
    learned = LEARNED / len(label_names(rows))
    for strategy in ("fed-sb", "fedsvd"):
        accuracy = {wire_dtype: [_accuracy(settings, rows, strategy, wire_dtype, seed)
                                 for seed in range(settings.repeats(3))] for wire_dtype in WIRE_DTYPES}
        ratios = [half / full for half, full in zip(accuracy["bf16"], accuracy["fp32"], strict=True)]
        yield Row(f"{strategy}, accuracy", {
            "bf16 ÷ fp32": Value.of(ratios, RATIO, better="higher"),
            **{wire_dtype: Value.of(values, "accuracy", better="higher", target=learned)
               for wire_dtype, values in accuracy.items()}}, "spread over seeds, without privacy")


def _round(strategy: str, rank: int, wire_dtype: str, *, quick: bool) -> tuple[tuple[int, int], tuple[float, float]]:
    """Return (up, down) of one client and round, first in values and then in bytes."""
    family = strategy_class(strategy).recipe.family
    run = plan(strategy, family, rank=rank, rounds=ROUNDS, max_participations=ROUNDS, wire_dtype=wire_dtype)
    adapter = layout(family, rank=rank, **({"layers": 1, "width": 64} if quick else MINILM))
    with TemporaryDirectory(prefix="fedlora-uploads-") as uploads:
        engine = GrpcEngine("127.0.0.1:0", Proposal(run), Path(uploads))
        engine.expect(adapter)
        client = threading.Thread(target=_serve, args=(engine.address, Echo(adapter)), daemon=True)
        client.start()
        step = strategy_class(strategy)(run, adapter)
        try:
            result = run_federation(engine, Run(step, tensors(adapter.state, 0), RoundOptions(seed=0)))
        finally:
            engine.close("done")
        client.join()
    later = result.records[1:]
    return (step.traffic.up, step.traffic.down), (float(np.mean([record.bytes_up for record in later])),
                                                  float(np.mean([record.bytes_down for record in later])))


def _serve(address: str, session: Echo) -> None:
    connection = Connection(address, "client", private=True)
    with suppress(Goodbye):
        connection.join()
        connection.ready()
        while True:
            order, received = connection.next_request()
            connection.send(session.run_round(order, received))


def balanced(rows: Rows) -> Rows:
    """Return equally many rows of each label: as many as the rarest label has."""
    assert rows.labels is not None
    places = [[i for i, label in enumerate(rows.labels) if label == name] for name in label_names(rows)]
    return rows.take([i for own in places for i in own[:min(map(len, places))]])


def _accuracy(settings: Settings, rows: Rows, strategy: str, wire_dtype: str, seed: int) -> float:
    """Return the accuracy on a fifth of the rows after a short run of two clients on the others."""
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    train, held_out = rows.take(shuffled[len(rows) // 5:]), rows.take(shuffled[:len(rows) // 5])
    parts = partition(len(train), train.labels, "iid", 2, seed)
    options = read_config(SimulationConfig, [
        *SHORT, f"--model={settings.model}", f"--device={settings.device}", f"--wire-dtype={wire_dtype}",
        *([f"--threads={settings.threads}"] if settings.threads else []),
        *(["--rounds=1", "--batch-size=4", "--rank=4"] if settings.quick else [])])
    population = Population(train, {f"client-{i}": part for i, part in enumerate(parts)}, label_names(rows), held_out)
    done = simulate(options, Method(strategy, None), seed, find_model(options), population)
    return done.result.records[-1].evaluation["accuracy"]


FIGURE = Figure(9, measure)
