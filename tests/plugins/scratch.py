"""A copy of the packages with one more file, and fedlora-simulate run from it.

Each extension point promises that a new method is one new file. So a toy, a file of this folder that no package knows,
is put among its kind in a copy of the tree. A process that finds only that copy then runs with it:

    tree = Tree.with_file(tmp_path / "tree", TOY, "strategies/fedlora_strategies/reductions/geometric_median.py")
    tree.simulate("--strategy", "…", model=checkpoint("bert"), out=tmp_path / "out")

The test suite that every file of the kind must pass finds the toy too:
`tree.passes("tests/strategies/test_reductions.py")`. No flag and no variable of the product adds code to a client.
"""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

from tests.processes import FORKS, PATIENCE, write_rows

ROOT = Path(__file__).parents[2]
PACKAGES = ("fedlora", "client/fedlora_client", "server/fedlora_server", "strategies/fedlora_strategies",
            "simulations/fedlora_simulations")
TOYS = Path(__file__).parent / "toys"

CLIENTS = 3
SMALL = ("--clients", CLIENTS, "--rounds", 2, "--local-steps", 2, "--batch-size", 8, "--max-length", 16, "--rank", 2,
         "--threads", 1, "--device", "cpu", "--precision", "fp32")
"""Flags that make a run with a tiny model take seconds. Flags given after them take precedence."""


@dataclass(frozen=True)
class Tree:
    """A folder that holds the packages as the repository does, with added files."""

    folder: Path

    @classmethod
    def with_file(cls, folder: Path, toy: Path, place: str) -> Tree:
        """Copy the packages, with what Python compiled of them, and add one file.

        Args:
            folder: The folder to create.
            toy: The file to add.
            place: The file's path from the repository's root. Nothing may be there.
        """
        for package in PACKAGES:
            shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("*.pyc.*"))
        tree = cls(folder)
        tree.add(toy, place)
        return tree

    def add(self, toy: Path, place: str) -> None:
        """Add one more file, as `with_file` does. Several toys in one tree save processes, which start slowly."""
        assert not (self.folder / place).exists(), f"{place} is there already: a toy adds a file and changes none"
        shutil.copyfile(toy, self.folder / place)

    def run(self, module: str, *arguments: object, fails: bool = False) -> str:
        """Run `python -m MODULE …`, which finds this tree's packages and not the repository's, and return its output.

        Args:
            module: The module to run.
            *arguments: Its arguments.
            fails: Whether it must end with an exit code other than 0.
        """
        paths = [str(self.folder / part) for part in ("", "client", "server", "strategies", "simulations")]
        log = self.folder / "output"
        log.write_bytes(b"")
        process = FORKS.Process(target=_run, args=(module, [*map(str, arguments)], paths, log, {
            "PYTHONPATH": os.pathsep.join(paths), "FEDLORA_INSECURE_NOISE_SEED": "0", "COLUMNS": "200",
            "XDG_STATE_HOME": str(self.folder / "state"), "XDG_CONFIG_HOME": str(self.folder / "config")}))
        process.start()
        process.join(PATIENCE * 120)
        if process.exitcode is None:
            process.kill()
            process.join()
        said = log.read_text()
        assert bool(process.exitcode) == fails, said
        return said

    def passes(self, *arguments: object) -> str:
        """Run the repository's own tests, which find what this tree holds, and return pytest's output.

        Args:
            *arguments: Arguments for pytest: files from the repository's root, -k words.
        """
        if not (self.folder / "tests").exists():
            shutil.copytree(ROOT / "tests", self.folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        return self.run("pytest", "-q", "-p", "no:cacheprovider", *arguments)

    def simulate(self, *flags: object, model: Path, out: Path, data: Path | None = None, fails: bool = False) -> str:
        """Run fedlora-simulate, with `SMALL` before the flags, and return its output.

        Args:
            *flags: More flags.
            model: The folder of a tiny checkpoint.
            out: The value of --out.
            data: The value of --data; None for rows of two labels that single words give away.
            fails: Whether it must end with an exit code other than 0.
        """
        if data is None:
            data = write_rows(self.folder / "rows" / "rows.jsonl", 0, rows=120 * CLIENTS)
        return self.run("fedlora_simulations.cli", *SMALL, "--model", model, "--data", data, "--out", out, *flags,
                        fails=fails)


def _run(module: str, arguments: Sequence[str], paths: Sequence[str], log: Path,
         environment: Mapping[str, str]) -> None:
    """Be `python -m MODULE …` in the first of the paths, less the seconds that importing PyTorch takes."""
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(paths[0])
    os.environ.update(environment)
    for name in [name for name in sys.modules if name.startswith(("fedlora", "tests", "benchmarks"))]:
        del sys.modules[name]
    sys.path[:0] = paths
    fork_server = vars(forkserver._forkserver)  # that of the tests knows the repository's files
    fork_server.clear()
    fork_server.update(vars(forkserver.ForkServer()))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
