"""`fedlora-server status` and `stop` against a server's socket in this process, and what strangers can do to it."""

import io
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from fedlora import wire
from fedlora.config import ServerConfig, read_config
from fedlora.plan import Proposal, RoundPlan, Upload
from fedlora_client.connection import Connection
from fedlora_server import checkpoint
from fedlora_server.cli import main
from fedlora_server.engine import node_id
from fedlora_server.folders import UNFINISHED
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_server.observer import ClientEvent, RoundRecord
from fedlora_server.operations import command, control
from fedlora_server.operations.assembly import Operations
from fedlora_server.operations.control import FILE, ControlSocket, ask, reachable
from fedlora_server.progress import Progress
from fedlora_server.stopping import Stopping
from fedlora_server.trackers import Trackers, Watched
from fedlora_strategies.messages import to_record, train_message
from tests.federation import layout_of, plan_of, start_of

RUN = plan_of("ffa-lora", rounds=5)
LAYOUT = layout_of("frozen-a")
STATE = start_of(LAYOUT, seed=1)
UPLOAD = {spec.name: STATE[spec.name] for spec in LAYOUT.trained}


class Server:
    """A run's folder with an engine, its trackers and its operations, but no round loop: a test tells the trackers."""

    def __init__(self, folder, *arguments):
        self.out = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / UNFINISHED).touch()
        checkpoint.begin(folder, {"rounds": 5}, RUN, {})
        console = Console(file=io.StringIO(), width=200)
        options = read_config(ServerConfig, ["--strategy", "ffa-lora", *arguments])
        run = Watched("a run", folder, console, {"strategy": "ffa-lora"}, RUN.run_id,
                      progress=Progress(options.round_timeout))
        self.stopping = Stopping(console)
        self.operations = Operations(options, run, self.stopping, None)
        self.trackers = Trackers([], run, self.operations.trackers)
        self.engine = GrpcEngine("127.0.0.1:0", Proposal(RUN), folder / "uploads", notify=self.trackers.client)
        self.engine.expect(LAYOUT)
        self.operations.attend(self.engine)

    def said(self):
        return self.operations._run.console.file.getvalue()

    def connect(self, name):
        connection = Connection(self.engine.address, name, private=False, connect_timeout_s=10)
        connection.join()
        connection.ready()
        self.until(lambda: node_id(name) in self.engine.idle())
        return connection

    def until(self, condition):
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            self.engine.wait([], 0.05)

    def end(self):
        self.engine.close("stopped")
        self.operations.close()
        (self.out / UNFINISHED).unlink(missing_ok=True)


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path / "run")
    yield server
    server.end()


def status(folder, capsys):
    """Return the exit code and the answer of `fedlora-server status RUN --json`."""
    code = main(["status", str(folder), "--json"])
    return code, json.loads(capsys.readouterr().out or "null")


def lines(folder, capsys):
    assert main(["status", str(folder)]) == 0
    return capsys.readouterr().out


def test_the_socket_is_the_users_own_and_gone_at_the_end(server):
    about = (server.out / FILE).stat()
    assert stat.S_ISSOCK(about.st_mode) and stat.S_IMODE(about.st_mode) == 0o600
    server.end()
    assert not (server.out / FILE).exists()


def test_status_follows_a_run_from_waiting_through_a_round_to_its_end(server, capsys):
    server.trackers.begin(RUN, ())
    server.trackers.waiting(2, 1, None)
    code, now = status(server.out, capsys)
    assert (code, now["phase"], now["rounds"]) == (0, "waiting", {"planned": 5, "finished": 0, "current": 1})
    assert "1 more needed (1 of 2 ready)" in lines(server.out, capsys)

    north, south = server.connect("north"), server.connect("south")
    server.trackers.asked(1, 0, ("north",))
    server.engine.push_messages([train_message(RoundPlan(RUN, 1, 0, wire.tensors_digest({})), to_record(STATE),
                                               node_id("north"))])
    plan, _ = north.next_request()
    code, now = status(server.out, capsys)
    assert (now["phase"], now["rounds"]["current"]) == ("training", 1)
    assert 1790 < now["round_left_s"] <= 1800 and now["run_left_s"] is None, "no round is finished to forecast from"
    told = {client["name"]: (client["state"], client["round"]) for client in now["clients"]}
    assert told == {"north": ("working", 1), "south": ("ready", None)}
    shown = lines(server.out, capsys)
    assert "clients train" in shown and "north  working on round 1" in shown and "2 connected, 2 ready, 1 wo" in shown

    north.send(Upload(*plan.key, tensors=UPLOAD, steps=1, num_examples=10))
    south.leave()
    server.until(lambda: len(server.engine.idle()) == 1)
    server.trackers.combining(1, 1)
    assert status(server.out, capsys)[1]["phase"] == "aggregating"
    server.trackers.finished(RoundRecord(1, cohort=("north",), uploaded=("north",), seconds=60.0))
    server.trackers.asked(2, 0, ("north",))
    _, now = status(server.out, capsys)
    [north_now, south_now] = sorted(now["clients"], key=lambda client: client["name"])
    assert time.time() - north_now["uploaded_at"] < 20 and north_now["bytes_up"] > 0 == now["lost"]
    assert south_now["state"] == "away" and now["uploads"] == 1
    assert 235 < now["run_left_s"] <= 240, "four rounds of 60 s, less what this one has lasted"
    assert re.search(r"run ends   in about (4 min|3 min 5\d s),", lines(server.out, capsys))

    server.trackers.ended("finished")
    assert status(server.out, capsys)[1]["phase"] == "ending"
    north.leave()


def test_a_run_that_is_held_up_says_why_until_it_goes_on(server, capsys):
    server.trackers.begin(RUN, ())
    server.trackers.asked(1, 0, ("north",))
    server.trackers.held_up("the disk is full")
    assert "held up: the disk is full" in lines(server.out, capsys)
    server.trackers.answered(1, "north", "uploaded")
    assert status(server.out, capsys)[1]["phase"] == "training"


def test_refusals_are_counted_by_code(server, capsys):
    for kind, code in (("refused", "budget"), ("declined", "policy"), ("refused", "budget"),
                       ("turned-away", "certificate")):
        server.trackers.client(ClientEvent(kind, "north", "text", code))
    _, now = status(server.out, capsys)
    assert now["refusals"] == {"budget": 2, "policy": 1} and now["turned_away"] == {"certificate": 1}
    shown = lines(server.out, capsys)
    assert "refusals   budget 2, policy 1" in shown and "turned away certificate 1" in shown


def test_many_clients_are_listed_up_to_a_bound(capsys):
    client = {"state": "ready", "since": 0.0, "round": None, "uploaded_at": None, "bytes_up": 0, "bytes_down": 0}
    now = {"run": "r", "strategy": "s", "folder": "f", "address": "a", "process": 1, "version": "v", "stopping": False,
           "rounds": {"planned": 0, "finished": 0, "current": 0}, "phase": "waiting", "why": "", "since": 0.0,
           "round_left_s": None, "run_left_s": None, "bytes": {"up": 0, "down": 0}, "refusals": {}, "turned_away": {},
           "clients": [{"name": f"c{number}", **client} for number in range(500)]}
    shown = command._lines(now, 60.0)
    assert len(shown) < command.MOST_SHOWN + 10 and "and 460 more" in shown[-1]


@pytest.mark.parametrize("suspend", [False, True])
def test_stop_asks_as_a_signal_does_and_waits_until_the_folder_is_free(server, capsys, suspend):
    def run():
        server.stopping.asked.wait(20)
        time.sleep(0.2)
        server.end()

    loop = threading.Thread(target=run)
    loop.start()
    code = main(["stop", str(server.out), *(["--suspend"] if suspend else [])])
    assert code == 0 and not (server.out / UNFINISHED).exists()
    assert f"--resume {server.out} goes on" in capsys.readouterr().out
    assert server.stopping.how() == ("suspended" if suspend else "stopped")
    assert f"clients {'wait for this server' if suspend else 'are told'}" in server.said()
    loop.join()


def test_stop_that_waits_in_vain_says_so_and_a_second_one_changes_nothing(server, capsys):
    for arguments in (["--suspend"], []):
        assert main(["stop", str(server.out), "--timeout", "0.2", *arguments]) == 1
        assert "has not ended after 0.2 s" in (said := capsys.readouterr().err)
    assert "stopping already; clients wait for it" in said
    assert server.stopping.how() == "suspended"
    assert "stopping" in lines(server.out, capsys)


def test_without_a_server_the_files_say_what_can_be_done(tmp_path, capsys):
    checkpoint.begin(tmp_path, {}, RUN, {})
    assert status(tmp_path, capsys) == (1, {"running": False, "begun": True, "planned": 5, "finished": 0,
                                            "resumable": True})
    checkpoint.save(tmp_path, RUN.run_id, 3, STATE, {})
    for sub, stream in (("status", "out"), ("stop", "err")):
        assert main([sub, str(tmp_path)]) == 1
        said = getattr(capsys.readouterr(), stream)
        assert f"3 of 5 rounds are finished. fedlora-server --resume {tmp_path} goes on" in said
    (tmp_path / "report.json").write_text('{"ended": "finished"}')
    assert main(["status", str(tmp_path)]) == 1 and "its run is over" in capsys.readouterr().out
    (tmp_path / "checkpoint.safetensors").write_bytes(b"x")
    assert main(["status", str(tmp_path)]) == 2 and "holds no run" in capsys.readouterr().err


def test_a_folder_that_is_none_or_holds_no_run_is_wrong_input_and_one_that_just_begins_is_not(tmp_path, capsys):
    for folder, says in ((tmp_path / "absent", "is not a folder"), (tmp_path, "holds no run")):
        for sub in ("status", "stop"):
            assert main([sub, str(folder)]) == 2 and says in capsys.readouterr().err
    (tmp_path / UNFINISHED).touch()
    assert main(["status", str(tmp_path)]) == 1 and "it starts just now" in capsys.readouterr().out


def test_what_a_killed_server_left_is_replaced_and_no_other_file_is(tmp_path, caplog):
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / FILE))
    left.close()
    with pytest.raises(ConnectionRefusedError):
        ask(tmp_path, {})
    first = ControlSocket(tmp_path, lambda request: ({"mine": 1}, False)).open()
    assert ask(tmp_path, {})[0] == {"mine": 1}
    (tmp_path / FILE).unlink()
    second = ControlSocket(tmp_path, lambda request: ({"mine": 2}, False)).open()
    first.close()
    assert ask(tmp_path, {})[0] == {"mine": 2}, "it removed its own file alone"
    second.close()
    (tmp_path / FILE).write_text("a user's file")
    third = ControlSocket(tmp_path, lambda request: ({}, False)).open()
    third.close()
    assert (tmp_path / FILE).read_text() == "a user's file" and "status and stop will not reach" in caplog.text


def test_a_folder_with_a_long_path_is_reached_where_proc_is_and_said_to_be_none_elsewhere(tmp_path, monkeypatch,
                                                                                           caplog):
    folder = tmp_path.joinpath(*["a-long-name" * 4] * 4)
    folder.mkdir(parents=True)
    assert len(os.fsencode(folder)) > control.LONGEST_PATH
    listening = ControlSocket(folder, lambda request: ({"heard": request}, False)).open()
    if Path("/proc/self/fd").is_dir():
        assert ask(folder, {"a": 1})[0] == {"heard": {"a": 1}}
    listening.close()
    assert not (folder / FILE).exists()
    monkeypatch.setattr(Path, "is_dir", lambda path: False)
    with pytest.raises(OSError, match="longer than"), reachable(folder / FILE):
        raise AssertionError
    ControlSocket(folder, lambda request: ({}, False)).open().close()
    assert "status and stop will not reach this server" in caplog.text


HOSTILE = {
    "garbage": b"\x00\xff" * 100 + b"\n", "no object": b"[1]\n", "nothing known": b'{"ask": "shutdown"}\n',
    "deep": b"[" * 4000 + b"\n", "stop without suspend": b'{"ask": "stop"}\n', "no line": b"x" * 10_000,
    "suspend that is a word": b'{"ask": "stop", "suspend": "yes"}\n', "no text": b'{"ask": ["status"]}\n',
}


@pytest.mark.parametrize("sent", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_request_is_answered_by_an_error_and_does_nothing(server, sent, capsys, caplog):
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(10)
        stranger.connect(str(server.out / FILE))
        stranger.sendall(sent)
        try:
            answer = stranger.recv(65536)
        except ConnectionResetError:  # it was closed with unread bytes
            answer = b'{"error": ""}'
    assert "error" in json.loads(answer)
    assert not server.stopping.asked.is_set() and status(server.out, capsys)[0] == 0
    assert "Traceback" not in caplog.text


def test_clients_that_say_nothing_hold_neither_the_server_nor_its_threads(server, capsys, monkeypatch):
    monkeypatch.setattr(control, "PATIENCE_S", 0.3)
    silent, before = [], sum(thread.name == "fedlora-control" for thread in threading.enumerate())
    for _ in range(3 * control.MOST_AT_ONCE):
        silent.append(socket.socket(socket.AF_UNIX))
        silent[-1].connect(str(server.out / FILE))
    threads = sum(thread.name == "fedlora-control" for thread in threading.enumerate())
    assert threads <= before + control.MOST_AT_ONCE
    deadline = time.monotonic() + 10
    while status(server.out, capsys)[0] != 0:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for one in silent:
        one.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_kept_out_and_told_so(server):
    ask_as_nobody = ("import os, sys; from fedlora_server.operations.control import ask; from pathlib import Path\n"
                     "os.setgid(65534); os.setuid(65534)\n"
                     "try: ask(Path(sys.argv[1]), {'ask': 'status'})\n"
                     "except PermissionError: sys.exit(7)")
    folder = Path("/tmp") / f"fedlora-control-{os.getpid()}"  # a place that nobody can reach
    folder.mkdir(mode=0o755)
    try:
        listening = ControlSocket(folder, lambda request: ({}, False)).open()
        ended = subprocess.run([sys.executable, "-c", ask_as_nobody, folder], capture_output=True, text=True)
        assert ended.returncode == 7, ended.stderr
        listening.close()
    finally:
        shutil.rmtree(folder)


def test_the_commands_load_nothing_that_a_health_check_would_wait_for(server):
    code = ("import sys; from fedlora_server.cli import main\nassert main(sys.argv[1:]) == 0\n"
            "heavy = {'torch', 'numpy', 'flwr', 'transformers', 'grpc', 'rich', 'opacus', 'cryptography'}\n"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)")
    ended = subprocess.run([sys.executable, "-c", code, "status", server.out], capture_output=True, text=True)
    assert ended.returncode == 0 and f"run        {RUN.run_id}, ffa-lora" in ended.stdout, ended.stderr
