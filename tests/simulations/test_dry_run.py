"""fedlora-simulate --dry-run: it shows each method's run and measures its time, and writes nothing."""

from types import SimpleNamespace

import pytest

from fedlora.config import SimulationConfig
from fedlora_simulations import dry_run
from fedlora_simulations.cli import main
from fedlora_simulations.dry_run import Forecast
from tests.processes import write_rows

SMALL = ("--dry-run", "--rank=2", "--local-steps=1", "--batch-size=8", "--max-length=16", "--threads=1", "--device=cpu",
         "--precision=fp32", "--clients=2", "--rounds=3")


@pytest.fixture
def arguments(tmp_path, checkpoint):
    return [f"--model={checkpoint('bert')}", f"--data={write_rows(tmp_path / 'train.jsonl', 0)}",
            f"--eval-data={write_rows(tmp_path / 'held-out.jsonl', 9, rows=20)}", f"--out={tmp_path / 'out'}", *SMALL]


def test_each_method_is_shown_and_timed_and_nothing_is_written(arguments, tmp_path, capfd):
    before = sorted(tmp_path.rglob("*"))
    assert main([*arguments, "--strategy=fedsvd,ffa-lora:orthonormal", "--seeds=0,1"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    text = " ".join(capfd.readouterr().err.split())
    assert text.count("Plan that clients are told") == 2 == text.count("each client and round")
    assert "Noise multiplier σ of the 2 clients" in text and "ε of the run" in text
    assert "evaluation 2 seeds" in text and "ffa-lora:orthonormal" in text and " in all." in text
    assert text.endswith("Nothing was started, and nothing was written.")


def test_rays_machines_are_not_forecast_and_wrong_input_is_refused(arguments, capfd):
    assert main([*arguments, "--engine=ray", "--privacy=off", "--epsilon=inf"]) == 0
    said = capfd.readouterr().err
    assert "no forecast is made" in said and "Noise multiplier" not in said
    assert main([*arguments, "--batch-size=64"]) == 2
    assert "too few for fedsvd" in capfd.readouterr().err


def test_a_forecast_counts_clients_steps_rounds_and_workers(arguments, monkeypatch, capfd):
    monkeypatch.setattr(dry_run, "seconds_of_steps", lambda trainer, job, times: [2.0] * times)
    monkeypatch.setattr(dry_run, "_evaluation", lambda *given: 1.0)
    made: list[Forecast] = []
    real = dry_run.forecast
    monkeypatch.setattr(dry_run, "forecast", lambda *given: made.append(real(*given)) or made[-1])
    assert main([*arguments, "--local-steps=5"]) == 0
    assert main([*arguments, "--local-steps=5", "--clients-per-round=1", "--max-participations=1"]) == 0
    assert made == [Forecast(20.0, 60.0, 1.0), Forecast(10.0, 20.0, 1.0)]
    assert "1 min 1 s in all" in capfd.readouterr().err


def test_budgets_are_those_that_sessions_declare():
    clients = SimpleNamespace(sizes={"client-0": 1234, "client-1": 999})
    declared = dry_run.budgets(SimulationConfig(epsilon=3.0), clients)
    assert {name: budget.declared_size for name, budget in declared.items()} == {"client-0": 1200, "client-1": 990}
    fixed = dry_run.budgets(SimulationConfig(declared_size=700, delta=1e-6), clients)
    assert {(budget.declared_size, budget.delta) for budget in fixed.values()} == {(700, 1e-6)}
