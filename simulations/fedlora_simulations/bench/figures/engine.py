"""What a client-round costs in process without training: messages, checks, the spool and the mean; MiniLM, r = 8."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from fedlora_server.cohort import RoundOptions
from fedlora_server.rounds import run_federation
from fedlora_strategies import FFALoRA
from fedlora_strategies.presets import preset

from ...in_process import InProcessEngine
from ..federations import MINILM, Echo, layout, plan, tensors
from ..measure import RATIO, Figure, Row, Settings, Value, interleaved
from ..subjects import rows_of, settle, subject


def measure(settings: Settings) -> Iterator[Row]:
    clients = 4 if settings.quick else 100
    shape = layout("frozen-a", **MINILM, rank=8)
    run = plan("ffa-lora", "frozen-a")
    echoes = {f"client-{i}": Echo(shape) for i in range(clients)}
    start = tensors(shape.state, 0)

    def one_round(block: int) -> None:
        engine = InProcessEngine(echoes, run.run_id, shape)
        result = run_federation(engine, FFALoRA(run, shape), run, start,
                                RoundOptions(seed=block, min_clients=clients, wait_timeout_s=0.0))
        engine.close("done")
        assert result.rounds == 1

    chosen = preset("ffa-lora", True)
    trained = subject(settings, rows_of(settings), family="frozen-a", rank=8, precision="auto", max_length=64,
                      expected_batch=8 if settings.quick else chosen.batch_size, steps=chosen.local_steps)
    rate = min(1.0, trained.plan.expected_batch / len(trained.records))
    times = interleaved({"engine": one_round, "training": partial(trained.train, private=True, sampling_rate=rate)},
                        settings.repeats(9), settle=settle(settings.device))
    each = [second / clients for second in times["engine"].wall]
    shares = [mine / (mine + training) for mine, training in zip(each, times["training"].wall, strict=True)]
    yield Row(f"{clients} clients", {
        "a client-round": Value.of([1e3 * second for second in each], "ms", better="lower", target=1.0),
        "CPU time": Value.of([1e3 * second / clients for second in times["engine"].cpu], "ms"),
        "share of a run": Value.of(shares, RATIO, better="lower", target=0.05),
        "training": times["training"].value()},
        note=f"training: {chosen.local_steps} private steps of {trained.plan.expected_batch} records")


FIGURE = Figure(4, measure)
