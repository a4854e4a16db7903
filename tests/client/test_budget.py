"""fedlora-client budget and verify show what the ledger holds, for people and as JSON."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.privacy import Accountant, Ledger, RosterFacts, RunTerms, Spend, four_digits
from fedlora_client import paths
from fedlora_client.cli import main


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    ledger = Ledger(paths.ledger())
    yield ledger
    ledger.close()


def command(*arguments):
    """Run `fedlora-client <arguments>` and return its exit code."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def budget(capsys, *arguments):
    """Return what `fedlora-client budget --json` says of each data set."""
    assert command("budget", "--json", *arguments) == 0
    return json.loads(capsys.readouterr().out)["datasets"]


def spend(ledger, dataset, run_id, rounds, noise_multiplier=2.0):
    terms = RunTerms(run_id, "a" * 64, "row", 1000, 0.05, noise_multiplier, None if noise_multiplier is None else 1e-5,
                     0.1, {"adapter": 1.0}, 4, 10)
    ledger.begin_run(dataset, terms)
    for number in range(1, rounds + 1):
        reservation = ledger.reserve(dataset, run_id, number, 0)
        reservation.begin()
    ledger.end_run(dataset, run_id)


def test_nothing_spent_is_no_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "none"))
    assert command("budget") == 0
    assert "nothing was spent" in capsys.readouterr().err


def test_runs_what_is_left_and_the_price_of_more(ledger, capsys):
    ledger.declare("north", epsilon=6.0, delta=1e-5)
    spend(ledger, "north", "11" * 8, 2)
    spend(ledger, "north", "22" * 8, 3)
    assert command("budget", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    north = shown["datasets"]["north"]
    assert shown["ledger"] == ledger.ledger_id and not shown["simulated"]
    assert [(run["run"], run["rounds"], run["steps"]) for run in north["runs"]] == [("11" * 8, 2, 8), ("22" * 8, 3, 12)]
    assert north["spent"] == pytest.approx(ledger.lifetime("north").spent)
    assert north["remaining"] == pytest.approx(6.0 - north["spent"])
    prices = [north["spent_after_further_rounds"][rounds] for rounds in ("1", "5", "20")]
    assert north["spent"] < prices[0] < prices[1] < prices[2]
    assert (north["updates_released"], north["charged"], north["reserved"]) == (0, north["spent"], north["spent"])
    assert north["no_forecast"] is None
    assert command("budget") == 0
    text = capsys.readouterr().out
    assert "north" in text and "11" * 8 in text and "more rounds" in text
    assert f"updates released: 0; ε {four_digits(north['spent'])} charged" in text


@given(st.floats(1e-6, 1e4))
def test_a_figure_has_four_digits_and_never_promises_more_than_was_computed(epsilon):
    up, down = float(four_digits(epsilon)), float(four_digits(epsilon, down=True))
    assert down * (1 - 1e-9) <= epsilon <= up * (1 + 1e-9) and up - down <= 1.001e-3 * epsilon
    assert len(four_digits(epsilon).replace(".", "").lstrip("0")) in (4, 5)  # 9.9999 is 10.000


def test_an_id_in_brackets_is_shown_as_it_is(ledger, capsys):
    ledger.declare("ward [7] [/bold]", epsilon=6.0, delta=1e-5)
    assert command("budget") == 0
    assert "ward [7] [/bold]: updates released: 0; ε 0.000 charged, 0.000 reserved" in capsys.readouterr().out


def test_the_price_of_more_rounds_is_what_the_ledger_will_charge(ledger, capsys):
    orders = (2.0, 8.0, 40.0)
    with ledger._chain.transaction():  # a budget that was created with other orders than today's
        ledger._chain.append("declare", dataset="north", epsilon=6.0, delta=1e-5, orders=orders, distinct=(),
                             unit="row")
    spend(ledger, "north", "11" * 8, 2)
    shown = budget(capsys, "--rounds", "3")["north"]["spent_after_further_rounds"]
    spend(ledger, "north", "22" * 8, 3)
    assert shown == {"3": pytest.approx(ledger.lifetime("north").spent)}
    assert command("budget", "--rounds", "3") == 0
    assert "charged after 3 more rounds" in capsys.readouterr().out


def test_a_run_that_closed_a_budget_counts_in_full_and_a_closed_budget_has_no_price(ledger, capsys):
    terms = RunTerms("11" * 8, "a" * 64, "row", 1000, 0.05, 1.0, 1e-5, 0.1, {"adapter": 1.0}, 4, 10)
    limit = Accountant(terms.spends(10)).epsilon(1e-5) + 0.01  # room for PRV's figure, not for the filter's
    ledger.declare("north", epsilon=limit, delta=1e-5)
    spend(ledger, "north", "11" * 8, 1, noise_multiplier=1.0)
    closed = budget(capsys)["north"]
    assert closed["closed_by"] == "11" * 8 and closed["remaining"] == 0 and closed["spent_after_further_rounds"] == {}
    assert closed["charged"] == pytest.approx(Accountant(terms.spends(1)).epsilon(1e-5))
    assert closed["charged"] < closed["reserved"] <= limit
    assert closed["runs"][0]["reserved"] == closed["reserved"] and closed["runs"][0]["charged"] == closed["charged"]
    assert command("budget", "--rounds", "3") == 0
    assert f"no forecast: run {'11' * 8} closed the budget" in capsys.readouterr().out
    paths.policy().parent.mkdir(parents=True)
    paths.policy().write_text('[dataset.north]\ndata = "x"\nepsilon = 50.0\ndelta = 1e-5\n')
    reopened = budget(capsys, "--rounds", "1")["north"]
    ledger.declare("north", epsilon=50.0, delta=1e-5)
    before = ledger.lifetime("north").spent
    spend(ledger, "north", "22" * 8, 1, noise_multiplier=1.0)
    assert reopened["epsilon"] == 50.0 and reopened["spent"] == pytest.approx(before)
    assert reopened["spent_after_further_rounds"] == {"1": pytest.approx(ledger.lifetime("north").spent)}


def test_limits_are_the_policys_where_it_has_them_and_looking_declares_nothing(ledger, capsys):
    ledger.declare("north", epsilon=6.0, delta=1e-5)
    spend(ledger, "north", "11" * 8, 2)
    paths.policy().parent.mkdir(parents=True)
    paths.policy().write_text('[dataset.north]\ndata = "x"\nepsilon = 9.0\ndelta = 1e-6\n')
    shown = budget(capsys)["north"]
    assert (shown["epsilon"], shown["delta"]) == (9.0, 1e-6)
    assert shown["remaining"] == pytest.approx(9.0 - shown["spent"])
    assert ledger.lifetime("north").epsilon == 6.0 and len(ledger.lifetime("north").declared) == 1


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--rounds", "many"], ["--policy", "no-such-file.toml"]])
def test_what_cannot_be_asked_is_an_error_that_names_it(ledger, capsys, arguments):
    assert command("budget", *arguments) == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_run_without_privacy_is_infinite(ledger, capsys):
    spend(ledger, "south", "33" * 8, 1, noise_multiplier=None)
    assert command("budget", "--json") == 0
    south = json.loads(capsys.readouterr().out)["datasets"]["south"]
    assert south["spent"] == "inf" and south["epsilon"] is None and south["runs"][0]["epsilon"] == "inf"
    assert command("budget") == 0
    assert "no forecast: the last run had no noise" in capsys.readouterr().out
    ledger.declare("north", epsilon=6.0, delta=1e-5)
    assert "no run has been charged yet" in budget(capsys)["north"]["no_forecast"]


def test_a_simulated_ledger_is_asked_for_by_name(ledger, tmp_path, capsys):
    simulated = Ledger(tmp_path / "demo" / "ledger.sqlite", simulated=True)
    spend(simulated, "made-up", "44" * 8, 1)
    simulated.close()
    assert command("budget", "--json", "--simulated-ledger", str(tmp_path / "demo")) == 0
    assert "made-up" in json.loads(capsys.readouterr().out)["datasets"]


def test_a_damaged_ledger_or_policy_is_an_error_with_its_place(ledger, capsys):
    paths.policy().parent.mkdir(parents=True)
    paths.policy().write_text("max-rouns = 3\n")
    assert command("budget") == 2
    assert str(paths.policy()) in capsys.readouterr().err


def test_what_is_no_report_is_not_verified(tmp_path, capsys):
    path = tmp_path / "privacy.json"
    path.write_text("{}")
    assert command("verify", str(path)) == 2
    assert "Not verified" in capsys.readouterr().out


def test_a_ledger_that_cannot_be_looked_at_is_named_without_a_traceback(monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", "/" + "x" * 300)  # as where it belongs to another user: the system refuses
    assert command("budget") == 2
    assert "ledger.sqlite: File name too long" in capsys.readouterr().err


ROSTER = RosterFacts("ab" * 32, 6, 1, 1.2, 4000.0, 2.0**-14, 1.0, 10_000, True)


def sums(ledger, run_id, *rosters, aggregate=None, trainings=3):
    terms = RunTerms(run_id, "a" * 64, "row", 5000, 0.03, 0.6, 1e-5, 1.0, {"adapter": 1.0}, 1, 80,
                     mechanism="distributed-gaussian", aggregate_noise_multiplier=aggregate, least_members=6,
                     colluding=1)
    ledger.begin_run("north", terms)
    for roster in rosters:
        ledger.note_roster("north", run_id, roster)
    for number in range(trainings):
        ledger.reserve("north", run_id, number, 0).begin()
    ledger.end_run("north", run_id)


def sigma_epsilon(sigma, trainings, delta=1e-5):
    return Accountant((Spend(sigma, 0.03, trainings),)).epsilon(delta)


def test_both_epsilons_of_secure_sums_are_shown_and_forecast_with_what_each_assumes(ledger, capsys):
    ledger.declare("north", epsilon=20.0, delta=1e-5)
    weaker = replace(ROSTER, digest="cd" * 32, noise_multiplier=1.1)
    sums(ledger, "11" * 8, ROSTER, weaker)
    north = budget(capsys, "--rounds", "5")["north"]
    [run] = north["runs"]
    assert (run["mechanism"], run["charges"]) == ("distributed-gaussian", "local")
    assert run["local"] == run["charged"] == sigma_epsilon(0.6, 3)
    assert run["aggregate"] == sigma_epsilon(1.1, 3, 0.99e-5), "the largest over the rosters"
    assert [(one["members"], one["colluding"], one["honest"]) for one in run["rosters"]] == [(6, 1, 4)] * 2
    assert north["last_run_after_further_rounds"] == {
        "5": {"local": sigma_epsilon(0.6, 8), "aggregate": sigma_epsilon(1.1, 8, 0.99e-5)}}
    assert command("budget", "--rounds", "5") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "with 4 honest of 6 members; its own noise is charged" in text
    assert f"ε {four_digits(run['local'])} by own noise, ε {four_digits(run['aggregate'])} in the sums" in text
    assert "nobody has to be trusted" in text and "who their pinned keys say" in text


def test_a_run_charged_for_its_sums_costs_what_they_cost_and_without_pins_none_is_stated(ledger, capsys):
    ledger.declare("north", epsilon=20.0, delta=1e-5)
    sums(ledger, "11" * 8, ROSTER, aggregate=1.15)
    sums(ledger, "22" * 8, replace(ROSTER, pinned=False))
    first, second = budget(capsys)["north"]["runs"]
    assert first["charges"] == "aggregate" and first["charged"] == sigma_epsilon(1.15, 3, 0.99e-5) < first["local"]
    assert second["aggregate"] is None and second["charged"] == second["local"]
    assert command("budget") == 0
    assert "no ε stated (the members' keys are not all in policy.toml)" in " ".join(capsys.readouterr().out.split())
