"""What a round of one step costs beside the step, by phase, in a run of 160 rounds with six clients and secure sums.

One client's and the server's books are kept as in a run, on disk, by nobody who trains; the sums travel over gRPC.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np

from fedlora.adapters import AdapterLayout
from fedlora.plan import AGGREGATE, Released, RunPlan, Upload
from fedlora.privacy import Ledger, RosterFacts, RunStreams
from fedlora.privacy.mechanisms.distributed_gaussian import honest
from fedlora.privacy.report import ReportedRun, load_or_create_key, privacy_report, sign, write_report
from fedlora.secure_sum.integers import Grid
from fedlora.secure_sum.packages import SUM
from fedlora.tasks import Records
from fedlora.wire import tensors_digest
from fedlora_client.session import ClientSession
from fedlora_client.session_report import Foresight, reported_run
from fedlora_client.state import FolderState
from fedlora_client.terms import Limits
from fedlora_server import checkpoint
from fedlora_server.observer import RoundRecord
from fedlora_server.pki.authority import Authority

from ..federations import MINILM, layout, plan, tensors
from ..measure import Figure, Row, Settings, Value
from .secure_sum import rounds_over_grpc

CLIENTS, ROUNDS, BATCH = 6, 160, 256
DATASET, SERVER = "north", "127.0.0.1:9092"


class Phases:
    """The seconds of each phase, in each of several rounds."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note how long the block takes."""
        began = time.perf_counter()
        yield
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)

    def values(self) -> dict[str, Value]:
        """Return the median of each phase and of the whole, in milliseconds."""
        whole = [sum(parts) for parts in zip(*self.seconds.values(), strict=True)]
        return {name: Value.of([1e3 * second for second in seconds], "ms")
                for name, seconds in {"in all": whole, **self.seconds}.items()}


class Books:
    """The books of one client: its ledger, its state and its privacy report.

    Args:
        run: the plan.
        shape: the layout of the adapters.
        size: number of records.
        folder: where everything is written.
        foresees: whether the figures of the next report are computed while a round is trained.
    """

    def __init__(self, run: RunPlan, shape: AdapterLayout, size: int, folder: Path, *, foresees: bool) -> None:
        trainer = SimpleNamespace(adapted=SimpleNamespace(layout=shape, missing=()), precision="fp32",
                                  shapes=SimpleNamespace(rows={}, one_at_a_time=""))
        records = Records(np.zeros(size, np.int32), np.arange(size + 1), 0, np.zeros(size, np.int64))
        self._folder, self._key = folder, load_or_create_key(folder / "key")
        self._ledger, self._state = Ledger(folder / "ledger.sqlite"), FolderState(folder / "state")
        self._session = ClientSession(run, trainer, records,  # type: ignore[arg-type]  # it trains nothing
                                      Limits(epsilon=8.0, least_members=CLIENTS), self._state, RunStreams(DATASET),
                                      self._ledger, DATASET)
        noise, values = self._session.terms.noise_multiplier, shape.num_trained
        assert noise is not None, "the run is private"
        grid = Grid.fitting(values, clip_norm=run.clip_norm, expected_batch=BATCH, members=CLIENTS, noise=noise)
        self._ledger.note_roster(DATASET, run.run_id, RosterFacts(
            "0" * 64, CLIENTS, 0, noise * honest(CLIENTS, 0)**0.5, noise * grid.sensitivity(values, run.clip_norm),
            grid.step, run.clip_norm, values, True))
        self._run, self._foresight = run, Foresight() if foresees else None
        self._sum = np.zeros(shape.num_trained, np.uint32)

    def keep(self, number: int, phases: Phases) -> None:
        """Keep the books of one round."""
        with phases.phase("charge"):
            reservation = self._ledger.reserve(DATASET, self._run.run_id, number, 0)
            reservation.begin()
        with phases.phase("report of the charge"):
            reported = self._report()
        if self._foresight is not None:  # a step takes longer than this
            self._foresight.begin(reported, self._session)
            self._foresight.wait()
        with phases.phase("store and release"):
            upload = Upload(self._run.run_id, number, 0, tensors=Released({SUM: self._sum}), steps=1)
            self._state.save_upload(upload)
            self._state.note_size(upload)
            reservation.stored(tensors_digest(upload.tensors))
            reservation.released()
        with phases.phase("report of the upload"):
            self._report()

    def _report(self) -> ReportedRun:
        reported = reported_run(self._session, server=SERVER, labels=(), refusals=())
        write_report(self._folder / "report", sign(privacy_report(reported), self._key))
        return reported

    def close(self) -> None:
        """Release ledger and state."""
        self._ledger.close()
        self._state.close()


def measure(settings: Settings) -> Iterator[Row]:
    """Yield one row for a client's books, one without foresight, one for the server's, and one for the sums."""
    rounds = 3 if settings.quick else ROUNDS
    shape = layout("lora", **MINILM, rank=1)
    run = plan("fedavg-lora", "lora", mechanism=AGGREGATE, least_members=CLIENTS, rounds=rounds, rank=1,
               max_participations=rounds, expected_batch=BATCH)
    with TemporaryDirectory(prefix="fedlora-bench-short-") as folder:
        # two sizes: the accountants remember the figures of one
        for case, foresees, size in (("a client's books", True, 10_000),
                                     ("a client's books, without foresight", False, 11_000)):
            books, phases = Books(run, shape, size, Path(folder) / case, foresees=foresees), Phases()
            for number in range(1, rounds + 1):
                books.keep(number, phases)
            books.close()
            yield Row(case, phases.values())
        yield Row("the server's checkpoint", _checkpoints(shape, Path(folder), rounds).values())
        authority = Authority.create(Path(folder) / "pki", ["127.0.0.1"])
        yield rounds_over_grpc(CLIENTS, shape.num_trained, authority, Path(folder), settings.repeats(20))


def _checkpoints(shape: AdapterLayout, folder: Path, rounds: int) -> Phases:
    state, memory = tensors(shape.state, 0), tensors(shape.trained, 1)
    cohort, phases = tuple(f"site-{number}" for number in range(CLIENTS)), Phases()
    for number in range(1, rounds + 1):
        with phases.phase("checkpoint"):
            checkpoint.save(folder, "0" * 16, number, state, memory)
        with phases.phase("line of metrics.jsonl"):
            checkpoint.note(folder, RoundRecord(number, cohort, 1, cohort))
    return phases


FIGURE = Figure(19, measure)
