"""The client's core with a real, tiny model: what is charged, what is sent again and what is declined."""

import dataclasses
import gc
import math
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from fedlora import models
from fedlora.adapters import attach, attach_planned, initial_tensors
from fedlora.adapters.sketches import sketch_layout, sketch_plan, sketch_tensors
from fedlora.data import Rows
from fedlora.plan import WIRE_DTYPES, ModelRef, Refusal, Refused, RoundPlan, RunPlan, Upload
from fedlora.privacy import Accountant, Forbidden, Ledger, RosterFacts, RunStreams, RunTerms, Spend, calibrate
from fedlora.privacy.accounting import pld_epsilon, prv_epsilon
from fedlora.privacy.ledger.anchor import unseal
from fedlora.privacy.report import privacy_report, read_signed, verify
from fedlora.privacy.trade_off import attack
from fedlora.tasks import task_for
from fedlora.training import Trainer
from fedlora.wire import rounded, tensors_digest
from fedlora_client.session import ClientSession, Limits
from fedlora_client.session_report import Foresight, reported_run, write_privacy_report
from fedlora_client.state import FolderState, MemoryState
from fedlora_client.terms import with_room

WORDS = ("good", "bad", "the", "film", "was", "very", "day")


def rows(count=60):
    rng = np.random.default_rng(0)
    labels = tuple(str(int(v)) for v in rng.integers(0, 2, count))
    texts = tuple(" ".join(rng.choice(WORDS, 5)) for _ in labels)
    return Rows("text", texts, None, None, labels, ("rows.jsonl",), np.zeros(count, np.int64), np.arange(1, count + 1))


def make_plan(**changes):
    return RunPlan(**{
        "run_id": "ab" * 8, "fedlora_version": "0.1.0", "strategy": "ffa-lora", "family": "frozen-a", "private": True,
        "model": ModelRef("local", "a" * 64, "b" * 64, "c" * 64), "task": "classification", "labels": ("0", "1"),
        "max_length": 16, "rank": 2, "alpha": 2.0, "targets": ("query",), "train_head": True, "dropout": 0.0,
        "rounds": 3, "max_participations": 2, "local_steps": 2, "expected_batch": 6, "optimizer": "sgd", "lr": 0.1,
        "clip_norm": 0.5, "adapter_scale": 1.0, "head_scale": 1.0, "weight_by_examples": False} | changes)


class Desk:
    """One client with everything that its session needs; `session()` does what a (re)started process would do."""

    def __init__(self, checkpoint, state, ledger):
        self.state, self.ledger, self.plan = state, ledger, make_plan()
        loaded = models.load(checkpoint("bert"), "classification", 2)
        adapted = attach(loaded, family="frozen-a", rank=2, alpha=2.0, targets=("query",), train_head=True)
        self.start = initial_tensors(adapted, init="orthonormal", seed=0)
        task = task_for(self.plan, loaded.tokenizer)
        self.trainer, self.records = Trainer(adapted, task, device="cpu", precision="fp32"), task.encode(rows())
        shared = {spec.name: self.start[spec.name] for spec in adapted.layout.frozen}
        self.trained = {spec.name: self.start[spec.name] for spec in adapted.layout.trained}
        self.frozen_sha256 = tensors_digest(shared)

    def session(self, plan=None, seed=7, approve=lambda terms: None, anchors=False, **limits):
        limits = Limits(**{"epsilon": 8.0} | limits)
        return ClientSession(plan or self.plan, self.trainer, self.records, limits, self.state,
                             RunStreams("north", seed), self.ledger, "north", approve=approve, anchors=anchors)

    def order(self, round, attempt=0, plan=None, left_s=math.inf):
        return RoundPlan(plan or self.plan, round, attempt, self.frozen_sha256, until=time.monotonic() + left_s)


@pytest.fixture
def desk(checkpoint, tmp_path):
    return Desk(checkpoint, FolderState(tmp_path / "state"), Ledger(tmp_path / "ledger.sqlite", simulated=True))


def test_an_upload_moves_only_the_trained_tensors_and_says_nothing_un_noised(desk):
    upload = desk.session().run_round(desk.order(1), desk.start)
    assert isinstance(upload, Upload)
    assert upload.tensors.keys() == desk.trained.keys()
    assert any(np.any(upload.tensors[name] != desk.trained[name]) for name in desk.trained)
    assert upload.num_examples is None and upload.train_loss is None
    assert upload.steps == 2 and upload.noise_multiplier > 0 and upload.delta == 1e-5


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
def test_a_repeated_order_gets_the_identical_bytes_at_no_cost_even_after_a_restart(desk, wire_dtype):
    desk.plan = make_plan(wire_dtype=wire_dtype)
    session = desk.session()
    first = session.run_round(desk.order(1), desk.start)
    spent = session.epsilon()
    restarted = desk.session(seed=8)
    again = restarted.run_round(desk.order(1), desk.start)
    assert {n: t.tobytes() for n, t in again.tensors.items()} == {n: t.tobytes() for n, t in first.tensors.items()}
    assert restarted.epsilon() == spent
    [charge] = desk.ledger.charges()
    assert charge.sha256 == tensors_digest(first.tensors) == tensors_digest(rounded(first.tensors, wire_dtype))


def test_a_real_ledgers_anchor_is_made_when_an_upload_leaves_and_tells_of_its_release(desk, tmp_path):
    """An upload that is sent again gets a new anchor: the stored upload has none."""
    desk.ledger = Ledger(tmp_path / "real" / "ledger.sqlite")
    session = desk.session(anchors=True)
    first = session.run_round(desk.order(1), desk.start)
    again = desk.session(anchors=True).run_round(desk.order(1), desk.start)
    assert desk.state.stored_upload(desk.order(1)).anchor == b"" != first.anchor != again.anchor != b""
    book = desk.ledger.book()
    assert [charge.state for charge in book.charges.values()] == ["released"]
    told = [unseal(desk.ledger.fingerprint_key(), upload.anchor) for upload in (first, again)]
    assert told == [(book.rows, book.head)] * 2, "sending again adds no row"


def test_only_a_real_ledger_sends_an_anchor_and_only_where_the_server_keeps_it(desk, tmp_path):
    assert desk.session(anchors=True).run_round(desk.order(1), desk.start).anchor == b""
    desk.ledger, desk.state = Ledger(tmp_path / "real" / "ledger.sqlite"), MemoryState({})
    assert desk.session(anchors=False).run_round(desk.order(1), desk.start).anchor == b""


def test_an_order_that_was_begun_and_not_finished_stays_charged_and_is_not_trained_twice(desk):
    session = desk.session()
    assert session.run_round(desk.order(1), desk.start, stop=lambda: True) == Refusal("unavailable")
    restarted = desk.session()
    assert restarted.epsilon() > 0 and restarted.started == ((1, 0),)
    assert restarted.run_round(desk.order(1), desk.start) == Refusal("unavailable")
    assert isinstance(restarted.run_round(desk.order(1, attempt=1), desk.start), Upload)


def test_an_upload_that_the_ledger_does_not_know_is_not_sent(desk, monkeypatch):
    """The process dies after the upload's file is written and before the ledger notes it."""
    def killed(upload):
        save_upload(upload)
        raise KeyboardInterrupt

    save_upload = desk.state.save_upload
    monkeypatch.setattr(desk.state, "save_upload", killed)
    with pytest.raises(KeyboardInterrupt):
        desk.session().run_round(desk.order(1), desk.start)
    assert desk.state.stored_upload(desk.order(1)) is not None
    assert desk.session().run_round(desk.order(1), desk.start) == Refusal("unavailable")


def test_gradients_that_are_not_finite_are_told_in_the_local_log(desk, caplog, monkeypatch):
    trained = desk.trainer.train
    monkeypatch.setattr(desk.trainer, "train", lambda *given: dataclasses.replace(trained(*given), nonfinite=3))
    assert isinstance(desk.session().run_round(desk.order(1), desk.start), Upload)
    assert "gradients of 3 drawn records were not finite" in caplog.text


def test_the_charge_is_on_the_disk_before_a_record_is_read(desk):
    session = desk.session()
    seen = []
    session.run_round(desk.order(1), desk.start, stop=lambda: bool(seen.append(session.started)))
    assert seen and all(started == ((1, 0),) for started in seen)


def test_a_round_for_whose_upload_there_is_no_room_is_declined_and_costs_nothing(desk, caplog, monkeypatch):
    session = desk.session()
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=5))
        assert session.run_round(desk.order(1), desk.start) == Refusal("unavailable")
    assert session.started == () and "room for 5 bytes" in caplog.text
    assert isinstance(session.run_round(desk.order(1, attempt=1), desk.start), Upload)


def test_an_order_whose_time_is_up_is_refused_and_charges_nothing(desk):
    session = desk.session()
    answer = session.run_round(desk.order(1, left_s=0.0), desk.start)
    assert answer.code == "too-late" and session.started == () and session.epsilon() == 0.0


def test_a_client_that_could_not_begin_in_time_charges_nothing(desk):
    """The preparation before the charge may take long, such as loading a model; the deadline is checked after it."""
    session, order = desk.session(), desk.order(1, left_s=0.2)
    begun = session.begin(order, desk.start, prepare=lambda: time.sleep(0.3))
    assert begun.code == "too-late" and session.started == () and session.epsilon() == 0.0
    assert isinstance(session.run_round(desk.order(1, attempt=1, left_s=60.0), desk.start), Upload)


def test_training_stops_when_its_time_is_up_and_stays_charged(desk):
    session, order = desk.session(), desk.order(1, left_s=30.0)
    late = dataclasses.replace(order, until=time.monotonic() + 1.0)
    begun = session.begin(late, desk.start)
    while not late.is_late:
        time.sleep(0.05)
    result = desk.trainer.train(begun, lambda: late.is_late)
    assert result.steps < desk.plan.local_steps
    assert session.finish(late, result) == Refusal("unavailable") and session.started == ((1, 0),)


def test_a_deadline_changes_no_bit_and_is_no_part_of_what_an_order_is(desk, tmp_path):
    order, dated = desk.order(1), desk.order(1, left_s=60.0)
    assert order == dated and hash(order) == hash(dated) and order.key == dated.key
    first = desk.session().run_round(dated, desk.start)
    again = desk.session().run_round(order, desk.start)
    assert all(np.array_equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    assert desk.session().started == ((1, 0),), "it is the same order"


def test_no_more_rounds_are_started_than_the_noise_was_calibrated_to(desk):
    session = desk.session()
    for number in (1, 2):
        assert isinstance(session.run_round(desk.order(number), desk.start), Upload)
    assert session.run_round(desk.order(3), desk.start) == Refusal("budget")
    assert 7.5 < session.epsilon() <= 8.0


def test_the_shared_tensors_are_needed_once(desk):
    session = desk.session()
    assert session.run_round(desk.order(1), desk.trained) == Refusal("missing-tensors")
    assert session.started == ()
    first = session.run_round(desk.order(1), desk.start)
    assert isinstance(first, Upload)
    assert isinstance(desk.session().run_round(desk.order(2), first.tensors), Upload)


def test_shared_tensors_that_changed_travel_alone_and_are_completed_from_what_is_held(desk):
    session = desk.session()
    names = sorted(desk.start.keys() - desk.trained.keys())
    assert len(names) > 1
    held, changed = {name: desk.start[name] for name in names}, {names[0]: -desk.start[names[0]]}
    other = {name: 2 * array for name, array in held.items()}
    desk.frozen_sha256 = tensors_digest(held | changed)
    assert session.run_round(desk.order(1), {**desk.trained, **changed}) == Refusal("missing-tensors")
    desk.state.save_frozen(tensors_digest(other), other)
    assert session.run_round(desk.order(1), {**desk.trained, **changed}) == Refusal("missing-tensors")
    assert session.started == ()
    desk.state.save_frozen(tensors_digest(held), held)
    assert isinstance(session.run_round(desk.order(1), {**desk.trained, **changed}), Upload)
    assert desk.state.frozen()[0] == desk.frozen_sha256


def test_tensors_that_do_not_fit_are_refused_before_anything_is_charged(desk):
    session = desk.session()
    name = next(iter(desk.trained))
    for bad in (np.full_like(desk.start[name], np.nan), desk.start[name][:1], desk.start[name].astype(np.float64)):
        answer = session.run_round(desk.order(1), {**desk.start, name: bad})
        assert isinstance(answer, Refusal) and answer.code == "invalid-tensors"
    assert session.started == ()


def test_a_plan_that_changes_within_the_run_is_refused_by_the_old_and_by_a_new_process(desk):
    other = make_plan(clip_norm=50.0)
    assert desk.session().run_round(desk.order(1, plan=other), desk.start) == Refusal("policy")
    desk.session().run_round(desk.order(1), desk.start)
    with pytest.raises(Refused, match="policy"):
        desk.session(plan=other)


def test_a_new_process_cannot_go_on_with_stricter_limits_than_its_noise_was_made_for(desk):
    desk.session().run_round(desk.order(1), desk.start)
    for stricter in ({"epsilon": 1.0}, {"max_clip_norm": 0.1}, {"delta": 1e-6}, {"declared_size": 50}):
        with pytest.raises(Refused, match="policy"):
            desk.session(**stricter)


def test_shared_tensors_that_are_not_the_named_ones_are_refused_and_not_kept(desk):
    name = next(iter(desk.start.keys() - desk.trained.keys()))
    answer = desk.session().run_round(desk.order(1), {**desk.start, name: desk.start[name] * 2})
    assert isinstance(answer, Refusal) and answer.code == "invalid-tensors"
    assert desk.state.frozen() == ("", {})


def test_privacy_of_the_two_sides_must_agree(desk):
    with pytest.raises(Refused, match="--epsilon inf"):
        desk.session(epsilon=float("inf"))
    with pytest.raises(Refused, match="--privacy off"):
        desk.session(plan=make_plan(private=False))


def test_a_batch_too_large_for_the_declared_size_is_refused_and_the_log_names_the_one_that_fits(desk, caplog):
    with pytest.raises(Refused) as refused:
        desk.session(plan=make_plan(expected_batch=30))
    assert refused.value.refusal == Refusal("policy")
    assert "at most 12" in caplog.text


def test_the_owner_may_allow_a_higher_sampling_rate(desk):
    plan = make_plan(expected_batch=30)
    assert desk.session(plan=plan, max_sampling_rate=0.5).terms.sampling_rate == 0.5


def test_dropout_is_refused_under_privacy_alone_as_its_masks_depend_on_other_records(desk, caplog):
    with pytest.raises(Refused) as refused:
        desk.session(plan=make_plan(dropout=0.1))
    assert refused.value.refusal == Refusal("policy") and "dropout 0.1" in caplog.text
    assert desk.ledger.terms("north", "ab" * 8) is None
    desk.session(plan=make_plan(dropout=0.1, private=False), epsilon=float("inf"))


def test_an_adjustment_that_does_not_fit_the_adapter_is_refused_before_anything_is_charged(desk, checkpoint):
    desk.session(plan=make_plan(adjustment="scaled-gd"))
    adapted = attach(models.load(checkpoint("bert"), "classification", 2), family="bra", rank=2, alpha=2.0,
                     targets=("query",), train_head=True)
    desk.trainer = Trainer(adapted, desk.trainer.task, device="cpu", precision="fp32")
    run = make_plan(run_id="cd" * 8, family="bra", adjustment="scaled-gd")
    with pytest.raises(ValueError, match="--adjustment scaled-gd: it scales the gradients of the two factors"):
        desk.session(plan=run)
    assert desk.ledger.terms("north", run.run_id) is None


def test_the_client_may_lower_the_clip_norm_and_never_raise_it(desk, tmp_path):
    assert desk.session(max_clip_norm=0.1).terms.clip_norm == 0.1
    desk.ledger, desk.state = Ledger(None, simulated=True), MemoryState({})
    assert desk.session(max_clip_norm=9.0).terms.clip_norm == 0.5


def test_without_privacy_the_number_of_examples_and_the_loss_are_sent_and_no_noise(desk):
    plan = make_plan(private=False, weight_by_examples=True)
    upload = desk.session(plan=plan, epsilon=float("inf")).run_round(desk.order(1, plan=plan), desk.start)
    assert upload.num_examples == 60 and upload.train_loss > 0
    assert upload.noise_multiplier is None and upload.delta is None


def test_a_run_after_another_gets_the_noise_that_the_lifetime_leaves_room_for_and_none_is_begun_beyond_it(desk, caplog):
    desk.ledger.declare("north", epsilon=10.0, delta=1e-5)
    first = desk.session(epsilon=4.0)
    for number in (1, 2):
        first.run_round(desk.order(number), desk.start)
    later = make_plan(run_id="cd" * 8)
    second = desk.session(plan=later, epsilon=8.0)
    assert second.terms.noise_multiplier > second.noise_for_run
    assert not desk.ledger.fits("north", dataclasses.replace(
        second.terms, run_id="ef" * 8, noise_multiplier=second.terms.noise_multiplier - 0.001))
    for number in (1, 2):
        assert isinstance(second.run_round(desk.order(number, plan=later), desk.start), Upload)
    assert 9.0 < desk.ledger.lifetime("north").spent <= 10.0
    desk.ledger.declare("north", epsilon=9.0, delta=1e-5)
    with pytest.raises(Refused, match="budget"):
        desk.session(plan=make_plan(run_id="12" * 8))
    assert "lifetime" in caplog.text


@pytest.mark.parametrize(("least", "found"), [(9.7, 9.7), (10.0, 10.0), (12.3, None)])
def test_more_than_ten_times_the_noise_is_not_taken_on(least, found):
    wanted = RunTerms("r", "p", "row", 1000, 0.1, 1.0, 1e-5, 1.0, {"adapter": 1.0}, 1, 1)
    terms = with_room(wanted, lambda other: other.noise_multiplier >= least)
    assert (terms and terms.noise_multiplier) == (found and pytest.approx(found))


def test_restarts_between_rounds_cost_nothing_where_a_fresh_engine_would_have_forgotten(desk, tmp_path):
    for number in (1, 2):
        assert isinstance(desk.session().run_round(desk.order(number), desk.start), Upload)
    restarted = desk.session().epsilon()
    assert len(desk.session().started) == 2
    terms = desk.session().terms
    spent = [Accountant((Spend(terms.noise_multiplier, terms.sampling_rate, steps),)).epsilon(terms.delta)
             for steps in (4, 2)]
    assert restarted == pytest.approx(spent[0], abs=1e-6)
    assert spent[1] < restarted - 0.5  # what an accountant that started afresh each round would print


def test_what_the_owners_policy_forbids_is_refused_before_anything_is_charged(desk):
    def forbid(terms):
        raise Forbidden(f"noise {terms.noise_multiplier}")

    with pytest.raises(Refused, match="policy"):
        desk.session(approve=forbid)
    assert desk.ledger.charges() == () and desk.ledger.terms("north", "ab" * 8) is None


def test_a_size_that_is_not_announced_leaves_the_upload_without_noise_and_delta(desk):
    upload = desk.session(announce_size=False).run_round(desk.order(1), desk.start)
    assert upload.noise_multiplier is None and upload.delta is None


def test_a_report_says_what_uploads_stated_and_verifies(desk, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    for announce in (True, False):
        desk.ledger, desk.state = Ledger(None, simulated=True), MemoryState({})
        session = desk.session(announce_size=announce, seed=None)
        session.run_round(desk.order(1), desk.start)
        path = write_privacy_report(tmp_path / str(announce), reported_run(
            session, server="127.0.0.1:9092", labels=("0", "1"), refusals=[(2, "budget")]))
        verified = verify(read_signed(path))
        report = verified.report
        assert verified.spent == pytest.approx(session.epsilon(), abs=1e-6)
        assert report["mechanism"]["family"] == desk.plan.family
        said = {item["what"] for item in report["left_without_noise"]}
        assert any("noise multiplier" in what for what in said) == announce
        assert {"label names", "refusal in round 2"} <= said


@pytest.mark.parametrize("trust", ["local", "aggregate"])
def test_the_figures_of_the_next_training_are_found_while_the_present_one_lasts(desk, trust):
    plan = make_plan(mechanism="distributed-gaussian", least_members=6, colluding=1, local_steps=1,
                     max_participations=3)
    session = desk.session(plan, seed=None, trust=trust, least_members=6)
    noise = session.terms.aggregate_noise_multiplier or 1.5
    desk.ledger.note_roster("north", plan.run_id, RosterFacts("ab" * 32, 6, 1, noise + 0.1, 4e3, 2.0**-14, 1.0, 300,
                                                                True))
    foresight = Foresight()

    def charge(round):
        desk.ledger.reserve("north", plan.run_id, round, 0).begin()
        facts = reported_run(session, server="127.0.0.1:9092", labels=("0", "1"), refusals=[])
        return privacy_report(facts), facts, session.epsilon()

    computed = (prv_epsilon, pld_epsilon, attack)
    _, facts, _ = charge(1)
    foresight.begin(facts, session)
    foresight.wait()
    misses = [function.cache_info().misses for function in computed]
    report, _, epsilon = charge(2)
    assert [function.cache_info().misses for function in computed] == misses
    assert report["privacy"]["spent"]["steps"] == 2 and 0 < epsilon < session.reserved()


def test_the_report_of_secure_sums_holds_the_rosters_of_the_ledger_and_both_guarantees(desk, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    plan = make_plan(mechanism="distributed-gaussian", least_members=6, colluding=1, local_steps=1)
    session = desk.session(plan, seed=None, trust="aggregate", least_members=6)
    terms = session.terms
    roster = RosterFacts("ab" * 32, 6, 1, terms.aggregate_noise_multiplier + 0.1, 4000.0, 2.0**-14, 1.0, 300, True)
    desk.ledger.note_roster("north", plan.run_id, roster)
    desk.ledger.reserve("north", plan.run_id, 1, 0).begin()
    facts = reported_run(session, server="127.0.0.1:9092", labels=("0", "1"), refusals=[])
    verified = verify(read_signed(write_privacy_report(tmp_path / "report", facts)))
    assert verified.report["sums"]["rosters"][0]["digest"] == roster.digest
    assert verified.aggregate < session.reserved() <= 8.0 < verified.epsilon
    assert verified.report["lifetime"]["spent"] >= session.epsilon() > verified.report["sums"]["spent"]["epsilon"]
    desk.ledger.end_run("north", plan.run_id)
    with pytest.raises(Refused) as refused:  # whose noise is charged cannot change within a run
        desk.session(plan, seed=None, least_members=6)
    assert refused.value.refusal.code == "policy"


def test_a_private_start_costs_one_participation_more_and_all_together_fit_epsilon(desk, checkpoint):
    plan = make_plan(private_start=True)
    layout = sketch_layout(plan, desk.trainer.adapted.layout, desk.trainer.adapted.missing)
    tensors = sketch_tensors(layout, desk.start, seed=0)
    made = []

    def sketch_trainer():
        adapted = attach_planned(models.load(checkpoint("bert"), "classification", 2), sketch_plan(plan))
        made.append(Trainer(adapted, desk.trainer.task, device="cpu", precision="fp32"))
        return made[-1]

    session = ClientSession(plan, desk.trainer, desk.records, Limits(8.0), desk.state, RunStreams("north", 7),
                            desk.ledger, "north", sketch_trainer=sketch_trainer)
    assert session.terms.noise_multiplier == calibrate(8.0, session.terms.delta, session.terms.sampling_rate,
                                                       (1 + plan.max_participations) * plan.local_steps)
    frozen_sha256 = tensors_digest({spec.name: tensors[spec.name] for spec in layout.frozen})
    sent = session.run_round(RoundPlan(plan, 0, 0, frozen_sha256), tensors)
    layout.check(sent.tensors, "trained")
    assert (sent.steps, session.started, session.ledger.charges()[0].state) == (2, ((0, 0),), "released")
    for number in (1, 2):
        assert isinstance(session.run_round(desk.order(number, plan=plan), desk.start), Upload)
    assert session.run_round(desk.order(3, plan=plan), desk.start) == Refusal("budget")
    assert 7.5 < session.epsilon() <= 8.0 and len(made) == 1


def test_a_simulated_client_holds_nothing_of_what_it_sent(desk):
    desk.ledger, desk.state = Ledger(None, simulated=True), MemoryState({})
    session = desk.session()
    upload = session.run_round(desk.order(1), desk.start)
    held = [weakref.ref(array) for array in upload.tensors.values()]
    assert held and all(reference() is not None for reference in held)
    del upload
    gc.collect()
    assert not any(reference() is not None for reference in held)
    assert session.run_round(desk.order(1), desk.start) == Refusal("unavailable")
