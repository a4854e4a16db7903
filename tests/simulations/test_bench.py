"""Every figure of the benchmark runs at tiny sizes and says what it must; nothing is asserted of how fast."""

import json
import threading

import pytest
import torch

from fedlora_simulations.bench import figure_titles, main
from fedlora_simulations.bench.fresh import forget_peak, in_fresh_process, peak_bytes, resident_bytes
from fedlora_simulations.bench.measure import RATIO, Value, exactly, interleaved


@pytest.mark.parametrize("figure", figure_titles())
def test_a_figure_gives_ratios_with_their_spread(figure, checkpoint, tmp_path, capsys):
    out = tmp_path / "result.json"
    assert main([figure, "--quick", "--model", str(checkpoint("bert")), "--threads", "1", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert list(result["figures"]) == [figure]
    assert {"processor", "cores", "memory_gib", "threads"} <= result["machine"].keys()
    assert {"python", "fedlora", "torch"} <= result["versions"].keys()
    measured = result["figures"][figure]
    assert "error" not in measured, measured["error"]
    cases = [row["case"] for row in measured["rows"]]
    assert cases and len(set(cases)) == len(cases)
    values = [Value(**value) for row in measured["rows"] for value in row["values"].values()]
    assert any(value.unit == RATIO for value in values)
    assert all(value.low <= value.median <= value.high for value in values)
    assert measured["title"] in " ".join(capsys.readouterr().out.split())


def test_json_on_stdout_is_the_result_and_nothing_else(checkpoint, capsys):
    assert main(["step", "--quick", "--model", str(checkpoint("bert")), "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["quick"] is True


def test_a_random_llama_takes_the_place_of_a_model_where_there_is_no_hub(capsys):
    assert main(["step", "--quick", "--model", "llama-1b", "--threads", "1", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["figures"]["step"]["rows"]) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named(capsys):
    assert main(["step", "--quick", "--device", "cuda"]) == 2
    assert "--device cuda" in capsys.readouterr().err


@pytest.fixture
def result_file(tmp_path):
    def write(name, ratio, low=None, high=None, better="lower", unit=RATIO):
        file = tmp_path / name
        value = Value(ratio, low or ratio, high or ratio, unit, better)
        file.write_text(json.dumps({
            "format": 1, "machine": {}, "settings": {}, "versions": {},
            "figures": {"step": {"rows": [{"case": "one", "values": {"ratio": vars(value)}}]}}}))
        return str(file)

    return write


@pytest.mark.parametrize("old, new, better, worse", [
    ((1.0, 0.9, 1.1), (1.3, 1.2, 1.4), "lower", True),
    ((1.0, 0.9, 1.1), (1.15, 1.05, 1.4), "lower", False),  # within the spread
    ((1.3, 1.2, 1.4), (1.0, 0.9, 1.1), "lower", False),
    ((1.3, 1.2, 1.4), (1.0, 0.9, 1.1), "higher", True),
    ((1.0, 1.0, 1.0), (1.001, 1.001, 1.001), "lower", True),  # what is counted has no spread
])
def test_compare_fails_for_what_got_worse_by_more_than_the_spread(result_file, old, new, better, worse, capsys):
    code = main(["compare", result_file("old.json", *old, better), result_file("new.json", *new, better), "--json"])
    assert code == int(worse)
    (change,) = json.loads(capsys.readouterr().out)
    assert (change["verdict"] == "worse") is worse


def test_compare_looks_at_ratios_alone(result_file, capsys):
    assert main(["compare", result_file("old.json", 1.0, unit="s"), result_file("new.json", 9.0, unit="s")]) == 0
    assert "0 ratios" in capsys.readouterr().out


def test_what_is_no_result_file_is_named(result_file, tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text("[1]")
    assert main(["compare", result_file("old.json", 1.0), str(other)]) == 2
    assert str(other) in capsys.readouterr().err


def test_variants_take_turns_and_meet_the_same_blocks():
    calls = []
    times = interleaved({name: lambda block, name=name: calls.append((name, block)) for name in "ab"}, 2)
    assert calls == [("a", 0), ("b", 0), ("a", 0), ("b", 0), ("b", 0), ("a", 0), ("b", 1), ("a", 1), ("a", 1), ("b", 1)]
    assert len(times["a"].wall) == len(times["b"].cpu) == 2


def test_a_value_is_a_median_with_quartiles_and_knows_its_target():
    assert vars(Value.of([4.0, 1.0, 2.0, 3.0, 5.0], "s"))["low"] == 2.0
    assert exactly(1.03, RATIO, better="lower", target=1.02).reached is False
    assert exactly(6.0, RATIO, better="higher", target=5.0).reached is True
    assert exactly(6.0, RATIO, better="higher").reached is None


def test_a_fresh_process_is_another_one_and_its_failure_is_told():
    assert in_fresh_process("threading:active_count") == 1
    assert threading.active_count() >= 1
    with pytest.raises(RuntimeError, match="No such file"):
        in_fresh_process("os:listdir", path="/no/such/folder")


def test_memory_is_what_was_held_since_the_peak_was_forgotten():
    if not forget_peak():
        pytest.skip("this system cannot forget a peak")
    before = peak_bytes()
    held = bytearray(64 << 20)
    held[::4096] = b"x" * len(held[::4096])
    assert resident_bytes() - before > 60 << 20
    del held
    assert peak_bytes() - before > 60 << 20
