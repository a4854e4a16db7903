"""A reduction, an optimizer at the server, a refactorization, a schedule and a recipe are one new file each.

A strategy need not be in the packages at all.

The toys are put into a copy of the packages, where the suites of their seams and runs of fedlora-simulate find them.
"""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.plugins.scratch import TOYS, Tree

OURS = "strategies/fedlora_strategies"
PLACES = {"geometric_median": "reductions", "signum": "server_optimizers", "balanced": "refactorizations",
          "alternating": "schedules", "fedavgm_sb": "recipes"}
"""Toy → the folder of `OURS` where its file belongs."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Each toy among its kind, and beside the packages a module of somebody else's."""
    (first, *others) = ((TOYS / f"{toy}.py", f"{OURS}/{seam}/{toy}.py") for toy, seam in PLACES.items())
    made = Tree.with_file(tmp_path_factory.mktemp("toys") / "tree", *first)
    for toy, place in others:
        made.add(toy, place)
    shutil.copy(TOYS / "outside.py", made.folder)
    return made


def report_of(out, method):
    """Return the report of a run, and its adapter."""
    tensors = load_file(out / f"{method}-seed0" / "adapter" / "adapter_model.safetensors")
    assert tensors and all(np.isfinite(tensor).all() for tensor in tensors.values())
    return json.loads((out / f"{method}-seed0" / "report.json").read_text()), tensors


def test_the_suites_of_their_seams_find_them_and_they_pass(tree):
    """Among other things, a run with the recipe and the optimizer is taken up bit for bit."""
    suites = (f"tests/strategies/test_{seam}.py" for seam in PLACES.values())
    said = tree.passes(*suites, "-vv", "-k", "geometric or signum or balanced or alternating or fedavgm")
    for toy in PLACES:
        assert f"[{toy.replace('_', '-')}" in said or f"-{toy.replace('_', '-')}]" in said
    assert "the_update_stays_as_it_is_and_the_state_can_be_gone_on_with[balanced-lora] PASSED" in said
    assert "taken_up_bit_for_bit[signum-fedavgm-sb] PASSED" in said


def test_their_names_are_offered_and_their_options_known(tree, checkpoint, tmp_path):
    told = tree.run("fedlora_server.cli", "--help")
    assert "fedavgm-sb" in told and "signum" in told and "geometric-median" in told
    said = tree.simulate("--server-optimizer", "signum", "--server-options", "beta2=1", model=checkpoint("bert"),
                         out=tmp_path / "none", fails=True)
    assert "signum has the options beta1, decay, lr" in said


def test_a_run_is_made_of_them(tree, tmp_path, checkpoint):
    """A recipe that is found, with a start of its own, and an outside module's with a reduction that is; by workers."""
    tree.simulate("--strategy", "outside:GeometricMedian,outside:Balanced,fedavgm-sb:weight", "--workers", 2,
                  model=checkpoint("bert"), out=tmp_path / "out")
    outside, _ = report_of(tmp_path / "out", "outside-GeometricMedian")
    assert outside["strategy"]["reduction"] == {"name": "geometric-median", "steps": 30}
    assert not outside["strategy"]["linear"] and not outside["strategy"]["exact"]
    assert outside["plan"]["strategy"] == "outside:GeometricMedian" and outside["plan"]["family"] == "frozen-a"
    rescaled, tensors = report_of(tmp_path / "out", "outside-Balanced")
    assert rescaled["strategy"]["refactorization"] == {"name": "balanced"}
    for name in (name for name in tensors if "lora_A" in name):
        A, B = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        np.testing.assert_allclose(np.linalg.norm(A, axis=1), np.linalg.norm(B, axis=0), rtol=1e-5)
    found, _ = report_of(tmp_path / "out", "fedavgm-sb-weight")
    assert found["strategy"]["optimizer"]["name"] == "momentum" and found["plan"]["strategy"] == "fedavgm-sb"


def test_an_optimizer_and_a_reduction_are_chosen_by_their_names(tree, tmp_path, checkpoint):
    tree.simulate("--server-optimizer", "signum", "--server-options", "beta1=0.5", "--batch-clients", 3,
                  "--reduction", "geometric-median", "--reduction-options", "steps=5",
                  model=checkpoint("bert"), out=tmp_path / "out")
    report, _ = report_of(tmp_path / "out", "fedsvd")
    assert report["strategy"]["reduction"] == {"name": "geometric-median", "steps": 5}
    assert report["strategy"]["optimizer"] == {"name": "signum", "lr": 1e-3, "decay": 0.0, "beta1": 0.5}


def test_a_schedule_has_clients_train_and_send_some_of_the_tensors(tree, tmp_path, checkpoint):
    """In two rounds each is sent once: B and the head, then A."""
    tree.simulate("--strategy", "outside:Alternating", "--strategy-options", "period=1", model=checkpoint("bert"),
                  out=tmp_path / "out")
    report, tensors = report_of(tmp_path / "out", "outside-Alternating")
    assert report["strategy"]["schedule"] == {"name": "alternating", "period": 1}
    sent = sum(record["bytes_up"] for record in report["rounds"])
    assert sent < 1.1 * 3 * 4 * sum(tensor.size for tensor in tensors.values())
    assert sent == 2 * 3 * 4 * report["values_per_client"]["up"], "which is the mean of the rounds"
    assert all(np.abs(tensor).max() > 0 for tensor in tensors.values())
