"""A sweep whose process is killed, and that goes on with --resume."""

import json
import time

from fedlora_simulations.cli import main
from tests.processes import PATIENCE, start, write_rows
from tests.simulations.test_sweep import SMALL, adapters


def test_a_killed_sweep_goes_on_with_resume(tmp_path, checkpoint):
    """The kill is a real one: no code of the process runs after it."""
    data, out = write_rows(tmp_path / "train.jsonl", 0, rows=160), tmp_path / "out"
    given = [f"--model={checkpoint('bert')}", f"--data={data}", *SMALL, "--rounds=4", "--sweep=epsilon=2,4"]
    second = out / "ffa-lora-epsilon=4-seed0"
    process = start("simulate", *given, f"--out={out}", log=tmp_path / "log")
    try:
        deadline = time.monotonic() + PATIENCE * 60
        while not (second / "metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()
    assert json.loads((second / "cell.json").read_text())["status"] == "begun"
    assert main([*given, f"--out={out}", "--resume"]) == 0
    assert main([*given[:-1], "--epsilon=4", f"--out={tmp_path / 'whole'}"]) == 0
    assert adapters(out)[second.name] in adapters(tmp_path / "whole").values()
    assert not (tmp_path / "out-interrupted-1").exists()
