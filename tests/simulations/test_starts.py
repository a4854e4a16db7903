"""Starts side by side: one command, each with its own adapter folder."""

import json

import numpy as np
import pytest

from fedlora.adapters import family_of, load
from fedlora_server.cli import main as serve
from fedlora_server.handover.stored_run import stored_run
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
               "fedex-lora", "fedsvd-refresh", "switch-lora", "bone", "salt", "dora-frozen-a"]
    assert main(["--strategy", ",".join(methods), *arguments, "--rounds", "2"]) == 0
    compared = json.loads((tmp_path / "out" / "comparison.json").read_text())["methods"]
    assert [one["method"] for one in compared] == methods and all(0 < one["epsilon"] <= 8 for one in compared)
    adapters = sorted((tmp_path / "out").glob("*/adapter/adapter_model.safetensors"))
    assert len({file.read_bytes() for file in adapters}) == len(methods)
    reports = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/report.json")}
    assert all(report["ended"] == "finished" and report["strategy"]["exact"] for report in reports.values())


def test_dora_runs_privately_and_randlora_with_lambda_alone(arguments, tmp_path, capsys):
    assert main(["--strategy", "dora", *arguments]) == 0
    assert main(["--strategy", "randlora", *arguments, "--out", str(tmp_path / "no")]) == 2
    assert "little but noise would be left of it. Train lambda alone with --family-options gamma=0" in " ".join(
        capsys.readouterr().err.split())
    alone = ["--strategy", "randlora", *arguments, "--out", str(tmp_path / "alone"), "--family-options", "gamma=0"]
    assert main([*alone, "--init", "weight"]) == 2
    assert "--init weight does not suit randlora: it gives factors, and the adapter family takes none" in " ".join(
        capsys.readouterr().err.split())
    assert main(alone) == 0
    for folder, exact in (("out", False), ("alone", True)):
        [report] = [json.loads(path.read_text()) for path in (tmp_path / folder).rglob("report.json")]
        assert report["ended"] == "finished" and report["strategy"]["exact"] is exact


def test_a_run_whose_adapter_peft_cannot_hold_ends_in_one_that_fedlora_loads(arguments, checkpoint, tmp_path, capsys):
    assert main(["--strategy", "flylora", "--family-options", "k=1", *arguments]) == 0
    [run], rows = [file.parent for file in (tmp_path / "out").rglob("report.json")], tmp_path / "rows.jsonl"
    assert json.loads((run / "report.json").read_text())["ended"] == "finished"
    assert not (run / "adapter" / "adapter_config.json").exists()
    assert (run / "adapter" / "fedlora.json").exists()
    adapted, stored = load(run / "adapter", checkpoint("bert")), stored_run(run)
    assert adapted.layout.family == family_of("flylora", (("k", 1.0),))
    for name, values in adapted.read("state").items():
        np.testing.assert_array_equal(values, stored.state[name])
    assert serve(["predict", str(run), str(rows), "--out", str(tmp_path / "told.csv")]) == 0
    capsys.readouterr()
    assert serve(["export", str(run), "--out", str(tmp_path / "again")]) == 0
    assert "PEFT cannot hold an adapter of the family flylora: its README.md says how" in capsys.readouterr().out
    assert serve(["export", str(run), "--merged", str(tmp_path / "merged")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the adapter family flylora chooses 1 of 2 rows of A for each token" in said and "Traceback" not in said
    assert not (tmp_path / "merged").exists()


def test_a_start_that_does_not_fit_the_strategy_is_refused_with_those_that_do(arguments, capsys):
    for method, told in (("dora-magnitudes:weight", "gives no V, which dora-magnitudes needs of its start; choose "
                                                    "--init row-norms"),
                         ("loldu:sparse", "gives no B, which loldu needs"), ("ffa-lora:row-norms", "gives no A"),
                         ("bone:weight", "--init weight does not suit bone: it gives factors, and the adapter "
                                         "family takes none; choose --init none")):
        assert main(["--strategy", method, *arguments]) == 2
        assert told in " ".join(capsys.readouterr().err.split())


def test_gradients_without_noise_start_a_run_without_privacy_and_no_other(arguments, tmp_path, capsys):
    methods, off = ["fed-sb:gradient", "fed-sb:lora-sb-clients", "pissa:lora-ga-clients"], ("--privacy", "off")
    for method in methods:
        assert main(["--strategy", method, *arguments]) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "without noise, which would release private rows; choose --init dp or " in told
        assert {"gradient": "public", "lora-sb-clients": "lora-sb", "lora-ga-clients": "lora-ga"}[
            method.partition(":")[2]] + ":FILE" in told
    assert main(["--strategy", ",".join(methods), *off, "--epsilon", "inf", *arguments]) == 0
    capsys.readouterr()
    reports = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/report.json")]
    for report in reports:
        assert report["ended"] == "finished" and report["plan"]["private_start"] and not report["plan"]["private"]
    sent = {report["plan"]["strategy"] + ":" * report["plan"]["whole_gradients"]: report["rounds"][0]["bytes_up"]
            for report in reports}
    assert min(sent["fed-sb:"], sent["pissa:"]) > 5 * sent["fed-sb"], "whole gradients are as large as the layers"
    compared = json.loads((tmp_path / "out" / "comparison.json").read_text())["methods"]
    assert compared[0]["bytes_up"] == compared[1]["bytes_up"] < sent["fed-sb:"] / 5, "the start is no round"
    assert main(["--strategy", "fed-sb:dp", *off, "--epsilon", "inf", *arguments]) == 2
    assert "choose --init gradient, which sends them as they are" in capsys.readouterr().err
    assert main(["--strategy", "ffa-lora:lora-ga-clients", *off, "--epsilon", "inf", *arguments]) == 2
    assert "it freezes A, for which --init gradient has" in " ".join(capsys.readouterr().err.split())
    assert main(["--strategy", "pissa:lora-ga-clients", *off, "--epsilon", "inf", *arguments, "--rank", "17",
                 "--out", str(tmp_path / "large")]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "rank 17 exceeds half of the smaller side" in told and "Traceback" not in told
