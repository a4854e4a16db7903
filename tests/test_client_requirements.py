"""What a data holder installs: fedlora-client needs no Flower, `datasets`, matplotlib, openpyxl or scikit-learn."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

from tests.processes import PATIENCE, Deployment, write_rows

ROOT = Path(__file__).parent.parent
LEFT_OUT = ("flwr", "datasets", "matplotlib", "openpyxl", "scikit-learn", "grpcio-health-checking")
MODULES = (*LEFT_OUT[:-2], "sklearn", "grpc_health")
WITH_FLOWER = {"fedlora_client.flower_app"}
"""The client's only module that needs Flower: SuperNodes load it, fedlora-client does not."""
SERVERS_TESTS = {"tests.client.sum_server", "tests.client.test_admission", "tests.client.test_sums",
                 "tests.client.test_terms_of_sums"}
"""The client's only tests that have a server, or its certificate authority, in their own process: it needs Flower."""

WITHOUT = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {MODULES!r} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
"""Code that makes a fresh interpreter one in which these packages are not installed."""


def without(code: str) -> list[str]:
    """Return a command that runs the code where the packages cannot be imported."""
    return [sys.executable, "-c", WITHOUT + code]


def test_the_clients_requirements_are_the_projects_less_what_the_coordinator_alone_needs():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = [each for each in declared if not each.startswith(LEFT_OUT)]
    lines = (ROOT / "requirements-client.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == wanted
    assert len(declared) == len(wanted) + 4, "datasets and openpyxl are extras"


def test_all_that_a_client_imports_and_its_tests_do_without_the_packages_that_are_left_out():
    code = f"""
import importlib, pathlib, pkgutil
import fedlora, fedlora_client, tests.client

names = [found.name for package in (fedlora, fedlora_client, tests.client)
         for found in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
needed = {{}}
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        needed[name] = error.name.partition(".")[0]
assert not any(name.partition(".")[0] in {MODULES!r} for name in sys.modules)
assert len(names) > 100, names
assert needed == dict.fromkeys({WITH_FLOWER | SERVERS_TESTS!r}, "flwr"), needed
"""
    ended = subprocess.run(without(code), cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_a_client_trains_a_whole_run_and_draws_its_spending_without_them(tmp_path, checkpoint):
    rows = write_rows(tmp_path / "data" / "north.jsonl", seed=0)
    with Deployment(tmp_path, checkpoint("bert")) as deployment:
        deployment.server("--min-clients", 1, "--rank", 2, "--rounds", 2, "--local-steps", 2, "--batch-size", 8,
                          "--max-length", 16)
        home, log = deployment.home("north"), tmp_path / "north.log"
        command = [
            *without("from fedlora_client.cli import main\nmain(sys.argv[1:])"),
            "--data", rows, "--name", "north", "--server", deployment.address, "--model", deployment.checkpoint,
            "--state", tmp_path / "state", "--threads", "1", "--device", "cpu", "--precision", "fp32", "--yes",
            "--declared-size", "120", "--labels", "routine,urgent"]
        with log.open("w") as out:
            client = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env=os.environ | {
                "XDG_STATE_HOME": str(home / "state"), "XDG_CONFIG_HOME": str(home / "config")})
        deployment.processes["north"] = client
        assert client.wait(PATIENCE * 120) == 0, log.read_text()
        assert deployment.end("server") == 0, deployment.log("server")
    assert log.read_text().count("sent 2 steps") == 2, log.read_text()
    [report] = (tmp_path / "state").glob("*/privacy.json")
    picture = ElementTree.parse(report.with_suffix(".svg")).getroot()
    words = " ".join(picture.itertext())
    assert f"run {report.parent.name}" in words and "2 rounds started: ε " in words
    assert "guarantee for 2 rounds: ε " in words
    assert "http" not in ElementTree.tostring(picture, encoding="unicode").replace("http://www.w3.org/2000/svg", "")
