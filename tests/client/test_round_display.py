"""What a data holder sees while a round lasts: from public numbers alone, and nowhere but here."""

import io
import threading

import pytest
from rich.console import Console

from fedlora.plan import RoundPlan
from fedlora_client import round_display
from fedlora_client.round_display import RoundDisplay
from tests.fedlora.private_training import plan

RUN = plan(rounds=20, max_participations=20, local_steps=8)


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def order(until=float("inf")):
    return RoundPlan(RUN, 3, 0, "0" * 64, until=until)


def test_the_line_has_step_speed_time_left_and_epsilon(clock):
    display = RoundDisplay(None, order(until=1600.0))
    assert display.line() == "round 3 of 20: preparing; the server waits for 10 min more"
    display.training(128.0, "records", "ε 1.234 of 8.000")
    assert display.line() == "round 3 of 20: step 1 of 8; the server waits for 10 min more; ε 1.234 of 8.000"
    clock[0] += 8
    display.stepped(2)
    clock[0] += 1
    assert display.line() == ("round 3 of 20: step 3 of 8; 32 records/s; about 23 s left; the server waits for "
                              "9 min 51 s more; ε 1.234 of 8.000")
    display.stepped(8)
    assert display.line().startswith("round 3 of 20: 8 steps done; ")


def test_without_a_deadline_none_is_shown(clock):
    display = RoundDisplay(None, order())
    display.training(4.0, "units", "no privacy")
    clock[0] += 2
    display.stepped(1)
    assert display.line() == "round 3 of 20: step 2 of 8; 2 units/s; about 14 s left; no privacy"


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(round_display, "LINE_EVERY_S", 0.02)
    console = Console(file=io.StringIO(), width=200)
    written = threading.Event()
    monkeypatch.setattr(round_display, "tell", lambda console, line, event, **about: (
        console.print(line, event, about["round"]), written.set()))
    with RoundDisplay(console, order()) as display:
        display.training(4.0, "records", "no privacy")
        assert written.wait(10)
    assert console.file.getvalue().splitlines()[0] in (
        "round 3 of 20: preparing training 3", "round 3 of 20: step 1 of 8; no privacy training 3")
    assert "fedlora-round" not in [thread.name for thread in threading.enumerate()]


def test_a_short_round_has_no_line_without_a_terminal_and_leaves_none_on_one():
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        with RoundDisplay(console, order()) as display:
            display.training(4.0, "records", "ε 1.234 of 8.000")
            display.stepped(8)
        shown = console.file.getvalue()
        assert shown.endswith("\x1b[2K") if terminal else shown == ""
