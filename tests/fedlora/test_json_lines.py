"""JSON lines on stderr: whatever is printed, logged or warned of, each line is one object with the same fields."""

import json
import logging
import sys
import threading
import warnings

import pytest
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from fedlora.console import QueuedLines, log_to_stderr, messages, say_why, stderr_that_never_blocks, tell, tell_about
from fedlora.json_lines import FIELDS, JsonLines, JsonText, line
from fedlora_server.observer import ClientEvent, RoundRecord
from fedlora_server.trackers import Trackers, Watched


@pytest.fixture
def said(tmp_path, monkeypatch):
    """Return a function that calls another one with JSON lines on stderr, and returns what was written."""
    def said(do, log_format="json"):
        with (tmp_path / "log").open("w") as log:
            monkeypatch.setattr(sys, "stderr", log)
            monkeypatch.setattr(logging.getLogger(), "handlers", [])
            with stderr_that_never_blocks(log_format):
                log_to_stderr()
                do()
            assert sys.stderr is log
        logging.captureWarnings(False)
        return (tmp_path / "log").read_text()

    return said


def parsed(text):
    lines = [json.loads(one) for one in text.splitlines()]
    assert all(list(one) == list(FIELDS) for one in lines)
    return lines


def test_whatever_is_written_becomes_an_object_with_the_same_fields(said):
    def speak():
        console = messages()
        console.print("[red]plain")
        console.print("NOT PRIVATE", style="bold red")
        console.print(Panel("a box"))
        table = Table("one", "two")
        table.add_row("1", "2")
        console.print(table)
        with console.status("round 1: training"):
            console.print("within")
        console.print()
        logging.getLogger("x").warning("beware of %s", "dogs", extra={"peer": "10.0.0.7", "kind": "ended"})
        try:
            raise ValueError("deep")
        except ValueError:
            logging.getLogger("x").exception("it failed")
        warnings.warn("old", stacklevel=1)
        say_why("fedlora-client: why")
        print("a library", file=sys.stderr)
        sys.stderr.write("10%\r20%\r30%\n")

    lines = parsed(said(speak))
    assert [(one["event"], one["level"], one["message"].split("\n")[0].strip("╭─╮")) for one in lines[:2]] == [
        ("message", "info", "[red]plain"), ("message", "warning", "NOT PRIVATE")]
    by = [(one["event"], one["level"]) for one in lines]
    assert by == [("message", "info"), ("message", "warning"), *[("message", "info")] * 3, ("log", "warning"),
                  ("log", "error"), ("log", "warning"), ("error", "error"), *[("stderr", "warning")] * 4]
    assert "a box" in lines[2]["message"] and "one" in lines[3]["message"] and lines[4]["message"] == "within"
    assert (lines[5]["message"], lines[5]["peer"]) == ("beware of dogs", "10.0.0.7")
    assert "Traceback" in lines[6]["message"] and "ValueError: deep" in lines[6]["message"]
    assert "old" in lines[7]["message"]
    assert [one["message"] for one in lines[8:]] == ["fedlora-client: why", "a library", "10%", "20%", "30%"]


def test_as_text_nothing_is_changed(said):
    def speak():
        console = messages()
        tell(console, "[red] a message " + "x" * 200, "joined", "warning", style="red", client="north")
        tell_about(console, run="0123456789abcdef")
        logging.getLogger("x").warning("beware")
        say_why("fedlora-client: why")

    assert said(speak, "text").splitlines() == ["[red] a message " + "x" * 200, "WARNING: beware",
                                                "fedlora-client: why"]


def test_a_line_says_which_run_and_client_it_is_about_and_has_no_other_fields(said):
    def speak():
        console = messages()
        tell_about(console, run="0123456789abcdef", client="north")
        tell(console, "round 1", "round", round=1, attempt=0, code="")
        tell(console, "south came", "joined", client="south")
        with pytest.raises(TypeError, match="no field text"):
            tell(console, "no", text="of a record")

    lines = parsed(said(speak))
    assert [(one["run"], one["client"], one["round"], one["attempt"], one["code"]) for one in lines] == [
        ("0123456789abcdef", "north", 1, 0, None), ("0123456789abcdef", "south", None, None, None)]
    assert line("a", "b\nc").count("\n") == 1


def test_lines_of_several_threads_do_not_mix_and_one_without_an_end_is_bounded(said):
    def speak():
        threads = [threading.Thread(target=lambda n=n: [print("word", n, file=sys.stderr) for _ in range(50)])
                   for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sys.stderr.write("x" * 100_000)

    lines = parsed(said(speak))
    assert len(lines) == 401 and len(lines[-1]["message"]) == 100_000
    assert {one["message"] for one in lines[:-1]} == {f"word {n}" for n in range(8)}


def test_what_nobody_reads_is_counted_in_a_json_line_too(tmp_path):
    with (tmp_path / "log").open("w") as log:
        queued = QueuedLines(log, lambda told: line("stderr", told, "warning"))
        queued._dropped = 7
        JsonText(JsonLines(queued)).write("one\n")
        queued.end(2)
    assert "(7 lines were left out" in parsed((tmp_path / "log").read_text())[-1]["message"]


def test_the_display_of_a_run_says_what_its_lines_are_about(said, tmp_path):
    def watch():
        run = Watched("a run", tmp_path, messages(), {}, "0123456789abcdef")
        tell_about(run.console, run=run.run_id)
        with Trackers(["console"], run) as trackers:
            trackers.said("The label set is no, yes")
            trackers.waiting(2, 1, 3.0)
            for kind in ("joined", "lost", "joined", "turned-away"):
                code = "places" if kind == "turned-away" else ""
                trackers.client(ClientEvent(kind, "north", "why", code, "10.0.0.7"))
            trackers.asked(1, 0, ("north", "south"))
            for round in (1, 1):
                trackers.client(ClientEvent("uploaded", "north", round=round, attempt=0, sha256="5a", upload_bytes=400))
            trackers.answered(1, "north", "uploaded")
            trackers.answered(1, "south", "lost")
            trackers.overdue(1, ("south",), 0)
            trackers.held_up("the disk is full")
            trackers.finished(RoundRecord(1, cohort=("north", "south"), uploaded=("north",),
                                          rejected={"north": "too long"}, curbed={"south": "10 rows"}))
            trackers.ended("finished")

    lines = parsed(said(watch))
    assert [(one["event"], one["level"], one["client"], one["round"]) for one in lines] == [
        ("message", "info", None, None), ("waiting", "info", None, None), ("joined", "info", "north", None),
        ("lost", "warning", "north", None), ("turned-away", "warning", "north", None), ("asked", "info", None, 1),
        ("uploaded", "info", "north", 1), ("uploaded", "info", "north", 1), ("answered", "warning", "south", 1),
        ("overdue", "warning", None, 1), ("held-up", "warning", None, None), ("finished", "info", None, 1),
        ("left-out", "warning", "north", 1), ("curbed", "warning", "south", 1), ("ended", "info", None, None)]
    assert {one["run"] for one in lines} == {"0123456789abcdef"}
    assert (lines[4]["code"], lines[4]["peer"], lines[6]["bytes"], lines[-1]["code"]) == (
        "places", "10.0.0.7", 400, "finished")


def test_a_console_of_json_lines_is_no_terminal_whatever_the_environment_says(said, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    lines = parsed(said(lambda: messages().print("red", style="red")))
    assert lines[0]["message"] == "red" and isinstance(messages(), Console)
