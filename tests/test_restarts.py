"""Real processes that die at the worst moments and are started again: all spending is recorded, and sent once.

The ledger of an interrupted run is compared with that of an uninterrupted run of the same processes.
"""

import json
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from itertools import pairwise

import pytest
from safetensors.numpy import load_file

from fedlora.plan import Upload
from fedlora.privacy import Accountant, Ledger, Spend
from fedlora.privacy.report import read_signed, verify
from fedlora.wire import tensors_digest
from fedlora_server.audit import chain
from fedlora_server.audit.command import main as audit_log
from tests.covering import WHOLE
from tests.driven_server import Server
from tests.processes import PATIENCE, write_rows
from tests.server.tcp_proxy import TcpProxy

SMALL = ("--rank", 2, "--local-steps", 2, "--batch-size", 8, "--max-length", 16)
EXACT = 1e-6
PLENTY = 200
"""An ε so large that calibrating its noise takes no time."""


@dataclass
class Account:
    """The only run in a simulated ledger."""

    charges: tuple
    epsilon: float

    @property
    def trainings(self):
        return [(charge.round, charge.attempt, charge.state) for charge in self.charges]

    @property
    def epsilon_of_a_round(self):
        """The ε that an accountant would give if it began anew each round."""
        terms = self.charges[0].terms
        spend = Spend(terms.noise_multiplier, terms.sampling_rate, terms.local_steps)
        return Accountant((spend,)).epsilon(terms.delta)


def account(deployment, name):
    path = deployment.home(name) / "ledger.sqlite"
    if not path.exists():
        return Account((), 0.0)
    ledger = Ledger(path, simulated=True)
    try:
        charges = ledger.charges()
        return Account(charges, ledger.epsilon(charges[0].dataset, charges[0].run_id) if charges else 0.0)
    finally:
        ledger.close()


def wait_until(true, deployment, timeout_s=90.0):
    deadline = time.monotonic() + PATIENCE * timeout_s
    while not true():
        assert time.monotonic() < deadline, "\n".join(map(deployment.log, deployment.processes))
        time.sleep(0.05)


def kill(deployment, name):
    deployment.processes[name].send_signal(signal.SIGKILL)
    assert deployment.end(name) == -signal.SIGKILL


def test_a_client_killed_between_rounds_and_after_storage_ends_with_the_same_epsilon_and_adapter(deploy, tmp_path):
    """North is killed twice: after its first upload was acknowledged, and after its second was stored but got lost.

    Meanwhile south is paused, which keeps the first round open. The last north has another noise seed, so a second
    training would give another update than the stored one.
    """
    files = {name: write_rows(tmp_path / f"{name}.jsonl", seed) for seed, name in enumerate(("north", "south"))}
    server = ("--min-clients", 2, "--min-replies", 2, "--seed", 5, "--rounds", 2, *SMALL)
    whole, broken = deploy("whole"), deploy("broken")
    for deployment in (whole, broken):
        deployment.server(*server)
        deployment.client("south", files["south"], "--epsilon", PLENTY, seed=5)
    whole.client("north", files["north"], "--epsilon", PLENTY, seed=5)

    broken.wait_for("server", "south ready")
    broken.processes["south"].send_signal(signal.SIGSTOP)
    proxy = TcpProxy(broken.address)

    def start_north(seed):
        broken.client("north", files["north"], "--epsilon", PLENTY, "--server", proxy.address, seed=seed)

    start_north(5)
    broken.wait_for("north", "round 1/2: sent")
    kill(broken, "north")
    start_north(5)
    broken.wait_for("north", "Joined")

    proxy.mute_uplink_after(500)  # cut in the middle of the next order
    broken.processes["south"].send_signal(signal.SIGCONT)
    wait_until(lambda: account(broken, "north").trainings == [(1, 0, "released"), (2, 0, "released")], broken)
    [stored] = (broken.folder / "state" / "north").glob("*/upload.safetensors")
    tensors, content = load_file(stored), stored.read_bytes()
    wait_until(lambda: proxy.swallowed_up > sum(tensor.nbytes for tensor in tensors.values()), broken)
    kill(broken, "north")
    proxy.restore()
    start_north(6)

    for deployment in (whole, broken):
        assert deployment.end("server") == 0, deployment.log("server")
        assert deployment.end("north") == deployment.end("south") == 0
    once, again = account(whole, "north"), account(broken, "north")
    assert again.trainings == once.trainings == [(1, 0, "released"), (2, 0, "released")]
    assert stored.read_bytes() == content and again.charges[1].sha256 == tensors_digest(tensors)
    assert [charge.sha256 for charge in again.charges] == [charge.sha256 for charge in once.charges]
    assert broken.adapter() == whole.adapter()
    assert again.epsilon == pytest.approx(once.epsilon, abs=EXACT)
    print(f"recorded ε {again.epsilon:.3f}; a fresh engine per round would print {again.epsilon_of_a_round:.3f}")
    assert again.epsilon_of_a_round < again.epsilon - 0.5


def test_a_client_killed_inside_a_training_is_charged_for_exactly_one_more(deploy, tmp_path):
    """The first north trains record by record, which takes long. It leaves a report although it is killed."""
    deployment = deploy("run")
    steps = 5
    deployment.server("--min-clients", 1, "--rounds", 2, *SMALL, "--local-steps", steps, "--batch-size", 120)
    data = write_rows(tmp_path / "data" / "north.jsonl", 0, rows=600)
    deployment.client("north", data, "--epsilon", PLENTY, "--micro-batch", 1, seed=5)
    state = deployment.folder / "state" / "north"
    wait_until(lambda: list(state.glob("*/privacy.json")), deployment)
    kill(deployment, "north")
    assert account(deployment, "north").trainings == [(1, 0, "reserved")]
    [left] = state.glob("*/privacy.json")
    [training] = verify(read_signed(left)).report["trainings"]
    assert (training["state"], training["steps"], training["upload"]) == ("reserved", steps, None)
    deployment.client("north", data, "--epsilon", PLENTY, seed=5)
    deployment.wait_for("server", "round 1: 1 of 1 replied")
    spent = account(deployment, "north")
    assert spent.trainings == [(1, 0, "reserved"), (1, 1, "released")]
    terms = spent.charges[0].terms
    both = Accountant((Spend(terms.noise_multiplier, terms.sampling_rate, 2 * steps),))
    print(f"recorded ε {spent.epsilon:.3f}; a fresh engine per round would print {spent.epsilon_of_a_round:.3f}")
    assert spent.epsilon == pytest.approx(both.epsilon(terms.delta), abs=EXACT)
    assert spent.epsilon_of_a_round < spent.epsilon - 0.5


def test_a_server_killed_inside_a_round_is_taken_up_again_at_no_cost(deploy, tmp_path):
    """The server dies in round 2, when south has sent its update and north, record by record, still trains.

    The new server finds both as they were, and Adam's moments in FedSVD's coordinates.
    """
    files = {name: write_rows(tmp_path / f"{name}.jsonl", seed, rows=600)
             for seed, name in enumerate(("north", "south"))}
    server = ("--min-clients", 2, "--min-replies", 2, "--seed", 5, "--rounds", 3, *SMALL, "--local-steps", 3,
              "--batch-size", 120, "--server-optimizer", "adam", "--server-options", "beta1=0.5,decay=1",
              "--strategy-options", "period=1")
    whole, broken = deploy("whole"), deploy("broken")
    for deployment in (whole, broken):
        deployment.server(*server)
        deployment.client("north", files["north"], "--epsilon", PLENTY, "--micro-batch", 1, seed=5)
        deployment.client("south", files["south"], "--epsilon", PLENTY, seed=5)
    broken.wait_for("south", "round 2/3: sent")
    assert account(broken, "north").trainings[-1] == (2, 0, "reserved")
    kill(broken, "server")
    broken.resume()
    for deployment in (whole, broken):
        assert deployment.end("server") == 0, deployment.log("server")
        assert deployment.end("north") == deployment.end("south") == 0, deployment.log("north")
    assert "goes on after round 1 of 3" in broken.log("server")
    assert broken.adapter() == whole.adapter()
    for name in files:
        assert account(broken, name).trainings == [(round, 0, "released") for round in (1, 2, 3)]
        assert account(broken, name).epsilon == pytest.approx(account(whole, name).epsilon, abs=EXACT)
    report = json.loads((broken.out / "report.json").read_text())
    assert report["resumed_after_rounds"] == [1] and [line["round"] for line in report["rounds"]] == [1, 2, 3]
    assert report["strategy"]["optimizer"] == {
        "name": "adam", "lr": 0.01, "decay": 1.0, "beta1": 0.5, "beta2": 0.99, "tau": 0.001, "correct_bias": 0}
    log = chain.read(broken.out / chain.FILE)
    assert not log.wrong and log.head == report["audit_head"]
    told = [(line["event"], line["round"]) for line in log.lines]
    assert ("resumed", 1) in told and [round for event, round in told if event == "closed"] == [1, 2, 3]
    assert [told.count(("accepted", round)) for round in (1, 2, 3)] == [2, 2, 2]
    signed = map(str, broken.folder.glob("state/*/*/privacy.json"))
    assert audit_log(["verify", str(broken.out), "--head", log.head, "--report", *signed]) == 0


def test_a_run_that_was_stopped_goes_on_when_server_and_clients_are_started_again(deploy, tmp_path):
    """The run is stopped in round 2, when south has sent its update and north still trains."""
    files = {name: write_rows(tmp_path / f"{name}.jsonl", seed, rows=600)
             for seed, name in enumerate(("north", "south"))}
    whole, broken = deploy("whole"), deploy("broken")
    for deployment in (whole, broken):
        deployment.server("--min-clients", 2, "--min-replies", 2, "--seed", 5, "--rounds", 3, *SMALL,
                          "--local-steps", 3, "--batch-size", 120)
        deployment.client("south", files["south"], "--epsilon", PLENTY, seed=5)
        deployment.client("north", files["north"], "--epsilon", PLENTY, "--micro-batch", 1, seed=5)
    broken.wait_for("south", "round 2/3: sent")
    assert account(broken, "north").trainings[-1] == (2, 0, "reserved")
    broken.processes["server"].send_signal(signal.SIGINT)
    assert broken.end("server") == 130 and broken.end("north") == broken.end("south") == 0, broken.log("north")
    stopped = json.loads((broken.out / "report.json").read_text())
    assert (stopped["ended"], stopped["finished_rounds"]) == ("stopped", 1)
    assert account(broken, "north").trainings[-1] == (2, 0, "released"), "finished and kept"
    assert "finishes its training and keeps the result" in broken.log("north")

    assert broken.resume("--rounds", 4).wait(60 * PATIENCE) == 2
    assert "begun with rounds 3, now 4" in broken.log("server")
    broken.resume()
    for name, data in files.items():
        broken.client(name, data, "--epsilon", PLENTY, seed=6)
    for deployment in (whole, broken):
        assert deployment.end("server") == 0, deployment.log("server")
        assert deployment.end("north") == deployment.end("south") == 0, deployment.log("north")
    for name in files:
        once, again = account(whole, name), account(broken, name)
        assert again.trainings == once.trainings == [(round, 0, "released") for round in (1, 2, 3)]
        assert [c.sha256 for c in again.charges[:2]] == [c.sha256 for c in once.charges[:2]], "sent as it was stored"
    report = json.loads((broken.out / "report.json").read_text())
    assert (report["ended"], report["resumed_after_rounds"]) == ("finished", [1])


LIVES, LONGEST_S = 22 if WHOLE else 8, 12.0


def test_a_client_killed_at_any_moment_has_been_charged_for_all_that_the_server_received(tmp_path, checkpoint):
    """Each process lives for a random part of the time that the first one took for three rounds, or of `LONGEST_S`."""
    server = Server(tmp_path, checkpoint("bert"), rounds=500, max_participations=500)
    choice, received, number, sent = random.Random(3), {}, 0, None

    def go_on():
        """Give the next order, or take the answer to the last one."""
        nonlocal number, sent
        if sent is None and server.engine.idle():
            number += 1
            sent = server.order(number)
        elif sent is not None and server.engine.wait([sent], 0.02).get(sent, "lost") != "lost":
            answer, sent = server.reply(sent), None
            if isinstance(answer, Upload):
                received[number] = tensors_digest(answer.tensors)

    def check():
        charges = server.charges()
        begun = {charge.round: charge for charge in charges if charge.state != "voided"}
        assert {round: begun[round].sha256 for round in received} == received
        assert all(begun[round].state == "released" for round in received)
        terms = charges[0].terms
        recorded, truth = (Accountant((Spend(terms.noise_multiplier, terms.sampling_rate, steps),)).epsilon(terms.delta)
                           for steps in (sum(charge.steps for charge in begun.values()), 2 * len(received)))
        assert recorded >= truth > 0

    began, life = time.monotonic(), None
    try:
        for _ in range(LIVES):
            server.client("--epsilon", PLENTY)
            end = None if life is None else time.monotonic() + choice.uniform(0, life)
            while len(received) < 3 if end is None else time.monotonic() < end:
                assert server.deployment.processes["north"].poll() is None, server.log()
                go_on()
            life = life or min(LONGEST_S, time.monotonic() - began)
            kill(server.deployment, "north")
            while server.engine.get_node_ids():
                server.engine.wait([], 0.02)
            if sent is not None and server.engine.wait([sent], 0.0).get(sent) == "uploaded":
                go_on()
            check()
    finally:
        server.engine.close("the test is over")
        server.deployment.__exit__()


@dataclass
class Call:
    """A system call, and the lines at which strace saw it begin and end."""

    name: str
    arguments: str
    begin: int
    end: int

    def wrote(self, data):
        """Return whether the call was given these bytes, among others."""
        strings = re.findall(r'"((?:[^"\\]|\\.)*)"', self.arguments)
        return data in "".join(strings).encode().decode("unicode_escape").encode("latin-1")


def system_calls(log):
    """Return the calls in an strace log in the order in which they began.

    strace splits a call into two lines if another thread's call comes between.
    """
    under_way, calls = {}, []
    for number, line in enumerate(log.read_text().splitlines()):
        if resumed := re.match(r"(\d+) +<\.\.\. \w+ resumed>", line):
            calls.append(Call(*under_way.pop(resumed[1]), number))
        elif begun := re.match(r"(\d+) +(\w+)\((.*)", line):
            thread, name, arguments = begun.groups()
            if arguments.endswith("<unfinished ...>"):
                under_way[thread] = name, arguments, number
            else:
                calls.append(Call(name, arguments, number, number))
    return sorted(calls, key=lambda call: call.begin)


def trace(process, log):
    """Attach strace to a running process."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    traced = "trace=openat,write,writev,pwrite64,sendto,sendmsg,fsync,fdatasync,rename"
    tracer = subprocess.Popen(["strace", "-f", "-yy", "-x", "-s", "65536", "-e", traced, "-o", log,
                               "-p", str(process.pid)], stderr=subprocess.PIPE, text=True)
    said = tracer.stderr.readline()
    if "attached" not in said:
        tracer.wait()
        pytest.skip(f"strace may not trace here: {said.strip()[:100]}")
    return tracer


def test_a_real_client_has_charge_update_and_witness_on_the_disk_before_a_byte_of_the_update_leaves(deploy, tmp_path):
    """The client is traced from before its Join, when there is no server yet, to its end."""
    deployment = deploy("run")
    data = write_rows(tmp_path / "data" / "north.jsonl", 0)
    tracer = trace(deployment.client("north", data, "--epsilon", PLENTY, "--connect-timeout", 300), tmp_path / "calls")
    deployment.server("--min-clients", 1, "--rounds", 1, *SMALL)
    assert deployment.end("north") == deployment.end("server") == 0, deployment.log("north")
    tracer.communicate()
    [stored] = (deployment.folder / "state" / "north").glob("*/upload.safetensors")
    update = min(load_file(stored).items())[1].tobytes()[:32]

    calls = system_calls(tmp_path / "calls")
    order = []

    def first(name, where, data=b"", after=-1):
        order.append(next(call for call in calls if call.name == name and where in call.arguments and call.wrote(data)
                          and call.begin > after))

    def synchronised(where):
        order.append(next(call for call in calls if call.name in ("fsync", "fdatasync") and where in call.arguments
                          and call.begin > order[-1].end))

    wal, folder, witness = "ledger.sqlite-wal>", str(stored.parent), ".fedlora-witness-north.json.new"
    first("pwrite64", wal, b'"kind":"reserved"')
    synchronised(wal)
    first("write", f"<{folder}/", update)  # the training's result
    synchronised(f"{stored}.new>")
    first("rename", f"{stored}.new")
    synchronised(f"<{folder}>")
    first("pwrite64", wal, b'"kind":"stored"')
    synchronised(wal)
    first("write", f"{witness}>", after=order[-1].end)  # joining wrote it once already, as a trial
    synchronised(f"{witness}>")
    first("rename", witness, after=order[-1].end)
    synchronised(f"<{data.parent}>")
    first("pwrite64", wal, b'"kind":"released"')
    synchronised(wal)
    order.append(next(call for call in calls if call.wrote(update) and folder not in call.arguments))
    assert order[-1].name == "sendmsg" and f"{deployment.address.partition(':')[2]}]>" in order[-1].arguments
    assert all(before.end < after.begin for before, after in pairwise(order)), order
