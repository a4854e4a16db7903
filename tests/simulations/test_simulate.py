"""The command `fedlora-simulate` as a researcher calls it."""

import json

import pytest

from fedlora_simulations.cli import main
from tests.processes import write_rows

SMALL = ("--rank=2", "--local-steps=1", "--batch-size=8", "--max-length=16", "--threads=1", "--device=cpu",
         "--precision=fp32", "--clients=2")


@pytest.fixture
def arguments(tmp_path, checkpoint):
    return [f"--model={checkpoint('bert')}", f"--data={write_rows(tmp_path / 'train.jsonl', 0)}",
            f"--eval-data={write_rows(tmp_path / 'held-out.jsonl', 9, rows=20)}", f"--out={tmp_path / 'out'}", *SMALL]


@pytest.mark.parametrize(("every", "evaluated"), [(1, [0, 1, 2, 3]), (2, [0, 2, 3]), (9, [0, 3])])
def test_the_last_round_is_evaluated_whatever_the_interval(arguments, tmp_path, every, evaluated):
    assert main([*arguments, "--strategy=ffa-lora", "--rounds=3", f"--eval-every={every}"]) == 0
    lines = (tmp_path / "out" / "ffa-lora-seed0" / "metrics.jsonl").read_text().splitlines()
    rounds = [json.loads(line) for line in lines]
    assert [record["round"] for record in rounds if record["evaluation"]] == evaluated
    assert [record["round"] for record in rounds] == [0, 1, 2, 3]
