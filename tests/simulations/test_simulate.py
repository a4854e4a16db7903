"""The command `fedlora-simulate` as a researcher calls it."""

import dataclasses
import itertools
import json
import math
import re
import resource
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from fedlora.config import SimulationConfig, read_config
from fedlora.privacy import calibrate
from fedlora_server import folders, round_state, run_setup
from fedlora_server.run_setup import without_effect
from fedlora_simulations import comparison, population, running, simulated_run
from fedlora_simulations.cli import main
from fedlora_simulations.simulated_run import allow_open_files, compiles_here
from fedlora_strategies import FedSB
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


def test_a_runs_report_says_all_that_is_needed_to_repeat_it(arguments, tmp_path):
    chosen_here = ("--threads", "--device", "--precision")
    automatic = [argument for argument in arguments if not argument.startswith(chosen_here)]
    assert main([*automatic, "--strategy=ffa-lora:orthonormal,fed-sb", "--rounds=1", "--seeds=3"]) == 0
    shown = {name: json.loads((tmp_path / "out" / name / "report.json").read_text())["options"]
             for name in ("ffa-lora-orthonormal-seed3", "fed-sb-seed3")}
    for options in shown.values():
        assert (options["seed"], options["partition"], options["rounds"]) == (3, "iid", 1)
        assert options["data"] == str(tmp_path / "train.jsonl") and options["lr"] > 0
        assert options["device"] != "auto" and options["precision"] in ("fp32", "bf16") and options["threads"] > 0
    assert shown["ffa-lora-orthonormal-seed3"]["init"] == "orthonormal"
    assert shown["fed-sb-seed3"]["init"] == FedSB.recipe.start
    assert [options["strategy"] for options in shown.values()] == ["ffa-lora", "fed-sb"]


@pytest.mark.parametrize("wrong", [
    "--partition=nonsense", "--batch-size=64", "--min-replies=3", "--clients=200", "--init=dp", "--device=cuda",
    "--labels=routine", "--strategy=ffa-lora,fed-sb:kaiming", "--strategy=ffa-lora,fedsvd:kaiming --rank=40",
    "--client-ranks=client-0=1 --strategy=ffa-lora", "--client-ranks=north=1 --strategy=flexlora",
    "--client-ranks=client-0=1 --strategy=flexlora --batch-clients=2",
    "--init=public:rows.jsonl --targets=none", "--partition=dirichlet:1 --seeds=1,4"])
def test_what_cannot_be_run_leaves_no_folder_and_is_said_once(arguments, tmp_path, capfd, wrong):
    off = ["--privacy=off", "--epsilon=inf"] if wrong == "--init=dp" else []
    assert main([*arguments, "--rounds=1", *wrong.split(), *off]) == 2
    assert not (tmp_path / "out").exists()
    written = capfd.readouterr().err
    assert "Traceback" not in written and len(re.findall("ERROR|fedlora-simulate:", written)) == 1, written


def test_a_comparison_is_left_of_what_was_finished_before_a_run_failed(arguments, tmp_path, monkeypatch, capsys):
    def failing(options, method, *others, **named):
        if method.strategy == "fed-sb":
            raise ValueError("the disk is full")
        return simulated(options, method, *others, **named)

    simulated = running.simulate
    monkeypatch.setattr(running, "simulate", failing)
    assert main([*arguments, "--strategy=ffa-lora,fed-sb", "--rounds=1"]) == 2
    assert "the disk is full" in capsys.readouterr().err
    [done] = json.loads((tmp_path / "out" / "comparison.json").read_text())["methods"]
    assert done["method"] == "ffa-lora" and (tmp_path / "out" / "comparison.png").exists()
    assert not (tmp_path / "out" / "fed-sb-seed0").exists()


def test_a_method_that_diverged_is_drawn_as_such(tmp_path):
    one = comparison.Comparison("fed-sb", "perplexity", (40.0, 42.0), (99.0, 99.0), ((0, 99.0, 0.0), (1, 41.0, 1.4)),
                                8.0, 10, 40.0, 40.0, 1, 1.0)
    other = dataclasses.replace(one, method="fedsvd", values=(math.inf, math.nan), curve=((0, 99.0, 0.0),
                                                                                         (1, math.inf, math.nan)))
    comparison.save(tmp_path, [one, other], {})
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "comparison.json").read_text())["methods"][0]["values"] == [40.0, 42.0]


def test_options_that_change_nothing_are_said(arguments, tmp_path, capfd):
    assert main([*arguments, "--rounds=1", "--strategy=ffa-lora", "--privacy=off", "--epsilon=inf", "--clip-norm=1",
                 "--targets=none", "--alpha=3"]) == 0
    told = capfd.readouterr().err
    for option in ("--clip-norm", "--rank", "--alpha"):
        assert f"{option} has no effect" in told
    assert told.count("has no effect") == 3


@pytest.mark.parametrize("given, said", [
    (["--compile"], "--compile with --device cpu"),
    (["--compile", "--batch-clients=2"], "--compile and --batch-clients do not work together"),
])
def test_compiling_where_it_cannot_be_is_refused_at_once(arguments, given, said, tmp_path, capfd):
    assert main([*arguments, *given]) == 2
    assert said in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_compiling_is_left_to_rays_workers_and_of_no_effect_with_dropout():
    options = read_config(SimulationConfig, ["--compile", "--engine=ray", "--dropout=0.1"])
    assert not compiles_here(options)
    assert without_effect(options) == ["--compile has no effect: a pass with dropout is not compiled."]
    options = read_config(SimulationConfig, ["--compile"])
    assert compiles_here(options) and not without_effect(options)


def test_a_simulated_client_declares_the_size_that_a_deployed_one_would(arguments, tmp_path, checkpoint):
    """The size must not depend on --max-length, through which a server could count rows."""
    rows = [{"prompt": "word " * (40 if i < 30 else 1), "completion": "yes"} for i in range(150)]
    (tmp_path / "causal.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    given = [f"--model={checkpoint('llama')}", "--task=causal-lm", f"--data={tmp_path / 'causal.jsonl'}",
             f"--out={tmp_path / 'out'}", *SMALL, "--clients=1", "--max-length=32", "--strategy=ffa-lora", "--rounds=1"]
    options = read_config(SimulationConfig, given)
    done = simulated_run.simulate(options, population.Method.parse("ffa-lora"), 0, run_setup.find_model(options),
                                  population.populate(options, 0))
    rate = 8 / 150
    assert done.noise_multipliers["client-0"] == calibrate(8.0, 1e-5, rate, 1)


def test_simulations_of_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folders, "time", SimpleNamespace(strftime=lambda form: "20260101-000000"))
    with ExitStack() as held:
        claimed = [held.enter_context(folders.claimed_folder(None, "demo")) for _ in range(3)]
        assert [folder.name for folder in claimed] == [f"20260101-000000-demo{end}" for end in ("", "-2", "-3")]
        assert all(folder.is_dir() for folder in claimed)
    assert not any(folder.exists() for folder in claimed), "nothing was left in them"


def test_no_clock_decides_how_a_round_ends(arguments, tmp_path, monkeypatch):
    every_look_is_a_day_later = SimpleNamespace(monotonic=itertools.count(step=86400).__next__)
    monkeypatch.setattr(round_state, "time", every_look_is_a_day_later)
    assert main([*arguments, "--strategy=ffa-lora", "--rounds=1"]) == 0
    lines = (tmp_path / "out" / "ffa-lora-seed0" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["uploaded"] == ["client-0", "client-1"]


def test_the_limit_of_open_files_is_raised_to_what_many_clients_need_or_the_error_names_it():
    before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, soft), hard))
        allow_open_files(600)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (600, hard)
        allow_open_files(300)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (600, hard)
        with pytest.raises(ValueError, match=r"fewer --clients"):
            allow_open_files(hard + 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_benchmarks_own_command_is_named(capsys):
    assert main(["bench", "step", "--model", "my model"]) == 2
    assert "python -m benchmarks step --model 'my model'" in capsys.readouterr().err
