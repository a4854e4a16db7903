"""A run's folder is handed on: exported, merged, and used for predictions and texts, as plain transformers uses it."""

import csv
import fcntl
import io
import json
import os
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from fedlora.adapters import Provenance, Statement
from fedlora.adapters.provenance import sections
from fedlora.config import ServerConfig, read_config
from fedlora.plan import AGGREGATE, plan_digest
from fedlora.privacy.report import announced, privacy_report, public_key, sign, write_report
from fedlora.tasks.classification import Classification
from fedlora_server import checkpoint as checkpoints
from fedlora_server.cli import main
from fedlora_server.handover.folder import check_replaceable, whole_folder
from fedlora_server.handover.stored_run import stored_run
from tests.fedlora.test_handing_on import loaded_as_printed
from tests.fedlora.test_privacy_report import KEY, MECHANISM, ReportedRun, training
from tests.processes import write_rows
from tests.stored_runs import stored

LABELS = "--labels=routine,urgent"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, checkpoint):
    return stored(tmp_path_factory.mktemp("classifier") / "run", checkpoint("bert"), LABELS)


@pytest.fixture(scope="module")
def writer(tmp_path_factory, checkpoint):
    return stored(tmp_path_factory.mktemp("writer") / "run", checkpoint("qwen2"), "--task=causal-lm", "--privacy=off")


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", 3, rows=30)


def run(*arguments):
    return main(list(map(str, arguments)))


def refused(capfd, *arguments):
    """Give a command that must be refused, and return the reason, which is one message without a traceback."""
    assert run(*arguments) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"fedlora-server {arguments[0]}: ") and "Traceback" not in said
    return said


def texts_of(file):
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


def table(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


# --- Export ---

def test_plain_transformers_gives_the_labels_and_probabilities_that_predict_gives(classifier, rows, tmp_path):
    merged, out = tmp_path / "merged", tmp_path / "predictions.csv"
    assert run("export", classifier.folder, "--merged", merged) == 0
    assert run("predict", classifier.folder, rows, "--out", out) == 0
    plain = pipeline("text-classification", model=str(merged), device="cpu")(texts_of(rows), truncation=True)
    assert [one["label"] for one in plain] == [row["predicted_label"] for row in table(out)]
    assert [one["score"] for one in plain] == pytest.approx([float(row["probability"]) for row in table(out)], abs=1e-5)
    assert len({one["label"] for one in plain}) == 2
    assert not (classifier.folder / "adapter").exists(), "--merged alone writes nothing else"


def test_the_adapter_of_a_killed_run_loads_by_its_own_lines_and_equals_the_merged_model(classifier, rows, tmp_path):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert run("export", classifier.folder, "--out", adapter, "--merged", merged) == 0
    logits = []
    for folder in (adapter, merged):
        model, tokenizer = loaded_as_printed(folder, classifier.base)
        inputs = tokenizer(texts_of(rows), padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            logits.append(model(**inputs).logits)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    assert logits[0].std() > 0.1
    for folder in (adapter, merged):
        texts = [file.read_text(errors="replace") for file in folder.rglob("*") if file.is_file()]
        assert not any(str(classifier.base) in text or str(tmp_path) in text for text in texts)
        about = json.loads((folder / "fedlora.json").read_text())
        assert about["run"] == classifier.plan.run_id and about["round"] == 2


def test_without_a_place_the_adapter_is_written_into_the_run_also_over_that_of_an_earlier_version(
        classifier, tmp_path, capsys):
    folder = shutil.copytree(classifier.folder, tmp_path / "run")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "README.md").write_text("of an earlier version")
    assert run("export", folder) == 0
    assert f"after round 2 of {classifier.plan.rounds} is in {folder / 'adapter'}" in capsys.readouterr().out
    assert (folder / "adapter" / "adapter_config.json").exists()
    assert "earlier" not in (folder / "adapter" / "README.md").read_text()


def test_fewer_bits_are_for_a_merged_model_alone_and_it_is_said_what_they_cost(classifier, tmp_path, capfd):
    said = refused(capfd, "export", classifier.folder, "--out", tmp_path / "a", "--dtype", "bfloat16")
    assert "--dtype bfloat16 is for --merged DIR" in said and not list(tmp_path.iterdir())
    assert run("export", classifier.folder, "--merged", tmp_path / "m", "--dtype", "bfloat16") == 0
    assert "weights are bfloat16: what it predicts differs" in capfd.readouterr().out
    assert {tensor.dtype for tensor in load_file(tmp_path / "m" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_base_model_elsewhere_is_named_and_another_one_is_not_taken(classifier, writer, tmp_path, capfd):
    copied = shutil.copytree(classifier.folder, tmp_path / "run")
    about = json.loads((copied / "run.json").read_text())
    about["options"]["model"] = str(tmp_path / "gone")
    (copied / "run.json").write_text(json.dumps(about))
    said = refused(capfd, "export", copied)
    assert "gone" in said and f"The run used {classifier.plan.model.title}; name a copy of it with --model PATH" in said
    assert "is not the base model of this run" in refused(capfd, "export", copied, "--model", writer.base)
    assert run("export", copied, "--model", classifier.base) == 0


@pytest.mark.parametrize(("change", "reason"), [
    (lambda run: shutil.rmtree(run), "is not a folder; name the --out folder of a run"),
    (lambda run: (run / "run.json").unlink(), "as where a simulation by an earlier version was stopped"),
    (lambda run: (run / "checkpoint.safetensors").unlink(), "no round of that run was finished"),
    (lambda run: (run / "checkpoint.safetensors").write_bytes(b"torn"), "is damaged, SafetensorError"),
    (lambda run: (run / "run.json").write_text("{"), "run.json cannot be read"),
    (lambda run: (run / "run.json").write_text("[]"), "it holds no object"),
    (lambda run: (run / "run.json").write_text('{"plan": {}, "options": {}}'), "not written by this FedLoRA version"),
    (lambda run: (run / "metrics.jsonl").write_text('{"round": 1}\n'), "is damaged, KeyError"),
    (lambda run: [path.unlink() for path in run.iterdir()], "has neither run.json nor report.json")])
def test_a_folder_without_a_usable_run_is_refused_with_the_reason(change, reason, classifier, tmp_path, capfd):
    folder = shutil.copytree(classifier.folder, tmp_path / "run")
    change(folder)
    for command in (["export", folder], ["predict", folder, "rows.jsonl"], ["generate", folder]):
        assert reason in refused(capfd, *command)


def test_a_run_without_a_finished_round_has_no_adapter(tmp_path, checkpoint, capfd):
    made = stored(tmp_path / "run", checkpoint("bert"), LABELS, rounds=())
    assert "was finished yet, so there is no adapter" in refused(capfd, "export", made.folder)


def test_of_a_folder_with_several_runs_one_must_be_named(classifier, tmp_path, capfd):
    for name in ("fedsvd-seed0", "fed-sb-seed0"):
        shutil.copytree(classifier.folder, tmp_path / name)
    assert "several runs; name one of them: fed-sb-seed0, fedsvd-seed0" in refused(capfd, "export", tmp_path)
    assert run("export", tmp_path / "fedsvd-seed0") == 0


def test_an_unfinished_round_in_the_metrics_is_left_out_and_no_file_of_the_run_changes(classifier, tmp_path):
    folder = shutil.copytree(classifier.folder, tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(lines + lines.splitlines()[-1].replace('"round": 2', '"round": 3') + '\n{"ro')
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert [record.round for record in stored_run(folder).records] == [1, 2]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# --- Folders ---

def test_a_folder_that_is_not_an_export_of_this_run_is_never_replaced(classifier, writer, tmp_path, capfd):
    foreign, other = tmp_path / "foreign", tmp_path / "other"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    assert run("export", writer.folder, "--out", other) == 0
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to(other)
    for place, reason in ((foreign, "did not write what is there"), (other, "exported from run"),
                          (tmp_path / "file", "is not a folder"), (tmp_path / "link", "is not a folder")):
        for option in ("--out", "--merged"):
            assert reason in refused(capfd, "export", classifier.folder, option, place)
    assert (foreign / "thesis.tex").read_text() == "years of work"
    assert "the same folder" in refused(capfd, "export", classifier.folder, "--out", "x", "--merged", "x")


def test_an_export_replaces_its_own_folder_as_a_whole(classifier, tmp_path):
    out = tmp_path / "adapter"
    assert run("export", classifier.folder, "--out", out) == 0
    (out / "left-over.txt").write_text("of the earlier export")
    assert run("export", classifier.folder, "--out", out) == 0
    assert (out / "adapter_config.json").exists() and not (out / "left-over.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_kill_or_a_fault_leaves_the_old_folder_and_the_next_export_takes_the_remains_away(classifier, tmp_path):
    plan, out = classifier.plan, tmp_path / "adapter"
    with whole_folder(out, plan, 1) as folder:
        (folder / "old").write_text("old")
    with pytest.raises(OSError, match="full"), whole_folder(out, plan, 2) as folder:
        (folder / "new").write_text("new")
        raise OSError("full")
    assert sorted(path.name for path in out.iterdir()) == ["fedlora.json", "old"] and len(list(tmp_path.iterdir())) == 1
    killed = tmp_path / ".adapter.unfinished"  # as a kill leaves it
    (killed / "base").mkdir(parents=True)
    (killed / "half").write_text("ha")
    with whole_folder(out, plan, 2) as folder:
        assert not list(folder.iterdir())
        (folder / "new").write_text("new")
    assert sorted(path.name for path in out.iterdir()) == ["fedlora.json", "new"] and len(list(tmp_path.iterdir())) == 1
    check_replaceable(out, plan.run_id)


def test_two_commands_do_not_write_the_same_folder_at_once(classifier, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("fedlora_server.handover.folder.WAIT_S", 0.2)
    held = tmp_path / ".adapter.unfinished"
    held.mkdir()
    lock = os.open(held, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = refused(capfd, "export", classifier.folder, "--out", tmp_path / "adapter")
        assert "another command writes" in said and held.exists()
    finally:
        os.close(lock)


# --- The model card ---

def card_of(folder):
    """Return (metadata, text) of a folder's model card, as the hub's own library reads it."""
    card = ModelCard.load(folder / "README.md")
    return card.data.to_dict(), card.content


def test_the_card_says_where_the_adapter_comes_from_and_names_nobody(classifier, tmp_path):
    out = tmp_path / "adapter"
    assert run("export", classifier.folder, "--out", out, "--data-description", "Notes of two wards.") == 0
    metadata, text = card_of(out)
    assert metadata["library_name"] == "peft" and metadata["pipeline_tag"] == "text-classification"
    assert "fedlora" in metadata["tags"] and "model-index" not in metadata and "license" not in metadata
    for told in ("Notes of two wards.", classifier.plan.model.weights_sha256, "fedsvd", "2 clients", "2 of 20 planned",
                 "| accuracy | 0.75 | 0.6 to 0.86 |", "| recall of urgent | 0.7 | 0.55 to 0.81 |",
                 "most frequent label) | 0.5 |", "| 1.25 to 1.5 |", "1e-05", "80 (20 trainings of 4)",
                 "**No ε is stated here.**", '"routine", "urgent", in this order'):
        assert told in text, told
    assert not re.search(r"\b(north|south)\b", text)
    assert run("export", classifier.folder, "--out", out, "--name-clients") == 0
    text = card_of(out)[1]
    assert "They are north, south." in text and "## Data\n\nNot described." in text


def test_the_card_of_a_run_without_privacy_says_so_and_a_merged_model_needs_no_peft(writer, tmp_path, capsys):
    out = tmp_path / "merged"
    assert run("export", writer.folder, "--merged", out) == 0
    metadata, text = card_of(out)
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "text-generation"
    assert "**No differential privacy.**" in text and "Not evaluated" in text and "PeftModel" not in text
    assert "σ" not in text and "--data-description TEXT does" in capsys.readouterr().out


def test_a_simulation_is_exported_from_its_report_and_its_card_states_no_epsilon(classifier, tmp_path):
    folder = shutil.copytree(classifier.folder, tmp_path / "fedsvd-seed0")
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").unlink()
    report = {"plan": about["plan"], "strategy": about["step"], "options": about["options"] | {"partition": "iid"}}
    (folder / "report.json").write_text(json.dumps(report))
    assert run("export", folder) == 0
    text = card_of(folder / "adapter")[1]
    assert "A simulation on one machine" in text and "Federated" not in text
    assert "**No ε.** In a simulation sampling and noise follow from a seed" in text


def test_what_people_wrote_does_not_become_markup(tmp_path, checkpoint):
    made = stored(tmp_path / "run", checkpoint("bert"), "--labels=<b>a</b>,[x](http://y)|z")
    assert run("export", made.folder) == 0
    text = card_of(made.folder / "adapter")[1]
    assert r"\<b\>a\</b\>" in text and r"\[x\](http://y)\|z" in text


def test_a_description_outlives_a_resumption(tmp_path, checkpoint):
    told = "- Notes of two wards,\n- 2019 to 2023: \"urgent\" = 1"
    made = stored(tmp_path / "run", checkpoint("bert"), LABELS, f"--data-description={told}")
    options = read_config(ServerConfig, [f"--resume={made.folder}"], begun_with=checkpoints.options_of)
    assert options.data_description == told


def test_the_data_are_described_when_the_run_is_started_or_in_a_file(tmp_path, checkpoint, capfd):
    told = tmp_path / "data.md"
    told.write_text("\ufeffEmergency notes.\n\n- 2019 to 2023\n", encoding="utf-8")
    made = stored(tmp_path / "run", checkpoint("bert"), LABELS, f"--data-description=@{told}")
    told.unlink()
    assert run("export", made.folder) == 0
    assert "## Data\n\nEmergency notes.\n\n- 2019 to 2023\n\n## Figures" in card_of(made.folder / "adapter")[1]
    with pytest.raises(SystemExit) as ended:
        run("export", made.folder, "--data-description", f"@{told}")
    assert ended.value.code == 2 and "data.md cannot be read: No such file" in capfd.readouterr().err


# --- Statements ---

def statement(made, folder, client="north", key=KEY, **changes):
    """Write a client's signed privacy report about a run, and return its file."""
    plan = made.plan
    about = {"dataset": "ward-7", "run_id": plan.run_id, "client": client, "server": "127.0.0.1:9092",
             "plan_sha256": plan_digest(plan), "strategy": plan.strategy, "base_model": {"name": "local"},
             "unit": "column:patient", "declared_size": 5000, "delta": 1e-5, "mechanism": MECHANISM,
             "trainings": (training(1), training(2)), "lifetime": None,
             "disclosed": announced(client=client, private=True)}
    return write_report(folder, sign(privacy_report(ReportedRun(**about | changes)), key))


def test_an_epsilon_is_stated_only_as_a_client_signed_it(classifier, tmp_path, capsys):
    signed, out = statement(classifier, tmp_path / "north"), tmp_path / "adapter"
    epsilon = json.loads(signed.read_text())["privacy"]["guarantee"]["epsilon"]
    arguments = ["export", classifier.folder, "--out", out, "--statements", signed]
    assert run(*arguments) == 0
    assert "Keys that nobody confirmed: 1 of 1" in capsys.readouterr().out
    text = card_of(out)[1]
    assert "1 of 2 clients handed over a signed privacy report" in text and "Nothing is stated for the other 1" in text
    assert "all rows that share one value of patient" in text
    assert f"`{public_key(KEY)[:16]}…` (key not confirmed)" in text
    [stated] = re.findall(r"\*\*([\d.]+)\*\*", text)
    assert float(stated) == pytest.approx(epsilon, rel=1e-3) and float(stated) >= epsilon
    assert "north" not in text and "No ε" not in text
    assert run(*arguments, "--public-key", f"north={public_key(KEY).upper()}", "--name-clients") == 0
    text = card_of(out)[1]
    assert "not confirmed" not in text and "| north | **" in text and "confirmed" not in capsys.readouterr().out


def test_a_card_states_both_epsilons_of_a_run_with_secure_sums(classifier):
    plan = replace(classifier.plan, mechanism=AGGREGATE, least_members=6, colluding=1, local_steps=1,
                   optimizer="sgd")
    one = Statement(7.9, 1e-5, "one row", 0.6, 0.02, 160, "", "ab" * 32, True, epsilon_in_sums=1.25)
    text = sections(Provenance(plan, 160, 6, statements=(one, replace(one, epsilon_in_sums=None))))
    assert "| client | ε | ε in the sums | δ |" in text
    assert "| 1 | **7.900** | **1.250** |" in text and "| 2 | **7.900** | not stated |" in text
    assert "the noise of at least 4 honest members" in text  # 5 of 6 open a sum, and one of them may collude
    assert "in the sums" not in sections(Provenance(classifier.plan, 160, 6, statements=(one,)))


@pytest.mark.parametrize(("changes", "more", "reason"), [
    ({"run_id": "fedcba9876543210"}, (), "is about run fedcba9876543210, and this is run"),
    ({"plan_sha256": "cd" * 32}, (), "they are not the same run"),
    ({"client": "east"}, (), "no update of that client is in this adapter. The clients are north, south"),
    ({}, ("--public-key", f"north={'ab' * 32}"), "Ask the institution which is right"),
    ({}, ("--public-key", f"south={'ab' * 32}"), "gives a key of south, and there is no statement of that client"),
    ({}, ("--public-key", f"north={'ab' * 32}", "--public-key", f"north={'cd' * 32}"), "two keys of one client")])
def test_a_statement_of_something_else_is_refused_and_nothing_is_written(changes, more, reason, classifier, tmp_path,
                                                                         capfd):
    signed = statement(classifier, tmp_path / "signed", **changes)
    said = refused(capfd, "export", classifier.folder, "--out", tmp_path / "a", "--statements", signed, *more)
    assert reason in said and not (tmp_path / "a").exists()


def test_a_statement_that_was_changed_or_given_twice_is_refused(classifier, tmp_path, capfd):
    signed = statement(classifier, tmp_path / "signed")
    again = shutil.copytree(tmp_path / "signed", tmp_path / "again") / signed.name
    command = ["export", classifier.folder, "--out", tmp_path / "a", "--statements", signed]
    assert "two statements of north" in refused(capfd, *command, again)
    for file in (tmp_path / "signed").iterdir():
        file.write_text(file.read_text().replace("ward-7", "ward-8"))
    assert "is not verified: " in refused(capfd, *command)
    assert "nowhere: No such file" in refused(capfd, "export", classifier.folder, "--statements", tmp_path / "nowhere")
    assert not (tmp_path / "a").exists()


def test_a_statement_without_a_guarantee_is_cited_without_an_epsilon(classifier, tmp_path):
    signed = statement(classifier, tmp_path / "signed", predictable="a simulation")
    assert run("export", classifier.folder, "--out", tmp_path / "a", "--statements", signed) == 0
    text = card_of(tmp_path / "a")[1]
    assert "| 1 | no guarantee |" in text and "Client 1: PREDICTABLE" in text and "**No ε" not in text


# --- Predictions ---

def test_rows_need_no_label_and_columns_of_theirs_are_kept(classifier, tmp_path, capfd):
    file, out = tmp_path / "notes.csv", tmp_path / "out.jsonl"
    file.write_text("Id;note;seen\n007;acute pain now;1\n008;calm rest;\n", encoding="utf-8")
    assert run("predict", classifier.folder, file, "--column", "text=note", "--keep", "id,seen", "--out", out,
               "--probabilities") == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(one["line"], one["id"], one["seen"]) for one in found] == [(2, "007", "1"), (3, "008", None)]
    for one in found:
        each = [one["probability_routine"], one["probability_urgent"]]
        assert sum(each) == pytest.approx(1, abs=1e-5) and one["probability"] == max(each)
        assert one["predicted_label"] == ("routine", "urgent")[each.index(max(each))]
    said = capfd.readouterr().err
    assert "No row of" in said and "2 rows are labelled in" in said and "pain" not in out.read_text()


def test_the_figures_are_those_of_the_rows_with_a_label_of_the_run(classifier, tmp_path, capfd, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [{"text": "acute pain", "label": "urgent"}, {"text": "calm", "label": None},
             {"text": "rest", "label": "ROUTINE"}, {"text": "mild cough", "label": "vet"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run("predict", classifier.folder, "rows.jsonl") == 0
    said = capfd.readouterr().err
    assert "2 rows with a label of the run" in said and "balanced accuracy" in said and "majority rate" in said
    [capitals, other] = [record.getMessage() for record in caplog.records]
    assert capitals.startswith("rows.jsonl:3: 1 labels are read as the name in the label set that differs only in")
    assert other.startswith("1 row has a label that is not one of the run's, and no part in the figures: rows.jsonl:4.")
    found = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [one["line"] for one in found] == [1, 2, 3, 4] and all(one["predicted_label"] for one in found)
    assert "predictions.jsonl exists" in refused(capfd, "predict", classifier.folder, "rows.jsonl")


def test_the_run_s_own_columns_are_meant_unless_others_are_given(tmp_path, checkpoint, capfd):
    made = stored(tmp_path / "run", checkpoint("bert"), LABELS, "--column=text=note,label=triage")
    with_label, without = tmp_path / "a.csv", tmp_path / "b.csv"
    with_label.write_text("note,triage\nacute pain,urgent\ncalm rest,routine\n")
    without.write_text("note\nacute pain\n")
    assert run("predict", made.folder, with_label, "--out", tmp_path / "a.out.csv") == 0
    assert "balanced accuracy" in capfd.readouterr().err
    assert run("predict", made.folder, without, "--out", tmp_path / "b.out.csv") == 0
    assert "no figures are shown" in capfd.readouterr().err
    said = refused(capfd, "predict", made.folder, without, "--out", "c.csv", "--column", "text=note,label=triage")
    assert "--column label=triage" in said and "no such column" in said


def test_a_folder_of_files_is_predicted_with_each_row_s_file_and_incomplete_rows_can_be_left_out(
        classifier, tmp_path, capfd):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.csv").write_text("text,label\nacute pain,\n,urgent\n")
    (data / "b.jsonl").write_text('{"text": "calm"}\n')
    said = refused(capfd, "predict", classifier.folder, data, "--out", tmp_path / "out.csv")
    assert "a.csv:3: text is missing or empty" in said
    assert run("predict", classifier.folder, data, "--out", tmp_path / "out.csv", "--skip-incomplete") == 0
    assert [(os.path.basename(row["file"]), row["line"]) for row in table(tmp_path / "out.csv")] == [
        ("a.csv", "2"), ("b.jsonl", "1")]


def test_a_row_that_the_model_cannot_read_gets_no_label_and_the_others_keep_theirs(classifier, rows, tmp_path, caplog,
                                                                                  monkeypatch):
    encode = Classification.encode

    def without_pain(self, some, unusable=None):
        kept = [row for row, text in enumerate(some.texts) if "pain" not in text]
        return replace(encode(self, some.take(kept), unusable), left_out=len(some) - len(kept))

    assert run("predict", classifier.folder, rows, "--out", tmp_path / "all.csv") == 0
    monkeypatch.setattr(Classification, "encode", without_pain)
    assert run("predict", classifier.folder, rows, "--out", tmp_path / "some.csv", "--probabilities") == 0
    lost = ["pain" in text for text in texts_of(rows)]
    assert 0 < sum(lost) < len(lost) and f"{sum(lost)} rows have no token" in caplog.text
    for row, of_all, without in zip(table(tmp_path / "some.csv"), table(tmp_path / "all.csv"), lost, strict=True):
        assert row["line"] == of_all["line"]
        assert row["predicted_label"] == ("" if without else of_all["predicted_label"])
        assert (row["probability_urgent"] == "") is without


def test_predictions_go_to_stdout_too_and_the_messages_beside_them(classifier, rows, capfd):
    assert run("predict", classifier.folder, rows, "--out", "-", "--batch-size", "4") == 0
    written = capfd.readouterr()
    assert len([json.loads(line) for line in written.out.splitlines()]) == 30 and "accuracy" in written.err


@pytest.mark.parametrize(("arguments", "reason"), [
    (["--out", "p.txt"], "does not end in .csv, .tsv, .jsonl"),
    (["--out", "nowhere/p.csv"], "there is no folder nowhere"),
    (["--out", "p.csv", "--keep", "ward"], "has no column ward to keep"),
    (["--out", "p.csv", "--keep", "label,LABEL,line"], "--keep line: a column of this name is written anyway"),
    (["--out", "p.csv", "--column", "text=note"], "needs the columns note")])
def test_a_wrong_wish_is_refused_and_nothing_is_written(arguments, reason, classifier, rows, tmp_path, monkeypatch,
                                                        capfd):
    monkeypatch.chdir(tmp_path)
    assert reason in refused(capfd, "predict", classifier.folder, rows, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_each_task_has_its_command(classifier, writer, rows, capfd):
    assert f"fedlora-server generate {writer.folder} writes texts" in refused(capfd, "predict", writer.folder, rows)
    assert f"fedlora-server predict {classifier.folder} FILE labels rows" in refused(
        capfd, "generate", classifier.folder, "--prompt", "a")


# --- Texts ---

PROMPTS = ("the patient reports", "What is the capital of France?", "a film")


def by_transformers(folder, prompts, new, chat):
    """Continue each prompt by itself with plain transformers on a merged model."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = []
    for prompt in prompts:
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                             add_generation_prompt=True) if chat else prompt
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)
        found = model.generate(**inputs, do_sample=False, max_new_tokens=new)
        texts.append(tokenizer.decode(found[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("chat", [True, False])
def test_plain_transformers_writes_the_texts_that_generate_writes(chat, writer, tmp_path, capfd):
    merged, file = tmp_path / "merged", tmp_path / "prompts.txt"
    assert run("export", writer.folder, "--merged", merged) == 0
    assert (merged / "chat_template.jinja").exists()
    file.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    assert run("generate", writer.folder, "--prompts", file, "--max-new-tokens", 9, "--out", tmp_path / "t.jsonl",
               *([] if chat else ["--plain"])) == 0
    found = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [one["prompt"] for one in found] == list(PROMPTS)
    expected = by_transformers(merged, PROMPTS, 9, chat)
    assert [one["completion"] for one in found] == expected and len(set(expected)) == len(PROMPTS)
    assert ("chat template" in capfd.readouterr().err) is chat


def test_one_prompt_is_answered_with_its_text_alone_and_lines_of_stdin_with_json_lines(writer, capfd, monkeypatch):
    assert run("generate", writer.folder, "--prompt", PROMPTS[0], "--max-new-tokens", 5) == 0
    alone = capfd.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPTS[0]}\n\n{PROMPTS[1]}\n"))
    assert run("generate", writer.folder, "--max-new-tokens", 5, "--batch-size", 1) == 0
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [one["prompt"] for one in found] == list(PROMPTS[:2]) and found[0]["completion"] == alone.removesuffix("\n")
    capfd.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert "stdin holds no prompt" in refused(capfd, "generate", writer.folder)


def test_conversations_are_answered_from_the_turns_before_their_last_answer(writer, tmp_path, capfd):
    def turns(*said):
        return [{"role": role, "content": content} for role, content in said]

    file, wrong = tmp_path / "held-out.jsonl", tmp_path / "wrong.jsonl"
    file.write_text(json.dumps({"messages": turns(("user", "calm?"), ("assistant", "yes"), ("user", "sure?"),
                                                  ("assistant", "no"))}) + "\n")
    assert run("generate", writer.folder, "--prompts", file, "--max-new-tokens", 4, "--system", "Be brief.") == 0
    [found] = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert found["prompt"] == turns(("user", "calm?"), ("assistant", "yes"), ("user", "sure?"))
    capfd.readouterr()
    assert "needs the model's chat template" in refused(capfd, "generate", writer.folder, "--prompts", file, "--plain")
    wrong.write_text(json.dumps({"messages": turns(("assistant", "yes"))}) + "\n")
    assert "wrong.jsonl:1: the conversation begins with the answer" in refused(
        capfd, "generate", writer.folder, "--prompts", wrong)


def test_tokens_are_drawn_if_a_temperature_is_given_and_the_seed_repeats_them(writer, capfd):
    def text(*more):
        assert run("generate", writer.folder, "--prompt", "a", "--max-new-tokens", 12, *more) == 0
        return capfd.readouterr().out

    warm = text("--temperature", "1.5")
    assert warm == text("--temperature", "1.5", "--seed", "0") != text("--temperature", "1.5", "--seed", "1")
    assert text() == text("--seed", "1") != warm


@pytest.mark.parametrize(("arguments", "reason"), [
    (["--prompt", "pain " * 400], "and the model has room for 256 with what it writes; shorten the prompt"),
    (["--prompts", "nowhere.txt"], "nowhere.txt: No such file"),
    (["--prompts", "empty.txt"], "empty.txt holds no prompt"),
    (["--prompts", "odd.csv"], "needs the columns messages, or prompt, or text"),
    (["--prompt", "a", "--plain", "--system", "b"], "--plain leaves it out; leave --system out"),
    (["--prompt", "a", "--out", "empty.txt"], "--out empty.txt exists")])
def test_a_prompt_that_cannot_be_continued_is_refused_with_the_reason(arguments, reason, writer, tmp_path, monkeypatch,
                                                                     capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    assert run("generate", writer.folder, *arguments) == 2
    assert reason in capfd.readouterr().err


def test_at_a_terminal_each_line_is_answered_until_the_end_of_input(writer, monkeypatch, capfd):
    given = iter([PROMPTS[0], "", "pain " * 400, PROMPTS[1]])

    def typed(prompt):
        assert prompt == "> "
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", typed)
    assert run("generate", writer.folder, "--max-new-tokens", 3) == 0
    said = capfd.readouterr()
    assert len(said.out.splitlines()) >= 2 and "Ctrl-D ends" in said.err and "shorten the prompt" in said.err


@pytest.mark.parametrize("command", ["predict", "generate"])
def test_ctrl_c_ends_with_130(command, classifier, writer, rows, monkeypatch, capfd):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fedlora_server.handover.stored_run.StoredRun.adapted", interrupted)
    folder, more = (classifier.folder, [rows, "--out", "-"]) if command == "predict" else (
        writer.folder, ["--prompt", "a"])
    assert run(command, folder, *more) == 130 and "interrupted" in capfd.readouterr().err


def test_the_metadata_of_a_card_is_yaml_also_for_a_base_model_of_the_hub(tmp_path, checkpoint):
    from fedlora.adapters.card import card

    model = AutoModelForCausalLM.from_pretrained(checkpoint("gpt2"))
    for merged in ("", "float32"):
        text = card(model, "causal-lm", "org/model", "1" * 40, merged=merged)
        found = yaml.safe_load(text.split("---")[1])
        assert found["base_model"] == "org/model"
        assert found["base_model_relation"] == ("finetune" if merged else "adapter")
