"""Warnings about training that goes wrong: said when it does, once, and never when it goes well."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fedlora.figures import MAJORITY
from fedlora_server.advice import Advice
from fedlora_server.observer import RoundRecord
from fedlora_server.trackers import Watched
from tests.federation import plan_of

PLAN = replace(plan_of("fedsvd"), rounds=9, max_participations=9)


def told(*rounds, before=(), plan=PLAN):
    """Return what is said of a run of these rounds: (figures, update norm) each; the first is the start's."""
    lines = []
    advice = Advice(Watched("a run", Path(), Console(file=io.StringIO()), {}), lines.append)
    advice.begin(plan, before)
    for number, (figures, norm) in enumerate(rounds):
        advice.finished(RoundRecord(number, evaluation=figures, update_norm=norm))
    return lines


def figures(accuracy, loss=0.5, **recalls):
    return {"accuracy": accuracy, MAJORITY: 0.6, "loss": loss, **{f"recall/{label}": r for label, r in recalls.items()}}


def test_nothing_is_said_of_a_run_that_learns():
    assert not told(*((figures(0.6 + 0.03 * n, 0.7 - 0.02 * n, no=1.0, yes=0.1 * n), 0.1 + 0.05 * n or None)
                      for n in range(10)))


def test_a_model_that_predicts_one_label_is_named_with_the_label_after_a_third():
    lines = told(*((figures(0.6 if n else 0.4, no=1.0, yes=0.0), 0.1) for n in range(5)))
    assert [line for line in lines if "predicted as no" in line] == [lines[0]] and lines[0].startswith("round 3: ")
    assert any("above 0.600" in line and "best: 0.600" in line for line in lines) and len(lines) == 2


def test_where_the_server_s_optimizer_does_the_steps_it_is_its_rate_that_is_named():
    poor = [(figures(0.4, 0.5 + 0.1 * n, no=1.0, yes=0.0), 9.0 if n == 4 else 0.1) for n in range(5)]
    client, server = (told(*poor, plan=replace(PLAN, local_steps=steps)) for steps in (2, 1))
    assert len(client) == len(server) == 4
    assert all("--lr (now 0.3)" in line for line in client) and any("--local-steps (now 2)" in line for line in client)
    assert all("--server-lr" in line and "--lr (" not in line and "--local-steps" not in line for line in server)


def test_a_round_without_evaluation_says_nothing_of_figures():
    assert not told((figures(0.4), None), *(({}, 0.1) for _ in range(8)))


@pytest.mark.parametrize(("losses", "rises"), [
    ((0.7, 0.6, 0.65, 0.7, 0.75), True), ((0.7, 0.5, 0.55, 0.6, 0.65), False), ((0.7, 0.8, 0.75, 0.9, 0.85), False)])
def test_a_loss_that_rises_three_times_above_the_starts_is_said(losses, rises):
    lines = told(*((figures(0.9, loss), 0.1) for loss in losses))
    assert [("risen 3 times in a row" in line) for line in lines] == [True] * rises


def test_an_update_far_beyond_the_earlier_ones_is_said_once():
    lines = told(*((figures(0.9), norm) for norm in (None, 0.1, 0.12, 0.11, 1.5, 1.6)))
    assert len(lines) == 1 and lines[0].startswith("round 4: the adapter moved by 1.5, more than 10 times")


def test_a_resumed_run_is_judged_with_its_earlier_rounds():
    before = tuple(RoundRecord(n, evaluation=figures(0.9), update_norm=0.1) for n in range(1, 4))
    assert len(told((figures(0.9), 1.2), before=before)) == 0, "round 0 has no update to compare"
    lines = []
    advice = Advice(Watched("a run", Path(), Console(file=io.StringIO()), {}), lines.append)
    advice.begin(PLAN, before)
    advice.finished(RoundRecord(4, update_norm=2.0))
    assert len(lines) == 1
