"""The measuring of a step runs on any model and data, and reports times that fit each other."""

import json

import pytest

from fedlora_simulations.bench import step_ratio


@pytest.mark.parametrize("family", ["lora", "frozen-a", "bra"])
def test_a_step_is_timed_with_and_without_privacy_on_the_same_draws(checkpoint, tmp_path, family):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": "a short note " * (1 + i % 5), "label": str(i % 2)}) + "\n"
                            for i in range(40)))
    figures = step_ratio(data, model=str(checkpoint("bert")), family=family, rank=2, expected_batch=8, repeats=2,
                         threads=1, precisions=("fp32",))["fp32"]
    assert figures["ratio"] == pytest.approx(figures["private_s"] / figures["plain_s"])
    assert figures["plain_cpu_s"] > 0 and figures["examples_per_s"] > 0
    assert 1 <= figures["records"] <= 40
