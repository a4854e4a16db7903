"""The sensitivity that the noise must cover: how far one unit of privacy can move the clipped sum.

It is measured over thousands of random pairs of neighbours. For each pair both sums are computed from the start, by the
trainer's own code: without the unit, the other records stand at other places of other micro-batches.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlora.records import pack
from tests.covering import covering
from tests.families import FAMILIES
from tests.fedlora.private_training import clipped_sum, make_trainer, plan
from tests.tiny import VOCABULARY

UNITS, PRESENT = 6, 5
"""The number of units that are drawn or not, and of those that are always drawn.

All 2^6 subsets of the 6 units are summed, each beside the 5 others. That makes 6 · 2^5 pairs of neighbours."""


def random_draw(trainer, rng, unit):
    """Return (records, owners) of a draw with random lengths, tokens, labels, answers and numbers of rows in a unit."""
    sizes = np.ones(UNITS + PRESENT, dtype=int) if unit == "row" else rng.integers(1, 5, size=UNITS + PRESENT)
    owners = np.repeat(np.arange(UNITS + PRESENT), sizes)
    lengths = rng.integers(5, rng.choice([9, 13]), size=len(owners))  # one padded length, or two
    tokens = [rng.integers(10, VOCABULARY, size=n).tolist() for n in lengths]
    pad = trainer.task.tokenizer.pad_token_id
    if trainer.task.name == "classification":
        return pack(tokens, pad, labels=rng.integers(0, 2, size=len(owners)).tolist()), owners
    return pack(tokens, pad, answers=[[0, *rng.integers(0, 2, size=n - 2).tolist(), 1] for n in lengths]), owners


def sum_of(trainer, run, records, owners, units, unit):
    """Return the clipped sum if exactly these units are drawn."""
    indices = np.flatnonzero(np.isin(owners, units))
    numbers = np.unique(owners[indices], return_inverse=True)[1]
    return clipped_sum(trainer, run, records, indices, None if unit == "row" else numbers)


def movements(kind, run, unit, precision, rng):
    """Return |S - S'| / C for every pair of neighbours of one draw."""
    trainer = make_trainer(kind, run, precision=precision, micro_batch=[None, 9][rng.integers(2)])
    run = replace(run, clip_norm=float(10 ** rng.uniform(-1.5, -0.5)), adapter_scale=float(2 ** rng.normal()),
                  head_scale=float(2 ** rng.normal()))
    records, owners = random_draw(trainer, rng, unit)
    present = list(range(UNITS, UNITS + PRESENT))
    sums = [sum_of(trainer, run, records, owners, [*(u for u in range(UNITS) if subset >> u & 1), *present], unit)
            for subset in range(2**UNITS)]
    return np.array([(sums[subset] - sums[subset ^ 1 << removed]).norm().item() / run.clip_norm
                     for subset in range(2**UNITS) for removed in range(UNITS) if subset >> removed & 1])


@pytest.mark.parametrize(("kind", "task", "unit", "precision", "family", "options"), covering(
    [("bert", "classification"), ("llama", "causal-lm")], ["row", "patient"], ["fp32", "bf16"],
    [*((family, ()) for family in FAMILIES), ("flylora", (("k", 2.0),))]))
def test_one_unit_moves_the_sum_by_at_most_the_clip_norm(kind, task, unit, precision, family, options):
    rng = np.random.default_rng(list(f"{task} {unit} {precision} {family} {options}".encode()))
    moved = movements(kind, plan(family, task, family_options=options), unit, precision, rng)
    assert moved.max() <= 1
    assert (moved > 0.999).mean() > 0.2  # the bound is reached, so the test is not vacuous


def test_the_test_sees_patients_that_are_clipped_by_row():
    """Clip each row of a patient, and then sum: the sensitivity rises up to k·C, and the measurement shows it."""
    run = plan("lora", clip_norm=0.01)
    trainer = make_trainer("bert", run)
    records, owners = random_draw(trainer, np.random.default_rng(0), "patient")
    whole = clipped_sum(trainer, run, records, range(len(owners)))
    moved = [(whole - clipped_sum(trainer, run, records, np.flatnonzero(owners != unit))).norm().item()
             for unit in range(UNITS)]
    assert max(moved) > 1.5 * run.clip_norm


@pytest.mark.parametrize("unit", ["row", "patient"])
def test_gradients_of_any_size_are_held_by_the_clip_norm(unit):
    run = plan("lora", clip_norm=0.3)
    trainer = make_trainer("bert", run)
    head = next(p for spec, p in trainer.adapted.trained_parameters() if spec.name.startswith("head.") and p.dim() == 2)
    records, owners = random_draw(trainer, np.random.default_rng(3), unit)
    for factor in (1e-12, 1e6, 1e6):
        with torch.no_grad():
            head *= factor
        whole = sum_of(trainer, run, records, owners, range(UNITS + PRESENT), unit)
        for removed in range(3):
            others = [u for u in range(UNITS + PRESENT) if u != removed]
            moved = whole - sum_of(trainer, run, records, owners, others, unit)
            assert moved.norm() <= run.clip_norm
