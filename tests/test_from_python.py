"""The three functions for Python are the three commands: the same options, words, files and bits, in this process."""

import csv
import io
import pkgutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console
from safetensors.numpy import load_file

import fedlora_client
import fedlora_server
import fedlora_simulations
from fedlora.config import ClientConfig, ServerConfig, SimulationConfig
from fedlora_client import TookPart, join
from fedlora_client.connection import ServerUnreachable
from fedlora_client.steps import NotReady
from fedlora_server import Served, serve
from fedlora_simulations import Simulation, cli, simulate
from tests.processes import free_port, write_rows

SMALL = {"rank": 2, "rounds": 2, "local_steps": 1, "batch_size": 8, "max_length": 16, "threads": 1, "privacy": "off",
         "epsilon": float("inf"), "device": "cpu", "precision": "fp32"}
OF_THE_SERVER = {"rank", "rounds", "local_steps", "batch_size", "max_length", "privacy"}


@pytest.fixture(autouse=True)
def own_environment(tmp_path, monkeypatch):
    """Let the functions set this process's environment for the test alone, and keep user files in its folder."""
    for name in ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE",
                 "GRPC_VERBOSITY", "GRPC_SSL_CIPHER_SUITES"):
        monkeypatch.setenv(name, "1")
    for name in ("STATE", "CONFIG"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def notes(tmp_path, checkpoint):
    """Return the options that name the data and the model."""
    return {"data": write_rows(tmp_path / "data" / "rows.jsonl", 0), "model": checkpoint("bert"),
            "eval_data": write_rows(tmp_path / "held-out.jsonl", 1, rows=24)}


def test_a_simulation_has_the_bits_and_files_of_the_command_and_a_silent_stdout(notes, console, tmp_path, capsys):
    result = simulate(SimulationConfig(seeds=(3,), clients=2), **notes, **SMALL, out=tmp_path / "ours", console=console,
                      strategy="fedsvd,ffa-lora:orthonormal")
    assert isinstance(result, Simulation) and result.folder == tmp_path / "ours"
    assert capsys.readouterr().out == "" and "Adapters, reports and the comparison are in" in console.file.getvalue()
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (notes | SMALL).items()]
    assert cli.main([*flags, "--seeds=3", "--clients=2", "--strategy=fedsvd,ffa-lora:orthonormal",
                     f"--out={tmp_path / 'theirs'}"]) == 0
    for run in result.runs:
        mine = load_file(run.adapter / "adapter_model.safetensors")
        other = load_file(tmp_path / "theirs" / Path(run.folder).name / "adapter" / "adapter_model.safetensors")
        assert {name: value.tobytes() for name, value in mine.items()} == {
            name: value.tobytes() for name, value in other.items()}
    assert {file.name for file in result.folder.rglob("*")} == {
        file.name for file in (tmp_path / "theirs").rglob("*")}


def test_results_are_a_table_a_picture_rows_and_runs(notes, console):
    result = simulate(console=console, strategy=["fedsvd", "fed-sb"], seeds="0,1", clients=2, track="no-plots", **notes,
                      **SMALL)
    assert [(run.method, run.seed) for run in result.runs] == [
        ("fedsvd", 0), ("fed-sb", 0), ("fedsvd", 1), ("fed-sb", 1)]
    first = result.runs[0]
    assert [one.round for one in first.rounds] == [0, 1, 2] and first.report["plan"]["rounds"] == 2
    assert first.figures["accuracy"] == first.report["evaluation"]["after"]["accuracy"]
    assert result.folder.parent.name == "runs" and result.folder.name.endswith("-simulation")
    shown = Console(file=io.StringIO(), width=100)
    shown.print(result.table())
    assert "fed-sb" in shown.file.getvalue() and "accuracy" in shown.file.getvalue()
    assert isinstance(result.plot(), Figure)
    rows = result.rows()
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("fedsvd", 0), ("fedsvd", 1), ("fed-sb", 0), ("fed-sb", 1)]
    assert {"epsilon_spent", "accuracy", "accuracy_low", "bytes_up"} <= rows[0].keys()
    csv.DictWriter(io.StringIO(), rows[0]).writerows(rows)
    with pytest.raises(ValueError, match=r"4 runs.*runs\[0\]"):
        _ = result.adapter


def test_one_run_has_one_adapter_and_without_held_out_rows_no_picture(notes, console):
    del notes["eval_data"]
    result = simulate(console=console, clients=2, track=("csv", "tensorboard"), **notes, **SMALL)
    assert (result.adapter / "adapter_model.safetensors").is_file()
    assert {"curves.png", "rounds.csv", "tensorboard"} <= {file.name for file in Path(result.runs[0].folder).iterdir()}
    with pytest.raises(ValueError, match="nothing was evaluated; give eval_data"):
        result.plot()


@pytest.mark.parametrize(("options", "told"), [
    ({"rounds": 0}, "--rounds: '0' is not a whole number of at least 1"),
    ({"round": 5}, "'round' is not an option of fedlora-simulate; did you mean 'rounds'"),
    ({"server": "a:1"}, "'server' is an option of fedlora-client, not of fedlora-simulate"),
    ({"allow_download": "yes"}, "allow_download must be true or false, not 'yes'"),
    ({"config": "no.toml"}, "--config no.toml cannot be read"), ({"dry_run": True}, "dry_run works only with"),
    ({}, "--data is missing"), ({"privacy": "off"}, "contradict each other"),
    ({"data": "no/such"}, "no/such"), ({"track": "wandbb"}, "'wandbb' is not a tracker")])
def test_a_wrong_option_is_a_value_error_in_the_words_of_the_command(options, told, console, checkpoint):
    with pytest.raises(ValueError) as error:
        simulate(console=console, model=checkpoint("bert"), **options)
    assert told in str(error.value)


def test_a_config_and_a_file_are_checked_as_keywords_are_and_keywords_override_them(tmp_path):
    with pytest.raises(ValueError, match=r"simulate\(\): --rounds: '0'"):
        simulate(SimulationConfig(rounds=0))
    with pytest.raises(TypeError, match="takes a ServerConfig, not a ClientConfig"):
        serve(ClientConfig())  # type: ignore[arg-type]
    (tmp_path / "run.toml").write_text("rounds = 0\n")
    with pytest.raises(ValueError, match=r"^serve\(\): --config \S*run\.toml: --rounds: '0'"):
        serve(tmp_path / "run.toml")
    with pytest.raises(ValueError, match=r"join\(\): --epsilon: '-1'"):
        join(ClientConfig(epsilon=8.0), epsilon=-1)
    with pytest.raises(ValueError, match="dry_run works only with the command fedlora-server"):
        serve(ServerConfig(rounds=0), rounds=1, dry_run=True)


def test_a_server_and_its_clients_run_in_threads_of_one_process(notes, console, tmp_path):
    """Two clients in turn of one process could not: the second would find the first one's files locked."""
    address = f"127.0.0.1:{free_port()}"
    of_both = {name: value for name, value in SMALL.items() if name not in OF_THE_SERVER}

    def client(name):
        return join(data=notes["data"], model=notes["model"], server=address, name=name, yes=True, console=console,
                    state=tmp_path / name, simulated_ledger=tmp_path / name, **of_both)

    with ThreadPoolExecutor() as threads:
        served = threads.submit(
            serve, ServerConfig(min_clients=2), console=console, labels=("routine", "urgent"), address=address,
            model=notes["model"], eval_data=notes["eval_data"], out=tmp_path / "run", wait_timeout=60,
            **{name: SMALL[name] for name in OF_THE_SERVER})
        parts = list(threads.map(client, ("north", "south")))
        done = served.result(60)
    assert isinstance(done, Served) and done.ended == "finished"
    assert [record.round for record in done.records] == [0, 1, 2] and 0 <= done.figures["accuracy"] <= 1
    assert done.adapter is not None and (done.adapter / "adapter_model.safetensors").is_file()
    assert all(isinstance(part, TookPart) and part.sent == (1, 2) and part.bytes_up > 0 for part in parts)
    assert [part.name for part in parts] == ["north", "south"] and len({part.run_id for part in parts}) == 1
    again = ClientConfig(data=str(notes["data"]), server=f"127.0.0.1:{free_port()}", name="north", yes=True,
                         connect_timeout=0.1, epsilon=float("inf"), state=tmp_path / "north",
                         simulated_ledger=tmp_path / "north", device="cpu")
    with pytest.raises(ServerUnreachable):  # rather than that the files are in use
        join(again, console=console)


def test_ctrl_c_stops_a_server_in_the_main_thread_and_its_handler_comes_back(notes, console, tmp_path):
    before = signal.getsignal(signal.SIGINT)

    def interrupt():
        deadline = time.monotonic() + 60
        while "waiting for" not in console.file.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt).start()
    done = serve(labels="routine,urgent", model=notes["model"], address=f"127.0.0.1:{free_port()}", console=console,
                 out=tmp_path / "run", **{name: SMALL[name] for name in OF_THE_SERVER})
    assert (done.ended, done.adapter, done.records, done.figures) == ("stopped", None, (), {})
    assert signal.getsignal(signal.SIGINT) is before


def test_with_a_kit_all_is_checked_as_fedlora_client_join_checks_it(console, tmp_path):
    with pytest.raises((ValueError, OSError), match=r"no\.toml"):
        join(kit=tmp_path / "no.toml", console=console)
    (tmp_path / "kit.toml").write_text("no kit")
    with pytest.raises(ValueError) as error:
        join(kit="kit.toml", check_only=True, console=console)
    assert not isinstance(error.value, NotReady) and "kit.toml" in str(error.value)
    with pytest.raises(ValueError, match=r"'check_only' is not an option of fedlora-client"):
        join(check_only=True, console=console)


def test_importing_the_functions_loads_nothing_that_trains():
    code = ("import sys\nfrom fedlora_client import join\nfrom fedlora_server import serve\n"
            "from fedlora_simulations import simulate\n"
            "heavy = {'torch', 'numpy', 'flwr', 'transformers', 'grpc', 'rich', 'opacus', 'cryptography'}\n"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_no_module_takes_the_place_of_a_function():
    for package, function in ((fedlora_simulations, simulate), (fedlora_server, serve), (fedlora_client, join)):
        name = function.__name__
        assert getattr(package, name) is function
        assert name not in {module.name for module in pkgutil.iter_modules(package.__path__)}
        with pytest.raises(AttributeError, match="has no attribute 'siimulate'"):
            _ = package.siimulate
