"""Sweeps of fedlora-simulate: their cells, what is kept of them, and how interrupted ones go on."""

import hashlib
import json
import math
from collections import Counter

import pytest

from fedlora.config import SimulationConfig, read_config
from fedlora.privacy import Ledger
from fedlora_client.session import ClientSession
from fedlora_simulations import running, sweep
from fedlora_simulations.cli import main
from tests.processes import write_rows

SMALL = ("--rank=2", "--local-steps=1", "--batch-size=8", "--max-length=16", "--threads=1", "--device=cpu",
         "--precision=fp32", "--clients=2", "--strategy=ffa-lora")


@pytest.fixture
def arguments(tmp_path, checkpoint):
    return [f"--model={checkpoint('bert')}", f"--data={write_rows(tmp_path / 'train.jsonl', 0, rows=160)}",
            f"--out={tmp_path / 'out'}", *SMALL]


@pytest.fixture
def runs(monkeypatch):
    """Count the cells that are really run, by name."""
    made = Counter()
    real = running.simulate

    def counting(options, method, seed, *others, **named):
        made[named["out"].name] += 1
        return real(options, method, seed, *others, **named)

    monkeypatch.setattr(running, "simulate", counting)
    return made


def adapters(out):
    return {path.parts[len(out.parts)]: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(out.glob("*/adapter/adapter_model.safetensors"))}


def configs(*given):
    return sweep.settings(read_config(SimulationConfig, given))


def test_every_combination_is_a_setting_and_an_infinite_epsilon_turns_privacy_off():
    found = configs("--sweep=epsilon=1,inf", "--sweep=targets=query,value;all;", "--sweep", "compile=false,true")
    assert [str(one) for one in found][:3] == [
        "epsilon=1, targets=query,value, compile=false", "epsilon=1, targets=query,value, compile=true",
        "epsilon=1, targets=all, compile=false"]
    assert len(found) == 8 and found[0].options.targets == ("query", "value") and not found[0].options.compile
    assert {(one.options.epsilon, one.options.privacy) for one in found} == {(1.0, "required"), (math.inf, "off")}
    [plain] = configs()
    assert plain.values == {} and plain.before == ""


def test_a_file_of_options_sweeps_as_the_command_line_does(tmp_path):
    (tmp_path / "run.toml").write_text('sweep = {epsilon = [1, 2.5, "inf"], targets = [["query", "value"], "all"], '
                                       'compile = [true]}\ntune = {lr = 0.1}\n')
    read = read_config(SimulationConfig, [f"--config={tmp_path / 'run.toml'}"])
    assert read.sweep == {"epsilon": ("1", "2.5", "inf"), "targets": ("query,value", "all"), "compile": ("true",)}
    assert read.tune == {"lr": ("0.1",)} and len(sweep.settings(read)) == 6


@pytest.mark.parametrize(("given", "said"), [
    ("rnk=2,8", "--sweep: rnk is not an option of fedlora-simulate; did you mean rank?"),
    ("rank=2,x", "--sweep: --rank: 'x' is not a whole number"), ("rank=2,02", "rank has the value 02 twice"),
    ("server=a", "server is an option of fedlora-client"), ("strategy=fedsvd", "several strategies go into --strategy"),
    ("privacy=off", "sweep epsilon"), ("compile=yes", "compile is true or false"), ("workers=1,2", "the same for all")])
def test_what_cannot_be_swept_is_said(given, said):
    with pytest.raises(ValueError) as wrong:
        configs(f"--sweep={given}")
    assert said in str(wrong.value)


@pytest.mark.parametrize(("given", "said"), [
    (["--sweep=rank"], "not of the form NAME=VALUE"), (["--sweep=rank=2,2"], "names the value 2 twice"),
    (["--sweep=rank=2", "--sweep=rank=4"], "rank is given twice")])
def test_a_sweep_that_cannot_be_read_ends_with_code_2(given, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        configs(*given)
    assert exit_.value.code == 2 and said in capsys.readouterr().err


def test_all_settings_are_checked_before_the_first_run_and_the_wrong_one_is_named(arguments, tmp_path, capfd, runs):
    for given, said in (("batch-size=8,64", "batch-size=64: with seed 0, client-0 has 80 records"),
                        ("epsilon=1,inf --privacy=off", "epsilon=1: --privacy off and --epsilon 1 contradict"),
                        ("init=kaiming,dp --privacy=off --epsilon=inf", "init=dp: ")):
        assert main([*arguments, "--rounds=1", f"--sweep={given.split()[0]}", *given.split()[1:]]) == 2
        assert said in capfd.readouterr().err
    assert not runs and not (tmp_path / "out").exists()


def test_what_has_ended_is_kept_and_values_can_be_added_later(arguments, tmp_path, capfd, runs):
    plain = [*arguments, "--rounds=1", "--epsilon=inf", "--privacy=off"]
    assert main([*plain, "--sweep=rank=1,2"]) == 0
    before = adapters(tmp_path / "out")
    assert set(before) == {"ffa-lora-rank=1-seed0", "ffa-lora-rank=2-seed0"}
    assert main([*plain, "--sweep=rank=1,2"]) == 2
    assert "Give --resume too" in capfd.readouterr().err
    moved = (tmp_path / "train.jsonl").rename(tmp_path / "elsewhere.jsonl")
    assert main([*plain, f"--data={moved}", "--sweep=rank=3,2", "--workers=1", "--resume"]) == 0
    assert runs == {"ffa-lora-rank=1-seed0": 1, "ffa-lora-rank=2-seed0": 1, "ffa-lora-rank=3-seed0": 1}
    after = adapters(tmp_path / "out")
    assert after.items() > before.items() and "kept from before" in capfd.readouterr().err
    lines = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert lines[0].startswith("method,rank,seed,status,epsilon_spent") and len(lines) == 3
    write_rows(moved, 1, rows=160)
    assert main([*plain, f"--data={moved}", "--rank=2", "--resume"]) == 0
    assert sum(runs.values()) == 4, "other rows are another cell"


def test_an_interrupted_run_goes_on_with_the_bits_and_the_charges_of_one_that_was_not(arguments, tmp_path, monkeypatch,
                                                                                     capfd, runs):
    given = [*arguments, "--strategy=fedsvd", "--server-optimizer=momentum", "--clients=3", "--clients-per-round=2",
             "--batch-size=5", "--rounds=4", "--max-participations=4"]
    assert main([*given, f"--out={tmp_path / 'whole'}"]) == 0
    real, done = ClientSession.finish, []

    def interrupted(self, plan, result):
        done.append(plan.round)
        if len(done) == 6:  # the second client of the third round, whose charge is written
            raise KeyboardInterrupt
        return real(self, plan, result)

    monkeypatch.setattr(ClientSession, "finish", interrupted)
    assert main(given) == 130 and done == [1, 1, 2, 2, 3, 3]
    folder = tmp_path / "out" / "fedsvd-seed0"
    assert json.loads((folder / "cell.json").read_text())["status"] == "begun"
    monkeypatch.setattr(ClientSession, "finish", real)
    assert main([*given, "--resume"]) == 0
    assert "goes on after its last finished round" in capfd.readouterr().err
    assert adapters(tmp_path / "out") == adapters(tmp_path / "whole") and runs["fedsvd-seed0"] == 3
    told = [json.loads((tmp_path / out / "fedsvd-seed0" / "cell.json").read_text()) for out in ("whole", "out")]
    assert told[0]["id"] == told[1]["id"] and told[1]["result"]["resumed"] == [2]
    assert told[0]["result"]["epsilon"] == told[1]["result"]["epsilon"]
    assert told[0]["result"]["bytes_up"] == told[1]["result"]["bytes_up"]
    charged = []
    for out in ("whole", "out"):
        ledger = Ledger(tmp_path / out / "fedsvd-seed0" / "ledger.sqlite", simulated=True)
        charged.append(sorted((one.dataset, one.round, one.attempt) for one in ledger.charges()))
        ledger.close()
    assert charged[0] == charged[1] and len(charged[0]) == 8


def test_a_run_that_would_have_other_bits_is_run_anew(arguments, tmp_path, monkeypatch, capfd):
    given = [*arguments, "--rounds=2"]
    real = ClientSession.finish
    monkeypatch.setattr(ClientSession, "finish", lambda self, plan, result: real(self, plan, result) if plan.round == 1
                        else (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(given) == 130
    monkeypatch.setattr(ClientSession, "finish", real)
    assert main([*given, "--micro-batch=4", "--resume"]) == 0
    assert "is run anew, because it was computed with micro_batch None and now 4" in capfd.readouterr().err
    about = json.loads((tmp_path / "out" / "ffa-lora-seed0" / "cell.json").read_text())
    assert about["status"] == "finished" and about["result"]["resumed"] == []


def test_a_run_of_a_sweep_that_diverges_does_not_keep_the_others_from_running(arguments, tmp_path, capfd, runs):
    held = write_rows(tmp_path / "held.jsonl", 9, rows=30)
    given = [*arguments, "--rounds=1", "--epsilon=inf", "--privacy=off", "--sweep=lr=1e5,0.001", "--optimizer=sgd",
             f"--eval-data={held}"]
    assert main(given) == 1
    said = capfd.readouterr()
    assert "1 of 2 runs ended early: ffa-lora-lr=1e5-seed0 (diverged)" in said.err
    assert main([*given, "--resume"]) == 1 and sum(runs.values()) == 2, "it would diverge again"
    assert "(diverged)" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize("damage", ["{", '{"identity": {"format": 9}}'])
def test_a_damaged_cell_is_said(arguments, tmp_path, capfd, damage):
    (tmp_path / "out" / "cell").mkdir(parents=True)
    (tmp_path / "out" / "cell" / "cell.json").write_text(damage)
    assert main([*arguments, "--resume"]) == 2
    assert "cell.json is " in capfd.readouterr().err


def test_resume_needs_a_folder_of_runs(arguments, tmp_path, capfd):
    assert main([*arguments[:2], *SMALL, "--resume"]) == 2
    assert "name it with --out" in capfd.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert main([*arguments, "--resume"]) == 2
    assert "holds no run of fedlora-simulate" in capfd.readouterr().err


def test_a_dry_run_shows_every_setting_and_what_has_ended(arguments, tmp_path, capfd):
    assert main([*arguments, "--rounds=1", "--epsilon=8"]) == 0
    capfd.readouterr()
    before = sorted(tmp_path.rglob("*"))
    assert main([*arguments, "--rounds=1", "--sweep=epsilon=8,inf", "--seeds=0,1", "--dry-run", "--resume"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    said = " ".join(capfd.readouterr().err.split())
    assert "4 runs, each with one method" in said and "inf ffa-lora none" in said
    assert "1 of the 4 runs have ended" in said
