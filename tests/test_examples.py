"""The examples in examples/ run as they say. tests/test_superlink.py runs the Flower app."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlora.plan import Upload
from fedlora_simulations.cli import main
from fedlora_simulations.in_process import InProcessEngine
from fedlora_strategies import FedAvgLoRA, FedSVD, strategy_class
from fedlora_strategies.messages import to_tensors
from tests.federation import STRATEGIES
from tests.processes import write_rows

SMALL = ("--rank=2", "--rounds=2", "--local-steps=1", "--batch-size=8", "--max-length=16", "--clients=2", "--threads=1",
         "--privacy=off", "--epsilon=inf", "--device=cpu", "--precision=fp32")


@pytest.fixture
def simulated(tmp_path, checkpoint):
    """Return the folder with the results of the only run."""
    def simulated(name, *flags):
        write_rows(tmp_path / "data" / "rows.jsonl", 0)
        out = tmp_path / name
        assert main([f"--model={checkpoint('bert')}", f"--data={tmp_path / 'data'}", f"--out={out}", *SMALL,
                     *flags]) == 0
        [folder] = (path for path in out.iterdir() if path.is_dir())
        return json.loads((folder / "report.json").read_text()), load_file(
            folder / "adapter" / "adapter_model.safetensors")

    return simulated


def test_a_strategy_of_ones_own_is_named_by_its_module_and_takes_its_options(simulated):
    own = "--strategy=examples.own_strategy:FadingFedSVD"
    report, fading = simulated("fading", own, "--strategy-options=fade=0.5,period=2")
    assert report["strategy"]["schedule"] == {"name": "Fading", "fade": 0.5}
    assert report["strategy"]["refactorization"]["period"] == 2
    assert (report["strategy"]["optimizer"]["name"], report["strategy"]["optimizer"]["lr"]) == ("momentum", 0.5)
    assert report["plan"]["strategy"] == "examples.own_strategy:FadingFedSVD"
    assert report["plan"]["lr"] == FedSVD.recipe.open.lr, "its parent's preset"
    _, plain = simulated("plain", own, "--server-optimizer=none", "--strategy-options=fade=0,period=2")
    _, ours = simulated("ours", "--strategy=fedsvd", "--strategy-options=period=2")
    assert all(np.array_equal(plain[key], ours[key]) for key in ours)
    B = [key for key in ours if "lora_B" in key]
    assert sum(np.sum(fading[key] ** 2) for key in B) < sum(np.sum(ours[key] ** 2) for key in B)


class Echo:
    """A client that sends back what it was to train, with 1 added to each value."""

    def __init__(self, layout):
        self.layout = layout

    def run_round(self, plan, tensors):
        names = plan.active or [spec.name for spec in self.layout.trained]
        return Upload(*plan.key, tensors={name: tensors[name] + 1 for name in names}, steps=1, num_examples=1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_model_is_all_that_a_server_app_needs(strategy, checkpoint):
    ready = strategy_class(strategy).for_model(str(checkpoint("bert")), labels=("no", "yes"), rank=2, rounds=2)
    plan, layout = ready.strategy.plan, ready.strategy.layout
    assert (plan.rank, plan.rounds, plan.labels, plan.private) == (2, 2, ("no", "yes"), False)
    assert plan.lr == ready.strategy.recipe.open.lr
    layout.check(ready.state, "state")
    ready.strategy.screen = math.inf  # screening off: no training moves values by 1
    engine = InProcessEngine({"a": Echo(layout), "b": Echo(layout)}, plan.run_id, layout)
    after = to_tensors(ready.strategy.start(engine, ready.arrays, num_rounds=plan.rounds).arrays)
    bias = next(spec.name for spec in layout.trained if spec.group == "head" and spec.name.endswith("bias"))
    np.testing.assert_allclose(after[bias], ready.state[bias] + plan.rounds, rtol=1e-6)


def test_what_a_server_app_exports_names_the_base_model_for_others_and_cuts_as_the_run_did(checkpoint, tmp_path):
    ready = FedSVD.for_model(str(checkpoint("bert")), labels=("no", "yes"), rank=2, max_length=16)
    folder = ready.export(ready.arrays, tmp_path / "adapter")
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == ready.strategy.plan.model.title and named.startswith("local:")
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 16
    assert not any(str(checkpoint("bert")) in file.read_text(errors="replace") for file in folder.rglob("*.*"))


@pytest.mark.parametrize(("values", "told"), [
    ({"ranks": 2}, "'ranks' is no value of a preset"), ({"rank": 0}, "rank"), ({"init": "nowhere"}, "nowhere"),
    ({"init": "dp"}, "only fedlora-server can make"),
    ({"targets": ("nothing",)}, "nothing"), ({"labels": ("one",)}, "two labels")])
def test_a_value_that_does_not_fit_is_told(values, told, checkpoint):
    with pytest.raises(ValueError, match=told):
        FedAvgLoRA.for_model(str(checkpoint("bert")), **{"labels": ("no", "yes")} | values)
