"""What is said of ε: verified reports alone, summed for one data set, the largest over several, else unknown."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora_adapter.known_epsilon import Known, Statement, known
from fedlora_adapter.peft_folder import read
from tests.adapter.adapters import exported, run

REPORTS = sorted((Path(__file__).parents[1] / "fixtures").rglob("privacy.json"))


def with_reports(folder: Path) -> Path:
    (folder / "privacy").mkdir()
    for number, report in enumerate(REPORTS):
        shutil.copyfile(report, folder / "privacy" / f"{number}.json")
    return folder


def statement(ledger: str, run: str, epsilon: float) -> Statement:
    return Statement(ledger, ledger, "notes", (), run, "row", epsilon, 1e-5)


def test_reports_in_the_folder_are_verified_and_the_largest_counts(checkpoint, tmp_path, capsys):
    folder = with_reports(exported(checkpoint("bert"), tmp_path / "a"))
    found = known([read(folder)])
    stated = [json.loads(report.read_text())["privacy"] for report in REPORTS]
    assert len(REPORTS) == 2 and not found.unknown
    assert found.epsilon() == (max(one["guarantee"]["epsilon"] for one in stated), stated[0]["delta"])
    assert "by the privacy reports of 2 data sets in 1 run: the largest" in run(capsys, "inspect", folder)[1]


def test_a_report_that_was_changed_is_refused(checkpoint, tmp_path, capsys):
    folder = with_reports(exported(checkpoint("bert"), tmp_path / "a"))
    report = folder / "privacy" / "0.json"
    report.write_text(report.read_text().replace('"epsilon": 7.99', '"epsilon": 3.99'))
    code, _, err = run(capsys, "inspect", folder)
    assert code == 2 and "0.json is no valid privacy report" in err


def test_a_report_of_another_run_is_refused(checkpoint, tmp_path, capsys):
    folder = with_reports(exported(checkpoint("bert"), tmp_path / "a"))
    (folder / "fedlora.json").write_text('{"run": "0123456789abcdef"}')
    code, _, err = run(capsys, "inspect", folder)
    assert code == 2 and "is of run 0123456789abcdef; take it out of the folder" in err


def test_one_data_set_s_runs_add_up_and_those_of_different_ones_do_not():
    both = Known((statement("north", "1", 2.0), statement("north", "2", 3.0), statement("south", "1", 4.0)), ())
    assert both.epsilon() == (5.0, 2e-5)
    assert "its ε were added" in both.sentence()
    assert Known(both.statements, ("other",)).epsilon() is None
    apart, shared = statement("north", "1", 2.0), replace(statement("north", "2", 3.0), dataset="scans")
    assert Known((apart, shared), ()).epsilon() == (3.0, 1e-5)
    assert Known((apart, replace(shared, overlapping=("notes",))), ()).epsilon() == (5.0, 2e-5)
    assert Known((), ()).epsilon() is None


def test_a_run_without_a_guarantee_has_none():
    found = Known((statement("north", "1", 2.0), statement("south", "1", float("inf"))), ())
    assert "no differential privacy guarantee for the records of south" in found.sentence()
    assert found.to_dict()["epsilon"] is None and json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("content", ["[]", "{}", '{"privacy": {"statements": [{}], "unknown": []}}'])
def test_a_damaged_record_is_told(content, checkpoint, tmp_path, capsys):
    folder = exported(checkpoint("bert"), tmp_path / "a")
    (folder / "fedlora_adapter.json").write_text(content)
    code, _, err = run(capsys, "inspect", folder)
    assert code == 2 and "fedlora_adapter.json is damaged" in err
