"""The command fedlora-simulate poison: one hostile client, from its uploads to the figures."""

import json

import pytest

from fedlora_simulations.cli import main
from fedlora_simulations.poison import HONEST, KINDS
from tests.processes import write_rows


@pytest.fixture
def run(tmp_path, checkpoint):
    """Run the command with further options; return the outcomes by kind of upload."""
    rows = write_rows(tmp_path / "train.jsonl", 0, rows=60), write_rows(tmp_path / "held-out.jsonl", 1, rows=20)

    def run(*options):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        assert main(["poison", f"--model={checkpoint('bert')}", f"--data={rows[0]}", f"--eval-data={rows[1]}",
                     "--strategy=fedavg-lora", "--rounds=2", "--local-steps=1", "--batch-size=4", "--eval-every=2",
                     f"--out={out}", *options]) == 0
        return {kind: runs["0"] for kind, runs in json.loads((out / "poison.json").read_text())["outcomes"].items()}

    return run


def test_what_no_training_can_have_made_costs_its_clients_part_and_no_more(run):
    outcomes = run()
    assert list(outcomes) == [HONEST, *KINDS]
    assert all(one["ended"] == "finished" and not one["honest_left_out"] for one in outcomes.values())
    left_out = {kind for kind, one in outcomes.items() if one["left_out"] == 2}
    assert left_out == {"nan", "million-times", "minus-ten-times", "other-shape"}
    assert len({str(outcomes[kind]["figures"]) for kind in left_out}) == 1, "whatever it sends"


def test_without_screening_one_upload_is_enough_to_end_the_run(run):
    assert run("--sends=million-times", "--screen=inf", "--eval-every=1")["million-times"]["ended"] == "diverged"


def test_a_robust_reduction_withstands_without_screening_what_ends_a_run_with_the_mean(run):
    outcomes = run("--sends=million-times,minus-ten-times", "--screen=inf", "--eval-every=1", "--reduction=median")
    assert all(one["ended"] == "finished" and not one["left_out"] for one in outcomes.values())
    honest = outcomes[HONEST]["figures"]["loss"]
    assert all(one["figures"]["loss"] < 1.1 * honest for one in outcomes.values())


def test_a_reduction_that_needs_more_clients_than_there_are_is_refused_before_any_training(
        tmp_path, checkpoint, capsys):
    rows = write_rows(tmp_path / "train.jsonl", 0, rows=60)
    assert main(["poison", f"--model={checkpoint('bert')}", f"--data={rows}", f"--eval-data={rows}", "--clients=4",
                 "--reduction=multi-krum", f"--out={tmp_path / 'out'}"]) == 2
    assert "multi-krum, f 1, m 0 needs at least 5 uploads in a round, and --clients is 4" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "said"), [
    (["--privacy=off"], "leave it out"), (["--workers=2"], "leave it out"), (["--sends=flowers"], "other-shape"),
    (["--strategy=fedsvd,ffa-lora", "--eval-data=rows.jsonl"], "one at a time"), ([], "--eval-data is missing")])
def test_what_cannot_be_run_is_refused_at_once(options, said, capsys):
    with pytest.raises(SystemExit):
        main(["poison", "--data=rows.jsonl", *options])
    assert said in capsys.readouterr().err
