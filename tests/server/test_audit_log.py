"""The audit log: its chain, what it keeps and leaves out, and how it outlives kills and full disks."""

import json
import logging
import shutil
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedlora.plan import plan_digest
from fedlora.privacy.report import Verified
from fedlora_server import checkpoint
from fedlora_server.audit import chain, log
from fedlora_server.audit.command import main
from fedlora_server.audit.compare import compare
from fedlora_server.audit.log import AuditLog
from fedlora_server.observer import ClientEvent, RoundRecord
from fedlora_server.trackers import Trackers, Watched
from tests.federation import plan_of
from tests.server.test_run_folder import small_disk  # noqa: F401

PLAN = plan_of("fedsvd", private=True)


def uploaded(name, round=1, attempt=0, **more):
    return ClientEvent("uploaded", name, peer="10.0.0.7", fingerprint=f"f-{name}", round=round, attempt=attempt,
                       sha256=f"{name}-{round}-{attempt}", upload_bytes=400, **more)


class Run:
    """A run that a test drives by hand: its audit log, and what was said meanwhile."""

    def __init__(self, out, left=None, plan=PLAN):
        self.out, self.stop, self.held_up, self.plan = out, threading.Event(), [], plan
        self.console = Console(width=1000, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
        self.log = AuditLog(Watched("a run", out, self.console, {}, plan.run_id, "the-server"), plan, self.stop,
                            self.held_up.append, left)

    def begin(self, *before):
        self.log.open()
        self.log.begin(self.plan, before)
        return self

    def round(self, number, names="ab", **about):
        for name in names:
            self.log.client(uploaded(name, number))
        self.log.finished(RoundRecord(number, cohort=tuple(names), **{"uploaded": tuple(names)} | about))

    def end(self, how="finished"):
        self.log.ended(how)
        self.log.close()
        return self

    def is_killed(self):
        """Leave the file as it is: nothing more is written."""
        self.log._fault = OSError("killed")

    def lines(self):
        return [json.loads(line) for line in (self.out / chain.FILE).read_text().splitlines()]

    def told(self, *fields):
        return [tuple(line[field] for field in fields) for line in self.lines()]


def left(round=0):
    return SimpleNamespace(round=round)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(checkpoint, "LOOK_AGAIN_S", 0.01)


def test_it_says_who_joined_uploaded_and_was_averaged_with_certificates_and_addresses(tmp_path):
    run = Run(tmp_path).begin()
    run.log.client(ClientEvent("joined", "a", peer="10.0.0.7", fingerprint="f-a"))
    run.log.client(ClientEvent("turned-away", "x", "the certificate of x is on no list", "certificate", "10.0.0.8"))
    run.log.client(ClientEvent("refused", "c", "budget: 0.1 of 4 is left", "budget", round=1, attempt=0))
    run.round(1, "abd", uploaded=("a", "b"), rejected={"b": "it is 100 times as long"})
    run.round(2, "ab", curbed={"b": "it counts for 10 rows"})
    run.end()
    assert run.told("event", "client", "round", "code", "sha256", "bytes") == [
        ("opened", None, None, None, None, None), ("begun", None, 0, None, None, None),
        ("joined", "a", None, None, None, None), ("turned-away", "x", None, "certificate", None, None),
        ("refused", "c", 1, "budget", None, None),
        *(("uploaded", name, 1, None, f"{name}-1-0", 400) for name in "abd"),
        ("accepted", "a", 1, None, "a-1-0", 400), ("left-out", "b", 1, "rejected", "b-1-0", 400),
        ("left-out", "d", 1, "unused", "d-1-0", 400), ("closed", None, 1, None, None, None),
        *(("uploaded", name, 2, None, f"{name}-2-0", 400) for name in "ab"),
        ("accepted", "a", 2, None, "a-2-0", 400), ("curbed", "b", 2, None, "b-2-0", 400),
        ("closed", None, 2, None, None, None), ("ended", None, None, "finished", None, None)]
    first, accepted = run.lines()[0], run.lines()[8]
    assert (first["run"], first["fingerprint"]) == (PLAN.run_id, "the-server")
    assert first["plan_sha256"] == run.lines()[1]["plan_sha256"] == plan_digest(PLAN)
    assert (accepted["fingerprint"], accepted["peer"], accepted["attempt"]) == ("f-a", "10.0.0.7", 0)
    text = (tmp_path / chain.FILE).read_text()
    assert "on no list" not in text and "is left" not in text and "100 times" not in text, "codes only"
    assert run.log.head == run.lines()[-1]["hash"] and run.log.head in run.console.export_text()


def test_it_names_the_roster_of_secure_sums_and_the_attempts_that_ended_unopened(tmp_path):
    run = Run(tmp_path).begin()
    run.log.rostered(1, ("a", "b"), 2, "ab" * 32)
    run.log.unopened(1, 0, "why")
    run.round(1)
    run.end()
    told = run.told("event", "round", "attempt", "sha256", "code")
    assert told[2:4] == [("rostered", 1, None, "ab" * 32, None), ("unopened", 1, 0, None, None)]
    assert main(["verify", str(tmp_path)]) == 0


def test_a_plan_whose_labels_are_open_is_named_once_they_are_fixed(tmp_path):
    run = Run(tmp_path, plan=PLAN.with_open_labels())
    run.log.open()
    run.log.begin(PLAN, ())
    run.end()
    assert [line["plan_sha256"] for line in run.lines()] == [None, plan_digest(PLAN), None]


def test_a_run_that_ends_before_its_rounds_says_so_and_hears_no_more_after_its_end(tmp_path):
    run = Run(tmp_path)
    run.log.open()
    run.log.close()
    run.log.client(ClientEvent("left", "a"))
    run.log.close()
    assert run.told("event", "code") == [("opened", None), ("ended", "interrupted")]


# The chain.


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the bytes of a log of three rounds."""
    out = tmp_path_factory.mktemp("whole")
    run = Run(out).begin()
    for number in (1, 2, 3):
        run.round(number)
    run.end()
    return (out / chain.FILE).read_bytes()


def verify(tmp_path, content, *options):
    (tmp_path / chain.FILE).write_bytes(content)
    return main(["verify", str(tmp_path), *map(str, options)])


def numbered(whole):
    return whole.decode().splitlines(keepends=True)


def test_a_whole_log_verifies_with_its_head_and_with_that_of_an_earlier_stop(whole, tmp_path, capsys):
    lines = numbered(whole)
    assert verify(tmp_path, whole) == 0
    assert "Without --head it cannot be noticed if lines were cut off" in capsys.readouterr().out
    assert verify(tmp_path, whole, "--head", json.loads(lines[-1])["hash"]) == 0
    assert verify(tmp_path, whole, "--head", json.loads(lines[-4])["hash"].upper()) == 0
    assert "3 lines were added since" in capsys.readouterr().out
    assert verify(tmp_path, whole, "--head", "0" * 64) == 1
    assert verify(tmp_path, whole, "--head", "0" * 63) == 2
    assert main(["verify", str(tmp_path / chain.FILE)]) == 0


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_changed_byte_is_found_wherever_it_is(whole, tmp_path_factory, data):
    at = data.draw(st.integers(0, len(whole) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[at]))
    file = tmp_path_factory.getbasetemp() / "changed"
    file.write_bytes(whole[:at] + bytes([other]) + whole[at + 1:])
    found = chain.read(file)
    assert found.wrong or found.torn_bytes
    assert len(found.lines) == whole[:at].count(b"\n")


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_lines_that_are_dropped_swapped_or_inserted_are_found_and_named(whole, tmp_path_factory, data):
    lines, file = numbered(whole), tmp_path_factory.getbasetemp() / "moved"
    first, second = sorted(data.draw(st.lists(st.integers(0, len(lines) - 1), min_size=2, max_size=2, unique=True)))
    dropped = lines[:first] + lines[second:]
    swapped = [*lines]
    swapped[first], swapped[second] = swapped[second], swapped[first]
    doubled = [*lines[:second], lines[first], *lines[second:]]
    for changed, says in ((dropped, f"{first + 1} "), (swapped, "missing"), (doubled, "inserted")):
        file.write_text("".join(changed))
        assert says in chain.read(file).wrong


@pytest.mark.parametrize(("change", "says"), [
    (lambda lines: [*lines[:4], lines[4].replace('"client":"a"', '"client":"z"'), *lines[5:]], "line 5 was changed"),
    (lambda lines: lines[:4] + lines[5:], "line 5 is missing"),
    (lambda lines: lines[2:], "lines 1 to 2 are missing"),
    (lambda lines: [*lines[:5], "\n", *lines[5:]], "line 6 is not a line of an audit log"),
    (lambda lines: [*lines[:3], lines[3].replace(",", ", ", 1), *lines[4:]], "line 4 is not a line"),
    (lambda lines: [*lines[:-1], lines[-1][:50]], "is torn: it has 50 bytes")])
def test_the_first_wrong_line_is_named_with_what_is_wrong(whole, tmp_path, capsys, change, says):
    assert verify(tmp_path, "".join(change(numbered(whole))).encode()) == 1
    assert says in capsys.readouterr().out


def test_a_line_that_was_changed_and_hashed_again_breaks_the_chain_behind_it(whole, tmp_path, capsys):
    lines = numbered(whole)
    forged = chain.sealed(json.loads(lines[4]) | {"client": "z"}, 5, json.loads(lines[3])["hash"])
    assert verify(tmp_path, "".join([*lines[:4], chain.spelled(forged).decode() + "\n", *lines[5:]]).encode()) == 1
    assert "line 6 follows another line than the one that stands before it" in capsys.readouterr().out


def test_a_tail_that_is_cut_off_is_found_with_the_head_alone(whole, tmp_path, capsys):
    cut = "".join(numbered(whole)[:-3]).encode()
    assert verify(tmp_path, cut) == 0
    said = capsys.readouterr().out
    assert "The server has not ended the log" in said and "lines were cut off at the end" in said
    assert verify(tmp_path, cut, "--head", json.loads(numbered(whole)[-1])["hash"]) == 1


@pytest.mark.parametrize("content", [b"", b"no log\n", b"[1]\n", b"\xff\xfe\n", b"{\n", b"[" * 100_000 + b"\n"])
def test_what_is_no_log_is_named_and_shows_no_traceback(tmp_path, content, capsys):
    assert verify(tmp_path, content) == (1 if content else 2)
    assert main(["verify", str(tmp_path / "absent")]) == 2
    assert "absent holds no audit.jsonl" in capsys.readouterr().err


def test_it_is_shown_as_a_table_of_what_is_asked_for(whole, tmp_path, capsys):
    (tmp_path / chain.FILE).write_bytes(whole)
    assert main(["show", str(tmp_path), "--client", "a", "--event", "accepted"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["number", "time", "event", "client"]
    assert [row.split()[2:5] for row in rows] == [["accepted", "a", str(number)] for number in (1, 2, 3)]
    (tmp_path / chain.FILE).write_bytes(whole.replace(b'"client":"b"', b'"client":"c"', 1))
    assert main(["show", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert "was changed" in shown.err and "opened" in shown.out


# Bounds.


def test_a_flood_of_joins_stays_small_and_says_what_it_leaves_out(tmp_path):
    run = Run(tmp_path).begin()
    for number in range(20_000):
        run.log.client(ClientEvent("joined", f"stranger-{number}", peer="10.0.0.9"))
        run.log.client(ClientEvent("turned-away", f"stranger-{number}" + 1000 * "x", "why", "certificate", "10.0.0.9"))
    run.round(1)
    run.end()
    lines = run.lines()
    assert len(lines) < 250 and (tmp_path / chain.FILE).stat().st_size < 200_000
    joins = sum(line["event"] in ("joined", "turned-away") for line in lines)
    assert joins + sum(line["more"] for line in lines) == 40_000
    assert not chain.read(tmp_path / chain.FILE).wrong


def test_clients_with_a_certificate_are_all_named_and_their_uploads_too(tmp_path):
    run = Run(tmp_path).begin()
    for number in range(400):
        for kind in ("joined", "lost", "rejoined", "lost"):
            run.log.client(ClientEvent(kind, f"c{number}", fingerprint=f"f-c{number}"))
        run.log.client(uploaded(f"c{number}"))
        for _ in range(3):
            run.log.client(replace(uploaded(f"c{number}", attempt=1), kind="late"))
    run.end("stopped")
    told = run.told("event", "more")
    for kind in ("joined", "lost", "rejoined", "uploaded", "late"):
        assert sum(event == kind for event, _ in told) == 400
    assert sum(more for _, more in told) == 400, "the second loss within a minute of each"


# Faults.


def test_a_killed_server_leaves_a_torn_line_and_the_next_one_cuts_it_and_goes_on(tmp_path):
    run = Run(tmp_path).begin()
    run.round(1)
    run.is_killed()
    whole = (tmp_path / chain.FILE).read_bytes()
    (tmp_path / chain.FILE).write_bytes(whole + b'{"number":7,"ti')
    again = Run(tmp_path, left(1)).begin(RoundRecord(1, uploaded=("a", "b")))
    again.round(2)
    again.end()
    assert (tmp_path / chain.FILE).read_bytes().startswith(whole) and not chain.read(tmp_path / chain.FILE).wrong
    count = whole.count(b"\n")
    assert again.told("event", "round", "code", "bytes")[count:count + 2] == [
        ("resumed", 1, "torn", 15), ("begun", 1, None, None)]
    assert sum(line["event"] == "closed" and line["round"] == 1 for line in again.lines()) == 1


def test_what_a_killed_server_had_not_written_of_a_closed_round_is_added_once(tmp_path):
    run = Run(tmp_path).begin()
    for name in "ab":
        run.log.client(uploaded(name, 1))
    run.log._flush()
    run.log._add("accepted", client="a", round=1, sha256="a-1-0")
    run.log._flush()
    run.is_killed()
    again = Run(tmp_path, left(1)).begin(RoundRecord(1, uploaded=("a", "b")))
    again.end("stopped")
    assert again.told("event", "client", "sha256")[4:] == [
        ("accepted", "a", "a-1-0"), ("resumed", None, None), ("begun", None, None), ("accepted", "b", "b-1-0"),
        ("closed", None, None), ("ended", None, None)]


def test_a_run_whose_log_is_missing_begins_one_that_says_so_and_a_damaged_one_is_not_continued(tmp_path):
    run = Run(tmp_path, left(3)).begin(RoundRecord(3, uploaded=("a",)))
    run.end()
    assert run.told("event", "round", "code")[:2] == [("resumed", 3, "no-log"), ("begun", 3, None)]
    with pytest.raises(ValueError, match="is that of run 0123456789abcdef, not of run"):
        Run(tmp_path, left(3), plan_of("fedsvd", run_id="f" * 16))
    file = tmp_path / chain.FILE
    file.write_bytes(file.read_bytes().replace(b'"round":3', b'"round":2', 1))
    with pytest.raises(ValueError, match=r"line 1 was changed: .* Restore it from a copy"):
        Run(tmp_path, left(3))


def test_a_full_disk_is_waited_out_and_nothing_is_lost(small_disk):  # noqa: F811
    ballast = small_disk / "ballast"
    run = Run(small_disk).begin()
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    run.log._held_up = lambda reason: (run.held_up.append(reason), ballast.unlink())
    for number in range(1, 20):
        run.round(number)
    run.end()
    assert len(run.held_up) == 1 and "No space left" in run.held_up[0]
    assert [line["round"] for line in run.lines() if line["event"] == "closed"] == [*range(1, 20)]
    assert not chain.read(small_disk / chain.FILE).wrong


def test_while_the_disk_is_full_uploads_wait_and_joins_beyond_a_bound_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "MOST_WAITING", 50)
    full, real = threading.Event(), log.append_to_file
    full.set()

    def append(path, content):
        if full.is_set():
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(log, "append_to_file", append)
    run = Run(tmp_path)
    run.log.open()
    for number in range(200):
        run.log.client(ClientEvent("joined", f"c{number}", fingerprint=f"f{number}"))
        run.log.client(uploaded(f"c{number}"))
    assert len(run.log._waiting) < 300
    full.clear()
    run.end("stopped")
    told = run.told("event", "more")
    assert sum(event == "uploaded" for event, _ in told) == 200
    assert sum(event == "joined" for event, _ in told) + sum(more for _, more in told) == 200


def test_a_fault_that_does_not_pass_is_said_once_and_ends_the_run(tmp_path, caplog):
    out = tmp_path / "run"
    out.mkdir()
    run = Run(out).begin()
    (out / chain.FILE).unlink()
    (out / chain.FILE).mkdir()
    with caplog.at_level(logging.ERROR):
        run.round(1)
        run.round(2)
        run.end()
    assert run.stop.is_set() and len(caplog.records) == 1
    assert "cannot be written (Is a directory)" in caplog.text and "the run ends" in caplog.text
    with pytest.raises(OSError, match="Is a directory") as fault:
        run.log.check()
    assert fault.value.filename == str(out / chain.FILE)


def test_a_folder_that_was_removed_ends_the_run_too(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    run = Run(out).begin()
    shutil.rmtree(out)
    run.round(1)
    with pytest.raises(ValueError, match="was removed while the run lasted"):
        run.log.check()


def test_whoever_stops_a_run_whose_disk_is_full_waits_no_longer(tmp_path, monkeypatch, caplog):
    def append(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log, "append_to_file", append)
    run = Run(tmp_path)
    run.log._held_up = lambda reason: run.stop.set()
    run.begin().end("stopped")
    assert "its last 2 events are lost" in caplog.text
    with pytest.raises(OSError, match="No space left"):
        run.log.check()


def test_events_come_under_a_lock_so_that_none_waits_for_the_disk(tmp_path, monkeypatch):
    slow = threading.Event()
    real = log.append_to_file
    monkeypatch.setattr(log, "append_to_file", lambda path, content: (slow.wait(5), real(path, content)))
    run = Run(tmp_path)
    with Trackers([], run.log.run, {"audit": run.log}) as trackers:
        began = time.monotonic()
        for number in range(1000):
            trackers.client(uploaded("a", number + 1))
        assert time.monotonic() - began < 2.0
        slow.set()
    assert len(run.lines()) == 1002


def stated(*rounds):
    """Return what `compare` reads of a report whose client `a` released an upload in each of these rounds."""
    report = {"run": {"id": PLAN.run_id, "plan_sha256": plan_digest(PLAN), "client": "a"}, "trainings": [
        {"round": number, "attempt": 0, "state": "released", "upload": {"sha256": f"a-{number}-0"}}
        for number in rounds]}
    return Verified("key", True, 1.0, 1e-5, 1.0, (), "", report, ("public key f-a",))


@pytest.mark.parametrize(("closed", "unanswered", "wrong"), [((1,), ((2, 0),), 0), ((1, 2), (), 1)])
def test_an_upload_that_the_log_lacks_contradicts_a_report_only_where_its_round_was_closed(
        tmp_path, closed, unanswered, wrong):
    run = Run(tmp_path).begin()
    for number in closed:
        run.round(number, "ab" if number == 1 else "b")
    run.end("stopped")
    found = compare(chain.read(tmp_path / chain.FILE).lines, stated(1, 2))
    assert (found.uploads, found.unanswered, len(found.wrong)) == (1, unanswered, wrong), found.wrong
