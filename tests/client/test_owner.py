"""The owner's side of a client: the first use writes the policy, and everything later is held against it."""

from argparse import Namespace

import pytest

from fedlora import data
from fedlora.plan import ModelRef, Refused
from fedlora.privacy import Budget, LedgerError, Policy
from fedlora.wire import Setup
from fedlora_client import places
from fedlora_client.owner import Owner, limits_of, unit_count
from tests.processes import write_rows

BUDGET = Budget.declare(120, epsilon=8.0)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home" / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home" / "config"))


@pytest.fixture
def north(tmp_path):
    return write_rows(tmp_path / "north" / "notes.jsonl", seed=0)


def options(path, **changes):
    return Namespace(**{"data": str(path), "epsilon": 8.0, "delta": None, "declared_size": None, "max_clip_norm": None,
                        "policy": None, "new_ledger": False, "simulated_ledger": None, "privacy_unit": None,
                        "rows_per_unit": 8, "server": "127.0.0.1:9092"} | changes)


def opened(path, budget=BUDGET, unit=None, **changes):
    owner = Owner(options(path, **changes))
    told = owner.take_charge(data.read(path, "classification", unit=unit), budget)
    owner.ledger.close()
    return owner, " ".join(told)


def test_the_first_private_use_gives_the_data_set_its_epsilon_for_life_and_the_second_finds_it(north):
    owner, told = opened(north)
    assert "[dataset.notes]" in told and str(places.policy()) in told
    declared = Policy.read(places.policy()).dataset_at(str(north))
    assert (declared.id, declared.epsilon, declared.delta) == ("notes", 8.0, BUDGET.delta)
    again, told = opened(north, epsilon=3.0)
    assert again.dataset == owner.dataset and "now gives" not in told and "of 8 spent" in told


def test_a_run_without_privacy_is_refused_where_there_is_a_budget_and_recorded_under_the_same_name_elsewhere(north):
    owner, _ = opened(north, budget=None, epsilon=float("inf"))
    assert owner.dataset == "notes" and not places.policy().exists()
    assert opened(north)[0].dataset == "notes"
    with pytest.raises(ValueError, match="--epsilon inf"):
        Owner(options(north, epsilon=float("inf")))


def test_the_unit_of_the_budget_is_the_unit_of_every_run(north):
    north.write_text("".join(line.replace('{"text"', f'{{"patient": "p{i // 3}", "text"')
                             for i, line in enumerate(north.read_text().splitlines(keepends=True))))
    owner, _ = opened(north, unit="patient", privacy_unit="column:patient")
    assert limits_of(options(north), owner).unit == "column:patient" and owner.unit_column == "patient"
    rows = data.read(north, "classification", unit="patient")
    assert unit_count(rows) == 40
    assert Owner(options(north)).unit == "column:patient"
    with pytest.raises(ValueError, match="--privacy-unit row"):
        Owner(options(north, privacy_unit="row"))


def test_a_copy_of_some_rows_shares_the_budget_and_a_lost_ledger_is_noticed(north, tmp_path):
    opened(north)
    copy = tmp_path / "copy.jsonl"
    copy.write_text("".join(north.read_text().splitlines(keepends=True)[:5]))
    _, told = opened(copy)
    assert "share records with copy" in told and "notes" in told
    witness = north.parent / ".fedlora-witness-notes.json"
    witness.write_text('{"dataset": "notes", "ledger_id": "' + "0" * 32 + '", "rows": 3, "head": "' + "0" * 64 + '"}')
    with pytest.raises(LedgerError, match="--new-ledger"):
        opened(north)
    owner, _ = opened(north, new_ledger=True)
    assert owner.ledger.created_anew


def test_a_simulated_ledger_touches_neither_the_policy_nor_the_real_ledger(north, tmp_path):
    owner, _ = opened(north, simulated_ledger=tmp_path / "simulated")
    assert owner.ledger.simulated and not places.policy().exists() and not places.ledger().exists()


def test_the_proposal_is_held_against_the_policy_before_the_data_is_read(tmp_path, caplog):
    path = tmp_path / "policy.toml"
    path.write_text('strategies = ["fedsvd"]\n')
    owner = Owner(options(tmp_path / "not-there", policy=path))
    setup = Setup(run_id="ab" * 8, fedlora_version="0", strategy="fed-sb", private=True,
                  model=ModelRef("local", "0" * 64, "1" * 64, "2" * 64), task="classification", labels=("0", "1"),
                  announce_labels=False, max_length=16, rounds=1, max_participations=1, local_steps=1,
                  expected_batch=1, clip_norm=1.0)
    with pytest.raises(Refused) as refused:
        owner.check_proposal(setup)
    assert str(refused.value.refusal.code) == "policy" and not refused.value.refusal.detail
    assert "strategies" in caplog.text and str(path) in caplog.text
