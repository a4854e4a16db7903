"""A run of MLflow: in mlflow.db in the run's folder, or where MLFLOW_TRACKING_URI says."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from fedlora.files import replace_file
from fedlora_server.trackers import Watched
from fedlora_server.trackers._experiments import LAST, PROJECT, ExperimentTracker

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

DATABASE, ARTIFACTS, RUN = "mlflow.db", "mlflow-artifacts", "mlflow-run.json"
"""Files and folder: the database and its files, and the id of the run in it, by which a resumed run goes on."""

STATES = {"finished": "FINISHED", "stopped": "KILLED"}
"""MLflow's word for how a run ended; "FAILED" for all else."""

QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "WARNING", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
         "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""Environment of MLflow, where it is not set: no telemetry, and a server that does not answer delays no round long."""

MOST_CHARACTERS = 500
"""Of a parameter's value: MLflow servers may refuse longer ones."""


class MLflow(ExperimentTracker):
    """The tracker that writes parameters, metrics, the report and the curves as a run of MLflow."""

    needs: ClassVar[Mapping[str, str]] = dict.fromkeys(("mlflow", "sqlalchemy", "alembic"), "fedlora[mlflow]")

    def __init__(self, run: Watched) -> None:
        super().__init__(run)
        self._client: MlflowClient | None = None
        self._id = ""

    @override
    def start(self, parameters: Mapping[str, str | int | float | bool]) -> Collection[int]:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        folder = (self.run.together or self.run.out).absolute()
        self._client = MlflowClient(uri or f"sqlite:///{folder / DATABASE}")
        if (known := self._known()) is not None:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return {metric.step for metric in self._client.get_metric_history(known, LAST)}
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(
            name, None if uri else (folder / ARTIFACTS).as_uri())
        self._id = self._client.create_run(experiment, run_name=self.run.title).info.run_id
        self._client.log_batch(self._id, params=[Param(key, str(value)[:MOST_CHARACTERS])
                                                 for key, value in parameters.items()])
        replace_file(self.run.out / RUN, json.dumps({"run_id": self._id}).encode(), 0o666)
        return ()

    def _known(self) -> str | None:
        """Return the id of the run that an earlier server began, if this store has it."""
        from mlflow.exceptions import MlflowException

        assert self._client is not None
        try:
            known: str = json.loads((self.run.out / RUN).read_text())["run_id"]
            self._client.get_run(known)
            return known
        except (FileNotFoundError, MlflowException):
            return None

    @override
    def write(self, round: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        assert self._client is not None
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(_allowed(name), value, now, round)
                                                  for name, value in values.items()])

    @override
    def finish(self, ended: str, files: Mapping[str, bytes]) -> None:
        assert self._client is not None
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (file := Path(folder, name)).write_bytes(content)
                self._client.log_artifact(self._id, str(file))
        self._client.set_terminated(self._id, STATES.get(ended, "FAILED"))


def _allowed(name: str) -> str:
    """Return a name that MLflow takes: characters that it refuses, as in a label's name, become their code."""
    return re.sub(r"[^\w.\-: /]", lambda found: f"_x{ord(found[0]):x}_", name)


TRACKER = MLflow
