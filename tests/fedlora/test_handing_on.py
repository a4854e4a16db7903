"""Exported adapters predict what the run predicted, for every architecture and every way to load them."""

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

from fedlora import models
from fedlora.adapters import attach, automatic_targets, export, merge
from fedlora.adapters.card import loading_code
from fedlora.tasks import read, task_named
from fedlora.training import Trainer, padding_counts
from tests.architectures import ARCHITECTURES, architecture
from tests.covering import WHOLE
from tests.fedlora.test_adapters import random_state

TEXTS = ["the patient reports chest pain", "a small cut", "warm, funny and well acted from the first scene to the last",
         "the jokes </s> are older than the actors, and the plot is dull"]
LABELS = ("dull", "warm", "neither")
MOST = 12
"""Most tokens of a record, fewer than the longest text has."""

QUICK = ("bert", "roberta", "deberta-v2", "albert", "bart", "t5", "gpt2", "llama", "qwen2_moe", "gemma3_text")
CASES = [(name, task) for name, task in itertools.product(ARCHITECTURES, ("classification", "causal-lm"))
         if (task == "classification" or ARCHITECTURES[name].decoder) and (WHOLE or name in QUICK)]


def made(name, task, folder, *, own_head=lambda base: None, train_head=True, seconds=()):
    """Make an adapted tiny model, its task, and the records of `TEXTS` (or of pairs of them with other texts).

    `own_head` may change the base model's folder before it is loaded.
    """
    base, kind = architecture(name, folder / "secretly-named"), task_named(task)
    own_head(base)
    models.check_task(base, task, MOST)
    loaded = models.load(base, task, LABELS if kind.has_labels else ())
    adapted = attach(loaded, family="lora", rank=2, alpha=4, train_head=kind.has_head and train_head,
                     targets=ARCHITECTURES[name].targets or automatic_targets(loaded.model))
    rows = folder / "rows.jsonl"
    texts = [{"text_a": text, "text_b": second} for text, second in zip(TEXTS, seconds, strict=True)] if seconds else [
        {"text": text} for text in TEXTS]
    rows.write_text("".join(json.dumps(text | ({"label": LABELS[i % 3]} if kind.has_labels else {})) + "\n"
                            for i, text in enumerate(texts)))
    own = kind(loaded.tokenizer, LABELS, MOST) if kind.has_labels else kind(loaded.tokenizer, MOST)
    return adapted, own, own.encode(read(rows, task))


def of_the_run(adapted, task, records):
    """Return the logits that a run's evaluation computes."""
    batch = task.collate(records, np.arange(len(records)), int(records.lengths.max()))
    with torch.no_grad():
        return adapted.model(**batch.inputs()).logits


def loaded_as_printed(folder: Path, base: Path):
    """Load (model, tokenizer) with the code in the README.md of an adapter or a merged model."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    names = {}
    for word, path in (("…", base), ("adapter", folder), ("model", folder)):
        code = code.replace(f'"{word}"', repr(str(path)))
    exec(code, names)
    return names["model"], names["tokenizer"]


def predicted(model, tokenizer, expected, *seconds):
    """Return the logits of `TEXTS`, padded together, at all places that are not padding; and the expected logits."""
    inputs = tokenizer(TEXTS, *seconds, padding=True, truncation=True, return_tensors="pt",
                       **({} if expected.dim() == 2 else {"max_length": MOST, "padding_side": "right"}))
    with torch.no_grad():
        logits = model(**inputs).logits
    if expected.dim() == 2:
        return logits, expected
    length = min(logits.shape[1], expected.shape[1])  # a run's texts also have an end-of-text token
    real = inputs["attention_mask"][:, :length].bool()
    return logits[:, :length][real], expected[:, :length][real]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "task"), CASES)
def test_however_it_is_loaded_it_predicts_what_the_run_predicted(name, task, tmp_path):
    adapted, own, records = made(name, task, tmp_path)
    state = random_state(adapted)
    adapted.write(state)
    expected = of_the_run(adapted, own, records)
    folder = export(adapted, state, tmp_path / "adapter", "local:0123456789ab", max_length=MOST)
    assert not any("secretly-named" in file.read_text(errors="replace") for file in folder.rglob("*") if file.is_file())

    model, tokenizer = loaded_as_printed(folder, adapted.base_path)
    torch.testing.assert_close(*predicted(model, tokenizer, expected), atol=1e-5, rtol=1e-5)

    config = json.loads((folder / "adapter_config.json").read_text())  # as a user names the folder of the base model
    named = shutil.copytree(folder, tmp_path / "named")
    (named / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(adapted.base_path)}))
    if task == "classification" and name != "canine":  # PEFT asks for embeddings, which CANINE does not have
        auto = AutoPeftModelForSequenceClassification.from_pretrained(
            named, num_labels=len(LABELS), pad_token_id=tokenizer.pad_token_id, ignore_mismatched_sizes=True)
        torch.testing.assert_close(*predicted(auto, tokenizer, expected), atol=1e-5, rtol=1e-5)
    elif task == "causal-lm":
        auto = AutoPeftModelForCausalLM.from_pretrained(named)
        torch.testing.assert_close(*predicted(auto, tokenizer, expected), atol=1e-5, rtol=1e-5)

    merged = tmp_path / "merged"
    model.merge_and_unload().save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    auto_class = AutoModelForSequenceClassification if task == "classification" else AutoModelForCausalLM
    torch.testing.assert_close(*predicted(auto_class.from_pretrained(merged), tokenizer, expected),
                               atol=1e-4, rtol=1e-4)
    ours = merge(adapted, state, tmp_path / "ours", "local:0123456789ab", max_length=MOST)
    torch.testing.assert_close(*predicted(*loaded_as_printed(ours, ours), expected), atol=1e-4, rtol=1e-4)
    assert not any("secretly-named" in file.read_text(errors="replace") for file in ours.rglob("*") if file.is_file())
    if task == "classification":
        for one in (merged, ours):
            told = pipeline("text-classification", model=str(one), device="cpu")(
                TEXTS, truncation=True, batch_size=4, top_k=1)
            assert [one[0]["label"] for one in told] == [LABELS[row] for row in expected.argmax(1)]


@pytest.mark.parametrize("name", [name for name, task in CASES if task == "causal-lm"])
def test_texts_that_are_continued_together_end_as_each_alone(name, tmp_path):
    adapted, _, _ = made(name, "causal-lm", tmp_path)
    folder = export(adapted, random_state(adapted), tmp_path / "adapter", "local:0123456789ab", max_length=MOST)
    assert "pads at the left" in (folder / "README.md").read_text()
    model, tokenizer = loaded_as_printed(folder, adapted.base_path)

    def continued(texts):
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        return model.generate(**inputs, do_sample=False, min_new_tokens=5, max_new_tokens=5)[:, -5:].tolist()

    alone = [continued([text])[0] for text in TEXTS]
    assert continued(TEXTS) == alone and len({*map(tuple, alone)}) > 1


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_a_base_model_of_the_hub_is_loaded_as_it_was_when_the_run_adapted_it(task, tmp_path, monkeypatch):
    adapted, own, records = made("gpt2", task, tmp_path)
    state = random_state(adapted)
    adapted.write(state)
    expected = of_the_run(adapted, own, records)
    then, now = "1" * 40, "2" * 40
    cache = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(adapted.base_path, cache / "snapshots" / then)
    architecture("gpt2", cache / "snapshots" / now, seed=1)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(now)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    reference = models.reference("org/tiny", models.resolve(f"org/tiny@{then}"))
    folder = export(adapted, state, tmp_path / "adapter", models.hub_name(reference), max_length=MOST)
    torch.testing.assert_close(*predicted(*loaded_as_printed(folder, Path("org/tiny")), expected), atol=1e-5, rtol=1e-5)
    readme, config = (folder / "README.md").read_text(), json.loads((folder / "adapter_config.json").read_text())
    assert "base_model: org/tiny\n" in readme and f'revision="{then}"' in readme
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/tiny", then)
    if task == "causal-lm":
        auto = AutoPeftModelForCausalLM.from_pretrained(folder)
        _, tokenizer = loaded_as_printed(folder, Path("org/tiny"))
        torch.testing.assert_close(*predicted(auto, tokenizer, expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if WHOLE or name in QUICK])
def test_pairs_are_told_apart_as_in_the_run(name, tmp_path):
    seconds = [*reversed(TEXTS)]
    adapted, own, records = made(name, "classification", tmp_path, seconds=seconds)
    state = random_state(adapted)
    adapted.write(state)
    expected = of_the_run(adapted, own, records)
    folder = export(adapted, state, tmp_path / "adapter", "local:0123456789ab", max_length=MOST)
    torch.testing.assert_close(*predicted(*loaded_as_printed(folder, adapted.base_path), expected, seconds),
                               atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("names", [("Warm", "neither", "dull"), ("a", "b", "c"), ("yes", "no")],
                         ids=["in another order", "of other names", "of another number"])
@pytest.mark.parametrize("name", ["bert", "bart", "llama"])
def test_a_head_of_the_base_models_own_is_handed_on_as_the_run_left_it(name, names, train_head, tmp_path):
    def own_head(base):
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=len(names), id2label=dict(enumerate(names)), dtype=torch.bfloat16)
        model.save_pretrained(base)

    adapted, own, records = made(name, "classification", tmp_path, own_head=own_head, train_head=train_head)
    state = random_state(adapted)
    adapted.write(state)
    expected = of_the_run(adapted, own, records)
    folder = export(adapted, state, tmp_path / "adapter", "local:0123456789ab", max_length=MOST)
    model, tokenizer = loaded_as_printed(folder, adapted.base_path)
    torch.testing.assert_close(*predicted(model, tokenizer, expected), atol=1e-5, rtol=1e-5)
    assert [model.config.id2label[row] for row in range(3)] == [*LABELS]


@pytest.mark.parametrize("name", [name for name, made in ARCHITECTURES.items() if WHOLE or name in QUICK])
def test_it_can_be_trained_under_privacy_or_is_refused_with_the_reason(name, tmp_path):
    adapted, own, _ = made(name, "classification", tmp_path)
    trainer = Trainer(adapted, own, device="cpu", precision="fp32")
    if ARCHITECTURES[name].private:
        trainer.rehearse()
    else:
        with pytest.raises(ValueError, match="how far it is padded"):
            trainer.rehearse()


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if WHOLE or name in QUICK])
def test_a_model_that_does_not_tell_a_text_from_what_fills_it_up_is_known(name, tmp_path):
    adapted, own, _ = made(name, "classification", tmp_path)
    assert padding_counts(adapted, own) is (name == "canine")


def test_the_lines_that_the_coordinators_page_prints_are_those_of_an_adapter():
    page = Path(__file__).parents[2].joinpath("docs", "coordinator.md").read_text()
    printed = next(code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "PeftModel" in code)
    base = re.search(r'base, adapter = "(.*?)"', printed)[1]
    assert printed == loading_code("classification", f'"{base}"', '"runs/…/adapter"')
