"""Tasks: records, batches and losses are compared with plain reference code on tiny real models."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedlora.plan import ModelRef, RunPlan
from fedlora.records import collate
from fedlora.tasks import read, task_for
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.classification import Classification
from tests.tiny import DECODERS, ENCODERS, KINDS, tiny_checkpoint

TEXTS = ["the patient reports chest pain", "a small cut", "the plot is dull and the jokes are old", "warm"]


def rows_of(folder: Path, task: str, *records: dict, unit: str | None = None):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read(path, task, unit=unit)


def loaded(folder: Path, kind: str, task: str):
    path = tiny_checkpoint(kind, folder)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if task == "causal-lm":
        return tokenizer, AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(0)
    return tokenizer, AutoModelForSequenceClassification.from_pretrained(path, num_labels=3,
                                                                         pad_token_id=tokenizer.pad_token_id)


def classification_rows(folder: Path):
    return rows_of(folder, "classification",
                   *({"text": text, "label": "abc"[i % 3]} for i, text in enumerate(TEXTS)))


def causal_rows(folder: Path):
    return rows_of(folder, "causal-lm", *({"prompt": "Q: " + text, "completion": text * (i + 1)}
                                          for i, text in enumerate(TEXTS)))


def test_records_hold_the_tokenizers_tokens_without_padding(tmp_path):
    tokenizer, _ = loaded(tmp_path, "bert", "classification")
    records = Classification(tokenizer, ("a", "b", "c"), 8).encode(classification_rows(tmp_path))
    for i, text in enumerate(TEXTS):
        expected = tokenizer(text, truncation=True, max_length=8)["input_ids"]
        assert records.tokens[records.offsets[i]:records.offsets[i + 1]].tolist() == expected
    assert (records.tokens.dtype, records.offsets.dtype, records.labels.dtype) == (np.int32, np.int64, np.int64)
    assert records.labels.tolist() == [0, 1, 2, 0] and records.lengths.max() == 8
    assert records.segments is None and records.answers is None and records.left_out == 0


def test_a_label_outside_the_set_names_file_line_and_the_allowed(tmp_path):
    tokenizer, _ = loaded(tmp_path, "bert", "classification")
    with pytest.raises(ValueError, match=r"rows.jsonl:2: the label is not in .* Allowed are: a, c") as error:
        Classification(tokenizer, ("a", "c"), 8).encode(classification_rows(tmp_path))
    assert TEXTS[1] not in str(error.value)


def test_rows_without_a_label_are_left_out_and_unused_labels_are_fine(tmp_path):
    tokenizer, _ = loaded(tmp_path, "bert", "classification")
    rows = rows_of(tmp_path, "classification", {"text": "x", "label": None}, {"text": "y", "label": 1}, {"text": "z"})
    records = Classification(tokenizer, ("0", "1", "2"), 8).encode(rows)
    assert (len(records), records.left_out, records.labels.tolist()) == (1, 2, [1])


def test_units_are_numbered_over_the_rows_that_are_trained_on(tmp_path):
    tokenizer, _ = loaded(tmp_path, "bert", "classification")
    rows = rows_of(tmp_path, "classification", {"text": "x", "label": None, "who": "a"},
                   {"text": "y", "label": 1, "who": "c"}, {"text": "z", "label": 0, "who": 7},
                   {"text": "z", "label": 0, "who": "c "}, {"text": "z", "who": 7.0}, unit="who")
    task = Classification(tokenizer, ("0", "1"), 8)
    records = task.encode(rows)
    assert (records.units.tolist(), records.units.dtype, records.units_count) == ([1, 0, 1], np.int64, 2)
    nobody = task.encode(rows.take([0, 4]))
    assert (len(nobody), nobody.units.tolist(), nobody.units_count) == (0, [], 0)
    alone = task.encode(dataclasses.replace(rows, units=None))
    assert alone.units is None and alone.units_count == 3

    tokenizer, _ = loaded(tmp_path / "gpt2", "gpt2", "causal-lm")
    rows = rows_of(tmp_path, "causal-lm", {"prompt": "a long prompt " * 9, "completion": "x", "who": "b"},
                   {"prompt": "x", "completion": "y", "who": "d"}, {"prompt": "x", "completion": "y", "who": "c"},
                   {"prompt": "x", "completion": "y", "who": "d"}, unit="who")
    records = CausalLM(tokenizer, 8).encode(rows)
    assert (records.left_out, records.units.tolist(), records.units_count) == (1, [1, 0, 1], 2)


def test_nothing_to_evaluate_is_an_error(tmp_path):
    tokenizer, model = loaded(tmp_path, "bert", "classification")
    task = Classification(tokenizer, ("0", "1"), 8)
    records = task.encode(rows_of(tmp_path, "classification", {"text": "x", "label": None}))
    assert len(records) == 0
    with pytest.raises(ValueError, match="nothing to evaluate"):
        task.evaluate(model, records)


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_batch_of_pairs_is_what_the_tokenizer_makes(tmp_path, kind):
    tokenizer, _ = loaded(tmp_path, kind, "classification")
    rows = rows_of(tmp_path, "classification", *({"text_a": a, "text_b": b, "label": 0}
                                                 for a, b in zip(TEXTS, reversed(TEXTS), strict=True)))
    batch = collate(Classification(tokenizer, ("0", "1"), 64).encode(rows), range(4), 64)
    expected = tokenizer(TEXTS, TEXTS[::-1], padding="max_length", max_length=64, return_tensors="pt")
    assert set(batch.inputs()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(batch.inputs()[name], tensor)


def test_a_batch_has_a_mask_also_where_it_is_full_and_keeps_the_order_asked_for(tmp_path):
    tokenizer, _ = loaded(tmp_path, "bert", "classification")
    records = Classification(tokenizer, ("a", "b", "c"), 64).encode(classification_rows(tmp_path))
    batch = collate(records, np.array([2, 2]), int(records.lengths[2]))
    assert batch.attention_mask.all() and torch.equal(batch.input_ids[0], batch.input_ids[1])
    batch = collate(records, [3, 0], 32)
    assert batch.attention_mask.sum(1).tolist() == records.lengths[[3, 0]].tolist()
    assert batch.labels.tolist() == records.labels[[3, 0]].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_records_classification_loss_is_its_own_cross_entropy(tmp_path, kind):
    tokenizer, model = loaded(tmp_path, kind, "classification")
    task = Classification(tokenizer, ("a", "b", "c"), 32)
    records = task.encode(classification_rows(tmp_path))
    with torch.no_grad():
        losses = task.per_record_loss(model, task.collate(records, np.arange(4), 40))
        for i, text in enumerate(TEXTS):
            logits = model(**tokenizer(text, return_tensors="pt")).logits
            torch.testing.assert_close(losses[i], F.cross_entropy(logits[0], torch.tensor(i % 3)))
    assert losses.shape == (4,) and losses.dtype == torch.float32


@pytest.mark.parametrize("kind", DECODERS)
def test_a_records_causal_loss_is_the_models_own_on_that_record_alone(tmp_path, kind):
    tokenizer, model = loaded(tmp_path, kind, "causal-lm")
    task = CausalLM(tokenizer, 128)
    records = task.encode(causal_rows(tmp_path))
    with torch.no_grad():
        losses = task.per_record_loss(model, task.collate(records, np.arange(4), 128))
        for i in range(4):
            alone = task.collate(records, [i], int(records.lengths[i]))
            torch.testing.assert_close(losses[i], model(input_ids=alone.input_ids, labels=alone.labels).loss)
    assert losses.shape == (4,) and losses.dtype == torch.float32


def test_loss_gradients_reach_the_model_from_answer_tokens_alone(tmp_path):
    tokenizer, model = loaded(tmp_path, "llama", "causal-lm")
    task = CausalLM(tokenizer, 128)
    records = task.encode(causal_rows(tmp_path))
    batch = task.collate(records, [0], int(records.lengths[0]))
    embedded = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
    by_embedding = dataclasses.replace(batch)
    object.__setattr__(by_embedding, "inputs", lambda: {"inputs_embeds": embedded})
    task.per_record_loss(model, by_embedding).sum().backward()
    assert embedded.grad[0, :-1].abs().sum(-1).min() > 0  # every token before the last is seen by an answer token
    assert embedded.grad[0, -1].abs().max() == 0  # nothing is predicted from the last


@pytest.mark.parametrize("kind", DECODERS)
def test_texts_are_learned_whole_and_completions_without_their_prompts(tmp_path, kind):
    tokenizer, _ = loaded(tmp_path, kind, "causal-lm")
    task = CausalLM(tokenizer, 64)
    records = task.encode(rows_of(tmp_path, "causal-lm", {"text": TEXTS[0]}))
    assert records.tokens.tolist() == [*tokenizer(TEXTS[0])["input_ids"], tokenizer.eos_token_id]
    assert records.answers.all()

    records = task.encode(rows_of(tmp_path, "causal-lm", {"prompt": TEXTS[0], "completion": TEXTS[1]}))
    prompt = tokenizer(TEXTS[0])["input_ids"]
    completion = tokenizer(TEXTS[1], add_special_tokens=False)["input_ids"]
    assert records.tokens.tolist() == [*prompt, *completion, tokenizer.eos_token_id]
    assert records.answers.tolist() == [0] * len(prompt) + [1] * (len(completion) + 1)
    batch = task.collate(records, [0], 64)
    assert batch.labels[0, len(prompt):len(records.tokens)].tolist() == [*completion, tokenizer.eos_token_id]
    assert (batch.labels == -100).sum() == 64 - len(completion) - 1


def test_conversations_are_learned_in_the_assistants_turns_as_the_template_marks_them(tmp_path):
    tokenizer, _ = loaded(tmp_path, "llama", "causal-lm")
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is it?"},
             {"role": "assistant", "content": "a cut"}, {"role": "user", "content": "and now?"},
             {"role": "assistant", "content": "stitches"}]
    records = CausalLM(tokenizer, 256).encode(rows_of(tmp_path, "causal-lm", {"messages": turns}))
    reference = tokenizer.apply_chat_template(turns, return_assistant_tokens_mask=True, return_dict=True)
    assert records.tokens.tolist() == reference["input_ids"]
    assert records.answers.tolist() == reference["assistant_masks"]


def learned(tokenizer, folder, *turns):
    """Return the decoded text of a conversation that is learned, and the rest of the text."""
    messages = [{"role": role, "content": content} for role, content in turns]
    records = CausalLM(tokenizer, 256).encode(rows_of(folder, "causal-lm", {"messages": messages}))
    return [tokenizer.decode(records.tokens[records.answers == which]) for which in (1, 0)]


TURNS = (("user", "one"), ("assistant", "<think>why</think> two"), ("user", "three"),
         ("assistant", "<think>how</think> four"))
PROMPT = "{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.mark.parametrize(("template", "answers", "rest"), [
    # words that the template adds to the last turn are not the assistant's
    ("{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and loop.last %}(thinking){% endif %}"
     "{{ m.content }};{% endfor %}" + PROMPT, "<think>why</think> two;<think>how</think> four;</s>",
     "[user]one;[assistant][user]three;[assistant](thinking)"),
    # the template removes the reasoning of earlier turns
    ("{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last else m.content.split('</think>')[-1] }};"
     "{% endfor %}" + PROMPT, " two;<think>how</think> four;</s>", "[user]one;[assistant][user]three;[assistant]"),
    # the template ends only the last turn
    ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if loop.last and not add_generation_prompt %}<end>"
     "{% endif %}{% endfor %}" + PROMPT, "<think>why</think> two<think>how</think> four<end></s>",
     "[user]one[assistant][user]three[assistant]"),
    # the template adds no prompt for an answer
    ("{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}",
     " <think>why</think> two; <think>how</think> four;</s>", "user: one;assistant:user: three;assistant:"),
], ids=["adds", "takes out", "ends the last", "no generation prompt"])
def test_the_assistants_own_words_are_learned_in_every_turn_whatever_a_template_does(template, answers, rest, tmp_path):
    tokenizer, _ = loaded(tmp_path, "llama", "causal-lm")
    tokenizer.chat_template = template
    assert learned(tokenizer, tmp_path, *TURNS) == [answers, rest]


def test_a_templates_own_system_text_is_not_learned_where_the_assistant_begins(tmp_path):
    tokenizer, _ = loaded(tmp_path, "llama", "causal-lm")
    tokenizer.chat_template = "You are kind. {% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}" + PROMPT
    assert learned(tokenizer, tmp_path, ("assistant", "hello"), ("user", "a"), ("assistant", "b")) == [
        "hello;b;</s>", "You are kind. [assistant][user]a;[assistant]"]


def test_a_template_that_writes_other_words_than_were_said_is_refused_without_quoting_them(tmp_path):
    tokenizer, _ = loaded(tmp_path, "llama", "causal-lm")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content | upper }};{% endfor %}" + PROMPT
    with pytest.raises(ValueError, match=r"rows.jsonl:1: .* changes the words of turn 2") as refused:
        learned(tokenizer, tmp_path, ("user", "a"), ("assistant", "secret"))
    assert "secret" not in str(refused.value).lower()


def test_conversations_need_a_chat_template_even_where_no_row_may_be_an_error(tmp_path):
    tokenizer, _ = loaded(tmp_path, "llama", "causal-lm")
    rows = rows_of(tmp_path, "causal-lm", {"messages": [{"role": "assistant", "content": "hello"}]})
    tokenizer.chat_template = None
    for unusable in (None, Counter()):
        with pytest.raises(ValueError, match=r"no chat template.* prompt and completion"):
            CausalLM(tokenizer, 64).encode(rows, unusable)


def test_a_template_that_ends_every_conversation_in_the_end_token_is_learned_in_all_of_the_assistants_turns(tmp_path):
    tokenizer, _ = loaded(tmp_path, "llama", "causal-lm")
    tokenizer.chat_template = ("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }};{% endfor %}"
                               "{% if add_generation_prompt %}[assistant]{% else %}{{ eos_token }}{% endif %}")
    turns = [{"role": role, "content": role[0] * 3} for role in ("user", "assistant", "user", "assistant")]
    records = CausalLM(tokenizer, 256).encode(rows_of(tmp_path, "causal-lm", {"messages": turns}))
    assert tokenizer.decode(records.tokens[records.answers == 1]) == "aaa;aaa;</s>"


def test_a_template_that_fails_does_not_quote_the_conversation(tmp_path):
    tokenizer, _ = loaded(tmp_path, "llama", "causal-lm")
    rows = rows_of(tmp_path, "causal-lm", {"messages": [{"role": "assistant", "content": "secret"}]})
    tokenizer.chat_template = "{{ raise_exception(messages[0]['content']) }}"
    with pytest.raises(ValueError, match="order of roles") as error:
        CausalLM(tokenizer, 64).encode(rows)
    assert "secret" not in str(error.value) and "rows.jsonl:1" in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_no_record_is_longer_than_the_maximum_length_however_short_that_is(tmp_path, kind):
    tokenizer, _ = loaded(tmp_path, kind, "classification")
    rows = rows_of(tmp_path, "classification", *({"text_a": text, "text_b": text * 3, "label": "a"} for text in TEXTS))
    for length in (1, 2, 3):
        records = Classification(tokenizer, ("a", "b"), length).encode(rows)
        assert len(records) == len(TEXTS) and records.lengths.max() <= length
        assert records.segments is None or len(records.segments) == len(records.tokens)


def same(these, those):
    """Return whether two sets of records would train a model in the same way."""
    return all(np.array_equal(getattr(these, name), getattr(those, name))
               for name in ("tokens", "offsets", "labels", "segments", "answers", "units"))


def test_where_no_row_may_be_an_error_those_that_fail_are_counted_and_the_others_are_as_if_alone(tmp_path):
    tokenizer, _ = loaded(tmp_path, "llama", "causal-lm")
    tokenizer.chat_template = "{% if 'odd' in messages[0]['content'] %}{{ raise_exception('x') }}{% endif %}" + (
        tokenizer.chat_template)
    rows = rows_of(tmp_path, "causal-lm", *(
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "rest"}]}
        for content in ("calm", "odd", "a long day " * 20, "now")))
    task, unusable = CausalLM(tokenizer, 40), Counter()
    assert same(task.encode(rows, unusable), task.encode(rows.take([0, 3])))
    assert unusable == {"the tokenizer or its chat template fails": 1, "no answer within the run's maximum length": 1}
    nobody = task.encode(rows.take([1, 2]), unusable)
    assert (len(nobody), nobody.left_out, nobody.units_count, len(nobody.tokens)) == (0, 2, 0, 0)


def test_a_label_outside_of_the_set_is_counted_where_no_row_may_be_an_error(tmp_path):
    tokenizer, _ = loaded(tmp_path, "bert", "classification")
    rows = rows_of(tmp_path, "classification", *(
        {"text": text, "label": label, "patient": patient}
        for text, label, patient in (("x", "a", 1), ("y", "other", 2), ("z", None, 2), ("calm", "c", 1))),
        unit="patient")
    task, unusable = Classification(tokenizer, ("a", "c"), 8), Counter()
    assert same(task.encode(rows, unusable), task.encode(rows.take([0, 3])))
    assert +unusable == {"no label": 1, "a label outside of the run's set": 1}
    assert task.encode(rows.take([1, 2]), unusable).units_count == 0


def test_a_prompt_that_fills_the_maximum_length_leaves_the_row_out(tmp_path):
    tokenizer, _ = loaded(tmp_path, "gpt2", "causal-lm")
    rows = rows_of(tmp_path, "causal-lm", {"prompt": "x" * 50, "completion": "y"}, {"prompt": "x", "completion": "y"})
    records = CausalLM(tokenizer, 16).encode(rows)
    assert (len(records), records.left_out) == (1, 1)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("micro_batch", [None, 1, 3])
def test_classification_is_evaluated_as_one_record_after_the_other(tmp_path, kind, micro_batch):
    tokenizer, model = loaded(tmp_path, kind, "classification")
    task = Classification(tokenizer, ("a", "b", "c"), 32)
    result = task.evaluate(model, task.encode(classification_rows(tmp_path)), micro_batch=micro_batch)
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])
    labels = torch.tensor([0, 1, 2, 0])
    assert result["accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result["count"] == 4 and isinstance(result["count"], int)


class Watched(torch.nn.Module):
    """A model that records the shape of every batch that goes through it."""

    def __init__(self, model):
        super().__init__()
        self.model, self.shapes = model, []

    def forward(self, input_ids, **inputs):
        self.shapes.append(tuple(input_ids.shape))
        return self.model(input_ids=input_ids, **inputs)


@pytest.mark.parametrize("task_name", ["classification", "causal-lm"])
def test_batches_of_an_evaluation_are_bounded_in_tokens_and_outputs(tmp_path, task_name):
    tokenizer, model = loaded(tmp_path, "gpt2", task_name)
    texts = ["word " * (1 + 4 * i) for i in range(40)]
    rows = rows_of(tmp_path, task_name, *({"text": text, "label": "a"} for text in texts))
    task = (Classification(tokenizer, ("a", "b", "c"), 256) if task_name == "classification"
            else CausalLM(tokenizer, 256))
    watched = Watched(model)
    assert task.evaluate(watched, task.encode(rows))["count"] == 40
    assert len(watched.shapes) > 1 and max(rows * length for rows, length in watched.shapes) <= 8192
    assert sum(rows for rows, _ in watched.shapes) == 40
    if task_name == "causal-lm":
        tokenizer.add_tokens([f"<{i}>" for i in range(2**17)])  # a vocabulary as large as any
        watched.shapes.clear()
        task.evaluate(watched, task.encode(rows))
        assert max(rows * length for rows, length in watched.shapes) * len(tokenizer) <= 2**26


def test_an_evaluation_that_runs_out_of_memory_names_what_helps(tmp_path):
    class Full(torch.nn.Module):
        def forward(self, **inputs):
            raise torch.OutOfMemoryError("CUDA out of memory")

    tokenizer, _ = loaded(tmp_path, "bert", "classification")
    task = Classification(tokenizer, ("a", "b", "c"), 32)
    with pytest.raises(MemoryError, match="evaluation ran out of memory: lower --max-length"):
        task.evaluate(Full(), task.encode(classification_rows(tmp_path)))


def test_perplexity_is_over_all_answer_tokens(tmp_path):
    tokenizer, model = loaded(tmp_path, "gpt2", "causal-lm")
    task = CausalLM(tokenizer, 64)
    records = task.encode(causal_rows(tmp_path))
    model.train()
    result = task.evaluate(model, records, autocast_dtype=None)
    assert model.training
    model.eval()
    total = tokens = 0.0
    for i in range(4):
        batch = task.collate(records, [i], int(records.lengths[i]))
        count = int((batch.labels[:, 1:] != -100).sum())
        total += task.per_record_loss(model, batch).item() * count
        tokens += count
    assert result["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert result["perplexity"] == pytest.approx(np.exp(total / tokens), rel=1e-5)
    bf16 = task.evaluate(model, records, autocast_dtype=torch.bfloat16)
    assert bf16["loss"] == pytest.approx(result["loss"], rel=0.05)


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_the_plan_names_the_task(tmp_path, task):
    tokenizer, _ = loaded(tmp_path, "qwen2", "causal-lm")
    labels = ("no", "yes") if task == "classification" else ()
    run = RunPlan(
        run_id="0" * 16, fedlora_version="0", strategy="fedsvd", family="frozen-a", private=True,
        model=ModelRef("local", "0" * 64, "0" * 64, "0" * 64), task=task, labels=labels, max_length=7, rank=1, alpha=1,
        targets=("q_proj",), train_head=False, dropout=0.0, rounds=1, max_participations=1, local_steps=1,
        expected_batch=1, optimizer="sgd", lr=1.0, clip_norm=1.0, adapter_scale=1.0, head_scale=1.0,
        weight_by_examples=False)
    made = task_for(run, tokenizer)
    assert (made.name, made.max_length) == (task, 7)
    assert getattr(made, "labels", ()) == labels


def test_a_tokenizer_without_the_tokens_needed_is_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint("llama", tmp_path))
    with pytest.raises(ValueError, match="no pad token"):
        Classification(tokenizer, ("a", "b"), 8)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint("bert", tmp_path))
    with pytest.raises(ValueError, match="no end-of-text token"):
        CausalLM(tokenizer, 8)
