"""A new task, local optimizer, adjustment or tracker is one new file."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.covering import few
from tests.plugins.scratch import ROOT, TOYS, Tree

PLACES = {"regression": "fedlora/tasks", "signs": "fedlora/training/optimizers",
          "head_alone": "fedlora/training/adjustments", "tally": "server/fedlora_server/trackers"}
"""Toy → the path where its file belongs."""

WORDS = ("fever", "cough", "pain", "calm", "rest", "acute", "mild")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Tree:
    """Return a copy of the packages with all four toys."""
    (first, place), *others = PLACES.items()
    made = Tree.with_file(tmp_path_factory.mktemp("plugins") / "tree", TOYS / f"{first}.py", f"{place}/{first}.py")
    for toy, place in others:
        assert not (made.folder / place / f"{toy}.py").exists()
        shutil.copyfile(TOYS / f"{toy}.py", made.folder / place / f"{toy}.py")
    return made


@pytest.fixture(scope="module")
def scores(tmp_path_factory) -> Path:
    """Write texts whose score is the number of acute words in them; a few have no score."""
    rng, file = np.random.default_rng(0), tmp_path_factory.mktemp("scores") / "scores.jsonl"
    rows = []
    for i in range(240):
        words = rng.choice(WORDS, 6)
        rows.append({"text": " ".join(words), "score": None if i % 40 == 0 else float((words == "acute").sum())})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def last_round(out: Path) -> dict:
    [lines] = out.glob("*/metrics.jsonl")
    return json.loads(lines.read_text().splitlines()[-1])


def test_toys_keep_what_every_file_of_their_kind_promises(tree):
    """Run the repository's test suites of the kinds over the tree's files."""
    suites = sorted((ROOT / "tests" / "contracts").glob("test_*.py"))
    toys = " or ".join(toy.replace("_", "-") for toy in PLACES)
    told = tree.run("pytest", *suites, "-k", toys, "--import-mode=append", "-p", "no:cacheprovider")
    passed = int(told.rpartition(" passed")[0].split()[-1])
    assert passed > 25 and "failed" not in told, told


def test_a_command_shows_every_toy(tree):
    told = tree.run("fedlora_simulations.cli", "--help")
    assert all(toy.replace("_", "-") in told for toy in PLACES)


@pytest.mark.parametrize("flags", few(("--epsilon", 8, "--batch-clients", 2),
                                      ("--privacy", "off", "--epsilon", "inf", "--workers", 2)))
def test_a_task_of_one_file_is_trained_measured_and_exported(tree, scores, tmp_path, checkpoint, flags):
    tree.simulate("--task", "regression", "--eval-data", scores, "--strategy", "fedavg-lora", *flags,
                  model=checkpoint("bert"), data=scores, out=tmp_path / "out")
    record = last_round(tmp_path / "out")
    assert record["evaluation"]["count"] == 234 and len(record["uploaded"]) == 3

    [adapter] = (tmp_path / "out").glob("*/adapter")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("bert"))
    base = AutoModelForSequenceClassification.from_pretrained(checkpoint("bert"), num_labels=1)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    rows = [row for row in map(json.loads, scores.read_text().splitlines()) if row["score"] is not None]
    with torch.no_grad():
        said = model(**tokenizer([row["text"] for row in rows], truncation=True, max_length=16, padding=True,
                                 return_tensors="pt")).logits[:, 0]
    errors = said - torch.tensor([row["score"] for row in rows])
    assert record["evaluation"]["rmse"] == pytest.approx(errors.square().mean().sqrt().item(), rel=1e-4)


def test_an_optimizer_and_a_tracker_of_one_file_each_see_all_that_a_client_releases(tree, tmp_path, checkpoint):
    tree.simulate("--optimizer", "signs", "--track", "no-plots,tally", "--lr", 0.25, "--clients", 1, "--rounds", 1,
                  "--local-steps", 1, model=checkpoint("bert"), out=tmp_path / "out")
    [folder] = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert json.loads((folder / "tally.json").read_text()) == {
        "planned": 1, "rank": 2, "uploaded": 1, "rounds": 1, "finished": 1}
    assert not (folder / "curves.png").exists()
    [values] = [run["values_up"] for run in json.loads((tmp_path / "out" / "comparison.json").read_text())["methods"]]
    assert last_round(tmp_path / "out")["update_norm"] == pytest.approx(0.25 * math.sqrt(values), rel=1e-4)


def test_an_adjustment_of_one_file_decides_what_becomes_of_the_noised_gradients(tree, tmp_path, checkpoint):
    tree.simulate("--adjustment", "head-alone", "--strategy", "ffa-lora", "--batch-clients", 2,
                  model=checkpoint("bert"), out=tmp_path / "out")
    [file] = (tmp_path / "out").glob("*/adapter/adapter_model.safetensors")
    tensors = load_file(file)
    updates = [array for name, array in tensors.items() if "lora_B" in name]
    assert updates and not any(array.any() for array in updates)
    assert last_round(tmp_path / "out")["update_norm"] > 1e-4, "the head trains"
