"""A run whose orders a test gives by hand: FedLoRA's gRPC engine, and a real client process called north."""

import dataclasses

import fedlora
from fedlora import models, wire
from fedlora.adapters import attach_planned, initial_tensors
from fedlora.adapters.sketches import sketch_layout, sketch_tensors
from fedlora.plan import Proposal, RoundPlan, RunPlan
from fedlora.privacy import Ledger
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_strategies.messages import read_reply, to_record, train_message
from tests.processes import Deployment, write_rows


class RecordingEngine(GrpcEngine):
    """An engine that keeps every frame that clients send, as bytes, stream by stream."""

    def __init__(self, *arguments, **options):
        self.streams = []
        super().__init__(*arguments, **options)

    def _read(self, session, requests):
        self.streams.append(frames := [])
        super()._read(session, (frames.append(data) or data for data in requests))


class Server:
    """One run of at most two rounds, with a real client process called north."""

    def __init__(self, folder, checkpoint, announce=False, **changes):
        self.plan = RunPlan(**{
            "run_id": "ab" * 8, "fedlora_version": fedlora.__version__, "strategy": "ffa-lora", "family": "frozen-a",
            "private": True, "model": models.reference("local", checkpoint), "task": "classification",
            "labels": ("routine", "urgent"), "max_length": 16, "rank": 2, "alpha": 2.0, "targets": ("query",),
            "train_head": True, "dropout": 0.0, "rounds": 2, "max_participations": 2, "local_steps": 2,
            "expected_batch": 8, "optimizer": "sgd", "lr": 0.1, "clip_norm": 0.5, "adapter_scale": 1.0,
            "head_scale": 1.0, "weight_by_examples": False} | changes)
        proposal = Proposal(self.plan.with_open_labels() if announce else self.plan)
        self.prepare(checkpoint)
        self.deployment = Deployment(folder, checkpoint)
        self.engine = RecordingEngine("127.0.0.1:0", proposal, folder / "uploads")
        self.deployment.address = self.engine.address
        self.data = write_rows(folder / "data" / "north.jsonl", seed=0)

    def prepare(self, checkpoint):
        """Return the tensors that the plan's first round starts from."""
        adapted = attach_planned(models.load(checkpoint, self.plan.task, len(self.plan.labels)), self.plan)
        self.state = initial_tensors(adapted, init="orthonormal", seed=0)
        self.layout, self.sketches = adapted.layout, sketch_layout(self.plan, adapted.layout, adapted.missing)

    def client(self, *arguments, **options):
        self.deployment.client("north", self.data, *arguments, **options)
        return self

    def wait_until_ready(self, times):
        """Wait until the client has been ready on so many streams."""
        while len(self.engine.streams) < times or not self.engine.idle():
            assert self.deployment.processes["north"].poll() is None, self.log()
            self.engine.wait([], 0.05)

    def come_back_with(self, **changes):
        """Break the connection, and welcome the same client process to another run."""
        before = self.engine._registry.proposal
        proposal = dataclasses.replace(before, plan=dataclasses.replace(before.plan, **changes))
        self.engine._registry.proposal = proposal
        for seat in self.engine._registry._seats:
            seat.proposal = proposal
        for name in self.engine._names.taken if proposal.plan.run_id != before.plan.run_id else ():
            self.engine._names.forget(name)  # a name belongs to a client for one run
        for session in list(self.engine._sessions):
            session._context.cancel()

    def ask(self, round, attempt=0, **changes):
        """Give an order with a changed plan, and return the client's answer: an Upload or a Refusal."""
        while not self.engine.idle():
            assert self.deployment.processes["north"].poll() is None, self.deployment.log("north")
            self.engine.wait([], 0.2)
        sent = self.order(round, attempt, **changes)
        while sent not in self.engine.wait([sent], 0.2):
            pass
        return self.reply(sent)

    def order(self, round, attempt=0, **changes):
        """Give the idle client an order, and return its message id."""
        seat = self.engine._registry._seats.recall(self.engine.idle()[0])  # the registry itself refuses to ask twice
        seat.asked.clear()
        seat.asked_before = 0
        seat.accepted = None
        layout = self.layout if round else self.sketches
        state = self.state if round else sketch_tensors(self.sketches, self.state, seed=0)
        digest = wire.tensors_digest({spec.name: state[spec.name] for spec in layout.frozen})
        order = RoundPlan(dataclasses.replace(self.plan, **changes), round, attempt, digest)
        self.engine.expect(layout)
        [sent] = self.engine.push_messages([train_message(order, to_record(state), self.engine.idle()[0])])
        return sent

    def reply(self, sent):
        """Return the answer that has arrived for an order: an Upload or a Refusal."""
        return read_reply(next(iter(self.engine.pull_messages([sent]))))

    def charges(self):
        path = self.deployment.home("north") / "state" / "fedlora" / "ledger.sqlite"
        if not path.exists():
            return ()
        ledger = Ledger(path)
        try:
            return ledger.charges()
        finally:
            ledger.close()

    def log(self):
        return self.deployment.log("north")
