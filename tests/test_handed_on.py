"""From a federated run to a model in other hands: real processes, and then plain transformers and PEFT alone."""

import csv
import json
import re

import pytest
import torch
from transformers import pipeline

from fedlora_server.cli import main
from tests.processes import Deployment, write_rows

PLENTY = 200
"""An ε so large that its noise is found at once."""


@pytest.fixture
def deployment(tmp_path, checkpoint):
    with Deployment(tmp_path, checkpoint("bert")) as deployment:
        yield deployment


def test_a_federated_run_ends_in_a_merged_model_that_predicts_without_us(deployment, tmp_path, capfd):
    held_out = write_rows(tmp_path / "held-out.jsonl", 9, rows=24)
    deployment.server("--min-clients", 2, "--rounds", 2, "--rank", 2, "--local-steps", 2, "--batch-size", 8,
                      "--max-length", 16, "--labels", "routine,urgent", "--eval-data", held_out,
                      "--data-description", "Made-up notes.")
    for seed, name in enumerate(("north", "south")):
        deployment.client(name, write_rows(tmp_path / f"{name}.jsonl", seed), "--epsilon", PLENTY)
    assert deployment.end("server") == 0, deployment.log("server")
    assert [deployment.end(name) for name in ("north", "south")] == [0, 0]
    out, merged, labelled = deployment.out, tmp_path / "merged", tmp_path / "labelled.csv"
    [signed] = (tmp_path / "state" / "north").glob("*/privacy.json")
    assert not re.search("north|south", (out / "adapter" / "README.md").read_text())

    report = json.loads((out / "report.json").read_text())
    assert main(["export", str(out), "--merged", str(merged), "--statements", str(signed)]) == 0
    capfd.readouterr()
    assert main(["predict", str(out), str(held_out), "--out", str(labelled)]) == 0
    accuracy = report["evaluation"]["after"]["accuracy"]
    assert re.search(rf"accuracy +{accuracy:.4g} ", capfd.readouterr().err), "as the run's own evaluation found"
    with labelled.open() as file:
        rows = list(csv.DictReader(file))
    texts = [json.loads(line)["text"] for line in held_out.read_text().splitlines()]
    told = pipeline("text-classification", model=str(merged), device="cpu")(texts, truncation=True)
    assert [one["label"] for one in told] == [row["predicted_label"] for row in rows]
    assert [one["score"] for one in told] == pytest.approx([float(row["probability"]) for row in rows], abs=1e-5)

    card = (merged / "README.md").read_text()
    stated = json.loads(signed.read_text())["privacy"]["guarantee"]["epsilon"]
    assert "Made-up notes." in card and "1 of 2 clients handed over" in card and "north" not in card
    assert float(re.search(r"\| \*\*([\d.]+)\*\* \|", card)[1]) == pytest.approx(stated, rel=1e-3)
    code = re.search(r"```python\n(.*?)```", (out / "adapter" / "README.md").read_text(), re.DOTALL)[1]
    names = {}
    exec(code.replace('"…"', repr(str(deployment.checkpoint))).replace('"adapter"', repr(str(out / "adapter"))), names)
    inputs = names["tokenizer"](texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        found = names["model"](**inputs).logits.argmax(1)
    assert [names["model"].config.id2label[int(one)] for one in found] == [one["label"] for one in told]
