"""The command fedlora-simulate rank-starts: the figure of each start, against its definition."""

import json
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console

from fedlora.adapters import attach, automatic_targets, initial_tensors
from fedlora.models import load
from fedlora.records import pack
from fedlora.tasks.classification import Classification
from fedlora.training import Trainer
from fedlora_simulations.cli import main
from fedlora_simulations.rank_starts import FIXED, Judge, Ranked, RankStartsConfig, table
from tests.processes import write_rows


@pytest.fixture
def arguments(checkpoint, tmp_path):
    return ["rank-starts", f"--public={write_rows(tmp_path / 'public.jsonl', seed=0, rows=60)}", "--rank=2",
            f"--model={checkpoint('bert')}", "--device=cpu", "--precision=fp32", "--threads=1", "--rows=48"]


def test_all_starts_of_a_strategy_are_ranked_and_said_how_far_to_be_trusted(arguments, capsys):
    assert main([*arguments, "--strategy=fed-sb", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["ranked"]
    assert {one["start"] for one in found} >= {"orthonormal", "weight", "avoid:FILE", "public:FILE", "lora-sb:FILE",
                                               "protect:FILE"}
    assert not {"kaiming", "dp", "gradient", "lora-sb-clients", "row-norms", "lora-ga:FILE"} & {
        one["start"] for one in found}
    decreases = [one["decrease"] for one in found]
    assert decreases == sorted(decreases, reverse=True) and decreases[0] > 0
    assert all(one["decrease"] <= one["without_noise"] for one in found)
    assert main([*arguments, "--strategy=fedavg-lora", "--epsilon=inf", "--rank=20"]) == 0
    told, left_out = capsys.readouterr()
    shown = " ".join(told.split())
    assert "did not rank whole runs with AdamW" in shown and "one step on public rows, with no noise" in shown
    assert "lora-ga:FILE" in shown and "rank 20 exceeds half of the smaller side" in left_out


@pytest.fixture
def adapted(checkpoint):
    loaded = load(checkpoint("bert"), "classification", 2)
    made = attach(loaded, family="frozen-a", rank=2, alpha=4.0, targets=automatic_targets(loaded.model),
                  train_head=False)
    made.write(initial_tensors(made, init="orthonormal", seed=0))
    return made


@pytest.fixture
def task(adapted):
    return Classification(adapted.tokenizer, ("routine", "urgent"), 32)


@pytest.fixture
def tokens(adapted, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 0, rows=14).read_text().splitlines()
    return [adapted.tokenizer(json.loads(row)["text"])["input_ids"] for row in rows]


def predicted(adapted, task, halves, noise, C):
    trainer = Trainer(adapted, task, device="cpu", precision="fp32")
    return Judge(trainer, *halves, noise, C).predict(adapted.read("state"))


def gradients(adapted, task, records):
    """Return each record's gradient, [records, values], computed alone."""
    found = []
    for i in range(len(records)):
        batch = task.collate(records, np.array([i]), int(records.lengths[i]))
        parameters = [parameter for _, parameter in adapted.trained_parameters()]
        own = torch.autograd.grad(task.per_record_loss(adapted.model, batch).sum(), parameters)
        found.append(np.concatenate([one.double().numpy().ravel() for one in own]))
    return np.stack(found)


def test_the_figure_is_what_the_best_step_is_predicted_to_gain(adapted, task, tokens):
    halves, noise, C = [task.made_up(tokens[:7]), task.made_up(tokens[7:])], 0.3, 1.0
    first, second = (gradients(adapted, task, half) for half in halves)
    best, error, _, eta, clip_norm = predicted(adapted, task, halves, noise, C)
    lengths = np.linalg.norm(first, axis=1, keepdims=True)
    assert lengths.min() < C < lengths.max(), "some are clipped"
    s = (first * np.minimum(1, C / lengths)).mean(axis=0)
    F, tau = second.T @ second / len(second), noise * C
    curved = s @ F @ s + tau**2 * np.trace(F)
    assert best == pytest.approx((second.mean(axis=0) @ s) ** 2 / (2 * curved), rel=1e-3)
    assert error == pytest.approx(spread(second @ s, 2 * curved), rel=0.02) and clip_norm == C

    def gain(length):  # expected, over noise with this deviation in each value
        return length * second.mean(axis=0) @ s - length**2 / 2 * curved

    assert gain(eta) == pytest.approx(best, rel=1e-3) and max(gain(0.9 * eta), gain(1.1 * eta)) < best


def test_a_step_that_does_not_lower_the_loss_is_shown_with_its_error(adapted, task, tokens):
    halves = [pack(some, task.tokenizer.pad_token_id, labels=labels) for some, labels in (
        (tokens[:7], [1] * 7), (tokens[7:], [0, 0, 1, 1, 1, 1, 1]))]
    first, second = (gradients(adapted, task, half) for half in halves)
    C = 2 * np.linalg.norm(first, axis=1).max()
    along = second @ first.mean(axis=0)
    assert -2 < along.mean() / (along.std() / np.sqrt(7)) < 0
    found = predicted(adapted, task, halves, 0.3, C)
    curved = (along**2).mean() + (0.3 * C) ** 2 * (second**2).sum(axis=1).mean()
    assert found[0] == 0 and found[1] == pytest.approx(spread(along, 2 * curved), rel=0.03, abs=0)
    shown = StringIO()
    Console(file=shown, width=120).print(table([Ranked("fed-sb", "lu", *found)], RankStartsConfig()))
    assert f"0 ± {1000 * found[1]:.2g}" in shown.getvalue() and "0 ± 0 " not in shown.getvalue()


def spread(along, denominator):
    """Draw the records' mean gain anew, and return the standard deviation of the figure that follows from it."""
    means = np.random.default_rng(0).normal(along.mean(), along.std() / np.sqrt(len(along)), 200_000)
    return (np.maximum(means, 0)**2 / denominator).std()


@pytest.mark.parametrize(("options", "said"), [
    (["--public=rows.jsonl", "--lr=1"], "--lr plays no part in one step"), ([], "--public is missing"),
    (["--public=rows.jsonl", "--strategy=fed-sb:weight"], "names a start")])
def test_what_plays_no_part_is_refused(options, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["rank-starts", *options])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_private_data_have_no_option_and_bad_rows_no_traceback(arguments, tmp_path, capsys):
    assert {"data", "eval_data", "init", "lr"} <= set(FIXED)
    one = write_rows(tmp_path / "one.jsonl", seed=0, rows=6, labels=("calm", "calm"))
    assert main([*arguments, f"--public={one}"]) == 2
    assert "rank-starts: --public" in capsys.readouterr().err
