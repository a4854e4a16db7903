"""fedlora-simulate --tune: the choice of values on a split of its own."""

import json

import numpy as np
import pytest

from fedlora.config import SimulationConfig, read_config
from fedlora_simulations import running, tune
from fedlora_simulations.cli import main
from fedlora_simulations.population import Method, populate
from fedlora_simulations.results import Result, Round
from fedlora_simulations.sweep import Setting
from fedlora_simulations.tune import Trials, Tuning
from tests.processes import write_rows

SMALL = ("--rank=2", "--local-steps=1", "--batch-size=8", "--max-length=16", "--threads=1", "--device=cpu",
         "--precision=fp32", "--clients=2", "--strategy=ffa-lora", "--rounds=1", "--epsilon=inf",
         "--privacy=off")


def options(*given):
    return read_config(SimulationConfig, given)


def trials(*values, metric="accuracy", status="finished"):
    made = Trials(Setting({}, options()), Method.parse("fedsvd"))
    for lr, value in values:
        made.add({"lr": lr}, options(f"--lr={lr}"), Result(
            "", "fedsvd", 0, status, metric, (Round(1, {metric: value}),), 1.0, None, None, 1, 1, 1, 1.0))
    return made


def test_the_best_value_is_the_highest_accuracy_or_the_lowest_perplexity():
    tried = (("0.1", 0.5), ("0.2", 0.7), ("0.3", 0.7), ("0.4", float("nan")))
    assert trials(*tried).values == {"lr": "0.2"} and trials(*tried).options.lr == 0.2
    assert trials(*tried, metric="perplexity").values == {"lr": "0.1"}
    assert trials(*tried, status="diverged").values == {"lr": "0.1"}


def test_a_budget_leaves_values_drawn_at_random_and_says_so():
    given = ("--tune=lr=1,2,3,4", "--tune=rank=1,2", "--tune-budget=3")
    found = Tuning.of(options(*given))
    assert found.count == 3 and found.combinations == 8
    assert found.candidates == Tuning.of(options(*given)).candidates
    assert found.candidates != Tuning.of(options(*given, "--seeds=1")).candidates
    assert "over 3, drawn at random, of the 8 combinations" in found.told() and "3 runs each" in found.told()


@pytest.mark.parametrize(("given", "said"), [
    (["--tune=epsilon=1,2"], "epsilon cannot be tuned"), (["--tune=lr=1,2", "--sweep=lr=1,2"], "lr is swept too"),
    (["--tune=rank=2,4000", "--strategy=fedsvd"], "4000"),
    (["--tune=dropout=0,0.1", "--epsilon=8", "--privacy=required"], "--tune dropout=0.1: "),
    (["--tune=lrr=1"], "did you mean lr?"), (["--tune-budget=2"], "--tune-budget 2 is for --tune"),
    (["--tune=batch-size=8,28", "--epsilon=8", "--privacy=required"],
     "--tune batch-size=28, on four fifths of the rows: ")])
def test_what_cannot_be_tuned_is_said(given, said, tmp_path, checkpoint, capfd):
    data = write_rows(tmp_path / "train.jsonl", 0, rows=300)
    assert main([f"--model={checkpoint('bert')}", f"--data={data}", *SMALL, f"--out={tmp_path / 'out'}", *given]) == 2
    assert said in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_units_of_privacy_are_held_out_as_a_whole(tmp_path):
    path = write_rows(tmp_path / "train.jsonl", 0, rows=100)
    rows = [json.loads(line) | {"patient": f"p{i % 25}"} for i, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    given = options(f"--data={path}", "--privacy-unit=column:patient", "--tune=lr=1")
    whole = populate(given, 0)
    fewer = Tuning.of(given).population(given, whole, 0)
    assert len(fewer.rows) == 80 and len(fewer.held_out) == 20
    assert not set(fewer.rows.units) & set(fewer.held_out.units) and len(set(fewer.held_out.units)) == 5
    assert sorted(np.concatenate(list(fewer.parts.values())).tolist()) == list(range(80))


def test_the_trials_see_no_row_of_the_evaluation_and_the_choice_is_used_on_all_training_rows(
        tmp_path, checkpoint, capfd, monkeypatch):
    train, held = write_rows(tmp_path / "train.jsonl", 0, rows=120), write_rows(tmp_path / "held.jsonl", 9, rows=40)
    seen = []
    real = running.simulate

    def watching(options, method, seed, base, population, **named):
        seen.append((options.lr, seed, population, named["out"]))
        return real(options, method, seed, base, population, **named)

    monkeypatch.setattr(running, "simulate", watching)
    given = [f"--model={checkpoint('bert')}", f"--data={train}", f"--eval-data={held}", *SMALL, "--seeds=0,1",
             f"--out={tmp_path / 'out'}", "--tune=lr=0.05,1e5", "--optimizer=sgd"]
    assert main(given) == 0
    texts = [json.loads(line)["text"] for line in train.read_text().splitlines()]
    assert [(lr, seed) for lr, seed, _, _ in seen] == [(0.05, 0), (1e5, 0), (0.05, 0), (0.05, 1)]
    for _, _, population, folder in seen[:2]:
        assert folder.parent.name == "tuning"
        assert len(population.rows) == 96 and len(population.held_out) == 24
        assert sorted((*population.rows.texts, *population.held_out.texts)) == sorted(texts)
        assert population.held_out.files == (str(train),)
    for _, _, population, _ in seen[2:]:
        assert len(population.rows) == 120 and len(population.held_out) == 40
    about = json.loads((tmp_path / "out" / tune.FILE).read_text())
    assert about["methods"][0]["chosen"] == {"lr": "0.05"}
    assert [one["status"] for one in about["methods"][0]["trials"]] == ["finished", "diverged"]
    for name in ("results.md", "results.tex", "compare.html"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert "--tune searches lr" in text and "contains what it tells about them" in text, name
    assert "lr 0.05" in capfd.readouterr().out
    assert main([*given, "--resume"]) == 0 and len(seen) == 4, "trials are kept too"
