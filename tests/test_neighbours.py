"""On neighbouring data sets a client sends the same, except for noise and random tokens.

The clients are real processes over real gRPC. A hostile server chooses lengths, labels, batches and targets such that a
single row decides whether there is anything to train on.
"""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from fedlora import models
from fedlora.config import ClientConfig, config_from
from fedlora.plan import Proposal, Refusal, RoundPlan, Upload, upload_metrics
from fedlora.wire import pb, read_frame, tensors_digest
from fedlora_client.supernode import SuperNodeClient
from tests.driven_server import Server

LONG = " ".join(["patient reports acute pain since morning"] * 12)
ROWS = 40

KINDS = {
    "classification": {
        "row": lambda text, label: {"text": text, "label": label},
        "plain": ("calm now", "routine"), "chosen": ("acute pain", "urgent"),
        "others": {"empty": ("\u200b", "urgent"), "overlong": (LONG, "urgent"), "odd label": ("calm", "someone's name"),
                   "no label": ("calm", None)}},
    "causal-lm": {
        "row": lambda prompt, completion: {"prompt": prompt, "completion": completion},
        "plain": (LONG, "rest"), "chosen": ("a", "rest"),
        "others": {"empty": ("\u200b", "\u200b"), "overlong": ("a", LONG), "long prompt": (LONG, "x")}}}

PLANS = {
    "classification": {"run_id": "ef" * 8, "labels": ("calm", "urgent"), "max_length": 1, "expected_batch": 3,
                       "targets": ("query", "value"), "clip_norm": 1e-6, "local_steps": 3},
    "causal-lm": {"run_id": "ef" * 8, "max_length": 12, "expected_batch": 3, "clip_norm": 1e-6, "local_steps": 3,
                  "task": "causal-lm", "labels": (), "targets": ("q_proj",), "train_head": False}}
"""The server's last plan for each task. At most one row of each data set can be trained on."""

BEFORE = {"classification": ({"max_length": 2, "labels": ("calm", "other"), "run_id": "cd" * 8},),
          "causal-lm": ({"max_length": 1, "run_id": "cd" * 8}, {"max_length": 64, "run_id": "12" * 8})}
"""The server's plans of the runs before, chosen to learn from the client's answer to each."""


def neighbours(task):
    """Return data sets that differ in one row: a row that the server's plan can use, another one, or none (removed)."""
    kind = KINDS[task]
    plain = [kind["row"](*kind["plain"])] * (ROWS - 1)
    variants = {"chosen": [kind["row"](*kind["chosen"])], "removed": []}
    variants |= {name: [kind["row"](*values)] for name, values in kind["others"].items()}
    return {name: [*plain[:7], *one, *plain[7:]] for name, one in variants.items()}


def write(path, rows, column):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row | ({"patient_id": i // 2} if column else {})) + "\n"
                            for i, row in enumerate(rows)))
    return path


def blank(message):
    """Replace the random bytes of a frame by as many zeros."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_BYTES:
            setattr(message, field.name, b"\0" * len(value))
        elif field.type == field.TYPE_MESSAGE:
            for one in value if field.is_repeated else [value]:
                blank(one)


def said(data):
    """Return a frame without the values of noised tensors, their checksum, and random tokens."""
    frame, chunk = read_frame(pb.ClientFrame, data)
    if frame is not None:
        frame.ClearField("chunk")
        blank(frame)
    return (None if frame is None else frame.SerializeToString(deterministic=True),
            None if chunk is None else (len(chunk[0]), chunk[1] is not None), len(data))


def sent(folder, checkpoint, task, column, rows):
    """Run a client, and return its log and each frame it sent on each stream, up to the answer to the last order."""
    plan = {**PLANS[task], "local_steps": 2, "clip_norm": 0.5, "expected_batch": 4, "max_length": 16,
            **({"labels": ("routine", "urgent")} if task == "classification" else {})}
    server = Server(folder, checkpoint, **plan | {"run_id": "ab" * 8})
    try:
        write(server.data, rows, column)
        unit = ("--privacy-unit", "column:patient_id") if column else ()
        size = ROWS // 2 if column else ROWS
        server.client("--task", task, "--epsilon", 500, "--yes", "--declared-size", size, *unit, defaults=False)
        server.wait_until_ready(1)
        runs = [*BEFORE[task], PLANS[task]]
        for count, changes in enumerate(runs, start=2):
            server.come_back_with(**changes)
            server.wait_until_ready(count)
        server.plan = dataclasses.replace(server.plan, **PLANS[task])
        server.prepare(checkpoint)
        answer = server.ask(1)
        assert isinstance(answer, Upload) and answer.steps == 3, server.log()
        streams = [[said(data) for data in frames] for frames in server.engine.streams]
        return streams, server.log()
    finally:
        server.engine.close("the test is over")
        server.deployment.__exit__()


@pytest.mark.parametrize("column", [False, True], ids=["row", "column"])
@pytest.mark.parametrize("task", KINDS)
def test_what_a_client_sends_does_not_depend_on_a_row(tmp_path, checkpoint, task, column):
    folder = checkpoint("bert" if task == "classification" else "llama")
    with ThreadPoolExecutor(3) as several:  # they mostly wait for their processes
        asked = {name: several.submit(sent, tmp_path / name.replace(" ", "-"), folder, task, column, rows)
                 for name, rows in neighbours(task).items()}
        found = {name: one.result() for name, one in asked.items()}
    streams, log = found["chosen"]
    assert [len(frames) for frames in streams] == [2] * (1 + len(BEFORE[task])) + [3]  # Join, Ready, and an Upload
    assert task == "causal-lm" or f"{ROWS - 1} OF {ROWS} ROWS HAVE A LABEL" in log
    for name, (others, log) in found.items():
        assert others == streams, f"{name}:\n{log}"
    assert "NO ROW CAN BE TRAINED ON" in found["removed"][1] and "NO ROW" not in found["chosen"][1]


@pytest.mark.parametrize("task", KINDS)
def test_what_a_supernode_answers_does_not_depend_on_a_row(tmp_path, checkpoint, task, monkeypatch):
    folder = checkpoint("bert" if task == "classification" else "llama")
    server = Server(tmp_path / "server", folder, **PLANS[task])
    server.engine.close("it is not called")
    layout, state = server.layout, server.state
    order = RoundPlan(server.plan, 1, 0, tensors_digest({spec.name: state[spec.name] for spec in layout.frozen}))
    asked = Proposal(server.plan.with_open_labels()) if server.plan.labels else None
    found = {}
    for name, rows in neighbours(task).items():
        home = tmp_path / name.replace(" ", "-")
        monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
        monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
        options = config_from({
            "server": "SuperLink", "data": str(write(home / "rows.jsonl", rows, False)), "task": task, "epsilon": 500,
            "model": str(folder), "state": str(home / "state"), "threads": 1, "device": "cpu", "precision": "fp32",
            "yes": True, "declared-size": ROWS}, ClientConfig, "--node-config")
        joined = SuperNodeClient(options).join(Proposal(server.plan))
        named = SuperNodeClient(options).join(asked) if asked else Refusal("labels")
        upload = SuperNodeClient(options).run_round(order, state)
        assert isinstance(upload, Upload), name
        found[name] = joined, named, upload_metrics(upload), {n: t.shape for n, t in upload.tensors.items()}
    assert all(answers == found["chosen"] for answers in found.values())
    assert found["chosen"][:2] == ((), Refusal("labels"))


def test_tokens_beyond_the_embeddings_are_refused_before_a_client_is_ready(tmp_path, checkpoint):
    """A record that holds one would end the round that draws it."""
    folder = tmp_path / "model"
    loaded = models.load(checkpoint("bert"), "classification", 2)
    loaded.tokenizer.add_tokens([f"<drug-{i}>" for i in range(20)])
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    for load in (models.load_tokenizer, lambda path: models.load(path, "classification", 2)):
        with pytest.raises(ValueError, match=r"tokens up to \d+, but the model has embeddings for \d+ only; resize"):
            load(folder)
    server = Server(tmp_path / "server", checkpoint("bert"), model=models.reference("local", folder))
    try:
        server.deployment.checkpoint = folder
        server.client()
        assert server.deployment.end("north", 60) == 4 and "embeddings for" in server.log()
        assert not any(member.ready_at for member in server.engine.members()) and server.charges() == ()
    finally:
        server.engine.close("the test is over")
        server.deployment.__exit__()
