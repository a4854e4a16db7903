"""Real processes that are stopped, suspended or held up, or lose their folder: a run survives as after a crash."""

import fcntl
import json
import os
import shutil
import signal

import pytest

from tests.processes import write_rows

SMALL = ("--rank", 2, "--local-steps", 2, "--batch-size", 8, "--max-length", 16)
LONG = (*SMALL, "--local-steps", 5, "--batch-size", 120)
PLENTY = 200
"""An ε so large that calibrating its noise takes no time."""


def test_clients_of_a_suspended_server_wait_and_the_same_command_goes_on_to_the_same_adapter(deploy, tmp_path):
    """SIGTERM comes in round 2, when south has sent its update and north, record by record, still trains."""
    files = {name: write_rows(tmp_path / f"{name}.jsonl", seed, rows=600)
             for seed, name in enumerate(("north", "south"))}
    server = ("--min-clients", 2, "--min-replies", 2, "--seed", 5, "--rounds", 2, *LONG)
    whole, broken = deploy("whole"), deploy("broken")
    for deployment in (whole, broken):
        deployment.server(*server)
        deployment.client("north", files["north"], "--epsilon", PLENTY, "--micro-batch", 1, seed=5)
        deployment.client("south", files["south"], "--epsilon", PLENTY, seed=5)
    broken.wait_for("south", "round 2/2: sent")
    broken.processes["server"].send_signal(signal.SIGTERM)
    assert broken.end("server") == 128 + signal.SIGTERM, broken.log("server")
    assert "clients wait for this server" in broken.log("server")
    broken.wait_for("south", "its run goes on when it is back")
    broken.server(*server)
    for deployment in (whole, broken):
        assert deployment.end("server") == 0, deployment.log("server")
        assert deployment.end("north") == deployment.end("south") == 0, deployment.log("north")
    assert "goes on after round 1 of 2" in broken.log("server")
    assert broken.adapter() == whole.adapter()
    assert broken.server(*server).wait(60) == 2 and "is not empty" in broken.log("server"), "a finished run is kept"


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_waited_for_clients_is_taken_up_with_the_label_names_that_are_yet_to_be_announced(
        deploy, tmp_path, end):
    """If the server is killed, north looks for its successor. If it is stopped, north is told to leave."""
    deployment = deploy("run")
    data = write_rows(tmp_path / "north" / "notes.jsonl", 0)
    deployment.server("--privacy", "off", "--min-clients", 2, "--rounds", 1, *SMALL)
    deployment.client("north", data, "--epsilon", "inf")
    deployment.wait_for("server", "north ready")
    run = json.loads((deployment.out / "run.json").read_text())["plan"]["run_id"]
    deployment.processes["server"].send_signal(end)
    assert deployment.end("server") == (130 if end == signal.SIGINT else -end)
    if end == signal.SIGINT:
        assert deployment.end("north") == 0
        assert f"--resume {deployment.out} goes on" in deployment.log("server")
    deployment.resume()
    if end == signal.SIGINT:
        deployment.client("north", data, "--epsilon", "inf")
    deployment.client("south", write_rows(tmp_path / "south" / "notes.jsonl", 1), "--epsilon", "inf")
    assert deployment.end("server") == deployment.end("north") == deployment.end("south") == 0, deployment.log("server")
    report = json.loads((deployment.out / "report.json").read_text())
    assert report["plan"]["run_id"] == run and report["plan"]["labels"] == ["routine", "urgent"]


def test_another_command_does_not_take_up_the_run_in_its_folder(deploy):
    deployment = deploy("run")
    deployment.server("--labels", "routine,urgent", "--min-clients", 2, "--rounds", 1, *SMALL)
    deployment.wait_for("server", "waiting for 2 more clients")
    deployment.processes["server"].kill()
    deployment.end("server")
    kept = (deployment.out / "run.json").read_bytes()
    deployment.server("--labels", "routine,urgent", "--min-clients", 2, "--rounds", 4, *SMALL)
    assert deployment.end("server") == 2
    assert "begun with rounds 1, now 4" in deployment.log("server")
    assert (deployment.out / "run.json").read_bytes() == kept


def test_a_run_whose_start_clients_release_goes_on_with_that_start_alone(deploy):
    deployment = deploy("run")
    same = ("--labels", "routine,urgent", "--min-clients", 2, "--rounds", 1, "--strategy", "pissa", "--privacy", "off")
    deployment.server(*same, "--init", "lora-ga-clients", *SMALL)
    deployment.wait_for("server", "waiting for 2 more clients")
    deployment.processes["server"].kill()
    deployment.end("server")
    deployment.server(*same, "--init", "lora-sb-clients", *SMALL)
    assert deployment.end("server") == 2
    assert "begun with init 'lora-ga-clients', now 'lora-sb-clients'" in deployment.log("server")


def test_a_removed_folder_is_said_and_ends_the_run(deploy, tmp_path):
    deployment = deploy("run")
    deployment.server("--labels", "routine,urgent", "--min-clients", 1, "--rounds", 500, *SMALL)
    deployment.client("north", write_rows(tmp_path / "north.jsonl", 0), "--epsilon", PLENTY, seed=5)
    deployment.wait_for("north", "round 2/500: sent")
    gone = deployment.out.rename(tmp_path / "gone")  # renamed, not removed piece by piece, since files in it are open
    shutil.rmtree(gone)
    assert deployment.end("server") == 2 and deployment.end("north") == 1
    assert f"folder {deployment.out} was removed" in deployment.log("server")
    assert "Traceback" not in deployment.log("server") + deployment.log("north")
    assert not deployment.out.exists()


def test_a_server_whose_stderr_nobody_reads_runs_to_its_end_and_heeds_signals(deploy, tmp_path, monkeypatch):
    """The server's stderr is a pipe of 4 kB that is full before it begins."""
    unread = []

    def with_an_unread_log(deployment, rounds):
        pipe = deployment.folder / "server.log"
        os.mkfifo(pipe)
        unread.append(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))
        fcntl.fcntl(unread[-1], fcntl.F_SETPIPE_SZ, 4096)
        os.write(unread[-1], b"x" * 4096)
        monkeypatch.setattr("pathlib.Path.write_bytes", lambda path, data: None)  # the test's own log file
        deployment.server("--labels", "routine,urgent", "--min-clients", 1, "--rounds", rounds, *SMALL)
        monkeypatch.undo()
        deployment.client("north", write_rows(tmp_path / "north.jsonl", 0), "--epsilon", PLENTY, seed=5)

    to_its_end, stopped = deploy("whole"), deploy("stopped")
    with_an_unread_log(to_its_end, 2)
    with_an_unread_log(stopped, 500)
    stopped.wait_for("north", "round 2/500: sent")
    stopped.processes["server"].send_signal(signal.SIGINT)
    assert stopped.end("server") == 130 and stopped.end("north") == 0
    assert json.loads((stopped.out / "report.json").read_text())["ended"] == "stopped"
    assert to_its_end.end("server") == to_its_end.end("north") == 0
    for descriptor in unread:
        os.close(descriptor)
