"""fedlora-client budget and verify: what the ledger holds, for people and as JSON."""

import json

import pytest

from fedlora.privacy import Ledger, RunTerms
from fedlora_client import places
from fedlora_client.cli import main


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    ledger = Ledger(places.ledger())
    yield ledger
    ledger.close()


def command(*arguments):
    """The exit code of `fedlora-client <arguments>`."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


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
    assert command("budget") == 0
    text = capsys.readouterr().out
    assert "north" in text and "11" * 8 in text and "more rounds" in text


def test_a_run_without_privacy_is_infinite(ledger, capsys):
    spend(ledger, "south", "33" * 8, 1, noise_multiplier=None)
    assert command("budget", "--json") == 0
    south = json.loads(capsys.readouterr().out)["datasets"]["south"]
    assert south["spent"] == "inf" and south["epsilon"] is None and south["runs"][0]["epsilon"] == "inf"
    assert command("budget") == 0


def test_a_simulated_ledger_is_asked_for_by_name(ledger, tmp_path, capsys):
    simulated = Ledger(tmp_path / "demo" / "ledger.sqlite", simulated=True)
    spend(simulated, "made-up", "44" * 8, 1)
    simulated.close()
    assert command("budget", "--json", "--simulated-ledger", str(tmp_path / "demo")) == 0
    assert "made-up" in json.loads(capsys.readouterr().out)["datasets"]


def test_a_damaged_ledger_or_policy_is_an_error_with_its_place(ledger, capsys):
    places.policy().parent.mkdir(parents=True)
    places.policy().write_text("max-rouns = 3\n")
    assert command("budget") == 2
    assert str(places.policy()) in capsys.readouterr().err


def test_what_is_no_report_is_not_verified(tmp_path, capsys):
    path = tmp_path / "privacy.json"
    path.write_text("{}")
    assert command("verify", str(path)) == 2
    assert "Not verified" in capsys.readouterr().out
