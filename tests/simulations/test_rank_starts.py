"""The command fedlora-simulate rank-starts: the figure of each start, against its definition."""

import json

import numpy as np
import pytest
import torch

from fedlora.adapters import attach, automatic_targets, initial_tensors
from fedlora.models import load
from fedlora.tasks.classification import Classification
from fedlora.training import Trainer
from fedlora_simulations.cli import main
from fedlora_simulations.rank_starts import FIXED, Judge
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
    assert not {"kaiming", "dp", "gradient", "row-norms", "lora-ga:FILE"} & {one["start"] for one in found}
    decreases = [one["decrease"] for one in found]
    assert decreases == sorted(decreases, reverse=True) and decreases[0] > 0
    assert all(one["decrease"] <= one["without_noise"] for one in found)
    assert main([*arguments, "--strategy=fedavg-lora", "--epsilon=inf", "--rank=20"]) == 0
    told, left_out = capsys.readouterr()
    shown = " ".join(told.split())
    assert "did not rank whole runs with AdamW" in shown and "one step on public rows, with no noise" in shown
    assert "lora-ga:FILE" in shown and "rank 20 exceeds half of the smaller side" in left_out


def test_the_figure_is_what_the_best_step_is_predicted_to_gain(checkpoint, tmp_path):
    loaded = load(checkpoint("bert"), "classification", 2)
    adapted = attach(loaded, family="frozen-a", rank=2, alpha=4.0, targets=automatic_targets(loaded.model),
                     train_head=False)
    task = Classification(loaded.tokenizer, ("routine", "urgent"), 32)
    rows = [json.loads(line) for line in write_rows(tmp_path / "rows.jsonl", 0, rows=14).read_text().splitlines()]
    tokens = [loaded.tokenizer(row["text"])["input_ids"] for row in rows]
    state = initial_tensors(adapted, init="orthonormal", seed=0)
    halves, noise, C = [task.made_up(tokens[:7]), task.made_up(tokens[7:])], 0.3, 1.0
    trainer = Trainer(adapted, task, device="cpu", precision="fp32")
    found = Judge(trainer, *halves, noise, C).predict(state)

    adapted.write(state)
    gradients = []
    for half in halves:
        of_half = []
        for i in range(len(half)):
            batch = task.collate(half, np.array([i]), int(half.lengths[i]))
            parameters = [parameter for _, parameter in adapted.trained_parameters()]
            own = torch.autograd.grad(task.per_record_loss(adapted.model, batch).sum(), parameters)
            of_half.append(np.concatenate([one.double().numpy().ravel() for one in own]))
        gradients.append(np.stack(of_half))
    first, second = gradients
    lengths = np.linalg.norm(first, axis=1, keepdims=True)
    assert lengths.min() < C < lengths.max(), "some are clipped"
    s = (first * np.minimum(1, C / lengths)).mean(axis=0)
    F, tau = second.T @ second / len(second), noise * C
    best, error, _, eta, clip_norm = found
    assert best == pytest.approx((second.mean(axis=0) @ s) ** 2 / (2 * (s @ F @ s + tau**2 * np.trace(F))), rel=1e-3)

    spread = np.sqrt((second @ s).var() / len(second)) / (second.mean(axis=0) @ s)  # of the gain, which is squared
    assert error == pytest.approx(2 * best * spread, rel=1e-3) and clip_norm == C

    def gain(length):  # expected, over noise with this deviation in each value
        return length * second.mean(axis=0) @ s - length**2 / 2 * (s @ F @ s + tau**2 * np.trace(F))

    assert gain(eta) == pytest.approx(best, rel=1e-3) and max(gain(0.9 * eta), gain(1.1 * eta)) < best


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
