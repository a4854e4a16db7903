"""TensorBoard, MLflow and W&B: what each store holds afterwards, read back from real stores on this machine."""

import io
import json
import math
import shutil
import socket
import time
from pathlib import Path

import pytest
from rich.console import Console
from typing_extensions import override

from fedlora.config import ServerConfig, SimulationConfig, options_of
from fedlora_server import trackers
from fedlora_server.observer import RoundRecord
from fedlora_server.trackers import Trackers, Watched, check_installed
from fedlora_server.trackers._experiments import OPTIONS
from tests.federation import plan_of

SECRET = ("north-hospital", "south-hospital", "/somewhere/private", "patients.jsonl", "10.11.12.13", "--swordfish")
"""Names of clients, paths, an address and a command: all that a store must not hold."""

OPTIONS_GIVEN = {"rounds": 3, "seed": 5, "init": "public:/somewhere/private/patients.jsonl", "address": "10.11.12.13:1",
                 "eval_data": Path("/somewhere/private/patients.jsonl"), "on_event": "page --swordfish",
                 "out": Path("/somewhere/private"), "server_options": (("beta1", 0.5),), "clients_per_round": None}

NOT_TOLD = {"address", "allow_download", "client_ranks", "column", "config", "data", "data_description", "delimiter",
            "dry_run", "encoding", "eval_data", "insecure", "label_map", "log_format", "metrics", "on_event", "out",
            "ray_address", "reference", "resume", "seeds", "sheet", "skip_incomplete", "strategy", "sweep", "tls",
            "track", "tune", "tune_budget"}
"""Options that no store is told: files, addresses, words about the data, and what lists a simulation's runs."""


def record(number, accuracy=0.5):
    return RoundRecord(number, cohort=("north-hospital", "south-hospital"), uploaded=("north-hospital",),
                       lost=("south-hospital",), disclosed={"north-hospital": {"steps": 4}}, bytes_up=1200,
                       evaluation={"accuracy": accuracy, "loss": math.nan, "recall/Typ 1, (schwer)": 0.25},
                       rejected={"south-hospital": "too large"}, update_norm=0.5 if number else None, seconds=1.5)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Let no process reach another one but by a socket on this machine that counts, and yield the number of calls."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as outside:
        outside.setblocking(False)
        url = f"http://127.0.0.1:{outside.getsockname()[1]}"
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "WANDB_BASE_URL"):
            monkeypatch.setenv(name, url)
        connect = socket.socket.connect
        monkeypatch.setattr(socket.socket, "connect", lambda self, address: connect(self, address) if (
            self.family == socket.AF_UNIX) else pytest.fail(f"calls {address}"))
        yield
        with pytest.raises(BlockingIOError):
            outside.accept()


@pytest.fixture(params=["tensorboard", "mlflow", "wandb"])
def store(request, tmp_path):
    if request.param == "mlflow":
        shutil.copyfile(request.getfixturevalue("mlflow_database"), tmp_path / "mlflow.db")
    return {"tensorboard": InTensorBoard, "mlflow": InMLflow, "wandb": InWandB}[request.param](tmp_path)


class Store:
    """One run's folder, and what its store holds."""

    key: str

    def __init__(self, folder):
        self.folder = folder

    def watch(self, *records, before=(), ended="finished"):
        run = Watched("fedsvd, tiny", self.folder, Console(file=io.StringIO()), OPTIONS_GIVEN, "0123456789abcdef")
        with Trackers([self.key], run) as watching:
            watching.begin(plan_of("fedsvd"), before)
            for one in records:
                watching.finished(one)
            if ended:
                watching.ended(ended)
                self.leave_report([*before, *records], ended)

    def leave_report(self, records, ended):
        (self.folder / "curves.png").write_bytes(b"a picture")
        (self.folder / "report.json").write_text(json.dumps({
            "ended": ended, "why": "south-hospital left", "finished_rounds": records[-1].round, "bytes": {"up": 7},
            "options": {"out": "/somewhere/private"}, "disclosed": {"north-hospital": {}}}))


class InTensorBoard(Store):
    key = "tensorboard"

    def __init__(self, folder):
        super().__init__(folder)
        self.files = [folder / "tensorboard"]

    def read(self):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        return EventAccumulator(str(self.folder / "tensorboard")).Reload()

    def curve(self, name):
        return [(event.step, event.value) for event in self.read().Scalars(name)]

    def parameters(self):
        [text] = self.read().Tensors("parameters/text_summary")
        rows = text.tensor_proto.string_val[0].decode().splitlines()[2:]
        return dict(row.strip("| ").split(" | ") for row in rows)

    def report(self):
        text = self.read().Tensors("report/text_summary")[-1].tensor_proto.string_val[0].decode()
        return json.loads(text.strip("`"))


class InMLflow(Store):
    key = "mlflow"

    def __init__(self, folder):
        super().__init__(folder)
        self.files = [folder / "mlflow.db", folder / "mlflow-artifacts"]

    def read(self):
        from mlflow.tracking import MlflowClient

        client = MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")
        [run] = client.search_runs([client.get_experiment_by_name("fedlora").experiment_id])
        return client, run

    def curve(self, name):
        client, run = self.read()
        return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name.replace(
            ",", "_x2c_").replace("(", "_x28_").replace(")", "_x29_"))]

    def parameters(self):
        return self.read()[1].data.params

    def report(self):
        client, run = self.read()
        assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"report.json", "curves.png"}
        return json.loads(Path(client.download_artifacts(run.info.run_id, "report.json")).read_text())


class InWandB(Store):
    key = "wandb"

    def __init__(self, folder):
        super().__init__(folder)
        self.files = [folder / "wandb"]

    def records(self):
        """Return the records of W&B's files, the earliest file first, once its own process has ended each of them."""
        for _ in range(600):
            found = [[*self._written(file)] for file in sorted(
                self.folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)]
            if found and all(records and records[-1].HasField("exit") for records in found):
                return [one for records in found for one in records]
            time.sleep(0.1)
        raise AssertionError("W&B did not end its files")

    @staticmethod
    def _written(file):
        """Yield the records of one of W&B's files, which are in the format of LevelDB's logs."""
        from wandb.proto.wandb_internal_pb2 import Record

        data, place, whole = file.read_bytes(), 7, b""
        while place + 7 <= len(data):
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
                continue
            length, kind = int.from_bytes(data[place + 4:place + 6], "little"), data[place + 6]
            whole += data[place + 7:place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # a whole record, or the last part of one
                yield Record.FromString(whole)
                whole = b""

    def curve(self, name):
        found = []
        for one in self.records():
            items = {item.key or "/".join(item.nested_key): item.value_json for item in one.history.item}
            if name in items:
                found.append((int(items["_step"]), float(json.loads(items[name]))))
        return found

    def parameters(self):
        first = next(one.run for one in self.records() if one.HasField("run"))
        return {item.key: str(json.loads(item.value_json)) for item in first.config.update}

    def report(self):
        [file] = self.folder.glob("wandb/offline-run-*/files/report.json")
        assert file.with_name("curves.png").read_bytes() == b"a picture"
        assert {named.path for one in self.records() for named in one.files.files} >= {"report.json", "curves.png"}
        return json.loads(file.read_text())


def test_a_store_has_settings_curves_report_and_picture_and_nothing_about_a_client_or_a_path(store):
    store.watch(record(0), record(1, 0.75))
    assert store.curve("evaluation/accuracy") == [(0, 0.5), (1, 0.75)]
    assert store.curve("evaluation/recall/Typ 1, (schwer)") == [(0, 0.25), (1, 0.25)]
    assert [math.isnan(value) for _, value in store.curve("evaluation/loss")] == [True, True]
    assert store.curve("training/update_norm") == [(1, 0.5)]
    assert store.curve("clients/asked") == [(0, 2), (1, 2)] and store.curve("clients/lost") == [(0, 1), (1, 1)]
    assert store.curve("traffic/bytes_up") == [(0, 1200), (1, 1200)]
    told = store.parameters()
    assert (told["strategy"], told["lr"], told["seed"], told["init"], told["targets"], told["server_options"]) == (
        "fedsvd", "0.3", "5", "public", "q", "beta1=0.5")
    report = store.report()
    assert report["ended"] == "finished" and report["bytes"] == {"up": 7}
    assert [one["clients/uploaded"] for one in report["rounds"]] == [1, 1]
    held = b"".join(file.read_bytes() for place in store.files for file in (place, *place.rglob("*")) if file.is_file())
    assert not [word for word in SECRET if word.encode() in held]


def test_a_resumed_run_goes_on_in_its_curves_and_brings_what_they_lack(store):
    store.watch(record(0), record(1), ended="")
    store.watch(record(3), before=[record(0), record(1), record(2)])
    assert store.curve("evaluation/accuracy") == [(round, 0.5) for round in range(4)]
    assert [one["round"] for one in store.report()["rounds"]] == [0, 1, 2, 3]
    assert store.parameters()["rounds"] == "3"


@pytest.mark.parametrize(("ended", "status"), [("finished", "FINISHED"), ("stopped", "KILLED"), ("diverged", "FAILED"),
                                               ("", "FAILED")])
def test_mlflow_says_how_a_run_ended(tmp_path, mlflow_database, ended, status):
    shutil.copyfile(mlflow_database, tmp_path / "mlflow.db")
    store = InMLflow(tmp_path)
    store.watch(record(0), ended=ended)
    assert store.read()[1].info.status == status


def test_runs_of_one_command_share_a_database_and_mlflow_s_own_variables_name_another(
        tmp_path, mlflow_database, monkeypatch):
    from mlflow.tracking import MlflowClient

    shutil.copyfile(mlflow_database, tmp_path / "mlflow.db")
    shutil.copyfile(mlflow_database, tmp_path / "elsewhere.db")

    def watch(folder):
        (tmp_path / folder).mkdir()
        run = Watched(folder, tmp_path / folder, Console(file=io.StringIO()), {}, together=tmp_path)
        with Trackers(["mlflow"], run) as watching:
            watching.begin(plan_of("fedsvd"), ())

    watch("a")
    watch("b")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri := f"sqlite:///{tmp_path / 'elsewhere.db'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "wards")
    watch("c")
    for database, experiment, names in ((f"sqlite:///{tmp_path / 'mlflow.db'}", "fedlora", {"a", "b"}),
                                        (uri, "wards", {"c"})):
        client = MlflowClient(database)
        runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
        assert {run.info.run_name for run in runs} == names


def test_a_package_that_is_missing_is_told_before_anything_begins_with_what_to_install(monkeypatch, capsys, tmp_path):
    from fedlora_server import cli

    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name in ("mlflow", "wandb") else object())
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    check_installed(["console", "csv", "plots", "tensorboard"])
    with pytest.raises(ValueError, match=r"--track mlflow needs mlflow.*pip install 'fedlora\[mlflow\]'"):
        check_installed(["mlflow"])
    assert cli.main(["--track", "wandb", "--labels", "a,b", "--out", str(tmp_path / "run")]) == 2
    assert "pip install 'fedlora[wandb]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_it_is_decided_of_every_option_whether_a_store_is_told():
    for config in (ServerConfig, SimulationConfig):
        told = {name for name, option in options_of(config).items() if option.plan} | set(OPTIONS)
        assert options_of(config).keys() - told <= NOT_TOLD
    known = {name for config in (ServerConfig, SimulationConfig) for name in options_of(config)}
    assert set(OPTIONS) | NOT_TOLD <= known


def test_a_store_that_cannot_be_written_is_named_and_the_run_goes_on(tmp_path, caplog, monkeypatch):
    class Elsewhere(Trackers):
        heard = 0

        @override
        def finished(self, record):
            super().finished(record)
            type(self).heard += 1

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/no/such.db")
    with Elsewhere(["mlflow"], Watched("a run", tmp_path, Console(file=io.StringIO()), {})) as watching:
        watching.begin(plan_of("fedsvd"), ())
        watching.finished(record(0))
    assert Elsewhere.heard == 1 and "The tracker mlflow failed" in caplog.text
