"""What a SuperNode's messages leave on the disk for the next one, whose process knows nothing of them."""

import json

import numpy as np
import pytest

import fedlora
from fedlora import models, wire
from fedlora.adapters import attach, initial_tensors
from fedlora.options import CLIENT, build_parser, read_options
from fedlora.plan import Refusal, RoundPlan, RunPlan, Upload
from fedlora.privacy import Ledger
from fedlora_client.supernode import SuperNodeClient
from tests.processes import write_rows


class SuperNode:
    """Each `ask` is answered as by a process of its own."""

    def __init__(self, folder, checkpoint):
        self.folder = folder
        data = write_rows(folder / "north.jsonl", seed=0)
        self.options = read_options(build_parser(CLIENT, ""), CLIENT, [
            f"--data={data}", "--name=north", f"--model={checkpoint}", f"--state={folder / 'state'}", "--threads=1",
            "--device=cpu", "--precision=fp32", f"--simulated-ledger={folder / 'ledger'}"])
        self.plan = RunPlan(
            run_id="ab" * 8, fedlora_version=fedlora.__version__, strategy="ffa-lora", family="frozen-a", private=True,
            model=models.reference("local", checkpoint), task="classification", labels=("routine", "urgent"),
            max_length=16, rank=2, alpha=2.0, targets=("query",), train_head=True, dropout=0.0, rounds=3,
            max_participations=3, local_steps=1, expected_batch=8, optimizer="sgd", lr=0.1, clip_norm=0.5,
            adapter_scale=1.0, head_scale=1.0, weight_by_examples=False)
        adapted = attach(models.load(checkpoint, "classification", 2), family="frozen-a", rank=2, alpha=2.0,
                         targets=("query",), train_head=True)
        self.state, self.layout = initial_tensors(adapted, init="orthonormal", seed=0), adapted.layout

    def ask(self, round, **changes):
        state = {**self.state, **changes}
        digest = wire.digest({spec.name: state[spec.name] for spec in self.layout.shared})
        return SuperNodeClient(self.options).run_round(RoundPlan(self.plan, round, 0, digest), state)

    def charges(self):
        ledger = Ledger(self.folder / "ledger" / "ledger.sqlite", simulated=True)
        try:
            return ledger.charges()
        finally:
            ledger.close()

    @property
    def mark(self):
        return self.folder / "state" / self.plan.run_id / "unfinished"


@pytest.fixture
def node(tmp_path, checkpoint):
    return SuperNode(tmp_path, checkpoint("bert"))


def test_after_a_round_that_failed_the_run_is_refused_until_the_owner_removes_the_mark(node, caplog):
    cut_off = {spec.name: np.full(spec.shape, 1e-45, np.float32) for spec in node.layout.shared}
    assert node.ask(1, **cut_off) == Refusal("unavailable") and len(node.charges()) == 1
    assert node.ask(2) == Refusal("unavailable") and len(node.charges()) == 1
    assert str(node.mark) in caplog.text
    node.mark.unlink()
    assert isinstance(node.ask(3), Upload) and not node.mark.exists()
    [report] = (node.folder / "state").glob("*/privacy.json")
    assert json.loads(report.read_text())


def test_a_process_that_is_killed_while_it_trains_leaves_the_mark(node, monkeypatch):
    def killed(*arguments, **options):
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr("fedlora.training.Trainer.train", killed)
        with pytest.raises(SystemExit):
            node.ask(1)
    assert node.ask(2) == Refusal("unavailable") and len(node.charges()) == 1
