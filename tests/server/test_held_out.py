"""Secure sums tell how the model does on held-out records, over ten rounds, each with the noise that it had."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from fedlora_server.held_out import ROUNDS, held_out_figures
from fedlora_server.observer import RoundRecord

CLIP_NORM, STEP = 2.0, 2.0**-15
UNIT = CLIP_NORM / math.sqrt(2)
PLAN = SimpleNamespace(task="classification", clip_norm=CLIP_NORM)


def told(rounds, *, noise=0.0):
    """Return the figures of each of some rounds, given as (number of right answers, number of records)."""
    roster = SimpleNamespace(noise=noise / STEP, grid=SimpleNamespace(step=STEP))
    records, figures = [], []
    for number, (right, drawn) in enumerate(rounds, start=1):
        sums = UNIT * (2 * right - drawn), UNIT * drawn
        figures.append(held_out_figures(PLAN, sums, records, roster, 4))
        records.append(RoundRecord(number, evaluation=figures[-1]))
    return figures


def test_the_accuracy_is_that_of_the_last_ten_rounds_together():
    last = told([(0, 50)] * 3 + [(40, 50)] * ROUNDS)[-1]
    assert last["held_out_accuracy"] == pytest.approx(0.8)
    reach = 1.96 * math.sqrt(0.8 * 0.2 / (50 * ROUNDS))
    assert last["held_out_accuracy/low"] == pytest.approx(0.8 - reach, abs=1e-4)
    assert last["held_out_accuracy/high"] == pytest.approx(0.8 + reach, abs=1e-4)
    nine = told([(0, 50)] * 3 + [(40, 50)] * (ROUNDS - 1))[-1]
    assert nine["held_out_accuracy"] == pytest.approx(0.8 * 0.9), "the last round without an answer is among the ten"


def test_noise_widens_the_interval_and_few_records_tell_nothing():
    quiet, loud = (told([(40, 50)] * 4, noise=noise)[-1] for noise in (0.0, 3.0))
    assert loud["held_out_accuracy"] == pytest.approx(quiet["held_out_accuracy"])
    assert loud["held_out_accuracy/low"] < quiet["held_out_accuracy/low"]
    assert loud["held_out_accuracy/noise"] == pytest.approx(2 * 3.0), "four clients' noise is twice one's"
    few = told([(1, 2)], noise=3.0)[-1]
    assert "held_out_accuracy" not in few and few["held_out_accuracy/drawn"] == pytest.approx(2 * UNIT)


def test_the_noise_of_each_round_is_that_of_the_clients_in_its_sum():
    roster = SimpleNamespace(noise=3.0 / STEP, grid=SimpleNamespace(step=STEP))
    sums = UNIT * 30, UNIT * 50
    before = [RoundRecord(1, evaluation=held_out_figures(PLAN, sums, [], roster, survivors)) for survivors in (4, 100)]
    one, other = (held_out_figures(PLAN, sums, [record], roster, 4) for record in before)
    assert one["held_out_accuracy/low"] > other["held_out_accuracy/low"]
