"""End-to-end tests of real processes over gRPC: they give the same adapter as a simulation, and survive faults.

Processes are forked from one that has the libraries in memory. In a client, importing Flower fails, because clients
must run without it. tests/test_readme.py and tests/test_intruders.py run the installed commands.
"""

import json
import signal
import socket

import pytest
from safetensors.numpy import load_file

from fedlora.config import SimulationConfig, read_config
from fedlora.privacy import Ledger
from fedlora.privacy.report import read_signed, verify
from fedlora_server.run_setup import find_model
from fedlora_simulations.population import Method, populate
from fedlora_simulations.simulated_run import simulate
from tests.processes import Deployment, write_rows

SMALL = ("--rank", 2, "--rounds", 2, "--local-steps", 2, "--batch-size", 8, "--max-length", 16)


@pytest.fixture
def deployment(tmp_path, checkpoint):
    with Deployment(tmp_path, checkpoint("bert")) as deployment:
        yield deployment


def hospitals(folder, count=3):
    """Return data files, each in its own folder, as if on machines that do not see each other's files."""
    return [write_rows(folder / str(i) / f"hospital-{i}.jsonl", seed=i) for i in range(count)]


def charges(deployment, name):
    ledger = Ledger(deployment.home(name) / "state" / "fedlora" / "ledger.sqlite")
    try:
        return ledger.charges()
    finally:
        ledger.close()


@pytest.mark.parametrize(("method", "wire_dtype", "cohort"), [
    ("fedavg-lora", "fp32", 3), ("ffa-lora", "fp32", 3), ("fed-sb", "fp32", 2), ("fedsvd", "fp32", 3),
    ("fedsvd", "bf16", 3), ("fed-sb:dp", "fp32", 3), ("pissa:lora-ga-clients", "fp32", 3)])
def test_simulation_and_grpc_end_with_the_same_adapter(deployment, tmp_path, method, wire_dtype, cohort):
    strategy, _, init = method.partition(":")
    start = ("--init", init) if init else ()
    private = not init.endswith("-clients")
    files = [write_rows(tmp_path / "data" / f"hospital-{i}.jsonl", seed=i) for i in range(3)]
    small = [*SMALL, "--min-replies", cohort, *(("--clients-per-round", cohort) if cohort < 3 else ())]
    deployment.server("--strategy", strategy, *start, "--min-clients", 3, "--seed", 5,
                      "--wire-dtype", wire_dtype, *small, *(() if private else ("--privacy", "off")))
    for file in files:
        deployment.client(file.stem, file, *(() if private else ("--epsilon", "inf")), seed=5)
    assert deployment.end("server") == 0, deployment.log("server")
    assert private or ("Without privacy, this run trains" in deployment.log(files[0].stem) and
                       "a start from whole gradients" in deployment.log(files[0].stem))
    arguments = [f"--strategy={method}", f"--model={deployment.checkpoint}", f"--data={tmp_path / 'data'}",
                 "--partition=files", "--threads=1", "--device=cpu", "--precision=fp32", f"--wire-dtype={wire_dtype}",
                 *map(str, small), *(() if private else ("--privacy=off", "--epsilon=inf"))]
    options = read_config(SimulationConfig, arguments)
    simulate(options, Method.parse(method), 5, find_model(options), populate(options, 5), out=tmp_path)
    simulated, deployed = (load_file(folder / "adapter" / "adapter_model.safetensors")
                           for folder in (tmp_path, deployment.out))
    assert simulated.keys() == deployed.keys() and simulated
    for name, tensor in simulated.items():
        assert tensor.tobytes() == deployed[name].tobytes(), f"{name} differs"


def test_a_client_killed_in_round_2_does_not_keep_the_run_from_its_adapter(deployment, tmp_path):
    deployment.server("--min-clients", 3, *SMALL, "--rounds", 4, "--eval-data",
                      write_rows(tmp_path / "held-out.jsonl", 9))
    files = hospitals(tmp_path)
    for file in files:
        deployment.client(file.stem, file)
    deployment.wait_for("server", "round 1: 3 of 3 replied")
    deployment.processes["hospital-1"].send_signal(signal.SIGKILL)
    assert deployment.end("server") == 0, deployment.log("server")
    assert "hospital-1 lost" in deployment.log("server")
    report = json.loads((deployment.out / "report.json").read_text())
    assert report["finished_rounds"] == 4 and report["rounds"][-1]["uploaded"] == ["hospital-0", "hospital-2"]
    assert (deployment.out / "adapter" / "adapter_config.json").exists()
    assert (deployment.out / "curves.png").stat().st_size > 10_000
    page = (deployment.out / "report.html").read_text()
    assert "4 of 4" in page and "http-equiv=\"refresh\"" not in page and "hospital-1" in page
    assert "\naccuracy after " in deployment.log("server"), "the summary"
    assert deployment.end("hospital-0") == deployment.end("hospital-2") == 0


def test_a_stopped_server_writes_the_last_finished_round_and_tells_the_clients(deployment, tmp_path):
    policy = deployment.home("hospital-0") / "config" / "fedlora" / "policy.toml"
    policy.parent.mkdir(parents=True)
    policy.write_text("announce-size = false\n")
    deployment.server("--min-clients", 2, *SMALL, "--rounds", 500)
    for file in hospitals(tmp_path, 2):
        deployment.client(file.stem, file)
    deployment.wait_for("server", "round 2: 2 of 2 replied")
    deployment.processes["server"].send_signal(signal.SIGINT)
    assert deployment.end("server", 30) == 130
    assert (deployment.out / "adapter" / "adapter_model.safetensors").exists()
    report = json.loads((deployment.out / "report.json").read_text())
    assert report["ended"] == "stopped"
    disclosed = report["rounds"][-1]["disclosed"]
    assert disclosed["hospital-0"].keys() == {"steps"}
    assert disclosed["hospital-1"].keys() == {"steps", "delta", "noise_multiplier"}
    assert deployment.end("hospital-0", 30) == deployment.end("hospital-1", 30) == 0
    assert "the coordinator stopped the run" in deployment.log("hospital-0")


def test_a_second_signal_ends_a_server_at_once_whoever_does_not_answer(deployment, tmp_path):
    deployment.server("--min-clients", 1, *SMALL, "--rounds", 500)
    deployment.client("north", hospitals(tmp_path, 1)[0])
    deployment.wait_for("server", "round 1: 1 of 1 replied")
    deployment.processes["north"].send_signal(signal.SIGSTOP)  # so that the server waits for it when it says goodbye
    deployment.processes["server"].send_signal(signal.SIGINT)
    deployment.wait_for("server", "A second signal stops the server at once")
    deployment.processes["server"].send_signal(signal.SIGINT)
    assert deployment.end("server", 1) == 130
    assert not (deployment.out / "report.json").exists(), "the first signal was enough: this test shows nothing"


def test_without_labels_the_server_takes_the_union_of_what_clients_say_they_disclose(deployment, tmp_path):
    deployment.server("--min-clients", 2, *SMALL, "--rounds", 1)
    for name, labels in {"north": ("routine", "urgent"), "south": ("routine", "acute")}.items():
        deployment.client(name, write_rows(tmp_path / name / "rows.jsonl", 1, labels=labels), "--labels",
                          ",".join(labels))
    assert deployment.end("server") == 0, deployment.log("server")
    assert "Disclosed to the server: the label names routine, urgent" in deployment.log("north")
    assert "south ready: discloses its label names acute, routine" in deployment.log("server")
    report = json.loads((deployment.out / "report.json").read_text())
    assert report["plan"]["labels"] == ["acute", "routine", "urgent"]
    assert report["disclosed"]["north"]["joined_with"]["label_names"] == ["routine", "urgent"]


def test_a_client_leaves_politely_and_a_restarted_one_goes_on_with_its_account(deployment, tmp_path):
    deployment.server("--min-clients", 2, "--min-replies", 1, *SMALL, "--rounds", 500)
    files = hospitals(tmp_path, 2)
    for file in files:
        deployment.client(file.stem, file)
    deployment.wait_for("server", "round 1: ")
    deployment.processes["hospital-0"].send_signal(signal.SIGINT)
    assert deployment.end("hospital-0", 30) == 130
    deployment.wait_for("server", "hospital-0 left")
    [report] = (deployment.folder / "state" / "hospital-0").glob("*/privacy.json")
    assert verify(read_signed(report)).spent > 0
    before = len(charges(deployment, "hospital-0"))
    deployment.client("hospital-0", files[0])
    deployment.wait_for("hospital-0", ": sent ")
    assert len(charges(deployment, "hospital-0")) > before >= 1
    assert len({charge.run_id for charge in charges(deployment, "hospital-0")}) == 1


def test_a_run_that_ends_for_want_of_clients_is_exit_code_1_on_both_sides(deployment, tmp_path):
    deployment.server("--min-clients", 2, "--min-replies", 2, "--wait-timeout", 0.1, *SMALL, "--rounds", 500)
    for file in hospitals(tmp_path, 2):
        deployment.client(file.stem, file)
    deployment.wait_for("server", "round 1: 2 of 2 replied")
    deployment.processes["hospital-1"].send_signal(signal.SIGINT)
    assert deployment.end("server", 30) == deployment.end("hospital-0", 30) == 1
    assert "too few clients were left" in deployment.log("hospital-0")


def test_no_server_is_exit_code_3_after_the_timeout(deployment, tmp_path):
    deployment.client("north", hospitals(tmp_path, 1)[0], "--connect-timeout", 1)
    assert deployment.end("north", 60) == 3
    assert f"no server at {deployment.address}" in deployment.log("north")


def test_a_taken_port_is_exit_code_2_and_names_the_port(deployment):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(deployment.address.partition(":")[2])))
        taken.listen()
        deployment.server(*SMALL)
        assert deployment.end("server", 60) == 2
    assert deployment.address.partition(":")[2] in deployment.log("server")
    assert "Traceback" not in deployment.log("server")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--task", "causal-lm"], "is an encoder"), (["--labels", "one"], "at least two"),
    (["--eval-data", "missing.jsonl"], "missing.jsonl"), (["--rank", "0"], "--rank"),
    (["--max-participations", "9", "--rounds", "3"], "more than the 3 rounds"), (["--max-length", "9999"], "9999"),
    (["--dropout", "0.1"], "--privacy off"), (["--min-replies", "3", "--clients-per-round", "2"], "--min-replies is 3"),
    (["--address", "0.0.0.0:9092"], "--insecure")])
def test_what_cannot_work_fails_before_the_port_is_bound(deployment, arguments, message):
    deployment.server(*arguments)
    assert deployment.end("server", 60) == 2
    assert message in deployment.log("server") and "Traceback" not in deployment.log("server")
    assert "Listening" not in deployment.log("server")


def test_a_folder_with_results_is_never_written_to(deployment):
    deployment.out.mkdir()
    (deployment.out / "report.json").write_text("{}")
    deployment.server(*SMALL)
    assert deployment.end("server", 60) == 2
    assert "not empty" in deployment.log("server")


def test_clients_that_do_not_fit_are_turned_away_with_what_to_change(deployment, tmp_path, checkpoint):
    secret = "Xylophonia"
    deployment.server("--min-clients", 9, "--labels", "routine,urgent", *SMALL)
    deployment.wait_for("server", "Listening")
    [file] = hospitals(tmp_path, 1)
    deployment.client("twin", file)
    deployment.wait_for("server", "twin ready")
    deployment.folder = tmp_path / "second"
    deployment.folder.mkdir()
    [file] = hospitals(deployment.folder, 1)  # in the same folder as the first one's data and witness
    other = write_rows(tmp_path / "other.jsonl", 1, rows=5)
    with other.open("a") as more:
        more.write(json.dumps({"text": f"{secret} acute", "label": secret}) + "\n")
    clients = {
        "twin": (file, []), "open": (file, ["--epsilon", "inf"]), "model": (file, ["--model", checkpoint("roberta")]),
        "labels": (other, []), "nowhere": (tmp_path / "nowhere", [])}
    for name, (data, arguments) in clients.items():
        deployment.client(name, data, *arguments)
    expected = {"twin": (4, "--name"), "open": (4, "--privacy"), "model": (4, "model-mismatch"),
                "labels": (2, "other.jsonl:6"), "nowhere": (2, "nowhere")}
    for name, (code, text) in expected.items():
        assert deployment.end(name, 60) == code, deployment.log(name)
        assert text in deployment.log(name), deployment.log(name)
        assert "Traceback" not in deployment.log(name) and secret not in deployment.log(name)


def test_held_out_rows_with_other_labels_than_the_clients_announce_end_the_run_before_it_begins(deployment, tmp_path):
    held_out = write_rows(tmp_path / "held-out.jsonl", 9, labels=("routine", "emergency"))
    deployment.server("--min-clients", 1, *SMALL, "--eval-data", held_out)
    deployment.client("north", hospitals(tmp_path, 1)[0])
    assert deployment.end("server", 60) == 2 and deployment.end("north", 60) == 1
    assert "held-out.jsonl:" in deployment.log("server") and "--labels" in deployment.log("server")
    assert "with --labels" in deployment.log("north") and "Traceback" not in deployment.log("server")


def test_a_server_without_privacy_is_refused_by_a_private_client(deployment, tmp_path):
    deployment.server("--privacy", "off", "--min-clients", 1, *SMALL)
    [file] = hospitals(tmp_path, 1)
    deployment.client("north", file)
    assert deployment.end("north", 60) == 4
    assert "--epsilon" in deployment.log("north") and "--privacy off" in deployment.log("north")


def restart_server(deployment, tmp_path):
    deployment.processes["server"].kill()
    deployment.processes["server"].wait()
    deployment.out = tmp_path / "second"
    deployment.server("--min-clients", 2, *SMALL)


def test_a_restarted_server_is_found_again_with_its_new_run(deployment, tmp_path):
    files = hospitals(tmp_path, 2)
    deployment.server("--min-clients", 3, *SMALL)
    for file in files:
        deployment.client(file.stem, file, "--connect-timeout", 60)
        deployment.wait_for(file.stem, "waiting to be asked")
    restart_server(deployment, tmp_path)
    assert deployment.end("server") == 0, deployment.log("server")
    assert deployment.end("hospital-0", 30) == 0
    assert "another run" in deployment.log("hospital-0")


def test_a_client_that_was_charged_spends_on_another_run_only_if_its_owner_starts_it_again(deployment, tmp_path):
    files = hospitals(tmp_path, 2)
    deployment.server("--min-clients", 2, *SMALL, "--rounds", 500)
    for file in files:
        deployment.client(file.stem, file, "--connect-timeout", 60)
    deployment.wait_for("server", "round 1: ")
    restart_server(deployment, tmp_path)
    assert deployment.end("hospital-0", 60) == 4, deployment.log("hospital-0")
    assert "would spend another" in deployment.log("hospital-0")


def test_a_client_too_small_for_the_batch_leaves_at_once_and_names_the_batch_that_fits(deployment, tmp_path):
    deployment.server("--min-clients", 1, *SMALL, "--batch-size", 64)
    deployment.client("small", hospitals(tmp_path, 1)[0])
    assert deployment.end("small", 60) == 4
    assert "at most 24 would fit" in deployment.log("small") and "Traceback" not in deployment.log("small")


def test_a_command_that_failed_can_be_given_again(deployment):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(deployment.address.partition(":")[2])))
        taken.listen()
        deployment.server(*SMALL)
        assert deployment.end("server", 60) == 2
    assert not deployment.out.exists()
