"""The check `make bits`: did a change leave every exported adapter as it was, bit for bit?

The parent commit and the working tree each run every strategy, with privacy and without, in one process, by two
workers, over gRPC and with batched clients, on tiny models and with seeded noise. The SHA-256 of each adapter that they
export must agree. Both are driven by the commands that users give, so their insides may differ.

    python -m tests.bits [--base REVISION] [--only WORD]

A commit that changes bits on purpose says so, and for which ways, in its message.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.processes import write_rows
from tests.tiny import tiny_checkpoint

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "bits"
"""Folder for a commit's results on this machine, so that it is run only once."""

STRATEGIES = ("fedavg-lora", "ffa-lora", "fed-sb", "fedsvd")
PRIVACY: Mapping[str, Sequence[str]] = {"plain": ("--epsilon", "inf"), "private": ("--epsilon", "8")}

SMALL = ("--rounds", "3", "--local-steps", "2", "--batch-size", "16", "--max-length", "16", "--rank", "2",
         "--targets", "auto")
SIMULATED: Mapping[str, Sequence[str]] = {
    "in process": (),
    "two workers": ("--workers", "2"),
    "batched clients": ("--batch-clients", "3"),
}
ALONE: Mapping[str, Sequence[str]] = {
    "noised start": ("--init", "dp"),
    "units and bf16": ("--privacy-unit", "column:patient", "--wire-dtype", "bf16"),
    "language model": ("--task", "causal-lm"),
}
"""Further ways to run, all with privacy and in one process."""

CLIENTS = 3


@dataclass(frozen=True)
class Inputs:
    """The inputs that both trees are given: models, each client's rows, and rows for a language model."""

    folder: Path

    @classmethod
    def write(cls, folder: Path) -> Inputs:
        tiny_checkpoint("bert", folder / "bert")
        tiny_checkpoint("llama", folder / "llama")
        for client in range(CLIENTS):
            file = write_rows(folder / "rows" / f"client-{client}.jsonl", seed=client)
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            file.write_text("".join(json.dumps(row | {"patient": f"p{i % 80}"}) + "\n" for i, row in enumerate(rows)))
            texts = folder / "texts" / file.name
            texts.parent.mkdir(exist_ok=True)
            texts.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows))
        return cls(folder)


class Tree:
    """The code of one commit, or the working tree.

    Args:
        source: the folder of the code.
        scratch: folder for the results of its runs.
    """

    def __init__(self, source: Path, inputs: Inputs, scratch: Path) -> None:
        self._inputs, self._scratch = inputs, scratch
        packages = (source / part for part in ("", "client", "server", "strategies", "simulations"))
        self._environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, packages)), "FEDLORA_INSECURE_NOISE_SEED": "0",
            "XDG_STATE_HOME": str(scratch / "state"), "XDG_CONFIG_HOME": str(scratch / "config"),
            "OMP_NUM_THREADS": "1"}

    def adapters(self, only: str) -> dict[str, str]:
        """Return the SHA-256 of each way's adapter, for all ways whose names contain `only`."""
        found: dict[str, str] = {}
        for privacy, epsilon in PRIVACY.items():
            for way, flags in SIMULATED.items():
                if only in f"{way}, {privacy}":
                    found |= self._simulated(f"{way}, {privacy}", (*epsilon, *flags))
            for strategy in STRATEGIES:
                if only in (name := f"gRPC, {privacy}, {strategy}"):
                    found[name] = self._deployed(name, strategy, privacy)
        for way, flags in ALONE.items():
            if only in way:
                found |= self._simulated(way, (*PRIVACY["private"], *flags))
        return found

    def _simulated(self, way: str, flags: Sequence[str]) -> dict[str, str]:
        language = "causal-lm" in flags
        out = self._scratch / way
        model, rows = ("llama", "texts") if language else ("bert", "rows")
        strategies = "fed-sb" if "dp" in flags else ",".join(STRATEGIES)
        privacy = "off" if "inf" in flags else "required"
        self._run("fedlora_simulations", "--strategy", strategies, "--privacy", privacy, *SMALL, *flags,
                  "--model", self._inputs.folder / model, "--data", self._inputs.folder / rows, "--partition", "files",
                  "--threads", 1, "--out", out)
        return {f"{way}, {file.relative_to(out).parts[0]}": _sha256(file)
                for file in sorted(out.glob("**/adapter_model.safetensors"))}

    def _deployed(self, way: str, strategy: str, privacy: str) -> str:
        out, model = self._scratch / way, self._inputs.folder / "bert"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        server = self._start("fedlora_server", "--strategy", strategy, "--privacy",
                             "off" if privacy == "plain" else "required", *SMALL, "--model", model, "--labels",
                             "routine,urgent", "--min-clients", CLIENTS, "--address", address, "--out", out)
        clients = [self._start(
            "fedlora_client", "--server", address, "--name", f"client-{n}", *PRIVACY[privacy], "--data",
            self._inputs.folder / "rows" / f"client-{n}.jsonl", "--model", model, "--threads", 1, "--simulated-ledger",
            out.with_suffix(f".ledger-{n}"), "--yes", "--declared-size", 120, "--labels", "routine,urgent")
            for n in range(CLIENTS)]
        try:
            for process in (*clients, server):  # a server would wait for clients that have failed
                _finish(process)
        finally:
            server.kill()
        return _sha256(out / "adapter" / "adapter_model.safetensors")

    def _start(self, package: str, *arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-m", f"{package}.cli", *map(str, arguments)], text=True,
                                env=self._environment, cwd=self._scratch, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT)

    def _run(self, package: str, *arguments: object) -> None:
        _finish(self._start(package, *arguments))


def _finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{process.args} ended with {process.returncode}:\n{output}")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _commit(revision: str) -> str:
    return subprocess.run(["git", "rev-parse", "--verify", f"{revision}^{{commit}}"], cwd=ROOT, text=True, check=True,
                          capture_output=True).stdout.strip()


def _of_commit(commit: str, inputs: Inputs, scratch: Path, only: str) -> dict[str, str]:
    ways = hashlib.sha256(Path(__file__).read_bytes() + only.encode()).hexdigest()[:16]
    kept = KEPT / f"{commit}-{ways}.json"
    if not kept.exists():
        source = scratch / "source"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", source, commit], cwd=ROOT, check=True)
        try:
            found = Tree(source, inputs, scratch).adapters(only)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", source], cwd=ROOT, check=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found, indent=1))
    return json.loads(kept.read_text())


def main() -> int:
    """Run the check and return the exit code: 0 if all adapters agree, 1 if not."""
    parser = argparse.ArgumentParser(description="Compare the adapters of two versions of the code, bit for bit.")
    changed = bool(subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], cwd=ROOT, check=True,
                                  capture_output=True).stdout)
    parser.add_argument("--base", default="HEAD" if changed else "HEAD^",
                        help="the commit to compare with [the last one that the working tree is not]")
    parser.add_argument("--only", default="", help="ways whose name holds this, as in gRPC or private [all]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedlora-bits-") as folder:
        inputs = Inputs.write(Path(folder) / "inputs")
        trees = [Path(folder) / name for name in ("base", "head")]
        for scratch in trees:
            scratch.mkdir()
        before = _of_commit(_commit(options.base), inputs, trees[0], options.only)
        now = Tree(ROOT, inputs, trees[1]).adapters(options.only)
    differ = [way for way in sorted({*before, *now}) if before.get(way) != now.get(way)]
    for way in differ:
        print(f"{way}: {before.get(way, 'absent')[:16]} before, {now.get(way, 'absent')[:16]} now")
    print(f"{len(now) - len(differ)} of {len(now)} adapters have the bits that they had at {options.base}")
    return int(bool(differ) or not now)


if __name__ == "__main__":
    sys.exit(main())
