"""A run's files, and a second server that resumes the run from them."""

import json
import resource

import numpy as np
import pytest

from fedlora.config import ServerConfig, read_config
from fedlora.plan import Refusal
from fedlora_server import checkpoint, round_state, rounds
from fedlora_server.engine import node_id
from fedlora_server.observer import Observer, RoundRecord
from fedlora_server.round_state import RoundOptions
from fedlora_server.rounds import Run, run_federation
from fedlora_simulations.in_process import InProcessEngine
from fedlora_strategies import FedSVD
from tests.federation import LinearSession
from tests.server.test_rounds import Federation, replace, same

NAMES = "abcdef"


class Crash(Exception):
    """Stands for the server's death in the middle of a run."""


class Crashing(Observer):
    """Crashes right before a round's orders, in the middle of its answers, or after its checkpoint."""

    def __init__(self, *, asked=None, answered=None, finished=None):
        self.when = {"asked": asked, "answered": answered, "finished": finished}

    def asked(self, round, attempt, names):
        if round == self.when["asked"]:
            raise Crash

    def answered(self, round, name, outcome):
        if round == self.when["answered"]:
            raise Crash

    def finished(self, record):
        if record.round == self.when["finished"]:
            raise Crash


class Remembering(LinearSession):
    """A client that sends a stored update again, as real ones do. `trained` counts its trainings."""

    def __init__(self, name, layout):
        super().__init__(name, layout)
        self.stored, self.trained = {}, 0

    def run_round(self, plan, tensors):
        if plan.key not in self.stored:
            self.trained += 1
            self.stored[plan.key] = super().run_round(plan, tensors)
        return self.stored[plan.key]


def federation(names=NAMES, **changes):
    run = Federation(names, **dict(rounds=4, max_participations=2) | changes)
    for name in names:
        replace(run, name, Remembering(name, run.layout))
    return run


def crashed(folder, observer, run=None, **options):
    run = run or federation()
    checkpoint.begin(folder, {"lr": 0.1, "labels": ("x", "y"), "eval_data": None}, run.plan, {})
    with pytest.raises(Crash):
        run.run(out=folder, observer=observer, **dict(clients_per_round=3) | options)
    return run


def resumed(folder, clients, *, evaluate=None, observer=None, recipe=None, **options):
    """Resume the run by a new server, with the clients of the old one."""
    run = Federation(clients.sessions, clients.plan.strategy, rounds=clients.plan.rounds, recipe=recipe,
                     max_participations=clients.plan.max_participations)
    for name, session in clients.sessions.items():
        replace(run, name, session)
    left = checkpoint.take_up(folder)
    left.check(run.plan)
    values = dict(seed=5, wait_timeout_s=0.0, clients_per_round=3) | options
    again = Run(run.strategy, run.start, RoundOptions(**values), evaluate=evaluate, out=folder, left=left)
    return run_federation(run.engine, again, observer=observer)


def bare(record):
    return record.round, record.cohort, record.uploaded, record.update_norm


def lines(folder):
    return [json.loads(line)["round"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("moment", [{"asked": 1}, {"answered": 1}, {"finished": 1}, {"asked": 3}, {"answered": 3},
                                    {"finished": 4}])
def test_a_run_that_is_taken_up_again_ends_as_if_nothing_had_happened(tmp_path, moment):
    """Each client may take part in two of four rounds, so the cohorts show whether participations were remembered."""
    whole = federation().run(clients_per_round=3)
    first = crashed(tmp_path, Crashing(**moment))
    result = resumed(tmp_path, first)
    assert result.ended == "finished" and same(result.state, whole.state)
    assert list(map(bare, result.records)) == list(map(bare, whole.records))
    assert all(session.trained == 2 for session in first.sessions.values()), "none trained twice for a round"
    [begun] = {moment.get("asked"), moment.get("answered")} - {None} or {moment["finished"] + 1}
    assert result.resumed == (begun - 1,) and lines(tmp_path) == [1, 2, 3, 4]
    assert checkpoint.load(tmp_path)[1] == 4


def test_the_clients_that_were_asked_are_asked_again_for_the_attempts_that_they_know(tmp_path):
    """Client a declines at first, so the round asks another as a backup, in attempt 1, before the server dies."""
    class Busy(Remembering):
        def run_round(self, plan, tensors):
            return Refusal("unavailable") if plan.round == 2 else super().run_round(plan, tensors)

    class BackupAsked(Observer):
        def answered(self, round, name, outcome):
            if round == 2 and outcome == "uploaded" and name == backups[0]:
                raise Crash

        def asked(self, round, attempt, names):
            if round == 2 and attempt:
                backups.extend(names)

    run, backups, asked = federation("abcd", rounds=3, max_participations=3), [], []
    [busy] = set(cohort_of(run, 2)) - set(cohort_of(run, 2)[1:])
    replace(run, busy, Busy(busy, run.layout))
    crashed(tmp_path, BackupAsked(), run, clients_per_round=2, min_replies=2)

    class Told(Observer):
        def asked(self, round, attempt, names):
            asked.append((round, attempt, names))

    result = resumed(tmp_path, run, clients_per_round=2, min_replies=2, observer=Told())
    assert result.ended == "finished" and (2, 1, tuple(backups)) in asked
    assert [round for round, *_ in asked].count(2) == 2 and result.records[1].attempts == 2
    assert run.sessions[backups[0]].stored.keys() >= {(run.plan.run_id, 2, 1)}
    assert all(len({key[:2] for key in session.stored}) == session.trained for session in run.sessions.values())


def cohort_of(run, round):
    """Return the two clients that are asked in a round if nothing goes wrong."""
    whole = federation("".join(run.sessions), rounds=3, max_participations=3).run(clients_per_round=2)
    return whole.records[round - 1].cohort


def test_min_clients_need_only_be_there(tmp_path):
    """After three rounds, only the clients of the fourth may still take part."""
    first = crashed(tmp_path, Crashing(finished=3), min_clients=6)
    assert resumed(tmp_path, first, min_clients=6).ended == "finished"


@pytest.mark.parametrize("moment", [{"asked": 1}, {"answered": 1}, {"finished": 1}])
def test_a_run_goes_on_without_a_client_that_does_not_come_back(tmp_path, monkeypatch, moment):
    monkeypatch.setattr(rounds, "RETURN_S", 0.2)
    first = crashed(tmp_path, Crashing(**moment), federation(max_participations=4), min_clients=6)
    result = resumed(tmp_path, first, min_clients=7)
    assert result.ended == "finished" and result.rounds == 4


def test_a_client_that_is_back_late_sends_what_it_trained_and_is_no_backup(tmp_path, monkeypatch):
    """It returns while the round waits, and would ask backup clients in its place."""
    monkeypatch.setattr(round_state, "RETURN_S", 0.0)
    first = crashed(tmp_path, Crashing(answered=3))
    whole, late = federation().run(clients_per_round=3), []

    def idle(self):
        return [node for node in listed(self) if node not in late]

    def wait(self, message_ids, timeout_s):
        late.clear()
        return waited(self, message_ids, timeout_s)

    listed, waited = InProcessEngine.idle, InProcessEngine.wait
    monkeypatch.setattr(InProcessEngine, "idle", idle)
    monkeypatch.setattr(InProcessEngine, "wait", wait)
    late.extend(map(node_id, NAMES))
    result = resumed(tmp_path, first)
    assert result.ended == "finished" and same(result.state, whole.state)
    assert all(session.trained == 2 for session in first.sessions.values()), "none trained twice for a round"
    assert [record.attempts for record in result.records] == [1, 1, 1, 1]


def test_what_is_left_is_as_readable_as_the_umask_has_it_and_a_full_disk_is_an_error_of_the_system(tmp_path):
    federation().run(out=tmp_path)
    assert (tmp_path / "checkpoint.safetensors").stat().st_mode == (tmp_path / "metrics.jsonl").stat().st_mode
    (tmp_path / "checkpoint.safetensors.new").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, "ab" * 8, 1, {"x": np.zeros(1, np.float32)}, {})


def test_a_line_for_which_the_disk_had_no_room_leaves_nothing_and_is_whole_the_next_time(tmp_path):
    record = RoundRecord(1, cohort=("a", "b"), evaluation={"accuracy": 0.5})
    checkpoint.note(tmp_path, record)
    whole = (tmp_path / checkpoint.LINES).read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, before[1]))  # room to begin the line, but not to end it
    try:
        with pytest.raises(OSError):
            checkpoint.note(tmp_path, record)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / checkpoint.LINES).read_bytes() == whole
    checkpoint.note(tmp_path, record)
    assert (tmp_path / checkpoint.LINES).read_bytes() == 2 * whole


def test_what_a_crash_cut_off_is_dropped_and_done_anew(tmp_path):
    whole = federation().run(clients_per_round=3)
    first = crashed(tmp_path, Crashing(finished=2))
    third = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1]) | {"round": 3}
    with (tmp_path / "metrics.jsonl").open("a") as file:  # a whole line without its checkpoint, then half a line
        file.write(json.dumps(third) + "\n" + json.dumps(third)[:40])
    result = resumed(tmp_path, first)
    assert same(result.state, whole.state) and [record.round for record in result.records] == [1, 2, 3, 4]
    assert lines(tmp_path) == [1, 2, 3, 4]


def test_a_start_that_was_evaluated_is_not_evaluated_again(tmp_path):
    seen = []

    def evaluate(state):
        seen.append(state)
        return {"accuracy": 0.5, "loss": float("nan")}

    first = crashed(tmp_path, Crashing(finished=1), evaluate=evaluate)
    result = resumed(tmp_path, first, evaluate=evaluate)
    assert len(seen) == 5 and [record.round for record in result.records] == [0, 1, 2, 3, 4]
    assert result.records[1].evaluation["loss"] != result.records[1].evaluation["loss"], "a number again, not a number"


def test_the_options_come_back_and_another_plan_is_refused(tmp_path):
    run = federation()
    options = vars(read_config(ServerConfig, [
        "--lr=0.1", "--labels=x,y", "--targets=query,value", "--round-timeout=inf", "--insecure", "--column=text=note",
        "--server-optimizer=adam", "--server-options=beta1=0,tau=1e-4", "--strategy-options=period=2",
        f"--eval-data={tmp_path / 'held out.jsonl'}", "--out=elsewhere"]))
    checkpoint.begin(tmp_path, options, run.plan, {})

    def given(*arguments):
        return vars(read_config(ServerConfig, [f"--resume={tmp_path}", *arguments],
                                 begun_with=checkpoint.options_of))

    assert read_config(ServerConfig, []).resume is None
    assert given() == options | {"out": None, "labels": None, "resume": tmp_path}
    assert given("--lr=0.2", "--no-insecure") == options | {"out": None, "labels": None, "resume": tmp_path, "lr": 0.2,
                                                            "insecure": False}
    left = checkpoint.take_up(tmp_path)
    assert left.plan == run.plan and left.state is None and left.round == 0
    with pytest.raises(ValueError, match=r"rounds 4, now 5.*Leave these options out"):
        left.check(Federation(NAMES, rounds=5, max_participations=2).plan)


@pytest.mark.parametrize(("named", "track"), [(["console", "plots"], ()), (["console", "csv"], ("csv", "no-plots")),
                                              (["plots"], ("no-console",))])
def test_a_run_that_was_begun_with_the_older_option_for_trackers_keeps_its_trackers(tmp_path, named, track):
    checkpoint.begin(tmp_path, {"trackers": named}, federation().plan, {})
    given = read_config(ServerConfig, [f"--resume={tmp_path}"], begun_with=checkpoint.options_of)
    assert given.track == track and set(given.trackers) - {"page"} == set(named)  # the page came with --track


def test_what_the_server_does_cannot_change_while_a_run_lasts_even_where_its_memory_would_fit(tmp_path):
    run, adam = federation(), FedSVD.recipe.with_optimizer("adam", {"beta1": 0.0})
    checkpoint.begin(tmp_path, {}, run.plan, {}, (), adam.described())
    left = checkpoint.take_up(tmp_path)
    left.check(run.plan, adam.described())
    for other in (FedSVD.recipe.with_optimizer("yogi", {"beta1": 0.0}), FedSVD.recipe.with_optimizer("adam", {})):
        with pytest.raises(ValueError, match=r"optimizer.*now.*Leave these options out"):
            left.check(run.plan, other.described())
    checkpoint.begin(tmp_path, {}, run.plan, {})  # as an earlier version wrote it
    checkpoint.take_up(tmp_path).check(run.plan, adam.described())


@pytest.mark.parametrize(("write", "message"), [
    (lambda folder: None, r"no run.json; name the --out folder"),
    (lambda folder: (folder / "run.json").write_text("{"), "cannot be read"),
    (lambda folder: (folder / "run.json").write_text("{}"), "no options"),
    (lambda folder: (folder / "run.json").write_text('{"options": {}, "plan": {}, "resumed": []}'), "version"),
])
def test_a_folder_without_a_run_is_refused(tmp_path, write, message):
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        checkpoint.take_up(tmp_path)


@pytest.mark.parametrize(("file", "content"), [
    ("checkpoint.safetensors", "x" * 100), ("asked.json", "{}"), ("asked.json", "[]"),
    ("metrics.jsonl", '{"round": 1}\n')])
def test_a_damaged_file_of_a_run_is_named_and_stays(tmp_path, file, content):
    crashed(tmp_path, Crashing(asked=2))
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=rf"--resume: {tmp_path} is damaged .*{file}"):
        checkpoint.take_up(tmp_path)
    assert (tmp_path / file).read_text() == content
