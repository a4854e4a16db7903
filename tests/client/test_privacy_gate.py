"""The owner's control over a client: the first use writes the policy, and every later use is checked against it."""

import csv
import json
import math

import pytest

from fedlora.config import ClientConfig, read_config
from fedlora.console import messages
from fedlora.data import ReadOptions
from fedlora.plan import Proposal, Refused
from fedlora.privacy import Budget, Ledger, LedgerError, Policy, RunTerms
from fedlora.privacy.ledger.anchor import seal
from fedlora.tasks import read
from fedlora_client import paths
from fedlora_client.data_holder import DataHolder
from fedlora_client.privacy_gate import PrivacyGate, limits_of, unit_count
from tests.fedlora.test_plan import make_plan
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
    return ClientConfig(data=str(path), **changes)


def opened(path, budget=BUDGET, unit=None, **changes):
    gate = PrivacyGate(options(path, **changes))
    told = gate.recognise(read(path, "classification", unit=unit)) + gate.take_charge(budget)
    gate.ledger.close()
    return gate, " ".join(told)


def test_the_first_private_use_gives_the_data_set_its_epsilon_for_life_and_the_second_finds_it(north):
    gate, told = opened(north)
    assert "[dataset.notes]" in told and str(paths.policy()) in told
    declared = Policy.read(paths.policy()).dataset_at(str(north))
    assert (declared.id, declared.epsilon, declared.delta) == ("notes", 8.0, BUDGET.delta)
    again, told = opened(north, epsilon=3.0)
    assert again.dataset == gate.dataset and "now gives" not in told
    assert "8.000 of ε 8 left" in told
    assert f"raise epsilon under [dataset.notes] in {paths.policy()}" in told


def test_a_run_without_privacy_is_refused_where_there_is_a_budget_and_recorded_under_the_same_name_elsewhere(north):
    gate, _ = opened(north, budget=None, epsilon=math.inf)
    assert gate.dataset == "notes" and not paths.policy().exists()
    assert opened(north)[0].dataset == "notes"
    with pytest.raises(ValueError, match="--epsilon inf"):
        PrivacyGate(options(north, epsilon=math.inf))


def test_the_unit_of_the_budget_is_the_unit_of_every_run(north):
    north.write_text("".join(line.replace('{"text"', f'{{"patient": "p{i // 3}", "text"')
                             for i, line in enumerate(north.read_text().splitlines(keepends=True))))
    gate, _ = opened(north, unit="patient", privacy_unit="column:patient")
    assert limits_of(options(north), gate).unit == "column:patient" and gate.unit_column == "patient"
    rows = read(north, "classification", unit="patient")
    assert unit_count(rows) == 40 and unit_count(read(north, "classification")) == 120
    assert PrivacyGate(options(north)).unit == "column:patient"
    with pytest.raises(ValueError, match="--privacy-unit row"):
        PrivacyGate(options(north, privacy_unit="row"))


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
    opened(north, new_ledger=True)
    assert [mark["rows"] for mark in Ledger(paths.ledger()).marks()] == [3]


def test_a_label_map_or_another_format_opens_no_second_budget(north, tmp_path):
    opened(north)
    mapped = ReadOptions(label_map={"urgent": "dringend"})
    gate = PrivacyGate(options(north, label_map=mapped.label_map))
    assert "8.000 of ε 8 left" in " ".join(gate.recognise(read(north, "classification", options=mapped)))
    assert gate.dataset == "notes"
    gate.ledger.close()
    copy = tmp_path / "other" / "export.csv"
    copy.parent.mkdir()
    with copy.open("w", encoding="cp1252", newline="") as stream:
        csv.writer(stream, delimiter=";").writerows([("text", "label"), *(
            (row["text"], row["label"].upper()) for row in map(json.loads, north.read_text().splitlines()))])
    gate = PrivacyGate(options(copy, label_map={"URGENT": "dringend"}))
    told = gate.recognise(read(copy, "classification", options=ReadOptions(label_map={"URGENT": "dringend"})))
    assert "share records with export" in " ".join(told) and "notes" in " ".join(told)


def released(gate, epsilon=8.0):
    """Charge a run of one round, and note that its update has left."""
    ledger = gate.ledger
    ledger.begin_run(gate.dataset, RunTerms("ab" * 8, "a" * 64, "row", 120, 0.1, None if epsilon == math.inf else 4.0,
                                             None if epsilon == math.inf else 1e-5, 1.0, {}, 1, 1))
    reservation = ledger.reserve(gate.dataset, "ab" * 8, 1, 0)
    reservation.begin()
    reservation.stored("0" * 64)
    reservation.released()
    ledger.close()


def spent(path, epsilon=8.0):
    """Charge a whole run to the data; afterwards a witness file lies beside them."""
    gate = PrivacyGate(options(path, epsilon=epsilon))
    gate.recognise(read(path, "classification"))
    gate.take_charge(BUDGET if epsilon != math.inf else None)
    released(gate, epsilon)
    return gate


def lose(*paths):
    for path in paths:
        path.unlink()


def test_a_lost_policy_is_an_error_that_says_what_to_write_and_the_limit_stays(north):
    gate, _ = opened(north)
    for lost in (lambda: lose(paths.policy()), lambda: paths.policy().write_text("max-rounds = 3\n")):
        lost()
        for epsilon in (50.0, math.inf):
            with pytest.raises(ValueError, match="write the entry again") as error:
                PrivacyGate(options(north, epsilon=epsilon))
    assert Ledger(paths.ledger()).lifetime("notes").epsilon == 8.0
    with paths.policy().open("a") as file:
        file.write(str(error.value).partition("\n\n")[2])
    assert Policy.read(paths.policy()).dataset_at(str(north)).id == gate.dataset
    assert "of ε 8 left" in opened(north, epsilon=50.0)[1]


def test_a_policy_that_is_named_must_be_there(north, tmp_path):
    with pytest.raises(ValueError, match=r"--policy .*mistyped\.toml: there is no such file"):
        PrivacyGate(options(north, policy=tmp_path / "mistyped.toml"))
    (tmp_path / "empty.toml").touch()
    opened(north, policy=tmp_path / "empty.toml")
    assert Policy.read(tmp_path / "empty.toml").datasets


def test_other_data_of_the_same_name_get_another_id_whatever_the_policy_still_knows(north, tmp_path):
    opened(north, budget=None, epsilon=math.inf)
    other = write_rows(tmp_path / "south" / "notes.jsonl", seed=9)
    other.write_text("".join(f'{{"text": "entirely other {i}", "label": "{i % 2}"}}\n' for i in range(40)))
    assert opened(other)[0].dataset == "notes-2"
    assert opened(other, epsilon=3.0)[0].dataset == "notes-2"
    assert opened(north, budget=None, epsilon=math.inf)[0].dataset == "notes"


@pytest.mark.parametrize("epsilon", [8.0, math.inf])
@pytest.mark.parametrize("again", ["the file", "its folder"])
def test_a_ledger_that_is_lost_together_with_the_policy_is_noticed_whatever_the_data_are_called_now(
        north, epsilon, again):
    spent(north, epsilon)
    lose(paths.ledger(), *([paths.policy()] if paths.policy().exists() else []))
    path = north if again == "the file" else north.parent
    with pytest.raises(LedgerError, match=r"written by another ledger.*--new-ledger"):
        opened(path)
    assert not paths.policy().exists()
    opened(path, new_ledger=True)
    [mark] = Ledger(paths.ledger()).marks()
    assert mark["dataset"] == "notes"
    opened(path)


def test_data_sets_in_one_folder_share_the_users_ledger(north):
    south = write_rows(north.parent / "more.jsonl", seed=4)
    for path in (north, south, north):
        opened(path)
    spent(north)
    opened(south)
    opened(north)


def test_a_simulated_ledger_is_refused_for_data_that_the_policy_names_or_a_witness_lies_beside(north, tmp_path):
    spent(north)
    for path in (north, north.parent):
        with pytest.raises(ValueError, match=r"--simulated-ledger.*\[dataset.notes\]"):
            opened(path, simulated_ledger=tmp_path / "simulated")
    lose(paths.policy())
    for path in (north, north.parent):
        with pytest.raises(ValueError, match=r"--simulated-ledger.*fedlora-witness-notes"):
            opened(path, simulated_ledger=tmp_path / "simulated")
    assert not (tmp_path / "simulated").exists()


def test_a_simulated_ledger_touches_neither_the_policy_nor_the_real_ledger(north, tmp_path):
    gate, _ = opened(north, simulated_ledger=tmp_path / "simulated")
    assert gate.ledger.simulated and not paths.policy().exists() and not paths.ledger().exists()


def test_an_anchor_ahead_of_the_ledger_is_refused_and_a_foreign_one_ignored_with_a_word(north, tmp_path, caplog):
    real = PrivacyGate(options(north))
    ahead = seal(real.ledger.fingerprint_key(), 99, "ab" * 32)
    real.check_anchor(None)
    real.check_anchor(b"")
    real.check_anchor(real.ledger.anchor())
    assert not caplog.records
    real.check_anchor(seal(bytes(32), 99, "ab" * 32))
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "not of this ledger's key" in caplog.text
    with pytest.raises(Refused, match="policy"):
        real.check_anchor(ahead)
    assert "--new-ledger" in caplog.text and str(real.ledger.path) in caplog.text
    real.ledger.close()
    decided = PrivacyGate(options(north, new_ledger=True))
    decided.check_anchor(ahead)
    assert [mark["rows"] for mark in decided.ledger.marks()] == [99]
    decided.ledger.close()
    simulated = PrivacyGate(options(north, simulated_ledger=tmp_path / "simulated"))
    simulated.check_anchor(ahead)
    simulated.ledger.close()


def test_the_proposal_is_held_against_the_policy_before_the_data_is_read(tmp_path, caplog):
    path = tmp_path / "policy.toml"
    path.write_text('strategies = ["fedsvd"]\n')
    gate = PrivacyGate(options(tmp_path / "not-there", policy=path))
    proposal = Proposal(make_plan(strategy="fed-sb"))
    with pytest.raises(Refused) as refused:
        gate.check_proposal(proposal)
    assert str(refused.value.refusal.code) == "policy" and not refused.value.refusal.detail
    assert "strategies" in caplog.text and str(path) in caplog.text


def test_a_mistyped_data_set_is_named_before_a_server_is_called_or_a_file_is_made(tmp_path):
    given = read_config(ClientConfig, [f"--data={tmp_path / 'typo.jsonl'}"])
    with pytest.raises(ValueError, match=r"typo\.jsonl does not exist"):
        DataHolder.of(given, messages())
    given = read_config(ClientConfig, [f"--data={tmp_path}", f"--model={tmp_path / 'nowhere'}"])
    with pytest.raises(ValueError, match=r"--model .*nowhere is no folder"):
        DataHolder.of(given, messages())
    assert list(tmp_path.iterdir()) == []
