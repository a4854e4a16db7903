"""Starts side by side: one command, each with its own adapter folder."""

import json

import pytest

from fedlora_simulations.cli import main
from tests.processes import write_rows


@pytest.fixture
def arguments(checkpoint, tmp_path):
    return ["--data", str(write_rows(tmp_path / "rows.jsonl", seed=0, rows=80)), "--model", str(checkpoint("bert")),
            "--rounds", "1", "--rank", "2", "--batch-size", "4", "--local-steps", "1", "--device", "cpu",
            "--precision", "fp32", "--threads", "1", "--out", str(tmp_path / "out")]


def test_starts_of_one_strategy_are_compared_by_one_command(arguments, tmp_path, capsys):
    public = write_rows(tmp_path / "public.jsonl", seed=1)
    methods = ["fed-sb:orthonormal", "fed-sb:weight", f"fed-sb:public:{public}", "fed-sb:dp"]
    assert main(["--strategy", ",".join(methods), *arguments]) == 0
    compared = json.loads((tmp_path / "out" / "comparison.json").read_text())["methods"]
    assert [one["method"] for one in compared] == methods
    adapters = sorted((tmp_path / "out").glob("*/adapter/adapter_model.safetensors"))
    assert len({file.read_bytes() for file in adapters}) == 4
    *data_free, charged = (one["epsilon"] for one in compared)
    assert max(data_free) <= 8 and charged <= 8, "the release is within the run's epsilon"


def test_a_start_that_cannot_be_is_found_before_anything_is_trained(arguments, tmp_path, capsys):
    methods = f"fed-sb:weight,ffa-lora:public:{tmp_path / 'rows.jsonl'}"
    assert main(["--strategy", methods, *arguments]) == 2
    assert "private rows without noise" in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        main(["--strategy", "fed-sb:gaussian", *arguments])
    assert "there is no such start" in capsys.readouterr().err


def test_starts_need_no_labels_where_they_read_texts_and_the_new_strategies_run_beside_each_other(
        arguments, tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"note {i} " * (1 + i % 5)}) + "\n" for i in range(40)))
    methods = [f"ffa-lora:eva:{texts}", f"fed-sb:avoid:{texts}", "loldu", "dora-magnitudes", "rolora",
               "fedex-lora", "fedsvd-refresh", "switch-lora"]
    assert main(["--strategy", ",".join(methods), *arguments, "--rounds", "2"]) == 0
    compared = json.loads((tmp_path / "out" / "comparison.json").read_text())["methods"]
    assert [one["method"] for one in compared] == methods and all(0 < one["epsilon"] <= 8 for one in compared)
    adapters = sorted((tmp_path / "out").glob("*/adapter/adapter_model.safetensors"))
    assert len({file.read_bytes() for file in adapters}) == len(methods)
    reports = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/report.json")}
    assert all(report["ended"] == "finished" and report["strategy"]["exact"] for report in reports.values())


def test_methods_that_are_not_exact_run_privately_and_randlora_with_lambda_alone(arguments, tmp_path, capsys):
    assert main(["--strategy", "pissa,dora", *arguments]) == 0
    compared = json.loads((tmp_path / "out" / "comparison.json").read_text())["methods"]
    assert all(0 < one["epsilon"] <= 8 for one in compared)
    reports = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/report.json")]
    assert [report["strategy"]["exact"] for report in reports] == [False, False]
    assert main(["--strategy", "randlora", *arguments, "--out", str(tmp_path / "no")]) == 2
    assert "little but noise would be left of it. Train lambda alone with --family-options gamma=0" in " ".join(
        capsys.readouterr().err.split())
    alone = ["--strategy", "randlora", *arguments, "--out", str(tmp_path / "alone"), "--family-options", "gamma=0"]
    assert main([*alone, "--init", "weight"]) == 2
    assert "--init weight: randlora takes nothing of a start" in " ".join(capsys.readouterr().err.split())
    assert main(alone) == 0
    report = json.loads((tmp_path / "alone" / "report.json").read_text())
    assert report["ended"] == "finished" and report["strategy"]["exact"]


def test_a_start_that_does_not_fit_the_strategy_is_refused_with_those_that_do(arguments, capsys):
    for method, told in (("dora-magnitudes:weight", "gives no V, which dora-magnitudes needs of its start; choose "
                                                    "--init row-norms"),
                         ("loldu:sparse", "gives no B, which loldu needs"), ("ffa-lora:row-norms", "gives no A")):
        assert main(["--strategy", method, *arguments]) == 2
        assert told in " ".join(capsys.readouterr().err.split())


def test_gradients_without_noise_start_a_run_without_privacy_and_no_other(arguments, tmp_path, capsys):
    assert main(["--strategy", "fed-sb:gradient", *arguments]) == 2
    assert "without noise, which would release private rows; choose --init dp" in capsys.readouterr().err
    assert main(["--strategy", "fed-sb:gradient", "--privacy", "off", "--epsilon", "inf", *arguments]) == 0
    report = json.loads(next((tmp_path / "out").glob("*/report.json")).read_text())
    assert report["ended"] == "finished" and report["plan"]["private_start"] and not report["plan"]["private"]
    assert main(["--strategy", "fed-sb:dp", "--privacy", "off", "--epsilon", "inf", *arguments]) == 2
    assert "choose --init gradient, which sends them as they are" in capsys.readouterr().err
