"""A SuperNode's client keeps nothing in memory between two messages, and forgets nothing."""

import dataclasses
import json
from pathlib import Path

import pytest

import fedlora
from fedlora import models
from fedlora.adapters import attach, initial_tensors
from fedlora.adapters.sketches import sketch_layout, sketch_tensors
from fedlora.config import ClientConfig, config_from
from fedlora.plan import AGGREGATE, ModelRef, Proposal, Refusal, RoundPlan, RunPlan, Upload
from fedlora.privacy import Ledger
from fedlora.wire import tensors_digest
from fedlora.wire.codec import upload_to_wire
from fedlora_client.cli import main
from fedlora_client.paths import signing_key
from fedlora_client.supernode import SuperNodeClient
from tests.processes import write_rows

OTHER_MODEL = ModelRef("local", "0" * 64, "1" * 64, "2" * 64)


class Node:
    """A SuperNode called north, and the orders of a server that may be hostile."""

    def __init__(self, folder, checkpoint):
        self.plan = RunPlan(
            run_id="ab" * 8, fedlora_version=fedlora.__version__, strategy="ffa-lora", family="frozen-a", private=True,
            model=models.reference("local", checkpoint), task="classification", labels=("routine", "urgent"),
            max_length=16, rank=2, alpha=2.0, targets=("query",), train_head=True, dropout=0.0, rounds=2,
            max_participations=2, local_steps=2, expected_batch=8, optimizer="sgd", lr=0.1, clip_norm=0.5,
            adapter_scale=1.0, head_scale=1.0, weight_by_examples=False)
        adapted = attach(models.load(checkpoint, "classification", 2), family="frozen-a", rank=2, alpha=2.0,
                         targets=("query",), train_head=True)
        self.state = initial_tensors(adapted, init="orthonormal", seed=0)
        self.layout, self.sketches = adapted.layout, sketch_layout(self.plan, adapted.layout, adapted.missing)
        self.options = config_from({
            "server": "SuperLink", "data": str(write_rows(folder / "north.jsonl", 0)), "name": "north", "epsilon": 200,
            "model": str(checkpoint), "state": str(folder / "state"), "threads": 1, "device": "cpu",
            "precision": "fp32", "yes": True, "declared-size": 120}, ClientConfig, "--node-config")

    def ask(self, round, attempt=0, **changes):
        layout = self.layout if round else self.sketches
        state = self.state if round else sketch_tensors(self.sketches, self.state, seed=0)
        frozen_sha256 = tensors_digest({spec.name: state[spec.name] for spec in layout.frozen})
        order = RoundPlan(dataclasses.replace(self.plan, **changes), round, attempt, frozen_sha256)
        return SuperNodeClient(self.options).run_round(order, state)

    @property
    def mark(self):
        return Path(self.options.state) / self.plan.run_id / "unfinished"


@pytest.fixture
def node(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home" / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home" / "config"))
    return Node(tmp_path, checkpoint("bert"))


def charges(tmp_path):
    ledger = Ledger(tmp_path / "home" / "state" / "fedlora" / "ledger.sqlite")
    try:
        return [(charge.round, charge.attempt, charge.state) for charge in ledger.charges()]
    finally:
        ledger.close()


def test_a_supernode_compiles_nothing(node):
    options = dataclasses.replace(node.options, compile=True)
    with pytest.raises(ValueError, match="--compile: a SuperNode starts a process for each message"):
        SuperNodeClient(options)


def test_a_supernode_follows_no_plan_but_the_one_that_its_run_began_with(node, tmp_path):
    announced = Proposal(node.plan)
    assert SuperNodeClient(node.options).join(announced) == ()
    assert node.ask(0) == Refusal("policy")  # the plan has no start from private gradients
    first = node.ask(1)
    assert first.steps == 2 and first.anchor == b"", "the server keeps no anchors"
    for changes in ({"clip_norm": 5.0}, {"local_steps": 4}, {"max_participations": 3, "rounds": 3}, {"rounds": 3},
                    {"expected_batch": 16}, {"strategy": "fedsvd"}, {"max_length": 32}, {"private_start": True}):
        assert node.ask(2, **changes) == Refusal("policy"), changes
    assert node.ask(2, private=False).code == "privacy-mismatch"
    assert node.ask(2, model=OTHER_MODEL).code == "model-mismatch"
    assert charges(tmp_path) == [(1, 0, "released")]
    again = node.ask(1)
    assert {n: t.tobytes() for n, t in again.tensors.items()} == {n: t.tobytes() for n, t in first.tensors.items()}
    assert node.ask(2).steps == 2
    assert node.ask(2, attempt=1) == node.ask(3) == Refusal("budget")
    assert charges(tmp_path) == [(1, 0, "released"), (2, 0, "released")]


def test_after_a_round_that_failed_the_run_is_refused_until_the_owner_removes_the_mark(node, tmp_path, caplog,
                                                                                       monkeypatch):
    def failing(*arguments, **options):
        raise RuntimeError("a fault of the machine")

    with monkeypatch.context() as patched:
        patched.setattr("fedlora.training.Trainer.train", failing)
        assert node.ask(1) == Refusal("unavailable")
    assert node.ask(2) == Refusal("unavailable")
    assert [round for round, _, _ in charges(tmp_path)] == [1] and str(node.mark) in caplog.text
    node.mark.unlink()
    assert isinstance(node.ask(2), Upload) and not node.mark.exists()
    [report] = (tmp_path / "state").glob("*/privacy.json")
    assert json.loads(report.read_text())


def test_a_process_that_is_killed_while_it_trains_leaves_the_mark(node, tmp_path, monkeypatch):
    def killed(*arguments, **options):
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr("fedlora.training.Trainer.train", killed)
        with pytest.raises(SystemExit):
            node.ask(1)
    assert node.ask(2) == Refusal("unavailable") and [round for round, _, _ in charges(tmp_path)] == [1]


STATEMENTS = {"controller": "Hospital North", "processor": "North IT", "purpose": "triage",
              "legal-basis": "Art. 9(2)(j)", "retention": "two years", "recipient": "the coordinator"}


def command(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    return ended.value.code


def test_the_owners_statements_reach_the_report_and_no_server_and_an_audit_can_be_added(node, tmp_path, capsys):
    policy = tmp_path / "home" / "config" / "fedlora" / "policy.toml"
    policy.parent.mkdir(parents=True)
    policy.write_text(f'[dataset.north]\ndata = "{node.options.data}"\nepsilon = 500.0\ndelta = 1e-5\n'
                      + "".join(f'{key} = "{text}"\n' for key, text in STATEMENTS.items()))
    told = SuperNodeClient(node.options).join(Proposal(node.plan))
    sent = node.ask(1)
    assert isinstance(sent, Upload)
    everything = repr(told).encode() + repr(sent).encode() + upload_to_wire(sent).SerializeToString() + b"".join(
        tensor.tobytes() for tensor in sent.tensors.values())
    assert not [text for text in STATEMENTS.values() if text.encode() in everything]

    [path] = (tmp_path / "state").glob("*/privacy.json")
    report = json.loads(path.read_text())
    assert set(report["about"].values()) == set(STATEMENTS.values()) and report["mechanism"]["family"] == "frozen-a"
    assert all(text in path.with_suffix(".md").read_text() for text in STATEMENTS.values())
    assert command("verify", path) == 0 and "the key of this machine" in capsys.readouterr().out

    mechanism, privacy = report["mechanism"], report["privacy"]
    run = {"private": True, "rounds": privacy["guarantee"]["steps"], "delta": privacy["delta"], "canaries": 100,
           "white_box": {"guessed_in": 10, "guessed_out": 10, "right": 15, "epsilon": 0.25},
           **{name: mechanism[name] for name in ("noise_multiplier", "sampling_rate", "clip_norm", "family")}}
    audit = tmp_path / "audit.json"
    audit.write_text(json.dumps({"confidence": 0.95, "audits": [run]}))
    assert command("attach-audit", path, audit) == 0 and "signed anew" in capsys.readouterr().out
    assert json.loads(path.read_text())["audit"]["epsilon"] == 0.25 and command("verify", path) == 0
    assert "**ε ≥ 0.250**" in path.with_suffix(".md").read_text()
    before = path.read_bytes()
    audit.write_text(json.dumps({"confidence": 0.95, "audits": [run | {"clip_norm": 9.0}]}))
    assert command("attach-audit", path, audit) == 2 and "clip norm 9.0" in capsys.readouterr().err
    assert command("attach-audit", path, tmp_path / "none.json") == 2 and "none.json" in capsys.readouterr().err
    signing_key().unlink()
    assert command("verify", path) == 3 and "but by whom?" in capsys.readouterr().out
    assert command("attach-audit", path, audit) == 2 and "not this machine's key" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_run_with_secure_aggregation_is_refused_by_name_before_the_data_are_read(node, caplog):
    plan = dataclasses.replace(node.plan, local_steps=1, mechanism=AGGREGATE, least_members=3)
    Path(node.options.data).unlink()
    assert SuperNodeClient(node.options).join(Proposal(plan)) == Refusal("policy")
    assert "secure aggregation" in caplog.text and "with fedlora-client" in caplog.text
