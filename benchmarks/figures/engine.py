"""Cost of a client-round in process without training: messages, checks, uploads and the mean; MiniLM, r = 8.

A client-round is one client's part in one round. Some clients only echo what they are sent. Others are real sessions
with a trainer that returns the state it was given; they add a client's bookkeeping: ledger, reservation and digests.
The cost of a client-round must not grow with the number of clients. Flower's own simulation engine is measured beside
ours, with one Ray actor for each core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from fedlora.adapters import AdapterLayout
from fedlora.plan import RunPlan, Tensors
from fedlora.privacy import Ledger, RunStreams
from fedlora.tasks import Records
from fedlora.training import TrainingJob, TrainResult
from fedlora_client.flower_app import Session
from fedlora_client.session import ClientSession
from fedlora_client.state import MemoryState
from fedlora_client.terms import Limits
from fedlora_server.round_state import RoundOptions
from fedlora_server.rounds import Run, run_federation
from fedlora_simulations.in_process import InProcessEngine
from fedlora_strategies import FFALoRA

from ..federations import MINILM, Echo, layout, plan, tensors
from ..flower_engine import flower_engine
from ..measure import RATIO, Figure, Row, Settings, Value, interleaved
from ..subjects import rows_of, settle, subject

RECORDS = 200
"""Records of each session; none of them is read."""

NOTES = {"clients": "clients that echo what they are sent",
         "real sessions": "sessions with ledger (in memory), reservation and digests, whose trainer trains nothing"}


class NoTrainer:
    """A stand-in for `Trainer` that returns the state it was given."""

    def __init__(self, layout: AdapterLayout) -> None:
        self.adapted = SimpleNamespace(layout=layout)

    def activate(self, active: tuple[str, ...], prefixes: tuple[tuple[str, int], ...] = ()) -> None:
        """Accept any selection of trained tensors; this trainer trains none."""

    def show_batch_invariance(self, run: RunPlan, rows_per_unit: int) -> None:
        """Do nothing: there is no arithmetic to check."""

    def train(self, training: TrainingJob, stop: Callable[[], bool] = lambda: False,
              stepped: Callable[[int], object] = lambda steps: None) -> TrainResult:
        """Return the trained tensors of the state that training would start from."""
        assert training.start is not None
        trained = {spec.name: training.start[spec.name] for spec in self.adapted.layout.trained}
        return TrainResult(trained, training.run.local_steps, (), 0.0, 0.0, 0)


def measure(settings: Settings) -> Iterator[Row]:
    """Yield one row for each kind and number of clients, and one beside Flower's engine."""
    counts = (4, 8) if settings.quick else (100, 1000)
    repeats = settings.repeats(9)
    shape = layout("frozen-a", **MINILM, rank=8)
    run = plan("ffa-lora", "frozen-a")
    start = tensors(shape.state, 0)

    def one_round(echoes: Mapping[str, Session]) -> None:
        engine = InProcessEngine(echoes, run.run_id, shape)
        rounds = RoundOptions(seed=0, min_clients=len(echoes), wait_timeout_s=0.0)
        result = run_federation(engine, Run(FFALoRA(run, shape), start, rounds))
        engine.close("done")
        assert len(result.records[-1].uploaded) == len(echoes)

    def echoing(clients: int) -> Callable[[int], None]:
        echoes = {f"client-{i}": Echo(shape) for i in range(clients)}
        return lambda block: one_round(echoes)

    def keeping_books(clients: int) -> Callable[[int], None]:
        unused = iter([sessions(run, shape, clients) for _ in range(1 + 2 * repeats)])  # each trains one round only
        return lambda block: one_round(next(unused))

    chosen = FFALoRA.recipe.preset(private=True)
    trained = subject(settings, rows_of(settings), family="frozen-a", rank=8, precision="auto", max_length=64,
                      expected_batch=8 if settings.quick else chosen.batch_size, steps=chosen.local_steps)
    rate = min(1.0, trained.plan.expected_batch / len(trained.records))
    kinds = {"clients": echoing, "real sessions": keeping_books}
    cases = {f"{clients:,} {kind}": (kind, clients) for kind in kinds for clients in counts}
    rounds = {case: kinds[kind](clients) for case, (kind, clients) in cases.items()}
    times = interleaved({**rounds, "training": partial(trained.train, private=True, sampling_rate=rate)},
                        repeats, settle=settle(settings.device))
    for case, (kind, clients) in cases.items():
        each = [second / clients for second in times[case].wall]
        shares = [mine / (mine + training) for mine, training in zip(each, times["training"].wall, strict=True)]
        values = {
            "a client-round": Value.of([1e3 * second for second in each], "ms", better="lower", target=1.0),
            "CPU time": Value.of([1e3 * second / clients for second in times[case].cpu], "ms"),
            "share of a run": Value.of(shares, RATIO, better="lower", target=0.05),
            "training": times["training"].value()}
        if clients > counts[0]:
            values[f"÷ that of {counts[0]}"] = times[case].over(times[f"{counts[0]} {kind}"],
                                                                factor=counts[0] / clients, target=1.2)
        yield Row(case, values, note=f"{NOTES[kind]}; training: {chosen.local_steps} private steps of "
                                     f"{trained.plan.expected_batch} records")
    yield beside_flower(run, shape, counts[0], rounds[f"{counts[0]} clients"], settings)


def sessions(run: RunPlan, layout: AdapterLayout, clients: int) -> dict[str, ClientSession]:
    """Make sessions as a simulation does, except that they train nothing; return them by client name."""
    records = Records(np.zeros(RECORDS, np.int32), np.arange(RECORDS + 1), 0, np.zeros(RECORDS, np.int64))
    ledger, trainer = Ledger(None, simulated=True), NoTrainer(layout)
    shared: dict[str, Tensors] = {}
    return {name: ClientSession(run, trainer, records, Limits(epsilon=8.0), MemoryState(shared),  # type: ignore[arg-type]
                                RunStreams(name, 0), ledger, name)
            for name in (f"client-{i}" for i in range(clients))}


def beside_flower(run: RunPlan, layout: AdapterLayout, clients: int, ours: Callable[[int], None],
                  settings: Settings) -> Row:
    """Measure a round over our engine in turn with one over Flower's.

    Raises:
        Unavailable: Ray is not installed.
    """
    with flower_engine(run, layout, clients) as flowers:
        times = interleaved({"Flower": flowers, "ours": ours}, settings.repeats(5))
    values: dict[str, Any] = {name: Value.of([1e3 * second / clients for second in taken.wall], "ms")
                              for name, taken in times.items()}
    return Row(f"{clients} clients, Flower's engine", {
        "Flower's ÷ ours": times["Flower"].over(times["ours"], better="higher"), **values})


FIGURE = Figure(4, measure)
