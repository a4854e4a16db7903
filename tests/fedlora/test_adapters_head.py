"""The head's start from public rows: the regression's optimum, on the features that the model itself computes."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from fedlora import models
from fedlora.adapters import attach, automatic_targets, initial_tensors
from fedlora.adapters.head_start import head_start
from fedlora.config import SimulationConfig, read_config
from fedlora.data import Rows
from fedlora.tasks.classification import Classification
from fedlora_server.run_setup import about_the_head, find_model, planned, prepare
from tests.covering import few

LABELS = ("no", "perhaps", "yes")


def write_file(path, labels=LABELS, count=30):
    rng = np.random.default_rng(0)
    words = {label: [label, "film", "note"] for label in labels}
    path.write_text("".join(json.dumps({
        "text": " ".join(rng.choice(words[label], 2 + i % 5)), "label": label}) + "\n"
        for i in range(count) for label in (labels[i % len(labels)],)))
    return path


def rows(count=30):
    labels = tuple(LABELS[i % 3] for i in range(count))
    texts = tuple(f"{label} note {i % 7}" * (1 + i % 4) for i, label in enumerate(labels))
    return Rows("text", texts, None, None, labels, ("rows.jsonl",), np.zeros(count, np.int64), np.arange(1, count + 1))


@pytest.mark.parametrize("kind", few("roberta", "gpt2", "modernbert"))
def test_the_head_is_the_optimum_of_a_logistic_regression_on_the_models_own_features(checkpoint, kind):
    loaded = models.load(checkpoint(kind), "classification", 3)
    adapted = attach(loaded, family="frozen-a", rank=2, alpha=4.0, targets=automatic_targets(loaded.model),
                     train_head=True)
    task, before = Classification(loaded.tokenizer, LABELS, 32), adapted.read("state")
    state = initial_tensors(adapted, init="orthonormal", seed=3)
    head = head_start(adapted, task, rows(), state, seed=3)
    assert set(head) == {f"head.{adapted.head}.{name}" for name, _ in adapted.model.get_submodule(
        adapted.head).named_parameters()}
    assert all(np.array_equal(before[name], after) for name, after in adapted.read("state").items())

    adapted.write(state)
    inputs, records = [], task.encode(rows())
    hook = adapted.model.get_submodule(adapted.head).register_forward_hook(
        lambda layer, given, output: inputs.append(given[0].detach()))
    for i in range(len(records)):
        batch = task.collate(records, np.array([i]), int(records.lengths[i]))
        with torch.no_grad():
            adapted.model(**batch.inputs())
    hook.remove()
    features = np.stack([one.reshape(-1, one.shape[-1])[-1].numpy() for one in inputs]).astype(np.float64)
    bias = f"head.{adapted.head}.bias"
    if bias in head:
        features = np.column_stack([features, np.ones(len(features))])
    expected = LogisticRegression(fit_intercept=False, tol=1e-9, max_iter=5000).fit(
        features, records.labels).coef_
    found = np.column_stack([head[f"head.{adapted.head}.weight"], *([head[bias]] if bias in head else [])])
    np.testing.assert_allclose(found, expected, atol=2e-3)

    losses = []
    for start in (state, state | head):
        adapted.write(start)
        losses.append(task.evaluate(adapted.model, records)["loss"])
    assert losses[1] < losses[0]


def simulated(checkpoint, tmp_path, *options):
    return read_config(SimulationConfig, [
        f"--model={checkpoint('bert')}", f"--data={write_file(tmp_path / 'private.jsonl')}", "--rank=2",
        "--max-length=32", *options])


@pytest.mark.parametrize(("strategy", "init"), few(
    ("fed-sb", "public"), ("fedavg-lora", None), ("dora-magnitudes", None), ("fed-sb", "dp")))
def test_a_run_starts_from_it_whatever_its_start(checkpoint, tmp_path, strategy, init):
    public = f"public:{write_file(tmp_path / 'public.jsonl')}"
    start = f"--init={public if init == 'public' else init}" if init else "--rank=2"
    plain, warm = simulated(checkpoint, tmp_path, start), simulated(
        checkpoint, tmp_path, start, f"--init-head={public}")
    drawn, fitted, again = (prepare(options, strategy, find_model(options), LABELS, 0) for options in (
        plain, warm, warm))
    changed = {name for name, value in drawn.state.items() if not np.array_equal(value, fitted.state[name])}
    heads = {f"head.classifier.{name}" for name in ("weight", "bias")}
    assert heads <= changed and (init == "public") is (changed > heads), "a gradient is taken at the run's own head"
    assert all(np.array_equal(value, again.state[name]) for name, value in fitted.state.items())
    assert dataclasses.replace(fitted.plan, run_id=drawn.plan.run_id) == drawn.plan, "clients are told nothing new"
    assert about_the_head(warm)[0].endswith("public.jsonl, which costs no ε.") and not about_the_head(plain)
    if fitted.start is not None:
        assert all(np.array_equal(fitted.start.tensors[name], fitted.state[name]) for name in heads)


def test_what_cannot_be_is_refused_by_name(checkpoint, tmp_path, capsys):
    def refused(message, *options):
        with pytest.raises(ValueError, match=message):
            asked = simulated(checkpoint, tmp_path, *options)
            planned(asked, "fedsvd")
            find_model(asked)

    public = f"--init-head=public:{write_file(tmp_path / 'public.jsonl')}"
    refused("--init-head starts the head that clients train, and --head freeze", public, "--head=freeze")
    refused("a causal language model has no task head; leave it out", public, "--task=causal-lm")
    refused("--init-head public:.*part of.* --data .*without noise", f"--init-head=public:{tmp_path / 'private.jsonl'}")
    two = write_file(tmp_path / "two.jsonl", labels=("no", "yes"))
    refused("--init-head public:.* has no row with the label perhaps", f"--init-head=public:{two}",
            "--labels=no,perhaps,yes")
    one = write_file(tmp_path / "one.jsonl", labels=("no",))
    refused("at least two labels, and its labels are: no.* or leave --init-head out", f"--init-head=public:{one}")
    with pytest.raises(SystemExit):
        simulated(checkpoint, tmp_path, "--init-head=weight")
    assert "write public:FILE" in capsys.readouterr().err
