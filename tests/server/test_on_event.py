"""--on-event: a real command that is run for events, and what a bad one cannot do to the run."""

import io
import json
import logging
import sys
import time

import pytest
from rich.console import Console

from fedlora.config import ServerConfig, read_config
from fedlora_server.observer import ClientEvent, RoundRecord
from fedlora_server.operations import on_event
from fedlora_server.operations.on_event import EVENTS, OnEvent, command_of
from fedlora_server.stopping import Stopping
from fedlora_server.trackers import Trackers, Watched
from tests.federation import plan_of

RUN = plan_of("ffa-lora", rounds=3)
RECORD = ("import json, os, sys\n"
          "given = {name: os.environ[name] for name in os.environ if name.startswith('FEDLORA_')}\n"
          "with open(sys.argv[1], 'a') as out: out.write(json.dumps([json.load(sys.stdin), given]) + '\\n')\n")


def watching(folder, *command, **options):
    run = Watched("a run", folder, Console(file=io.StringIO()), {"strategy": "ffa-lora"}, RUN.run_id)
    tracker = OnEvent(run, command, **options)
    return tracker, Trackers([], run, {"on-event": tracker})


def recording(folder, **options):
    return watching(folder, sys.executable, "-c", RECORD, str(folder / "events"), **options)


def recorded(folder):
    path = folder / "events"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_the_command_gets_every_kind_of_event_in_order_as_json_and_in_its_environment(tmp_path):
    tracker, trackers = recording(tmp_path, expiry=lambda: (1e9, "ends soon"), stopped=lambda: "suspended")
    deadline = time.monotonic() + 20
    while not recorded(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    trackers.begin(RUN, ())
    trackers.waiting(2, 0, None)
    trackers.waiting(2, 1, None)  # still the same wait
    trackers.asked(1, 0, ("north",))
    trackers.client(ClientEvent("lost", "north; rm -rf /"))
    trackers.client(ClientEvent("refused", "south", "the client's words", "budget", round=1))
    trackers.unopened(1, 0, "too few uploads")
    trackers.held_up("the disk is full")
    trackers.finished(RoundRecord(1, cohort=("north", "south"), uploaded=("north",), evaluation={"accuracy": 0.5}))
    trackers.ended("stopped")
    trackers.close()
    tracker.end(20)
    events = recorded(tmp_path)
    assert [event["event"] for event, _ in events] == [
        "certificate-ends-soon", "run-begun", "waiting", "client-lost", "client-refused", "sum-unopened", "held-up",
        "round-finished", "run-ended"]
    assert {event["event"] for event, _ in events} == EVENTS.keys()
    by_name = {event["event"]: (event, given) for event, given in events}
    assert by_name["client-lost"][1]["FEDLORA_CLIENT"] == "north; rm -rf /", "no shell reads it"
    refused, given = by_name["client-refused"]
    assert (refused["code"], given["FEDLORA_CODE"], given["FEDLORA_ROUND"]) == ("budget", "budget", "1")
    assert "words" not in json.dumps(refused), "what a client wrote is not passed on"
    finished = by_name["round-finished"][0]
    assert (finished["round"], finished["rounds"], finished["uploaded"]) == (1, 3, 1)
    assert finished["evaluation"] == {"accuracy": 0.5}
    assert by_name["run-ended"][0]["reason"] == by_name["run-ended"][1]["FEDLORA_REASON"] == "suspended"
    for event, given in events:
        assert (event["run"], event["folder"]) == (RUN.run_id, str(tmp_path))
        assert (given["FEDLORA_EVENT"], given["FEDLORA_RUN"]) == (event["event"], RUN.run_id)


@pytest.mark.parametrize(("ended", "stopped", "told"), [
    ("finished", "", "finished"), ("wait-timeout", "", "wait-timeout"), ("stopped", "stopped", "stopped"),
    (None, "stopped", "stopped"), (None, "", "failed"), ("finished", "stopped", "finished")])
def test_the_end_names_its_reason_however_the_run_ended(tmp_path, ended, stopped, told):
    tracker, trackers = recording(tmp_path, stopped=lambda: stopped)
    if ended:
        trackers.ended(ended)
    trackers.close()
    tracker.end(20)
    [(event, _)] = recorded(tmp_path)
    assert event["reason"] == told


def test_a_command_that_hangs_is_killed_with_its_children_and_the_next_event_is_told(tmp_path, caplog):
    script = tmp_path / "hook.sh"
    script.write_text(f"#!/bin/sh\nif [ $FEDLORA_EVENT = held-up ]; then sleep 1000; fi\n"
                      f"echo $FEDLORA_EVENT >> {tmp_path / 'told'}\n")
    script.chmod(0o755)
    tracker, trackers = watching(tmp_path, str(script), limit_s=0.3)
    began = time.monotonic()
    trackers.held_up("full")
    trackers.begin(RUN, ())
    assert time.monotonic() - began < 0.2, "the run does not wait"
    tracker.end(10)
    assert (tmp_path / "told").read_text() == "run-begun\n"
    assert "did not end within 0.3 s at event held-up" in caplog.text


def test_at_the_end_the_last_command_has_a_bounded_time(tmp_path, caplog):
    tracker, trackers = watching(tmp_path, "sleep", "1000")
    trackers.begin(RUN, ())
    trackers.close()
    began = time.monotonic()
    tracker.end(0.3)
    assert time.monotonic() - began < 5 and "had not ended after 0.3 s and was killed; 1 events" in caplog.text
    tracker._thread.join(5)
    assert not tracker._thread.is_alive()


@pytest.mark.parametrize(("command", "says"), [
    (["sh", "-c", "echo the mail server is away >&2; exit 3"],
     "ended with exit code 3 at event run-begun: the mail server is away"),
    (["sh", "-c", "kill -9 $$"], "exit code -9"), (["/does/not/exist"], "cannot be run")])
def test_a_command_that_fails_is_logged_and_the_run_hears_nothing_of_it(tmp_path, caplog, command, says):
    tracker, trackers = watching(tmp_path, *command)
    trackers.begin(RUN, ())
    tracker.end(10)
    assert says in caplog.text
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert (record.peer, bool(record.kind)) == ("", True), "`PeerFilter` lets one a minute through"


def test_a_command_that_reads_nothing_and_says_much_is_run_to_its_end(tmp_path, caplog):
    script = f"exec <&-; yes | head -c 1000000 >&2; echo done > {tmp_path}/done"
    tracker, trackers = watching(tmp_path, "sh", "-c", script)
    trackers.begin(RUN, ())
    tracker.end(10)
    assert (tmp_path / "done").exists() and not caplog.text


def test_events_beyond_a_bound_are_left_out_counted_and_those_of_the_run_are_kept(tmp_path, caplog):
    tracker, trackers = watching(tmp_path, "sleep", "0.2")
    for number in range(200):
        trackers.client(ClientEvent("lost", f"stranger {number}"))
    assert len(tracker._waiting) <= on_event.MOST_WAITING_ABOUT_CLIENTS
    trackers.held_up("full")
    trackers.close()
    assert [event["event"] for event in tracker._waiting][-2:] == ["held-up", "run-ended"]
    deadline = time.monotonic() + 10
    while "events were left out" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    tracker.end(0.1)


def test_a_client_that_comes_and_goes_is_told_once_a_minute(tmp_path):
    tracker, trackers = recording(tmp_path)
    for _ in range(50):
        trackers.client(ClientEvent("lost", "north"))
    tracker.end(20)
    assert len(recorded(tmp_path)) == 1


def test_a_command_that_is_none_is_refused_at_the_start(tmp_path, capsys):
    with pytest.raises(ValueError, match="'no-such-command-here' is no command of this machine"):
        command_of("no-such-command-here --now")
    for given, says in (("", "names no command"), ("mail 'x", "cannot be split into words")):
        with pytest.raises(SystemExit):
            read_config(ServerConfig, [f"--on-event={given}"])
        assert says in capsys.readouterr().err
    assert command_of("echo 'a b'") == ["echo", "a b"]


def test_only_the_first_request_to_stop_counts():
    stopping = Stopping(Console(file=io.StringIO()))
    assert stopping.how() == ""
    assert stopping.ask(goes_on=True) and not stopping.ask(goes_on=False)
    assert stopping.how() == "suspended"
