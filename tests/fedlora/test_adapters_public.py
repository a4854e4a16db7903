"""Starts from public rows: the gradient is that of the loss, and its singular vectors become the frozen factors."""

import json

import numpy as np
import pytest
import torch

from fedlora import models
from fedlora.adapters import attach, automatic_targets, family_of, initial_tensors
from fedlora.adapters.public_rows import (
    ROWS,
    TOKENS,
    mean_gradients,
    public_start,
    read_public,
    sampled_inputs,
)
from fedlora.config import ServerConfig, SimulationConfig, read_config
from fedlora.data import Rows
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.classification import Classification
from fedlora_server.run_setup import find_model, prepare
from tests.families import FAMILIES

LABELS = ("no", "yes")
RANK = 3


def write_file(path, labels=LABELS, count=12):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": f"note {i} " * (1 + i % 6), "label": labels[i % len(labels)]}) + "\n"
                            for i in range(count)))
    return path


def case(checkpoint, kind, task_name, family):
    loaded = models.load(checkpoint(kind), task_name, len(LABELS))
    adapted = attach(loaded, family=family, rank=RANK, alpha=6.0, targets=automatic_targets(loaded.model),
                     train_head=task_name == "classification")
    task = (Classification(loaded.tokenizer, LABELS, 32) if task_name == "classification"
            else CausalLM(loaded.tokenizer, 32))
    return adapted, task


@pytest.fixture
def rows(tmp_path):
    return read_public(str(write_file(tmp_path / "public.jsonl")), "classification", LABELS, columns={})


@pytest.mark.parametrize(("kind", "task_name"), [("bert", "classification"), ("gpt2", "classification"),
                                                 ("gpt2", "causal-lm"), ("llama", "causal-lm")])
@pytest.mark.parametrize("family", [family for family in FAMILIES if "A" in family_of(family).bases])
def test_fixed_factors_are_the_leading_singular_vectors_of_the_gradient(checkpoint, tmp_path, kind, task_name, family):
    adapted, task = case(checkpoint, kind, task_name, family)
    rows = read_public(str(write_file(tmp_path / "public.jsonl")), task_name, LABELS, columns={})
    before = {name: tensor.detach().clone() for name, tensor in adapted.model.named_parameters()}
    state = public_start(adapted, task, rows, seed=5)
    adapted.layout.check(state, "state")
    for name, tensor in adapted.model.named_parameters():
        assert torch.equal(tensor, before[name]), f"{name} was left changed"
        assert tensor.grad is None

    # the reference: the run's own head on the bare model, one record at a time, autograd on the whole weight
    base = models.load(checkpoint(kind), task_name, len(LABELS)).model
    with torch.no_grad():
        for name in adapted.missing:
            base.get_parameter(name).copy_(torch.from_numpy(state[f"head.{name}"]))
    records = task.encode(rows)
    for module in adapted.layout.modules:
        weight = base.get_submodule(module).weight
        total = torch.zeros(weight.shape, dtype=torch.float64)
        for i in range(len(records)):
            batch = task.collate(records, np.array([i]), int(records.lengths[i]))
            total += torch.autograd.grad(task.per_record_loss(base, batch).sum(), weight)[0].double()
        gradient = (total.T if kind == "gpt2" else total).numpy()
        A, B = state[f"{module}.A"], state[f"{module}.B"]
        np.testing.assert_allclose(A @ A.T, np.eye(len(A)), atol=1e-5)
        if trained := {"bra": "R", "diagonal": "e", "salt": "e", "lora-offset": "dB"}.get(family):
            np.testing.assert_allclose(B.T @ B, np.eye(len(A)), atol=1e-5)
            assert not state[f"{module}.{trained}"].any()
            caught = np.linalg.norm(B.T @ gradient @ A.T)
        else:
            assert not B.any()
            caught = np.linalg.norm(gradient @ A.T)
        best = np.linalg.norm(np.linalg.svd(gradient, compute_uv=False)[:len(A)])
        assert caught == pytest.approx(best, rel=1e-3)


def test_the_head_and_the_first_loss_are_those_of_every_other_start(checkpoint, rows):
    adapted, task = case(checkpoint, "bert", "classification", "bra")
    public, other = public_start(adapted, task, rows, seed=5), initial_tensors(adapted, init="orthonormal", seed=5)
    for name in (name for name in other if name.startswith("head.")):
        np.testing.assert_array_equal(public[name], other[name])
    records, losses = task.encode(rows), []
    for state in (public, other):
        adapted.write(state)
        losses.append(task.evaluate(adapted.model, records)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_large_file_is_drawn_from_and_the_seed_decides_every_bit(checkpoint, tmp_path):
    adapted, task = case(checkpoint, "bert", "classification", "frozen-a")
    file = write_file(tmp_path / "many.jsonl", count=ROWS + 200)
    rows = read_public(str(file), "classification", LABELS, columns={})
    first, again, other = (public_start(adapted, task, rows, seed=seed) for seed in (1, 1, 2))
    assert all(first[name].tobytes() == again[name].tobytes() for name in first)
    assert any(not np.array_equal(first[f"{m}.A"], other[f"{m}.A"]) for m in adapted.layout.modules)


def test_a_gradient_of_zero_is_refused(checkpoint, rows):
    adapted, task = case(checkpoint, "bert", "classification", "bra")
    head = "head.classifier.weight"
    adapted.write({**initial_tensors(adapted, init="orthonormal", seed=0),
                   head: np.zeros_like(adapted.read("state")[head])})
    with pytest.raises(ValueError, match="zero or not finite; choose --init orthonormal"):
        mean_gradients(adapted, task, task.encode(rows))


def test_rows_without_usable_labels_are_refused(tmp_path):
    def read(text):
        path = tmp_path / "public.jsonl"
        path.write_text(text)
        return read_public(str(path), "classification", LABELS, columns={})

    with pytest.raises(ValueError, match="no column label"):
        read('{"text": "one"}\n')
    with pytest.raises(ValueError, match="at least two labels, and its labels are: none"):
        read('{"text": "one", "label": null}\n')
    with pytest.raises(ValueError, match="its labels are: yes"):
        read('{"text": "one", "label": "yes"}\n')
    with pytest.raises(ValueError, match=r"public\.jsonl:2: the label is not in the label set. Allowed are: no, yes"):
        read('{"text": "one", "label": "yes"}\n{"text": "two", "label": "maybe"}\n')
    with pytest.raises(ValueError, match="does not exist"):
        read_public(str(tmp_path / "absent.jsonl"), "classification", LABELS, columns={})


@pytest.mark.parametrize("flag", ["--data", "--eval-data"])
def test_private_and_held_out_rows_are_no_public_start(tmp_path, flag):
    file = write_file(tmp_path / "rows" / "a.jsonl")
    (tmp_path / "link.jsonl").symlink_to(file)
    for public, other in ((file, file), (file, file.parent), (file.parent, file), (tmp_path / "link.jsonl", file)):
        with pytest.raises(ValueError, match=f"part of.* {flag} "):
            read_public(str(public), "classification", LABELS, columns={}, others={flag: other})
    rows = read_public(str(file), "classification", LABELS, columns={}, others={flag: tmp_path / "row", "--x": None})
    assert isinstance(rows, Rows) and len(rows) == 12


@pytest.mark.parametrize("strategy", ["fed-sb", "ffa-lora", "fedsvd", "fedavg-lora"])
@pytest.mark.parametrize("init", ["weight", "public"])
def test_every_strategy_is_prepared_from_such_a_start(checkpoint, tmp_path, strategy, init):
    public = f"public:{write_file(tmp_path / 'public.jsonl')}"
    options = simulated(checkpoint, write_file(tmp_path / "private.jsonl"), public if init == "public" else init)
    federation = prepare(options, strategy, find_model(options), LABELS, 0)
    federation.adapted.layout.check(federation.state, "state")
    for module in federation.adapted.layout.modules:
        A = federation.state[f"{module}.A"]
        np.testing.assert_allclose(A @ A.T, np.eye(len(A)), atol=1e-5)


def test_a_bad_public_file_is_found_before_anything_starts(checkpoint, tmp_path):
    private = write_file(tmp_path / "private.jsonl")
    for init, message in ((f"public:{private}", "without noise"), (f"public:{tmp_path}", "without noise"),
                          (f"public:{tmp_path / 'no.jsonl'}", "does not exist")):
        with pytest.raises(ValueError, match=message):
            find_model(simulated(checkpoint, private, init))


@pytest.mark.parametrize(("kind", "task_name"), [("bert", "classification"), ("gpt2", "causal-lm")])
def test_a_start_from_texts_reads_inputs_alone_and_leaves_the_model_as_it_was(checkpoint, tmp_path, kind, task_name):
    """EVA takes the directions in which the inputs vary most; the other start takes none of the four strongest."""
    adapted, task = case(checkpoint, kind, task_name, "bra")
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": f"note {i} " * (1 + i % 6)}) + "\n" for i in range(40)))
    rows = read_public(str(file), task_name, LABELS, columns={"label": "urgency"} if kind == "bert" else {}, init="eva")
    before = {name: tensor.detach().clone() for name, tensor in adapted.model.named_parameters()}
    inputs = sampled_inputs(adapted, task, task.encode(rows), 5)
    eva, again, avoid = (public_start(adapted, task, rows, seed=5, init=init) for init in ("eva", "eva", "avoid"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.model.named_parameters())
    for module in adapted.layout.modules:
        X = inputs[module].double().numpy()
        assert TOKENS <= len(X) < TOKENS + len(rows) and X.std(axis=0).min() > 0
        A = eva[f"{module}.A"].astype(np.float64)
        np.testing.assert_array_equal(eva[f"{module}.A"], again[f"{module}.A"])
        np.testing.assert_allclose(A @ A.T, np.eye(RANK), atol=1e-5)
        centred = X - X.mean(axis=0)
        best = np.linalg.norm(np.linalg.svd(centred, compute_uv=False)[:RANK])
        assert np.linalg.norm(centred @ A.T) == pytest.approx(best, rel=1e-4)
        A = avoid[f"{module}.A"].astype(np.float64)
        np.testing.assert_allclose(A @ A.T, np.eye(RANK), atol=1e-5)
        assert np.abs(np.linalg.svd(X, full_matrices=False)[2][:4] @ A.T).max() < 1e-4
    with pytest.raises(ValueError, match=r"eva:.*part of"):
        read_public(str(file), task_name, LABELS, columns={}, init="eva", others={"--data": file})


def simulated(checkpoint, private, init) -> SimulationConfig:
    return read_config(SimulationConfig, [
        f"--model={checkpoint('bert')}", f"--data={private}", f"--init={init}", "--rank=2", "--max-length=32"])


@pytest.mark.parametrize(("text", "names"), [
    ("public:", "name the FILE"), ("gaussian", "there is no such start; choose one of ")])
def test_a_start_that_would_release_private_rows_is_refused_by_name(capsys, text, names):
    with pytest.raises(SystemExit) as exit_:
        read_config(ServerConfig, [f"--init={text}"])
    message = capsys.readouterr().err
    assert exit_.value.code == 2 and names in message and "public:FILE" in message

