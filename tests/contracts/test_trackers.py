"""Contract tests for trackers: they run on every tracker that is installed."""

from __future__ import annotations

import io
import json
import math
import shutil

import numpy as np
import pytest
from rich.console import Console

from fedlora import registry
from fedlora_server.observer import ClientEvent, RoundRecord
from fedlora_server.sum_round import PHASES
from fedlora_server.trackers import Tracker, Watched
from tests.federation import plan_of

PACKAGE = "fedlora_server.trackers"
EVENTS = {name for kind in Tracker.__mro__ if kind is not object for name, value in vars(kind).items()
          if callable(value) and not name.startswith("_")}

BEGUN = (RoundRecord(0, evaluation={"accuracy": 0.5, "loss": 0.7, "count": 4}),)


def record(number, **values):
    return RoundRecord(number, cohort=("a", "b"), attempts=2, uploaded=("a",), lost=("b",), refused={"c": "budget"},
                       rejected={"d": "[bold]too large"}, disclosed={"a": {"steps": 4}}, update_norm=0.5, bytes_up=1200,
                       bytes_down=3400, seconds=1.5, **values)


@pytest.fixture(params=registry.keys(PACKAGE))
def key(request):
    return request.param


@pytest.fixture(autouse=True)
def local_stores(key, request, tmp_path, monkeypatch):
    """Let stores that can be elsewhere be in the run's folder."""
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    if key == "mlflow":
        shutil.copyfile(request.getfixturevalue("mlflow_database"), tmp_path / "mlflow.db")


@pytest.fixture(params=[True, False], ids=["terminal", "pipe"])
def watched(request, tmp_path):
    console = Console(file=io.StringIO(), force_terminal=request.param, width=100)
    return Watched("a run", tmp_path, console, {"rounds": 3, "rank": 2, "data": None})


def test_it_says_in_a_line_what_it_is(key):
    assert registry.titles(PACKAGE)[key]
    assert issubclass(registry.load(PACKAGE, key).TRACKER, Tracker)


def test_it_takes_every_event_of_a_run_and_leaves_the_files_alone_that_resuming_reads(key, watched):
    kept = {name: watched.out / name for name in ("metrics.jsonl", "run.json", "asked.json", "report.json")}
    for name, file in kept.items():
        file.write_text(json.dumps({"file": name}))
    tracker = registry.load(PACKAGE, key).TRACKER(watched)
    told = {"open": lambda: tracker.open(), "said": lambda: tracker.said("a joined [red]"),
            "client": lambda: [tracker.client(ClientEvent(kind, "a[/]", "why", code="budget")) for kind in (
                "joined", "rejoined", "ready", "uploaded", "refused", "late", "declined", "left", "lost",
                "turned-away", "disconnected")],
            "begin": lambda: tracker.begin(plan_of("fedsvd", private=True), BEGUN),
            "waiting": lambda: (tracker.waiting(2, 1, None), tracker.waiting(2, 1, 3.0)),
            "fewer": lambda: tracker.fewer(1, 1, 2),
            "asked": lambda: (tracker.asked(1, 0, ("a", "b")), tracker.asked(1, 1, tuple("abcdefghij"))),
            "overdue": lambda: tracker.overdue(1, ("a", "b"), 1),
            "held_up": lambda: tracker.held_up("the disk is full"),
            "doubted": lambda: tracker.doubted(1, "its loss is not finite"),
            "uncompared": lambda: tracker.uncompared(1, 2),
            "rostered": lambda: tracker.rostered(1, ("a", "b", "c"), 3, "ab" * 32),
            "left_out": lambda: tracker.left_out("d[/]", "its certificate has ended"),
            "summing": lambda: [tracker.summing(1, phase) for phase in PHASES],
            "unopened": lambda: tracker.unopened(1, 0, "too few signed"),
            "answered": lambda: (tracker.answered(1, "a", "uploaded"), tracker.answered(1, "b", "lost")),
            "combining": lambda: tracker.combining(1, 2),
            "evaluated": lambda: tracker.evaluated(1, {"accuracy": 0.6, "loss": math.nan, "count": 4}),
            "finished": lambda: (tracker.finished(record(1, evaluation={"accuracy": 0.6, "loss": math.nan})),
                                 tracker.finished(record(2, evaluation={"rmse": np.float64(math.inf)})),
                                 tracker.finished(RoundRecord(3))),
            "ended": lambda: [tracker.ended(how) for how in ("stopped", "wait-timeout", "diverged", "finished")],
            "close": lambda: tracker.close()}
    assert told.keys() == EVENTS
    for event in told.values():
        event()
    assert all(json.loads(file.read_text()) == {"file": name} for name, file in kept.items())


@pytest.mark.parametrize("ended", ["stopped", "wait-timeout"])
def test_a_run_that_ends_early_is_watched_too(key, tmp_path, ended):
    watched = Watched("a run", tmp_path, Console(file=io.StringIO()), {"rounds": 3, "rank": 2})
    tracker = registry.load(PACKAGE, key).TRACKER(watched)
    tracker.open()
    tracker.begin(plan_of("fedsvd"), ())
    tracker.ended(ended)
    tracker.close()
    before_it_began = registry.load(PACKAGE, key).TRACKER(watched)
    before_it_began.open()
    before_it_began.close()
