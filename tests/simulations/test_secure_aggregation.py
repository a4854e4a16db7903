"""Simulated runs with secure aggregation, and with one step a round: the integers of masked ones, without masks."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from fedlora.config import SimulationConfig, read_config
from fedlora.plan import AGGREGATE
from fedlora.plan.limits import sum_threshold
from fedlora.privacy.mechanisms.distributed_gaussian import honest
from fedlora.quantities import quantity
from fedlora.secure_sum.guarantee import SumGuarantee
from fedlora_client.session import ClientSession
from fedlora_server.observer import Observer
from fedlora_server.run_setup import find_model, planned, recipe_of
from fedlora_simulations.cli import main
from fedlora_simulations.population import Method, populate
from fedlora_simulations.simulated_roster import simulated_roster
from fedlora_simulations.simulated_run import simulate
from fedlora_strategies import strategy_class
from fedlora_strategies.recipe import STEPS_AT_SERVER
from tests.covering import few
from tests.federation import STRATEGIES, layout_of
from tests.processes import write_rows
from tests.strategies.test_sums import FACTORS

SMALL = ("--rank=2", "--rounds=2", "--batch-size=8", "--max-length=16", "--threads=1", "--device=cpu",
         "--precision=fp32")
PRIVATE = [name for name in STRATEGIES if not layout_of(strategy_class(name).recipe.family).family.why_not_private()]


@pytest.fixture
def arguments(tmp_path, checkpoint):
    return [f"--model={checkpoint('bert')}", f"--data={write_rows(tmp_path / 'train.jsonl', 0, rows=240)}",
            "--clients=3", *SMALL]


def run(arguments, *flags, strategy="fedsvd", out=None, **named):
    options = read_config(SimulationConfig, [*arguments, f"--strategy={strategy}", *flags])
    if out is not None and not out.exists():
        out.mkdir()
    return simulate(options, Method.parse(strategy), 5, find_model(options), populate(options, 5), out=out, **named)


def assert_same(one, two, apart=0.0):
    for name, array in one.result.state.items():
        if apart:
            np.testing.assert_allclose(two.result.state[name], array, rtol=0, atol=apart, err_msg=name)
        else:
            assert array.tobytes() == two.result.state[name].tobytes(), f"{name} differs"


def test_every_strategy_that_averages_runs_and_tells_both_epsilons(arguments, tmp_path):
    held_out = write_rows(tmp_path / "held-out.jsonl", 9, rows=20)
    names = [name for name in PRIVATE if name not in FACTORS]
    assert {"fedsvd", "fed-sb", "ffa-lora", "rolora", "fedavg-lora", "switch-lora", "bone"} <= set(names)
    assert main([*arguments, f"--strategy={','.join(names)}", "--secure-aggregation", f"--eval-data={held_out}",
                 f"--out={tmp_path / 'out'}", "--track=no-page,no-plots"]) == 0
    methods = json.loads((tmp_path / "out" / "comparison.json").read_text())["methods"]
    assert [one["method"] for one in methods] == names
    for one in methods:
        assert one["rounds"] == 2 and 0 < one["epsilon_of_sums"] < one["epsilon"] <= 8
        folder = tmp_path / "out" / f"{one['method']}-seed0"
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["uploaded"] == ["client-0", "client-1", "client-2"] and len(last["roster"]) == 64
        plan = json.loads((folder / "report.json").read_text())["plan"]
        assert (plan["mechanism"], plan["least_members"], plan["local_steps"]) == (AGGREGATE, 3, 1)


@pytest.mark.parametrize(("strategy", "flags"), few(("ffa-lora", ("--ranks=nested",)), ("fedsvd", ())))
def test_workers_give_the_same_bits_and_clients_in_lockstep_nearly_the_same(arguments, strategy, flags):
    secure = (*flags, "--secure-aggregation", "--server-optimizer=none", "--lr=0.1")
    one, two, batched = (run(arguments, *secure, more, strategy=strategy) for more in (
        "--workers=1", "--workers=2", "--batch-clients=3"))
    assert one.result.rounds == 2 and any(
        np.abs(array - one.federation.state[name]).max() > 1e-3 for name, array in one.result.state.items())
    assert_same(one, two)
    assert_same(one, batched, apart=1e-4)
    assert (one.bytes_up, one.bytes_down, one.epsilons) == (two.bytes_up, two.bytes_down, two.epsilons)
    assert one.aggregate_epsilons == batched.aggregate_epsilons


def test_sums_tell_of_held_out_records_beside_frozen_tensors_and_alike_in_lockstep(arguments):
    flags = "--secure-aggregation", "--server-optimizer=none", "--lr=0.1", "--hold-out=0.25", "--epsilon=1000"
    one, batched = (run(arguments, *flags, more, strategy="fedsvd") for more in ("--workers=1", "--batch-clients=3"))
    assert one.federation.adapted.layout.frozen
    assert_same(one, batched, apart=1e-4)
    told, again = ([record.evaluation for record in done.result.records] for done in (one, batched))
    assert len(told) == 2 and all(round["held_out_accuracy/drawn"] > 0 for round in told)
    assert told == again


def test_one_step_rounds_without_secure_aggregation_take_the_same_steps(arguments):
    """Where only adapters train, both ways draw the same noise; that of a sum is larger by the rounding's share."""
    flags = "--one-step", "--head=freeze", "--server-optimizer=sgd", "--server-lr=0.1"
    plain, secure = run(arguments, *flags), run(arguments, *flags, "--secure-aggregation")
    moved = max(np.abs(array - plain.federation.state[name]).max() for name, array in plain.result.state.items())
    assert plain.federation.plan.mechanism != secure.federation.plan.mechanism == AGGREGATE
    assert moved > 0.05
    assert_same(plain, secure, apart=0.02 * moved)
    assert plain.noise_multipliers == secure.noise_multipliers
    assert plain.epsilons == pytest.approx(secure.epsilons) and not plain.aggregate_epsilons


class Killed(Exception):
    """Ends a run as a kill does: after a round's checkpoint was written."""


class Killing(Observer):
    def finished(self, record):
        if record.round == 2:
            raise Killed


def test_an_interrupted_run_goes_on_with_the_bits_and_both_epsilons_of_one_that_was_not(arguments, tmp_path):
    flags = "--secure-aggregation", "--rounds=4"
    whole = run(arguments, *flags, out=tmp_path / "whole")
    with pytest.raises(Killed):
        run(arguments, *flags, out=tmp_path / "killed", observer=Killing())
    left = run(arguments, *flags, out=tmp_path / "killed", go_on=True)
    assert left.result.rounds == 4 and left.result.resumed == (2,)
    assert_same(whole, left)
    assert (whole.epsilons, whole.aggregate_epsilons) == (left.epsilons, left.aggregate_epsilons)


@pytest.mark.parametrize("colluding", [0, 1])
def test_the_aggregate_epsilon_is_that_of_the_honest_shares_of_noise(arguments, colluding, monkeypatch):
    met = []
    real = SumGuarantee.of
    monkeypatch.setattr(SumGuarantee, "of", classmethod(lambda cls, roster, **more: met.append(roster) or real(
        roster, **more)))
    flags = "--clients=6", f"--colluding={colluding}", "--secure-aggregation", "--max-clip-norm=1"
    done = run(arguments, *flags, strategy="ffa-lora")
    roster = met[0]
    assert len(roster.entries) == 6 and roster.honest == honest(6, colluding) == sum_threshold(6) - colluding
    plan = done.federation.plan
    assert done.federation.plan.least_members == 6
    for name, sigma in done.noise_multipliers.items():  # a client's noise over the plan's clip norm is the roster's
        share = sigma * (1.0 / plan.clip_norm) * roster.grid.sensitivity(roster.values, plan.clip_norm)
        assert share == pytest.approx(roster.noise) and done.aggregate_epsilons[name] < done.epsilons[name]


def test_trust_in_the_aggregate_calibrates_the_noise_of_a_sum(arguments):
    local, aggregate = (run(arguments, "--secure-aggregation", "--epsilon=3", f"--trust={trust}") for trust in (
        "local", "aggregate"))
    assert all(2.9 < epsilon <= 3 for epsilon in local.epsilons.values())
    assert all(2.9 < epsilon <= 3 for epsilon in aggregate.aggregate_epsilons.values())
    for name in local.epsilons:
        assert local.aggregate_epsilons[name] < 3 < aggregate.epsilons[name]
        assert aggregate.noise_multipliers[name] < local.noise_multipliers[name]


def test_the_roster_of_a_simulation_has_every_client_in_order_of_its_name(arguments):
    sessions = []
    real = ClientSession.__init__

    def noting(self, *given, **named):
        real(self, *given, **named)
        sessions.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClientSession, "__init__", noting)
        done = run(arguments, "--clients=12", "--secure-aggregation", "--batch-size=4")
    terms = {session.dataset: session.terms for session in sessions}
    roster = simulated_roster(done.federation.plan, terms, done.federation.adapted.layout.num_trained)
    assert list(roster.members) == sorted(terms) and roster.members.keys() == set(done.result.records[-1].uploaded)
    assert done.result.records[-1].roster == roster.digest.hex()


def test_files_are_clients_too(arguments, tmp_path):
    for i in range(4):
        write_rows(tmp_path / "data" / f"hospital-{i}.jsonl", seed=i)
    files = [one for one in arguments if not one.startswith(("--clients", "--data"))]
    assert main([*files, f"--data={tmp_path / 'data'}", "--partition=files", "--secure-aggregation",
                 f"--out={tmp_path / 'out'}"]) == 0
    assert json.loads((tmp_path / "out" / "fedsvd-seed0" / "report.json").read_text())["plan"]["least_members"] == 4


def test_a_sweep_over_epsilon_has_both_epsilons_in_its_files(arguments, tmp_path, capsys):
    assert main([*arguments, "--secure-aggregation", "--sweep=epsilon=1,8", f"--out={tmp_path / 'out'}"]) == 0
    with (tmp_path / "out" / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["epsilon_of_sums"]) < float(line["epsilon_spent"]) for line in lines] == [True, True]
    assert "ε of sums" in (tmp_path / "out" / "results.md").read_text() and "ε of sums" in capsys.readouterr().out


def test_a_dry_run_forecasts_both_epsilons_and_the_bytes_of_integers(arguments, capfd):
    done = run(arguments, "--secure-aggregation", "--wire-dtype=bf16")
    assert main([*arguments, "--secure-aggregation", "--wire-dtype=bf16", "--dry-run"]) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert f"each client and round {quantity(done.bytes_up / 6)} up" in said  # four bytes a value, also with bf16
    assert "each with the noise of 3 honest clients of 3" in said and "ε of sums" in said
    assert "mechanism distributed-gaussian" in said and "least-members 3" in said


@pytest.mark.parametrize(("flags", "said"), [
    ("--strategy=fedex-lora", "--strategy fedex-lora cannot be run with --secure-aggregation: .*factors A and B"),
    ("--strategy=flexlora", "--strategy flexlora cannot be run with --secure-aggregation"),
    ("--reduction=median", "its reduction median needs each upload by itself"),
    ("--local-steps=4", "--secure-aggregation and --local-steps 4 exclude each other"),
    ("--optimizer=adamw", "--secure-aggregation and --optimizer adamw exclude each other"),
    ("--adjustment=allora", "--secure-aggregation and --adjustment allora exclude each other"),
    ("--init=dp", "--secure-aggregation and --init dp exclude each other"),
    ("--privacy=off --epsilon=inf", "--secure-aggregation and --privacy off exclude each other"),
    ("--clients-per-round=3", "--secure-aggregation and --clients-per-round 3 exclude each other"),
    ("--min-replies=3", "--secure-aggregation and --min-replies 3 exclude each other"),
    ("--screen=5", "--secure-aggregation and --screen 5 exclude each other"),
    ("--clients=2", "takes 3 to 200 clients, and --clients is 2"),
    ("--colluding=1", "--colluding is 1, and with 3 clients it can be at most 0")])
def test_what_secure_aggregation_excludes_is_refused_by_name(arguments, tmp_path, capfd, flags, said):
    assert main([*arguments, "--secure-aggregation", f"--out={tmp_path / 'out'}", *flags.split()]) == 2
    written = " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "out").exists() and "Traceback" not in written
    assert re.search(said, written), written


@pytest.mark.parametrize(("flags", "said"), [
    ("--one-step --local-steps=2", "--one-step and --local-steps 2 exclude each other"),
    ("--colluding=1", "--colluding 1 is for --secure-aggregation"),
    ("--least-noise=0.5", "--least-noise 0.5 is for --secure-aggregation"),
    ("--hold-out=0.1", "--hold-out 0.1 is for --secure-aggregation"),
    ("--trust=aggregate", "--trust aggregate is for --secure-aggregation")])
def test_what_is_only_for_secure_aggregation_is_refused_without_it(arguments, capfd, flags, said):
    assert main([*arguments, *flags.split()]) == 2
    assert said in " ".join(capfd.readouterr().err.split())


def options_of(*flags):
    return read_config(SimulationConfig, ["--data=rows.jsonl", *flags])


@pytest.mark.parametrize("flag", ["--one-step", "--secure-aggregation"])
def test_one_step_runs_have_a_preset_of_their_own_that_flags_override(flag):
    for name in PRIVATE:
        recipe, private = strategy_class(name).recipe, strategy_class(name).recipe.preset(True)
        if name in FACTORS and flag == "--secure-aggregation":
            continue
        values = planned(options_of(flag), name)
        assert (values.rounds, values.local_steps, values.batch_size) == (160, 1, 256)
        assert (values.optimizer, values.lr, values.lr_schedule) == ("sgd", 1.0, "constant")
        same = "rank", "alpha", "clip_norm", "head_scale", "targets", "init"
        assert [getattr(values, one) for one in same] == [getattr(private, one) for one in same]
        assert recipe_of(options_of(flag), name).optimizer == STEPS_AT_SERVER != recipe.optimizer
    given = options_of(flag, "--rounds=80", "--rank=4", "--server-lr=0.01", "--server-options=beta1=0.5")
    assert (planned(given, "fedsvd").rounds, planned(given, "fedsvd").rank) == (80, 4)
    assert recipe_of(given, "fedsvd").optimizer == replace(STEPS_AT_SERVER, lr=0.01, beta1=0.5)
    assert recipe_of(options_of(flag, "--server-optimizer=none"), "fedsvd").optimizer is None


def test_one_step_runs_need_no_privacy():
    values = planned(options_of("--one-step", "--privacy=off", "--epsilon=inf"), "fedsvd")
    assert values == planned(options_of("--one-step"), "fedsvd")


def test_noise_too_small_for_a_guarantee_of_sums_is_told_as_none_unless_it_is_what_counts(arguments, capfd):
    weak = [*arguments, "--secure-aggregation", "--epsilon=1000"]
    done = run(weak)
    assert set(done.aggregate_epsilons.values()) == {float("inf")} and max(done.epsilons.values()) < 1000
    assert main([*weak, "--trust=aggregate"]) == 2
    assert "rounding to the grid would add" in capfd.readouterr().err
