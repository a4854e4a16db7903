"""Worker processes: the same bits as one process, and a run that ends whatever happens to them."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from fedlora.config import SimulationConfig, read_config
from fedlora.plan import RoundPlan
from fedlora.privacy import Ledger
from fedlora.training import TrainingJob, TrainResult
from fedlora_server.engine import node_id
from fedlora_server.run_setup import find_model
from fedlora_simulations.population import Method, populate
from fedlora_simulations.processes import ProcessWorkers
from fedlora_simulations.simulated_run import simulate
from fedlora_simulations.worker import WorkerLost, Workers, threads_each
from fedlora_simulations.worker_engine import WorkerEngine
from fedlora_strategies.messages import to_record, train_message
from tests.covering import WHOLE, few
from tests.federation import STRATEGIES, LinearSession, layout_of, plan_of, start_of
from tests.processes import PATIENCE, write_rows

SMALL = ("--rank=2", "--rounds=2", "--local-steps=2", "--batch-size=8", "--max-length=16", "--threads=1",
         "--device=cpu", "--precision=fp32")
FLAGS = {"randlora": ("--family-options=gamma=0",)}
"""Flags without which a strategy's adapters are not for private runs."""


def run(tmp_path, checkpoint, strategy, *flags):
    for i in range(3):
        write_rows(tmp_path / "data" / f"hospital-{i}.jsonl", seed=i)
    arguments = [f"--strategy={strategy}", f"--model={checkpoint('bert')}", f"--data={tmp_path / 'data'}",
                 "--partition=files", *flags, *SMALL, *FLAGS.get(strategy, ())]
    options = read_config(SimulationConfig, arguments)
    out = tmp_path / "-".join(("run", *flags))
    out.mkdir()
    return simulate(options, Method.parse(strategy), 5, find_model(options), populate(options, 5), out=out), out


def charges(out):
    """Return the charges in a run's ledger, without their order and the digests of what was sent."""
    ledger = Ledger(out / "ledger.sqlite", simulated=True)
    found = sorted((c.dataset, c.round, c.attempt, c.state) for c in ledger.charges())
    ledger.close()
    return found


@pytest.mark.parametrize("strategy", ["ffa-lora:dp", *(STRATEGIES if WHOLE else ("fedsvd", "fed-sb"))])
def test_worker_processes_end_with_the_bits_and_the_charges_of_one_process(tmp_path, checkpoint, strategy):
    (one, first), (two, second) = (run(tmp_path, checkpoint, strategy, f"--workers={count}") for count in (1, 2))
    assert one.result.rounds == two.result.rounds == 2
    for name, array in one.result.state.items():
        assert array.tobytes() == two.result.state[name].tobytes(), f"{name} differs"
    assert (one.epsilons, one.bytes_up, one.bytes_down) == (two.epsilons, two.bytes_up, two.bytes_down)
    assert charges(first) == charges(second) and len(charges(first)) == (9 if "dp" in strategy else 6)


def test_whole_gradients_start_a_run_alike_in_every_engine(tmp_path, checkpoint):
    one, two, batched = (run(tmp_path, checkpoint, "pissa:lora-ga-clients", "--privacy=off", "--epsilon=inf", more)[0]
                         for more in ("--workers=1", "--workers=2", "--batch-clients=3"))
    assert one.federation.plan.whole_gradients and one.result.ended == "finished"
    for name, array in one.result.state.items():
        assert array.tobytes() == two.result.state[name].tobytes(), f"{name} differs"
        np.testing.assert_allclose(batched.result.state[name], array, rtol=1e-4, atol=1e-4, err_msg=name)
    assert (one.bytes_up, one.bytes_down) == (two.bytes_up, two.bytes_down)


@pytest.mark.parametrize(("strategy", "ranks"), few(
    ("ffa-lora", "shrink:6"), ("fedavg-lora", "nested"), ("ffa-lora", "grow:6"), ("fedavg-lora", "shrink:6")))
def test_ranks_change_alike_in_every_engine(tmp_path, checkpoint, strategy, ranks):
    one, two, batched = (run(tmp_path, checkpoint, strategy, f"--ranks={ranks}", more)[0] for more in (
        "--workers=1", "--workers=2", "--batch-clients=3"))
    changed = len({record.bytes_up for record in one.result.records if record.round}) == 2
    assert changed or ranks == "nested", "both rounds may draw the same rank"
    for name, array in one.result.state.items():
        assert array.tobytes() == two.result.state[name].tobytes(), f"{name} differs"
        np.testing.assert_allclose(batched.result.state[name], array, rtol=1e-4, atol=1e-4, err_msg=name)
    assert (one.bytes_up, one.bytes_down, one.epsilons) == (two.bytes_up, two.bytes_down, two.epsilons)
    assert (one.bytes_up, one.epsilons) == (batched.bytes_up, batched.epsilons)


def test_clients_of_fewer_ranks_train_alike_in_every_process_and_are_charged_as_all_others(tmp_path, checkpoint):
    ranks = "--client-ranks=hospital-0=1,hospital-2=2"
    (one, first), (two, _) = (run(tmp_path, checkpoint, "flexlora", f"--workers={count}", ranks) for count in (1, 2))
    whole, second = run(tmp_path, checkpoint, "flexlora")
    for name, array in one.result.state.items():
        assert array.tobytes() == two.result.state[name].tobytes(), f"{name} differs"
    assert (one.bytes_up, one.epsilons) == (two.bytes_up, two.epsilons)
    assert one.bytes_up < whole.bytes_up and one.bytes_down < whole.bytes_down
    assert one.epsilons == whole.epsilons and charges(first) == charges(second)


@pytest.mark.parametrize("strategy", ["ffa-lora:dp", *(STRATEGIES if WHOLE else ("fedavg-lora", "fedsvd"))])
def test_batched_clients_end_where_one_after_the_other_end_and_are_charged_alike(tmp_path, checkpoint, strategy):
    (one, first), (two, second) = (run(tmp_path, checkpoint, strategy, f"--batch-clients={count}") for count in (1, 2))
    moved = False
    for name, array in one.result.state.items():
        np.testing.assert_allclose(two.result.state[name], array, rtol=1e-5, atol=1e-5, err_msg=name)
        moved |= abs(array - one.federation.state[name]).max() > 1e-3
    assert moved and (one.epsilons, one.bytes_up) == (two.epsilons, two.bytes_up)
    assert charges(first) == charges(second) and len(charges(first)) == (9 if "dp" in strategy else 6)


class StagedSession(LinearSession):
    """A session that begins and finishes as `ClientSession` does; its "training" is `run_round` itself."""

    def begin(self, plan, tensors, part=None):
        self.upload = self.run_round(plan, tensors)
        return TrainingJob(plan.run, self.name, tensors, 1.0, None, 1.0, 1.0, 1, None, plan.round, plan.attempt)

    def finish(self, plan, result):
        assert result.tensors == {"trained by": self.name}
        return self.upload


class Backwards(Workers):
    """Three workers, of which the one started last is always done first."""

    def __init__(self):
        self.stack = []

    @property
    def free(self):
        return 3 - len(self.stack)

    def start(self, key, trainings):
        assert self.free
        self.stack.append((key, trainings))

    def done(self):
        key, trainings = self.stack.pop()
        return key, [TrainResult({"trained by": training.records}, 1, (), 0.0, 0.0, 0) for training in trainings]

    def close(self):
        self.stack.clear()


@pytest.fixture
def engine():
    layout = layout_of("lora")
    made = WorkerEngine({name: StagedSession(name, layout) for name in "abcde"}, "0" * 16, layout, Backwards())
    yield made
    made.close("the test is over")


def push(engine, names="abcde", attempt=0):
    plan = RoundPlan(plan_of("fedavg-lora", run_id="0" * 16), 1, attempt, "0" * 64)
    arrays = to_record(start_of(layout_of("lora"), 0))
    return engine.push_messages([train_message(plan, arrays, node_id(name)) for name in names])


@pytest.mark.usefixtures("one_at_a_time")
def test_outcomes_are_told_one_by_one_in_the_order_asked_whichever_worker_is_first(engine):
    pushed = push(engine)
    told = [list(engine.wait(pushed, 0.0)) for _ in pushed]
    assert told == [pushed[:i + 1] for i in range(5)]
    assert len(list(engine.pull_messages(pushed))) == 5 and engine.bytes_up == 5 * 4 * layout_of("lora").num_trained


def test_all_workers_are_busy_before_the_first_is_waited_for(engine):
    busy = []

    class Watched(Backwards):
        def done(self):
            busy.append(len(self.stack))
            return super().done()

    engine._workers = Watched()
    pushed = push(engine)
    while len(engine.wait(pushed, 0.0)) < 5:
        pass
    assert busy == [3, 3, 3, 2, 1]


@pytest.mark.usefixtures("one_at_a_time")
def test_a_worker_is_given_as_many_clients_at_a_time_as_it_may_have(engine):
    engine._group = 2
    pushed = push(engine)
    assert engine.wait(pushed, 0.0) == {pushed[0]: "uploaded"}
    assert [len(trainings) for _, trainings in engine._workers.stack] == []
    assert list(engine._outcomes) == [pushed[4], pushed[2], pushed[3], pushed[1]]  # 2, 2 and 1, the last group first


def test_what_a_cancelled_order_gives_is_dropped(engine):
    pushed = push(engine)
    engine.wait(pushed, 0.0)
    engine.cancel(pushed[1:])
    again = push(engine, "b", attempt=1)
    assert engine.wait(again, 0.0) == {again[0]: "uploaded"}
    assert len(list(engine.pull_messages(pushed))) == 1


@pytest.mark.usefixtures("one_at_a_time")
def test_a_client_that_comes_back_gives_what_it_trained_meanwhile(engine):
    pushed = push(engine)
    engine.wait(pushed, 0.0)
    engine.leave("b")
    assert engine.wait(pushed, 0.0)[pushed[1]] == "lost"
    engine.join("b", engine._sessions[node_id("a")])
    while len(outcomes := engine.wait(pushed, 0.0)) < 5:
        pass
    assert set(outcomes.values()) == {"uploaded"}


class Doomed:
    """A blueprint whose trainer cannot be built."""

    device = "cpu"

    def __init__(self, error):
        self.error = error

    def build(self, index):
        if self.error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise self.error


def test_a_worker_that_is_killed_is_an_error_that_says_so_and_no_hang():
    workers = ProcessWorkers(Doomed(None), 1)
    try:
        workers.start("a", [])
        with pytest.raises(WorkerLost, match=r"worker 0 was killed by SIGKILL.*--workers"):
            workers.done()
    finally:
        workers.close()


def test_what_a_worker_raises_is_raised_here():
    workers = ProcessWorkers(Doomed(ZeroDivisionError("by nought")), 1)
    try:
        workers.start("a", [])
        assert workers.free == 0
        with pytest.raises(ZeroDivisionError, match="by nought") as caught:
            workers.done()
        assert "in build" in caught.value.__notes__[0]
        assert workers.free == 1
    finally:
        workers.close()
        workers.close()


def test_more_workers_than_cores_have_a_thread_each(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    assert [threads_each(count) for count in (1, 2, 3, 9)] == [4, 2, 1, 1]


def test_ctrl_c_ends_a_simulation_and_all_of_its_processes(tmp_path, checkpoint):
    write_rows(tmp_path / "data.jsonl", seed=0)
    log = tmp_path / "log"
    code = "import sys; from fedlora_simulations.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["--strategy=ffa-lora", f"--model={checkpoint('bert')}", f"--data={tmp_path / 'data.jsonl'}",
                 f"--out={tmp_path / 'out'}", "--workers=2", *SMALL, "--rounds=9999", "--batch-size=4"]
    with log.open("w") as out:  # its own process group, as a shell gives it
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=out, stderr=out,
                                   start_new_session=True)
    try:
        deadline = time.monotonic() + PATIENCE * 90
        while "round 2:" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(PATIENCE * 30) == 130, log.read_text()
        assert "Traceback" not in log.read_text() and "finished rounds are in the --out folder" in log.read_text()
        while group_lives(process.pid):
            assert time.monotonic() < deadline, "a process was left behind"
            time.sleep(0.05)
    finally:
        if group_lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
