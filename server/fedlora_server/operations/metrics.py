"""The run's figures in Prometheus' terms: a collector of what the run does at the moment at which it is asked.

No label's values can be made up by a peer: codes, states and phases are fixed sets, and figures are the task's own.
Counters begin at 0 with each server; the rounds do not.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from typing_extensions import override

import fedlora
from fedlora.plan import PROTOCOL, REFUSALS
from fedlora_server.observer import RoundRecord
from fedlora_server.phases import PHASES
from fedlora_server.progress import Now, Progress
from fedlora_server.registry_engine import RegistryEngine
from fedlora_server.trackers import Tracker, Watched

SECONDS = (1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0)
"""Upper bounds of the histogram of rounds' durations."""
STATES = ("connected", "ready", "working")
TURNED_AWAY = ("certificate", "places", *REFUSALS)
"""Codes of clients that may not join (`ClientEvent.code`)."""


class Metrics(Tracker, Collector):
    """The tracker that counts rounds' durations, and the collector of all metrics.

    Args:
        run: the run to watch.
        progress: what the run does.
        engine: returns the engine, or None before there is one.
        expiry: returns the Unix time at which the server's certificate ends, or None without TLS.
    """

    def __init__(self, run: Watched, progress: Progress, engine: Callable[[], RegistryEngine | None],
                 expiry: Callable[[], float | None]) -> None:
        super().__init__(run)
        self._progress, self._engine, self._expiry = progress, engine, expiry
        self._strategy = str(run.options.get("strategy", ""))
        self._began = time.time()
        self._durations, self._total_s = [0] * (len(SECONDS) + 1), 0.0

    @override
    def finished(self, record: RoundRecord) -> None:
        if record.round:
            self._durations[bisect_left(SECONDS, record.seconds)] += 1
            self._total_s += record.seconds

    def describe(self) -> Iterable[Metric]:
        """Return nothing, so that the registry does not collect before the run has begun."""
        return ()

    @override
    def collect(self) -> Iterator[Metric]:
        engine = self._engine()
        now = self._progress.now(engine.held_up if engine is not None else "")
        yield _labelled(GaugeMetricFamily, "fedlora_build_info", "FedLoRA's version and wire protocol; always 1.",
                        ("version", "protocol"), {(fedlora.__version__, str(PROTOCOL)): 1})
        yield _labelled(GaugeMetricFamily, "fedlora_run_info", "The run's id and strategy; always 1.",
                        ("run", "strategy"), {(self.run.run_id, self._strategy): 1})
        yield GaugeMetricFamily("fedlora_start_time_seconds", "Unix time at which this server started.", self._began)
        yield from self._of_rounds(now)
        yield from self._of_clients(now, engine)
        expiry = self._expiry()
        if expiry is not None:
            yield GaugeMetricFamily("fedlora_certificate_expiry_timestamp_seconds",
                                    "Unix time at which the server's certificate ends; absent without TLS.", expiry)

    def _of_rounds(self, now: Now) -> Iterator[Metric]:
        yield GaugeMetricFamily("fedlora_rounds_planned", "Number of rounds in the plan; 0 before it is known.",
                                now.planned)
        yield GaugeMetricFamily("fedlora_rounds_finished",
                                "Number of the last finished round, those of earlier servers of the run included.",
                                now.finished)
        yield GaugeMetricFamily("fedlora_current_round", "Number of the round under way, or of the next one.",
                                now.current)
        if now.finished_at is not None:
            yield GaugeMetricFamily("fedlora_last_round_finished_timestamp_seconds",
                                    "Unix time at which a round finished last; absent before the first.",
                                    now.finished_at)
        counts, buckets = 0, []
        for bound, number in zip((*map(str, SECONDS), "+Inf"), self._durations, strict=True):
            counts += number
            buckets.append((bound, counts))
        yield HistogramMetricFamily("fedlora_round_seconds", "Durations of finished rounds, in seconds.",
                                    buckets=buckets, sum_value=self._total_s)
        yield _labelled(GaugeMetricFamily, "fedlora_phase", "1 for what the run does now, 0 for all else.", ("phase",),
                        {(phase,): phase == now.phase for phase in PHASES})
        yield _labelled(GaugeMetricFamily, "fedlora_evaluation",
                        "The last figures on the server's own held-out data.", ("figure",),
                        {(name,): value for name, value in now.evaluation.items()})

    def _of_clients(self, now: Now, engine: RegistryEngine | None) -> Iterator[Metric]:
        states = [member.state for member in engine.members()] if engine is not None else []
        yield _labelled(GaugeMetricFamily, "fedlora_clients",
                        "Clients here: connected and not ready yet, ready to be asked, or working.", ("state",),
                        {(state,): states.count(state) for state in STATES})
        yield CounterMetricFamily("fedlora_received_bytes", "Bytes received from clients.",
                                  engine.bytes_up if engine is not None else 0)
        yield CounterMetricFamily("fedlora_sent_bytes", "Bytes sent to clients.",
                                  engine.bytes_down if engine is not None else 0)
        yield CounterMetricFamily("fedlora_uploads", "Uploads that arrived whole and in time.", now.uploads)
        yield CounterMetricFamily("fedlora_uploads_rejected", "Uploads that a round left out of its average.",
                                  now.rejected)
        yield _labelled(CounterMetricFamily, "fedlora_refusals",
                        "Orders that clients declined, and uploads that the server refused.", ("code",),
                        {(code,): now.refusals.get(code, 0) for code in REFUSALS})
        yield _labelled(CounterMetricFamily, "fedlora_turned_away", "Clients that were not let in.", ("code",),
                        {(code,): now.turned_away.get(code, 0) for code in TURNED_AWAY})
        yield CounterMetricFamily("fedlora_clients_lost", "Connections to clients that broke.", now.lost)
        yield CounterMetricFamily("fedlora_clients_disconnected",
                                  "Clients put out because their certificate is no longer taken.", now.disconnected)


def _labelled(kind: type[GaugeMetricFamily] | type[CounterMetricFamily], name: str, help: str, labels: tuple[str, ...],
              values: Mapping[tuple[str, ...], float]) -> Metric:
    family = kind(name, help, labels=labels)
    for label, value in values.items():
        family.add_metric(list(label), float(value))
    return family
