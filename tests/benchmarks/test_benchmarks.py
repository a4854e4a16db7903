"""Benchmarks: every figure runs at tiny sizes and reports what it must; nothing is asserted about speed."""

import json
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import hostile, subjects
from benchmarks.cli import figure_titles, main
from benchmarks.federations import layout, plan, tensors
from benchmarks.figures import independence, memory, wire
from benchmarks.figures.engine import sessions
from benchmarks.figures.workers import WORKERS, worker_threads
from benchmarks.fresh import call, forget_peak, in_fresh_process, peak_bytes, resident_bytes
from benchmarks.measure import RATIO, Figure, Row, Settings, Unavailable, Value, exactly, interleaved
from benchmarks.subjects import subject
from fedlora.plan import RoundPlan
from fedlora.tasks import read
from fedlora.training import Trainer
from fedlora.wire import tensors_digest
from tests.processes import FORKS, write_rows

ROOT = Path(__file__).parent.parent.parent


def in_forked_process(function, **arguments):
    """Call a function as `in_fresh_process` does, without the seconds of an interpreter's imports."""
    with ProcessPoolExecutor(1, mp_context=FORKS) as process:
        return json.loads(process.submit(call, function, json.dumps(arguments)).result())


def test_the_command_in_a_checkout_lists_every_figure_without_loading_what_trains():
    code = ("import runpy, sys\ntry: runpy.run_module('benchmarks', run_name='__main__', alter_sys=True)\n"
            "except SystemExit as ended: code = ended.code\n"
            "assert not {'torch', 'flwr', 'transformers', 'opacus'} & set(sys.modules)\nsys.exit(code)")
    ended = subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "usage: python -m benchmarks" in ended.stdout
    assert all(name in ended.stdout for name in (*figure_titles(), "all", "compare"))


@pytest.mark.parametrize("figure", [name for name in figure_titles() if name != "compiled"])
def test_a_figure_gives_ratios_with_their_spread(figure, checkpoint, tmp_path, capsys, monkeypatch):
    if figure in ("aggregation", "memory", "population"):
        monkeypatch.setattr(f"benchmarks.figures.{figure}.in_fresh_process", in_forked_process)
    out = tmp_path / "result.json"
    assert main([figure, "--quick", "--model", str(checkpoint("bert")), "--threads", "1", "--repeats", "1",
                 "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert list(result["figures"]) == [figure]
    assert {"processor", "cores", "memory_gib", "threads"} <= result["machine"].keys()
    assert {"python", "fedlora", "torch"} <= result["versions"].keys()
    measured = result["figures"][figure]
    assert "error" not in measured or (figure == "engine" and find_spec("ray") is None), measured["error"]
    cases = [row["case"] for row in measured["rows"]]
    assert cases and len(set(cases)) == len(cases)
    values = [Value(**value) for row in measured["rows"] for value in row["values"].values()]
    assert any(value.unit == RATIO for value in values)
    assert all(value.low <= value.median <= value.high for value in values)
    assert measured["title"] in " ".join(capsys.readouterr().out.split())


def test_what_is_for_cuda_alone_is_said_without_it(checkpoint, capsys):
    assert main(["compiled", "--quick", "--model", str(checkpoint("bert")), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["figures"]["compiled"]
    assert measured["rows"] == [] and "--device cuda" in measured["error"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_compiled_blocks_are_measured_on_cuda(checkpoint, capsys):
    assert main(["compiled", "--quick", "--device", "cuda", "--model", str(checkpoint("bert")), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["figures"]["compiled"]["rows"]) == 2


def test_json_on_stdout_is_the_result_and_nothing_else(checkpoint, capsys):
    assert main(["step", "--quick", "--model", str(checkpoint("bert")), "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["quick"] is True


def test_a_random_llama_takes_the_place_of_a_model_where_there_is_no_hub(capsys):
    assert main(["wire", "--quick", "--model", "llama-1b", "--threads", "1", "--repeats", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    figure = result["figures"]["wire"]
    assert len(figure["rows"]) == 2 * len(wire.CASES) + 2 and "error" not in figure
    assert result["settings"]["model"] == "llama-1b"


def test_a_result_says_with_how_many_threads_and_repeats_it_was_measured(capsys):
    torch.set_num_threads(2)
    assert main(["refactorisation", "--quick", "--threads", "1", "--repeats", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    repeats = result["figures"]["refactorisation"]["repeats"]
    assert result["machine"]["threads"] == result["settings"]["threads"] == repeats == 1


def test_a_result_file_keeps_the_figures_that_are_not_measured_again(tmp_path, capsys):
    out = tmp_path / "result.json"
    arguments = ["--quick", "--threads", "1", "--repeats", "1", "--out", str(out)]
    assert main(["refactorisation", *arguments]) == 0
    first = json.loads(out.read_text())
    kept = {**first["figures"]["refactorisation"], "seconds": -1.0}
    out.write_text(json.dumps({**first, "figures": {"kept": kept, "refactorisation": kept}}))
    assert main(["refactorisation", *arguments]) == 0
    result = json.loads(out.read_text())
    assert result["figures"]["kept"] == kept and result["began"] == first["began"]
    assert result["figures"]["refactorisation"]["seconds"] >= 0
    before = out.read_text()
    assert main(["refactorisation", "--quick", "--threads", "2", "--out", str(out)]) == 2
    assert "other settings" in capsys.readouterr().err and out.read_text() == before


def test_what_is_missing_and_the_notes_are_shown_in_full(monkeypatch, capsys):
    def measure(settings):
        yield Row("a case", {"ratio": Value.of([1.0], RATIO)}, note="what the numbers need to be understood")
        raise Unavailable("pip install 'fedlora[ray]'")

    monkeypatch.setattr(memory, "FIGURE", Figure(2, measure))
    assert main(["memory"]) == 0
    shown = capsys.readouterr().out
    assert "a case: what the numbers need" in shown and "'fedlora[ray]'" in shown


@pytest.mark.parametrize(("chosen", "quick", "measured"), [
    ("bf16", False, ("fp32", "bf16")), ("fp32", False, ("fp32",)), ("fp32", True, ("fp32", "bf16"))])
def test_bf16_is_measured_where_the_device_has_it(chosen, quick, measured, monkeypatch):
    monkeypatch.setattr(subjects, "resolve_precision", lambda precision, device: chosen)
    assert subjects.precisions(Settings(Path("rows.jsonl"), quick=quick)) == measured


def test_rows_that_are_too_few_for_all_clients_are_counted_before_any_is_measured(tmp_path, checkpoint, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", seed=0, rows=39)
    assert main(["population", "--quick", "--data", str(rows), "--model", str(checkpoint("bert")), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["figures"]["population"]
    assert measured["rows"] == [] and "39 rows" in measured["error"] and "40" in measured["error"]


def test_peaks_are_not_measured_where_that_of_loading_the_model_cannot_be_forgotten(monkeypatch, checkpoint, capsys):
    monkeypatch.setattr(memory, "forget_peak", lambda: False)
    assert main(["memory", "--quick", "--model", str(checkpoint("bert")), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["figures"]["memory"]
    assert measured["rows"] == [] and "Linux" in measured["error"]


def test_one_block_has_the_same_records_and_new_noise(tmp_path, checkpoint):
    write_rows(tmp_path / "rows.jsonl", seed=0)
    one = subject(Settings(tmp_path, str(checkpoint("bert")), threads=1), read(tmp_path, "classification"),
                  family="frozen-a", rank=2, precision="fp32", expected_batch=4, max_length=16)
    state = one.adapted.read("state")

    def trained(private):
        one.adapted.write(state)
        result = one.train(0, private=private, sampling_rate=0.2)
        return result.drawn, np.concatenate([array.ravel() for array in result.tensors.values()])

    (drawn, first), (again, second), (plainly, plain), (_, plain_again) = map(trained, (True, True, False, False))
    assert drawn == again == plainly
    assert not np.array_equal(first, second) and np.array_equal(plain, plain_again)


@pytest.mark.parametrize("search", [independence.by_decision, independence.by_gradients])
def test_the_search_finds_arithmetic_that_depends_on_how_many_records_there_are(search, tmp_path, checkpoint,
                                                                                monkeypatch):
    """Rounding is emulated to differ in trainings of 16 records and more, whatever the trainer computes."""
    train, trained = Trainer.train, []

    def counting(self, job, *stop):
        trained.append(len(job.records))
        return train(self, job, *stop)

    monkeypatch.setattr(Trainer, "train", counting)
    write_rows(tmp_path / "rows.jsonl", seed=0)
    one = subject(Settings(tmp_path, str(checkpoint("bert")), threads=1), read(tmp_path, "classification"),
                  family="lora", rank=2, precision="fp32", expected_batch=16, max_length=16)
    with hostile.rounding_otherwise(one, lambda rows: trained[-1] >= 16):
        found = {records: search(one, independence.Case("", "", "fp32", 1, True, records, "last", "one", 10), "cpu")
                 for records in (15, 16)}
    assert found[15].equal and found[15].ratio <= 1
    assert not found[16].equal and found[16].ratio > 10


@pytest.mark.parametrize("threads, each", [(1, 1), (2, 1), (5, 2), (8, 4)])
def test_workers_have_together_the_threads_of_the_one_process(threads, each):
    assert worker_threads(threads) == each and WORKERS == 2


def test_a_session_that_trains_nothing_is_charged_for_it():
    run, shape = plan("ffa-lora", "frozen-a"), layout("frozen-a", layers=1, width=8, rank=2)
    start = tensors(shape.state, 0)
    first, other = sessions(run, shape, 2).values()
    order = RoundPlan(run, 1, 0, tensors_digest({spec.name: start[spec.name] for spec in shape.frozen}))
    upload = first.run_round(order, start)
    assert {name: array.tobytes() for name, array in upload.tensors.items()} == {
        spec.name: start[spec.name].tobytes() for spec in shape.trained}
    assert first.epsilon() == pytest.approx(8.0, rel=0.05) and other.epsilon() == 0.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named(capsys):
    assert main(["step", "--quick", "--device", "cuda"]) == 2
    assert "--device cuda" in capsys.readouterr().err


@pytest.fixture
def result_file(tmp_path):
    def write(name, ratio, low=None, high=None, better="lower", unit=RATIO, tolerance=0.0, **machine):
        file = tmp_path / name
        value = Value(ratio, low or ratio, high or ratio, unit, better, tolerance=tolerance)
        file.write_text(json.dumps({
            "format": 1, "machine": machine, "settings": {}, "versions": {},
            "figures": {"step": {"rows": [{"case": "one", "values": {"ratio": vars(value)}}]}}}))
        return str(file)

    return write


@pytest.mark.parametrize("old, new, better, worse", [
    ((1.0, 0.9, 1.1), (1.3, 1.2, 1.4), "lower", True),
    ((1.0, 0.9, 1.1), (1.15, 1.05, 1.4), "lower", False),  # within the spread
    ((1.3, 1.2, 1.4), (1.0, 0.9, 1.1), "lower", False),
    ((1.3, 1.2, 1.4), (1.0, 0.9, 1.1), "higher", True),
    ((1.0, 1.0, 1.0), (1.001, 1.001, 1.001), "lower", True),  # counted values have no spread
])
def test_compare_fails_for_what_got_worse_by_more_than_the_spread(result_file, old, new, better, worse, capsys):
    code = main(["compare", result_file("old.json", *old, better), result_file("new.json", *new, better), "--json"])
    assert code == int(worse)
    (change,) = json.loads(capsys.readouterr().out)
    assert (change["verdict"] == "worse") is worse


@pytest.mark.parametrize("new, worse", [(1.01, False), (1.04, False), (1.06, True), (0.9, False)])
def test_what_was_measured_once_got_worse_only_beyond_a_tolerance(result_file, new, worse):
    old, new = (Value.of([number], RATIO, better="lower") for number in (1.0, new))
    files = [result_file(f"{name}.json", value.median, tolerance=value.tolerance)
             for name, value in (("old", old), ("new", new))]
    assert main(["compare", *files]) == int(worse)


@pytest.mark.parametrize("new, worse", [(1.2, False), (1.3, True)])
def test_seconds_of_one_machine_are_compared_more_widely(result_file, new, worse, capsys):
    code = main(["compare", result_file("old.json", 1.0, unit="s", cores=2, load=0.1),
                 result_file("new.json", new, unit="s", cores=2, load=4.0)])
    assert code == int(worse)
    assert "1 values" in capsys.readouterr().out


def test_seconds_of_different_machines_are_not_compared(result_file, capsys):
    assert main(["compare", result_file("old.json", 1.0, unit="s", cores=2),
                 result_file("new.json", 9.0, unit="s", cores=4)]) == 0
    assert "0 values" in capsys.readouterr().out


def test_a_figure_that_no_longer_works_is_worse(result_file, tmp_path, capsys):
    old, new = result_file("old.json", 1.0), tmp_path / "new.json"
    result = json.loads(Path(old).read_text())
    for figure in result["figures"].values():
        figure |= {"rows": [], "error": "RuntimeError: no longer"}
    new.write_text(json.dumps(result))
    assert main(["compare", old, str(new)]) == 1 and "RuntimeError: no longer" in capsys.readouterr().out
    assert main(["compare", str(new), str(new)]) == 0


def test_a_value_that_is_gone_is_worse_and_a_figure_that_was_left_out_is_named(result_file, tmp_path, capsys):
    old, new = result_file("old.json", 1.0), tmp_path / "new.json"
    result = json.loads(Path(old).read_text())
    (row,) = result["figures"]["step"]["rows"]
    new.write_text(json.dumps(result | {"figures": {"step": {"rows": [row | {"case": "another"}]}}}))
    assert main(["compare", old, str(new)]) == 1 and "1 gone" in capsys.readouterr().out
    new.write_text(json.dumps(result | {"figures": {}}))
    assert main(["compare", old, str(new)]) == 0 and "Not measured again: step" in capsys.readouterr().out


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


def test_a_fresh_process_finds_the_benchmarks_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert in_fresh_process("benchmarks.fresh:resident_bytes") > 1 << 20


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
