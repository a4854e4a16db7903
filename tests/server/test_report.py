"""A run's adapter and report can be read, however the run ended."""

import json
import struct
from types import SimpleNamespace

import numpy as np
import pytest

from fedlora.adapters import attach, initial_tensors
from fedlora.models import load
from fedlora_server.observer import RoundRecord
from fedlora_server.report import describe, disclosures, write_report
from fedlora_server.rounds import FederationResult
from fedlora_server.trackers import plots
from fedlora_strategies import FedSB
from tests.federation import layout_of, plan_of, start_of
from tests.tiny import tiny_checkpoint


def record(number, **values):
    return RoundRecord(number, cohort=("a", "b"), uploaded=("a",), disclosed={"a": {"steps": 4, "delta": 1e-5}},
                       update_norm=0.5, bytes_up=1200, bytes_down=3400, seconds=1.5, **values)


def size_of(png):
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("names", [(), ("accuracy", "loss"), ("loss", "perplexity")])
@pytest.mark.parametrize("rounds", [0, 1, 7])
def test_curves_are_drawn_for_any_number_of_rounds(tmp_path, names, rounds):
    evaluation = {name: 0.5 for name in names}
    records = [RoundRecord(0, evaluation=evaluation)] if names else []
    records += [record(number, evaluation=evaluation) for number in range(1, rounds + 1)]
    width, height = size_of(plots.draw(tmp_path / "curves.png", records, "a run"))
    assert width > 1000 and height > 400


def test_the_report_sums_up_the_rounds_and_says_what_was_disclosed():
    plan, layout = plan_of("fed-sb", private=True), layout_of("bra")
    records = (RoundRecord(0, evaluation={"accuracy": 0.5}), record(1), record(2, evaluation={"accuracy": 0.75}))
    result = FederationResult(start_of(layout, 0), records, "stopped")
    report = describe(plan, FedSB(plan, layout), result, {"seed": 3}, {"b": {"labels": ("no", "yes")}})
    assert report["ended"] == "stopped" and report["finished_rounds"] == 2 and report["options"] == {"seed": 3}
    assert report["evaluation"] == {"before": {"accuracy": 0.5}, "after": {"accuracy": 0.75}, "after_round": 2}
    assert report["bytes"] == {"up": 2400, "down": 6800} and report["seconds"] == 3.0
    assert report["plan"]["run_id"] == plan.run_id and report["versions"]["flwr"].startswith("1.41")
    assert report["disclosed"] == {
        "b": {"joined_with": {"labels": ("no", "yes")}},
        "a": {"rounds": {"1": {"steps": 4, "delta": 1e-5}, "2": {"steps": 4, "delta": 1e-5}}}}


def test_figures_of_another_round_than_the_first_and_the_last_are_not_called_so(tmp_path):
    plan, layout = plan_of("fed-sb"), layout_of("bra")
    records = (record(1), record(2, evaluation={"accuracy": 0.75}), record(3))
    result = FederationResult(start_of(layout, 0), records, "stopped")
    assert describe(plan, FedSB(plan, layout), result, {}, {})["evaluation"] == {
        "before": None, "after": {"accuracy": 0.75}, "after_round": 2}
    plots.draw(tmp_path / "curves.png", records, "resumed, stopped")


def test_nothing_is_disclosed_by_a_run_without_rounds():
    assert disclosures((), {}) == {}


def test_a_run_leaves_an_adapter_and_a_report_even_if_its_loss_diverged(tmp_path):
    base = tiny_checkpoint("bert", tmp_path / "base")
    adapted = attach(load(base, "classification", 2), family="bra", rank=2, alpha=2.0, targets=("query",),
                     train_head=True)
    plan = plan_of("fed-sb")
    federation = SimpleNamespace(plan=plan, adapted=adapted, strategy=FedSB(plan, adapted.layout))
    state = initial_tensors(adapted, init="orthonormal", seed=0)
    result = FederationResult(state, (record(1, evaluation={"loss": float("nan"), "count": np.int64(3)}),), "finished")
    write_report(tmp_path, federation, result)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json",
                                                                        "adapter_model.safetensors"}
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rounds"][0]["evaluation"] == {"loss": "nan", "count": 3}
