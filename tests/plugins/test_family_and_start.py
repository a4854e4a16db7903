"""A new adapter family or a new start is one new file, and everything runs with it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.covering import few
from tests.plugins.scratch import ROOT, TOYS, Tree

PLACES = {"frozen_b": "fedlora/adapters/families", "cosines": "fedlora/adapters/starts",
          "frozen_b_mean": "strategies/fedlora_strategies/recipes"}
"""Toy → the path where its file belongs."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Tree:
    """Return a copy of the packages with the toys."""
    (first, place), *others = PLACES.items()
    made = Tree.with_file(tmp_path_factory.mktemp("plugins") / "tree", TOYS / f"{first}.py", f"{place}/{first}.py")
    for toy, place in others:
        made.add(TOYS / f"{toy}.py", f"{place}/{toy}.py")
    return made


def test_toys_keep_what_every_file_of_their_kind_promises(tree):
    told = tree.run("pytest", *(ROOT / "tests" / "contracts" / f"test_{seam}.py" for seam in ("families", "starts")),
                    "-k", "frozen-b or cosines", "--import-mode=append", "-p", "no:cacheprovider")
    passed = int(told.rpartition(" passed")[0].split()[-1])
    assert passed > 15 and "failed" not in told, told


@pytest.mark.parametrize("flags", few(
    ("--workers", 2, "--family-options", "gain=2"), ("--batch-clients", 3),
    ("--privacy", "off", "--epsilon", "inf", "--ranks", "bert.encoder.layer.0.attention.self.query=3")))
def test_a_family_of_one_file_is_trained_however_clients_train_and_exported(tree, tmp_path, checkpoint, flags):
    tree.simulate("--strategy", "frozen-b-mean", "--targets", "auto", *flags, model=checkpoint("bert"),
                  out=tmp_path / "out")
    [folder] = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    report = json.loads((folder / "report.json").read_text())
    assert report["ended"] == "finished" and report["plan"]["family"] == "frozen-b"
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    query = next(array for name, array in tensors.items() if "layer.0.attention.self.query.lora_A" in name)
    assert query.shape == (3 if "--ranks" in flags else 2, 32) and np.abs(query).max() > 0
