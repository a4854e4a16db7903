"""The client's core in a run with secure aggregation: what it checks before a charge, and what it uploads."""

import dataclasses

import numpy as np
import pytest

from fedlora.plan import AGGREGATE, Refusal, Upload
from fedlora.privacy import Ledger
from fedlora.privacy.rng import RunStreams
from fedlora.secure_sum.integers import Grid
from fedlora.secure_sum.packages import SUM, sent_digest
from fedlora.secure_sum.rounding import rounded_noise
from fedlora.secure_sum.statements import Refused, Unreadable
from fedlora.wire import tensors_digest
from fedlora_client.state import FolderState
from fedlora_client.sum_part import PlainPart
from tests.client.test_session import Desk, make_plan


@pytest.fixture
def desk(checkpoint, tmp_path):
    made = Desk(checkpoint, FolderState(tmp_path / "state"), Ledger(tmp_path / "ledger.sqlite", simulated=True))
    made.plan = make_plan(mechanism=AGGREGATE, least_members=3, local_steps=1)
    return made


def part_of(desk, session, **changes):
    """Return a part with the plan's numbers, and with the noise of this client's own terms."""
    values = desk.trainer.adapted.layout.num_trained
    grid = Grid.fitting(values, clip_norm=desk.plan.clip_norm, expected_batch=desk.plan.expected_batch, members=3,
                        noise=session.terms.noise_multiplier)
    noise = session.terms.noise_multiplier * grid.sensitivity(values, session.terms.clip_norm)
    return PlainPart(**{"grid": grid, "values": values, "noise": noise} | changes)


def test_the_upload_is_the_part_s_vector_of_the_encoded_sum_alone(desk):
    session = desk.session()
    part = part_of(desk, session)
    upload = session.run_round(desk.order(1), desk.start, part=part)
    assert isinstance(upload, Upload) and upload.tensors.keys() == {SUM} and upload.steps == 1
    assert upload.tensors[SUM].dtype == part.grid.dtype and upload.tensors[SUM].shape == (part.values,)
    noise = rounded_noise(RunStreams("north", 7).stream(1, "noise"), part.noise, part.values)
    clipped_sum = part.grid.decode(upload.tensors[SUM]) - noise * part.grid.step
    assert 0 < np.linalg.norm(clipped_sum) <= 60 * desk.plan.clip_norm
    assert len(session.started) == 1 and session.released == 1


def test_an_upload_of_a_sum_that_is_asked_for_again_has_the_identical_bytes_and_asks_no_part(desk):
    session = desk.session()
    first = session.run_round(desk.order(1), desk.start, part=part_of(desk, session))
    spent = session.epsilon()
    again = desk.session(seed=8).run_round(desk.order(1), desk.start)
    assert again.tensors[SUM].tobytes() == first.tensors[SUM].tobytes() and desk.session().epsilon() == spent
    [charge] = desk.ledger.charges()
    assert charge.sha256 == tensors_digest(first.tensors)


class Wary(PlainPart):
    """A part that takes no cohort, or one vector only. It notes what it was asked."""

    def __init__(self, part, refuses):
        super().__init__(part.grid, part.values, part.noise)
        self.refuses, self.sent = refuses, None

    def accept(self, sent):
        self.sent = sent
        if self.refuses == "the cohort":
            raise Refused("the cohort holds a stranger")
        if self.refuses == "the shares":
            raise Unreadable("the shares that 'east' sealed cannot be opened")

    def masked(self, integers):
        if self.refuses == "the vector":
            raise Refused("its masks serve one vector only")
        return super().masked(integers)


def test_the_part_is_asked_with_the_digest_of_what_was_received_before_anything_is_charged(desk, caplog):
    session = desk.session()
    part = Wary(part_of(desk, session), "the cohort")
    assert session.run_round(desk.order(1), desk.start, part=part) == Refusal("policy")
    assert part.sent == sent_digest(tensors_digest(desk.trained), desk.frozen_sha256)
    assert "the cohort holds a stranger" in caplog.text and not session.started


def test_shares_that_cannot_be_opened_cost_the_round_alone_and_the_owner_is_told_whose(desk, caplog):
    session = desk.session()
    part = Wary(part_of(desk, session), "the shares")
    assert session.run_round(desk.order(1), desk.start, part=part) == Refusal("unavailable")
    assert "the shares that 'east' sealed cannot be opened" in caplog.text and not session.started


def test_a_vector_that_the_part_does_not_mask_is_not_sent_and_stays_charged(desk, caplog):
    session = desk.session()
    part = Wary(part_of(desk, session), "the vector")
    assert session.run_round(desk.order(1), desk.start, part=part) == Refusal("policy")
    assert "its masks serve one vector only" in caplog.text and len(session.started) == 1 and not session.released
    assert session.run_round(desk.order(1), desk.start, part=part_of(desk, session)) == Refusal("unavailable")


@pytest.mark.parametrize(("changes", "said"), [
    (lambda part: {"values": part.values + 1}, "values on the grid"),
    (lambda part: {"grid": dataclasses.replace(part.grid, clip_norm=0.4)}, "values on the grid"),
    (lambda part: {"grid": dataclasses.replace(part.grid, fraction_bits=part.grid.fraction_bits - 1)},
     "values on the grid"),
    (lambda part: {"grid": dataclasses.replace(part.grid, most=part.grid.most // 2)}, "values on the grid"),
    (lambda part: {"noise": 1.01 * part.noise}, "asks each client for noise of")])
def test_a_part_whose_numbers_are_not_the_plan_s_or_that_asks_for_more_noise_is_refused(desk, caplog, changes, said):
    session = desk.session()
    part = part_of(desk, session, **changes(part_of(desk, session)))
    assert session.run_round(desk.order(1), desk.start, part=part) == Refusal("policy")
    assert said in caplog.text and not session.started


def test_a_run_with_secure_aggregation_sends_nothing_outside_of_a_sum_and_one_without_takes_part_in_none(desk, caplog):
    session = desk.session()
    part = part_of(desk, session)
    assert session.run_round(desk.order(1), desk.start) == Refusal("policy")
    assert "without a secure sum, which this run's plan asks for" in caplog.text and not session.started
    plain = make_plan(run_id="cd" * 8)
    session = desk.session(plain)
    assert session.run_round(desk.order(1, plan=plain), desk.start, part=part) == Refusal("policy")
    assert "with a secure sum, which this run's plan does not have" in caplog.text and not session.started


def test_a_lower_clip_norm_of_the_client_takes_more_noise_over_it_on_the_same_grid(desk):
    session = desk.session(max_clip_norm=desk.plan.clip_norm / 4)
    assert session.terms.clip_norm == desk.plan.clip_norm / 4
    part = part_of(desk, session)
    upload = session.run_round(desk.order(1), desk.start, part=part)
    noise = rounded_noise(RunStreams("north", 7).stream(1, "noise"), part.noise, part.values)
    clipped_sum = part.grid.decode(upload.tensors[SUM]) - noise * part.grid.step
    assert 0 < np.linalg.norm(clipped_sum) <= 60 * session.terms.clip_norm
