"""The round loop, over a real engine whose clients come, go, decline and forget."""

import json
import time
from collections import Counter
from threading import Event

import numpy as np
import pytest

from fedlora.plan import Refusal
from fedlora_server import checkpoint, round_state
from fedlora_server.observer import Observer
from fedlora_server.round_state import RoundOptions
from fedlora_server.rounds import Run, run_federation
from fedlora_simulations.in_process import InProcessEngine
from fedlora_strategies import strategy_class
from tests.federation import STRATEGIES, LinearSession, layout_of, plan_of, start_of

pytestmark = pytest.mark.usefixtures("one_at_a_time")


class Engine(InProcessEngine):
    """An engine that can have some clients receive orders and never answer."""

    silent = frozenset()

    def wait(self, message_ids, timeout_s):
        silent = {id for id, order in self._orders.items()
                  if self.name_of(order.message.metadata.dst_node_id) in self.silent}
        return super().wait([id for id in message_ids if id not in silent], min(timeout_s, 0.01))


class Federation:
    """A federation of linear clients with one-letter names, which records all that the loop tells its observer."""

    def __init__(self, names="abcd", strategy="fedsvd", recipe=None, silent="", **changes):
        self.plan = plan_of(strategy, **changes)
        self.layout = layout_of(self.plan.family)
        self.sessions = {name: LinearSession(name, self.layout) for name in names}
        self.engine = Engine(self.sessions, self.plan.run_id, self.layout)
        self.engine.silent = set(silent)
        self.strategy = strategy_class(strategy)(self.plan, self.layout, recipe=recipe)
        self.start = start_of(self.layout, 1)

    def run(self, *, observer=None, stop=None, out=None, evaluate=None, **options):
        values = dict(seed=5, wait_timeout_s=0.0) | options
        if out is not None:
            out.mkdir(exist_ok=True)
        run = Run(self.strategy, self.start, RoundOptions(**values), evaluate=evaluate, out=out)
        return run_federation(self.engine, run, observer=observer, stop=stop)

    def keys(self):
        return {name: session.keys for name, session in self.sessions.items()}


class Declining(LinearSession):
    """A client that declines the first `times` orders with `code`."""

    def __init__(self, name, layout, code, times=1000):
        super().__init__(name, layout)
        self.code, self.times, self.orders = code, times, 0

    def run_round(self, plan, tensors):
        self.orders += 1
        return Refusal(self.code) if self.orders <= self.times else super().run_round(plan, tensors)


class Calling(LinearSession):
    """A client that calls a function before it trains in a given round."""

    def __init__(self, name, layout, call):
        super().__init__(name, layout)
        self.call = call

    def run_round(self, plan, tensors):
        self.call(plan)
        return super().run_round(plan, tensors)


def replace(federation, name, session):
    federation.sessions[name] = session
    federation.engine.join(name, session)


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_rounds_are_run_with_all_clients_and_the_loss_falls(strategy):
    federation = Federation(strategy=strategy)
    result = federation.run()
    assert result.ended == "finished" and result.rounds == 3
    assert all(record.uploaded == tuple("abcd") for record in result.records)
    losses = [np.mean([s.loss(state) for s in federation.sessions.values()])
              for state in (federation.start, result.state)]
    assert losses[1] < losses[0]



def test_the_history_of_a_private_run_holds_what_each_client_states_once():
    result = Federation("ab", rounds=4, private=True).run()
    assert len({id(said) for record in result.records for said in record.disclosed.values()}) == 2
    assert all(record.disclosed["a"]["noise_multiplier"] == 1.5 for record in result.records)
    assert len({id(record.refused) for record in result.records}) == 1, "what is empty is held once, too"


def test_the_same_seed_gives_the_same_bits_whatever_the_order_of_joining():
    states = [Federation(names).run(clients_per_round=2).state for names in ("abcd", "dbca")]
    assert same(*states)


def test_cohorts_depend_on_the_seed_and_leave_no_client_out():
    def cohorts(seed):
        federation = Federation("abcdef", rounds=4, max_participations=2)
        result = federation.run(seed=seed, clients_per_round=3)
        assert result.ended == "finished"
        assert all(len(keys) == 2 for keys in federation.keys().values()), "4 rounds of 3 are 2 for each of 6"
        return [record.uploaded for record in result.records]

    assert cohorts(1) == cohorts(1)
    assert len({str(cohorts(seed)) for seed in range(4)}) > 1


def test_no_client_is_asked_more_often_than_the_plan_allows():
    federation = Federation("ab", rounds=3, max_participations=2)
    result = federation.run()
    assert result.rounds == 2 and result.ended == "wait-timeout"
    assert federation.keys() == {"a": [(1, 0), (2, 0)], "b": [(1, 0), (2, 0)]}


def in_training_order(federation):
    return [federation.engine.name_of(node) for node in federation.engine.get_node_ids()]


def test_a_round_closes_with_half_of_its_cohort_when_the_others_are_lost():
    federation = Federation("abcd")
    first, second, *others = in_training_order(federation)

    def part(plan):
        for name in others:
            federation.engine.leave(name)

    replace(federation, first, Calling(first, federation.layout, part))
    result = federation.run()
    assert result.ended == "finished" and set(result.records[0].cohort) == set("abcd")
    assert result.records[0].lost == tuple(sorted(others)) and result.records[1].lost == ()
    assert all(record.uploaded == tuple(sorted((first, second))) for record in result.records)


def test_a_short_round_keeps_its_uploads_and_asks_backup_clients_with_the_next_attempt():
    federation = Federation("abcd", rounds=1)
    first = Federation("abcd", rounds=1).run(clients_per_round=2).records[0].cohort
    for name in first[:1]:
        replace(federation, name, Declining(name, federation.layout, "unavailable"))
    result = federation.run(clients_per_round=2, min_replies=2)
    [record] = result.records
    assert record.attempts == 2 and record.refused == {first[0]: "unavailable"}
    assert first[1] in record.uploaded and len(record.uploaded) == 2
    [backup] = set(record.uploaded) - set(first)
    assert federation.keys()[backup] == [(1, 1)] and federation.keys()[first[1]] == [(1, 0)]


def test_nobody_trains_twice_for_one_key_and_free_backups_are_asked_before_those_that_declined():
    federation = Federation("abc", rounds=1)
    replace(federation, "a", Declining("a", federation.layout, "unavailable", times=1))
    replace(federation, "b", Declining("b", federation.layout, "unavailable", times=1))
    result = federation.run(min_replies=3)
    [record] = result.records
    assert record.uploaded == ("a", "b", "c") and record.refused == {}
    keys = federation.keys()
    assert keys["c"] == [(1, 0)] and all(attempt > 0 for name in "ab" for _, attempt in keys[name])


def test_a_client_that_always_declines_is_not_asked_for_ever():
    federation = Federation("ab")
    declining = [Declining(name, federation.layout, "unavailable") for name in "ab"]
    for session in declining:
        replace(federation, session.name, session)
    result = federation.run()
    assert result.ended == "wait-timeout" and result.rounds == 0 and same(result.state, federation.start)
    assert all(session.orders <= 3 for session in declining)


@pytest.mark.parametrize("code", ["policy", "budget", "model-mismatch"])
def test_a_client_that_declines_for_good_is_not_asked_again(code):
    federation = Federation("abc", rounds=3)
    declining = Declining("b", federation.layout, code)
    replace(federation, "b", declining)
    result = federation.run()
    assert result.ended == "finished" and declining.orders == 1
    assert result.records[0].refused == {"b": code} and result.records[1].refused == {}


def test_a_client_without_the_frozen_tensors_is_sent_them_again_and_loses_no_participation():
    federation = Federation("abc", strategy="fed-sb", rounds=3)

    def forget(plan):
        if (plan.round, plan.attempt) == (2, 0):
            federation.sessions["b"].held.clear()

    replace(federation, "b", Calling("b", federation.layout, forget))
    result = federation.run(min_replies=3)
    assert result.ended == "finished" and [r.attempts for r in result.records] == [1, 2, 1]
    assert federation.keys()["b"] == [(1, 0), (2, 1), (3, 0)]


def test_with_nobody_left_the_loop_says_that_it_waits_and_goes_on_when_somebody_comes():
    federation = Federation("a", rounds=1)
    told = []

    class Door(Observer):
        def waiting(self, needed, present, timeout_s):
            told.append((needed, present, timeout_s))
            federation.sessions["z"] = LinearSession("z", federation.layout)
            federation.engine.join("z", federation.sessions["z"])

    result = federation.run(min_replies=2, wait_timeout_s=20.0, observer=Door())
    assert told == [(1, 0, 20.0)]
    assert result.ended == "finished" and result.records[0].uploaded == ("a", "z")
    assert federation.keys() == {"a": [(1, 0)], "z": [(1, 1)]}


def test_a_lost_client_that_comes_back_is_asked_for_the_same_key_and_counts():
    federation = Federation("ab", rounds=1)

    first, second = in_training_order(federation)

    class Back(Observer):
        def waiting(self, needed, present, timeout_s):
            federation.engine.join(second, federation.sessions[second])

    replace(federation, first, Calling(first, federation.layout, lambda plan: federation.engine.leave(second)))
    result = federation.run(min_replies=2, wait_timeout_s=20.0, observer=Back())
    assert result.ended == "finished" and federation.keys()[second] == [(1, 0)]
    assert result.records[0].lost == () and result.records[0].attempts == 1


class Returning(Engine):
    """An engine whose clients, if they leave, return once the round has looked for them five times."""

    looks = 0

    def wait(self, message_ids, timeout_s):
        if self.absent.keys() - set(map(self.name_of, self.get_node_ids())):
            self.looks += 1
        if self.looks > 5:
            for name, session in self.absent.items():
                self.join(name, session)
        return super().wait(message_ids, timeout_s)


def lost_for_a_moment(**options):
    """Return a federation in which all clients but one leave while that one trains."""
    federation = Federation("abcd", rounds=1)
    engine = federation.engine = Returning(federation.sessions, federation.plan.run_id, federation.layout)
    first, *others = in_training_order(federation)
    engine.absent = {name: federation.sessions[name] for name in others}

    def part(plan):
        for name in others:
            engine.leave(name)

    replace(federation, first, Calling(first, federation.layout, part))
    return first, federation.run(**options).records[0]


def test_clients_that_are_lost_for_a_moment_are_given_the_time_to_come_back():
    _, record = lost_for_a_moment(wait_timeout_s=20.0)
    assert record.uploaded == tuple("abcd") and record.lost == ()


def test_a_round_closes_with_one_of_four_where_the_others_do_not_come_back():
    first, record = lost_for_a_moment(wait_timeout_s=0.0)
    assert record.uploaded == (first,) and len(record.lost) == 3


def test_the_first_round_waits_for_the_clients_it_needs():
    federation = Federation("a", rounds=1)
    told = []

    class Door(Observer):
        def waiting(self, needed, present, timeout_s):
            told.append((needed, present, timeout_s))
            name = "yz"[present - 1]
            federation.sessions[name] = LinearSession(name, federation.layout)
            federation.engine.join(name, federation.sessions[name])

    result = federation.run(min_clients=3, observer=Door())
    assert told == [(3, 1, None), (3, 2, None)] and result.records[0].uploaded == ("a", "y", "z")


def test_after_the_time_limit_a_round_closes_with_enough_uploads_and_cancels_the_rest():
    federation = Federation("abcd", rounds=1, silent="ac")
    result = federation.run(round_timeout_s=0.1, min_replies=2)
    [record] = result.records
    assert record.lost == ("a", "c") and record.uploaded == ("b", "d")
    assert federation.engine.idle() and not list(federation.engine.pull_messages(["1", "2", "3", "4"]))


def test_clients_whose_time_is_up_are_lost_and_the_round_closes_with_half_of_those_that_are_left():
    federation, told = Federation("abcdefgh", rounds=1, silent="abcdef"), []

    class Overdue(Observer):
        def overdue(self, round, names, missing):
            told.append((round, names, missing))

    [record] = federation.run(round_timeout_s=0.1, observer=Overdue()).records
    assert record.uploaded == ("g", "h") and record.lost == tuple("abcdef")
    assert told == [(1, record.lost, 0)], "half of the two that are left"


class Fresh(Observer):
    """Has a client with a new name join whenever clients were asked, or their time was up."""

    def __init__(self, federation, session, silent=False):
        self.federation, self.session, self.silent, self.asked_at = federation, session, silent, []

    def _come(self):
        engine = self.federation.engine
        name = f"fresh {len(list(engine.get_node_ids()))}"
        engine.silent |= {name} if self.silent else set()
        engine.join(name, self.session(name))

    def asked(self, round, attempt, names):
        self.asked_at.append(time.monotonic())
        self._come()

    def overdue(self, round, names, missing):
        self._come()


def test_new_names_that_never_answer_do_not_hold_a_round_beyond_its_time():
    federation = Federation("abcdef", rounds=1, silent="cdef")
    fresh = Fresh(federation, lambda name: LinearSession(name, federation.layout), silent=True)
    [record] = federation.run(round_timeout_s=0.2, observer=fresh).records
    assert record.uploaded == ("a", "b") and record.lost == tuple("cdef") and record.attempts == 1


def test_new_names_that_decline_at_once_are_asked_ever_more_rarely_and_hold_no_round():
    federation = Federation("abcdef", rounds=1, silent="b")
    for name in "cdef":
        replace(federation, name, Declining(name, federation.layout, "unavailable"))
    fresh = Fresh(federation, lambda name: Declining(name, federation.layout, "unavailable"))
    [record] = federation.run(round_timeout_s=2.0, observer=fresh).records
    assert record.uploaded == ("a",) and record.lost == ("b",)
    at_once = round_state.BACKUPS_AT_ONCE
    waits = np.diff(fresh.asked_at)[at_once:]  # by a clock that is read a little after each asking
    assert at_once < record.attempts <= 1 + at_once + 1 and all(waits >= 0.9)
    assert fresh.asked_at[-1] - fresh.asked_at[0] < 2.0, "once half of those left is there, nobody is asked any more"


def test_a_round_that_gets_too_few_uploads_asks_backup_clients_so_often_and_no_more(monkeypatch):
    monkeypatch.setattr(round_state, "BACKUPS_PER_ROUND", 3)
    federation = Federation("ab", rounds=1, silent="b")
    fresh = Fresh(federation, lambda name: LinearSession(name, federation.layout), silent=True)
    result = federation.run(round_timeout_s=0.05, min_replies=2, observer=fresh)
    assert result.ended == "wait-timeout" and len(fresh.asked_at) == 1 + 3
    assert result.why.startswith("round 1: b, fresh ") and result.why.endswith("lost")


def test_a_run_that_ends_for_want_of_clients_says_why_they_declined():
    federation = Federation("abc", rounds=2)
    for name in "ab":
        replace(federation, name, Declining(name, federation.layout, "model-mismatch"))
    replace(federation, "c", Declining("c", federation.layout, "policy"))
    result = federation.run()
    assert result.ended == "wait-timeout"
    assert result.why == ("round 1: a, b declined: the client's base model is not the plan's [model-mismatch]; "
                          "c declined: the client's policy does not allow this [policy]")


def test_an_explicit_number_of_replies_stands_whoever_is_lost():
    federation = Federation("abcd", rounds=1, silent="abc")
    result = federation.run(round_timeout_s=0.1, min_replies=2)
    assert result.ended == "wait-timeout" and result.rounds == 0


def test_a_client_that_missed_m_rounds_in_a_row_is_left_out_of_the_next_2_to_the_m_minus_1():
    federation = Federation("abc", rounds=12, max_participations=12, silent="b")
    records = federation.run(round_timeout_s=0.3).records
    assert [record.round for record in records if "b" in record.cohort] == [1, 3, 7]
    assert all(record.lost == ("b",) for record in records if "b" in record.cohort)


def test_who_declines_because_it_is_too_late_has_used_up_nothing_and_waits_its_turn():
    federation = Federation("abc", rounds=2)
    replace(federation, "b", Declining("b", federation.layout, "too-late", times=1))
    records = federation.run().records
    assert [record.uploaded for record in records] == [("a", "c"), ("a", "c")] and records[0].lost == ("b",)
    federation = Federation("ab", rounds=2, max_participations=1)
    replace(federation, "b", Declining("b", federation.layout, "too-late", times=1))
    assert [record.uploaded for record in federation.run().records] == [("a",), ("b",)]


def test_clients_that_missed_rounds_are_asked_where_too_few_others_are_there():
    federation = Federation("ab", rounds=3, silent="b")
    records = federation.run(round_timeout_s=0.05, min_replies=1).records
    assert ["b" in record.cohort for record in records] == [True, False, True]
    federation = Federation("ab", rounds=3, silent="b")

    class Waking(Observer):
        def finished(self, record):
            federation.engine.silent = set()

    records = federation.run(round_timeout_s=0.05, clients_per_round=4, observer=Waking()).records
    assert [set(record.cohort) for record in records] == 3 * [{"a", "b"}], "two are the quorum of four"


def test_an_answer_in_time_is_an_end_of_what_was_missed():
    federation = Federation("ab", rounds=6, max_participations=6, silent="b")

    class Waking(Observer):
        def finished(self, record):
            federation.engine.silent = {"b"} if record.round == 3 else set()

    records = federation.run(round_timeout_s=0.05, observer=Waking()).records
    assert [record.round for record in records if "b" in record.cohort] == [1, 3, 4, 6]
    assert [record.round for record in records if "b" in record.uploaded] == [3, 6]


def test_what_clients_missed_is_kept_with_the_run(tmp_path):
    federation = Federation("abc", rounds=3, silent="b")
    federation.run(round_timeout_s=0.05, out=tmp_path)
    asked = json.loads((tmp_path / "asked.json").read_text())
    assert asked["round"] == 3 and asked["missed"] == {"b": [1, 3]}
    assert checkpoint._asked(tmp_path).missed == {"b": (1, 3)}


def test_a_run_that_goes_on_with_fewer_clients_than_it_waited_for_says_so_once():
    federation, told = Federation("abc", rounds=4, max_participations=4), []
    leave = federation.engine.leave
    replace(federation, "a", Calling("a", federation.layout, lambda plan: plan.round == 2 and leave("b")))

    class Watch(Observer):
        def fewer(self, round, connected, needed):
            told.append((round, connected, needed))

    result = federation.run(min_clients=3, observer=Watch())
    assert result.ended == "finished" and told == [(3, 2, 3)]


def test_compared_runs_have_the_same_cohorts():
    cohorts = [[record.cohort for record in Federation("abcdef", strategy, rounds=6, run_id=run_id).run(
        clients_per_round=2).records] for strategy, run_id in (("fedsvd", "0" * 16), ("ffa-lora", "1" * 16))]
    assert cohorts[0] == cohorts[1] and len(set(cohorts[0])) > 2


def test_a_stop_returns_the_state_of_the_last_finished_round():
    whole = Federation("abc", rounds=1).run()
    federation, stop = Federation("abc", rounds=3), Event()
    replace(federation, "b", Calling("b", federation.layout, lambda plan: plan.round == 2 and stop.set()))
    result = federation.run(stop=stop)
    assert result.ended == "stopped" and result.rounds == 1 and same(result.state, whole.state)


def test_an_upload_that_is_not_finite_counts_as_declined_and_adds_nothing():
    federation = Federation("abc", rounds=1)

    class Broken(LinearSession):
        def run_round(self, plan, tensors):
            upload = super().run_round(plan, tensors)
            next(iter(upload.tensors.values()))[0] = np.inf
            return upload

    replace(federation, "b", Broken("b", federation.layout))
    result = federation.run()
    assert result.records[0].uploaded == ("a", "c") and result.records[0].refused == {"b": "invalid-tensors"}
    without = Federation("ac", rounds=1).run()
    assert same(result.state, without.state)


class Times(LinearSession):
    """A client that multiplies its update by a factor, from round `since` on."""

    def __init__(self, name, layout, factor, since=1):
        super().__init__(name, layout)
        self.factor, self.since = factor, since

    def run_round(self, plan, tensors):
        upload = super().run_round(plan, tensors)
        for name, array in upload.tensors.items() if plan.round >= self.since else ():
            array[:] = tensors[name] + self.factor * (array - tensors[name])
        return upload


def test_an_upload_that_goes_too_far_is_named_and_its_client_is_asked_again(tmp_path):
    federation, other = Federation("abcde", rounds=3), Federation("abde", rounds=3)
    replace(federation, "c", Times("c", federation.layout, 1e6))
    result = federation.run(out=tmp_path)
    assert result.ended == "finished" and same(result.state, other.run().state)
    for record in result.records:
        assert set(record.cohort) == set(record.uploaded) == set("abcde") and set(record.rejected) == {"c"}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all("times the lower median" in line["rejected"]["c"] for line in lines)


def test_a_state_with_ten_times_the_loss_of_the_start_is_made_again_without_the_longest_uploads():
    told = []

    class Doubt(Observer):
        def doubted(self, round, why):
            told.append((round, why))

    federation, other = Federation("abc", rounds=1), Federation("ab", rounds=1)
    replace(federation, "c", Times("c", federation.layout, 3.6))
    steps = 2 * federation.plan.lr  # one update moves the bias by this, the mean of three by nearly twice
    result = federation.run(observer=Doubt(), evaluate=lambda state: {
        "loss": 100.0 if state["head.out.bias"].max() > 1.5 * steps else 1.0})
    assert result.ended == "finished" and set(result.records[-1].rejected) == {"c"}
    assert told == [(1, "its loss, 100, is more than 10 times that of the start, 1")]
    assert same(result.state, other.run().state) and federation.keys() == {name: [(1, 0)] for name in "abc"}


@pytest.mark.parametrize("figure", [float("nan"), float("inf"), 1e9])
def test_a_run_whose_states_stay_bad_stops_with_the_last_good_one_and_names_the_rates(figure, tmp_path):
    recipe = strategy_class("fedsvd").recipe.with_optimizer("momentum", {"lr": 0.5})
    federation, seen = Federation("abc", recipe=recipe, rounds=3), []

    def evaluate(state):
        seen.append(state)
        return {"loss": 1.0 if len(seen) < 3 else figure}

    result = federation.run(out=tmp_path, evaluate=evaluate)
    assert result.ended == "diverged" and result.rounds == 1
    assert "--lr (now 0.3)" in result.why and "--server-lr (now 0.5)" in result.why
    stored = checkpoint.load(tmp_path)
    assert stored.round == 1 and same(stored.state, result.state) and same(stored.memory, federation.strategy.memory)
    assert same(stored.state, seen[1]) and all(np.isfinite(array).all() for array in stored.state.values())
    assert federation.keys() == {name: [(1, 0), (2, 0)] for name in "abc"}, "nobody trains again"
    assert federation.engine.idle() and not federation.engine._orders, "and no upload is kept"


def test_a_state_that_is_no_good_leaves_nothing_behind_where_no_upload_is_left():
    recipe = strategy_class("fedsvd").recipe.with_optimizer("momentum", {"lr": 0.5})
    federation = Federation("a", recipe=recipe, rounds=3)
    replace(federation, "a", Times("a", federation.layout, 4.0, since=2))
    seen, memories = [], []

    class Kept(Observer):
        def finished(self, record):
            memories.append(federation.strategy.memory)

    result = federation.run(observer=Kept(), evaluate=lambda state: seen.append(1) or {
        "loss": 1.0 if len(seen) < 3 else 100.0})
    assert result.ended == "diverged" and result.rounds == 1 and "lower --lr" in result.why
    assert len(federation.strategy.usual_norms) == 1 and same(federation.strategy.memory, memories[-1])
    assert set(federation.strategy.rejected) == set(federation.engine.get_node_ids()), "the only one is left out"


def test_a_run_that_is_taken_up_compares_with_the_rounds_before(tmp_path):
    def federation():
        made = Federation("ab", rounds=4, max_participations=4)
        replace(made, "b", Times("b", made.layout, 1e6, since=3))
        return made

    whole = federation().run(out=tmp_path / "whole")
    first, stop = federation(), Event()
    first.run(out=tmp_path / "cut", stop=stop, observer=Stopping(stop, after=2))
    checkpoint.begin(tmp_path / "cut", {}, first.plan, {})
    second = federation()
    run = Run(second.strategy, second.start, RoundOptions(seed=5, wait_timeout_s=0.0), out=tmp_path / "cut",
              left=checkpoint.take_up(tmp_path / "cut"))
    resumed = run_federation(second.engine, run)
    assert same(resumed.state, whole.state)
    assert [set(record.rejected) for record in resumed.records if record.round] == [set(), set(), {"b"}, {"b"}]
    assert [record.usual_norm for record in resumed.records] == [record.usual_norm for record in whole.records]


class Stopping(Observer):
    def __init__(self, stop, after):
        self.stop, self.after = stop, after

    def finished(self, record):
        if record.round == self.after:
            self.stop.set()


def test_each_round_leaves_its_checkpoint_and_its_line(tmp_path):
    seen = []

    class Reader(Observer):
        def finished(self, record):
            run_id, round, state, memory = checkpoint.load(tmp_path)
            lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
            assert run_id == federation.plan.run_id and [line["round"] for line in lines] == list(range(round + 1))
            assert not memory
            seen.append((round, state))

    federation = Federation("abc")
    result = federation.run(out=tmp_path, observer=Reader(), evaluate=lambda state: {"accuracy": 0.5})
    assert [round for round, _ in seen] == [0, 1, 2, 3] and same(seen[-1][1], result.state)
    assert same(seen[0][1], federation.start)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["evaluation"] == {"accuracy": 0.5} and last["bytes_up"] == 3 * 4 * federation.strategy.traffic.up
    assert last["disclosed"]["a"]["num_examples"] == 12 and last["update_norm"] > 0
    with pytest.raises(ValueError, match="no round"):
        checkpoint.load(tmp_path / "nowhere")


def test_the_lines_of_a_run_that_diverged_are_json(tmp_path):
    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    Federation("ab", rounds=1).run(out=tmp_path, evaluate=lambda state: {"loss": float("nan")})
    lines = [json.loads(line, parse_constant=no_constant)
             for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["evaluation"] for line in lines] == [{"loss": "nan"}] * 2


def test_evaluation_comes_every_so_many_rounds_and_after_the_last():
    calls = Counter()
    federation = Federation("ab", rounds=5, max_participations=5)
    result = federation.run(evaluate=lambda state: calls.update(all=1) or {"loss": 1.0}, evaluate_every=2)
    assert [record.round for record in result.records if record.evaluation] == [0, 2, 4, 5] and calls["all"] == 4


def test_a_private_run_records_no_loss_and_no_counts():
    result = Federation("ab", strategy="fed-sb", private=True, rounds=1).run()
    assert result.records[0].train_loss is None
    assert result.records[0].disclosed["a"] == {"steps": 2, "delta": 1e-5, "noise_multiplier": 1.5}


@pytest.mark.parametrize("name", ["clients_per_round", "min_clients", "min_replies"])
def test_options_below_one_are_refused(name):
    with pytest.raises(ValueError, match="--" + name.replace("_", "-")):
        RoundOptions(seed=0, **{name: 0})


def test_more_replies_than_clients_asked_are_refused():
    with pytest.raises(ValueError, match="lower --min-replies or raise --clients-per-round"):
        RoundOptions(seed=0, clients_per_round=2, min_replies=3)


@pytest.mark.parametrize(("options", "most", "rounds"), [
    ({"min_clients": 2}, 6, 6), ({"min_clients": 2, "min_replies": 2}, 3, 3), ({"min_clients": 2}, 3, 3),
    ({"min_clients": 4, "clients_per_round": 2}, 1, 2), ({"min_clients": 4, "clients_per_round": 3}, 2, 3),
    ({"min_clients": 4, "clients_per_round": 3, "min_replies": 3}, 2, 2)])
def test_how_many_rounds_are_possible_is_how_many_the_clients_do(options, most, rounds):
    assert RoundOptions(seed=0, **options).rounds_within(6, most) == rounds
    run = Federation("abcd"[:options["min_clients"]], rounds=6, max_participations=most).run(
        wait_timeout_s=0.2, **options)
    assert len(run.records) - (not run.records[0].round) == rounds


def test_no_round_is_possible_without_enough_clients():
    assert RoundOptions(seed=0, min_clients=2, min_replies=3).rounds_within(10, 10) == 0
