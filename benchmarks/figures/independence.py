"""How far one record moves the clipped sum, with tensors chosen by a hostile server.

The measured value is ‖S − S′‖ / C, where S is the sum of clipped gradients before noise, S′ the same sum without one
record, and C the clip norm. The noise is calibrated for 1. The tensors come from three searches: by the package
hypothesis, by gradients, and by a steep head that decides between two roundings of its input. Tensors that a client
would refuse for their size are counted and measured all the same. The last row emulates a processor that rounds
differently from 16 rows on, as some do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora.adapters.layout import MOST_RECEIVED
from fedlora.data import Rows
from fedlora.plan import Tensors
from fedlora.records import pack
from fedlora.tasks import Records

from ..hostile import (
    KINDS,
    adapters,
    head_inputs,
    magnified,
    most_different_layer,
    rounding_otherwise,
    structured,
    threshold_head,
    train,
)
from ..measure import RATIO, Figure, Row, Settings, Unavailable, exactly
from ..subjects import Subject, precisions, rows_of, save_random_bert, subject

INPUTS, INPUTS_QUICK = 1500, 24
MOST_RECORDS = 64
GIVEN_MODEL = 0.14
"""Share of the inputs for --model; the others go to a tiny random model, which is a hundred times as fast."""

EMULATED = 0.04
"""Share of bf16 among the inputs for --model if the device emulates bf16, where one input takes half a minute."""

EMULATED_ROWS = 16
"""Number of rows from which the emulated processor rounds differently."""

GENERATORS = ("hypothesis", "gradients", "decision")
PLACES = ("first", "middle", "last", "random")
TOKENS = {"cpu": (6, 11, 16), "cuda": (6, 20, 40)}
"""Lengths of the texts in tokens, by device; each is padded to a different length."""


@dataclass(frozen=True)
class Case:
    """One input of a search, without its tensors: what is trained on, and how.

    Attributes:
        generator: one of `GENERATORS`, the search for the tensors.
        model: name of the base model.
        precision: "fp32" or "bf16".
        threads: CPU threads.
        head: whether the head is trained.
        records: number of records, with the one that is left out.
        place: one of `PLACES`, where the record that is left out stands.
        lengths: "one" or "several" padded lengths.
        seed: seed of the texts and tensors.
    """

    generator: str
    model: str
    precision: str
    threads: int
    head: bool
    records: int
    place: str
    lengths: str
    seed: int


@dataclass(frozen=True)
class Outcome:
    """The measurement of one input.

    Attributes:
        case: the input.
        ratio: ‖S − S′‖ / C.
        equal: whether the other records' gradients are the same, bit for bit.
        refused: whether a client would refuse the tensors for their size.
    """

    case: Case
    ratio: float
    equal: bool
    refused: bool


@dataclass(frozen=True)
class Neighbours:
    """Two neighbouring data sets: records with and without one record, whose token ids are `text`."""

    with_it: Records
    without: Records
    text: np.ndarray


def cases(total: int, models: Sequence[str], threads: Sequence[int], *, bf16: float) -> list[Case]:
    """Draw cases so that, for each generator and model, each field's values occur equally often (but see `bf16`).

    Args:
        total: number of cases.
        models: names of the given model and of the tiny one; `GIVEN_MODEL` is the first one's share.
        threads: numbers of CPU threads.
        bf16: share of bf16 in the cases of the first model.
    """
    random = np.random.default_rng(22)

    def spread(values: Sequence[Any], count: int) -> list[Any]:
        return [values[i] for i in random.permutation(np.resize(np.arange(len(values)), count))]

    found: list[Case] = []
    for i, generator in enumerate(GENERATORS):
        count = total // len(GENERATORS) + (i < total % len(GENERATORS))
        given = round(count * GIVEN_MODEL)
        rounded = round(bf16 * given)
        drawn = [[models[0]] * given + [models[1]] * (count - given),
                 spread(["bf16"] * rounded + ["fp32"] * (given - rounded), given) + spread(
                     ("fp32", "bf16"), count - given)]
        drawn += [spread(values, given) + spread(values, count - given) for values in (
            tuple(threads), (True, False), tuple(range(1, MOST_RECORDS + 1)), PLACES, ("one", "several"), range(2**16))]
        found += [Case(generator, *fields) for fields in zip(*drawn, strict=True)]
    return found


def neighbours(one: Subject, case: Case, device: str, label: int | None = None) -> Neighbours:
    """Make a case's records with and without one of them.

    Args:
        one: gives the tokenizer.
        case: the case.
        device: decides the lengths of the texts.
        label: label of all records. Then all records of one length have the same text, so that one decision of the head
            decides for all of them. None for random texts and labels.
    """
    random = np.random.default_rng(case.seed)
    tokenizer = one.trainer.task.tokenizer
    embedded: int = one.adapted.model.get_input_embeddings().weight.shape[0]  # type: ignore
    words = np.setdiff1d(np.arange(min(len(tokenizer), embedded)), tokenizer.all_special_ids)
    texts = [random.choice(words, length) for length in TOKENS[device]]
    which = random.integers(0, len(texts) if case.lengths == "several" else 1, case.records)
    content = [texts[kind] if label is not None else random.choice(words, len(texts[kind])) for kind in which]
    gone = {"first": 0, "middle": case.records // 2, "last": case.records - 1,
            "random": int(random.integers(case.records))}[case.place]
    chosen = random.integers(0, 2, case.records) if label is None else np.full(case.records, label)
    kept = [i for i in range(case.records) if i != gone]

    def records(indices: Sequence[int]) -> Records:
        return pack([content[i] for i in indices], tokenizer.pad_token_id, labels=[int(chosen[i]) for i in indices])

    return Neighbours(records(range(case.records)), records(kept), content[gone])


def outcome(one: Subject, case: Case, pair: Neighbours, state: Tensors) -> Outcome:
    """Measure how far the record that one of the two data sets lacks moves the clipped sum."""
    try:
        one.adapted.layout.check(state, "state", most=MOST_RECEIVED)
        refused = False
    except ValueError:
        refused = True
    present, absent = (train(one, records, state) for records in (pair.with_it, pair.without))
    ratio = float((present.clipped - absent.clipped).norm()) / one.plan.clip_norm
    return Outcome(case, ratio, not absent.gradients - present.gradients, refused)


def by_decision(one: Subject, case: Case, device: str) -> Outcome:
    """Measure with a steep head over adapters whose B is zero, as at the start of a run.

    If the head is trained, A is zero too.
    """
    pair = neighbours(one, case, device, 0)
    state = adapters(one, 0.0 if case.head else 1.0, case.seed)
    if not case.head:
        state |= {name: np.zeros_like(array) for name, array in state.items() if name.endswith(".B")}
    return _decided(one, case, pair, state, device)


def by_gradients(one: Subject, case: Case, device: str) -> Outcome:
    """Measure with a steep head over adapters that magnify the layer in which the batches round most differently."""
    pair = neighbours(one, case, device, 0)
    state = adapters(one, 10.0 ** (case.seed % 5 - 1), case.seed)
    layer, difference = most_different_layer(one, pair.with_it, pair.without, state, pair.text)
    if layer is not None and difference is not None and bool(difference.isfinite().all()):
        state = magnified(one, state, pair.text, pair.with_it.pad_id, layer, difference)
    return _decided(one, case, pair, state, device)


def _decided(one: Subject, case: Case, pair: Neighbours, state: Mapping[str, np.ndarray], device: str) -> Outcome:
    present, absent = (head_inputs(one, records, state, pair.text) for records in (pair.with_it, pair.without))
    head, label = threshold_head(one, present, absent)
    return outcome(one, case, neighbours(one, case, device, label), {**state, **head})


def by_hypothesis(one: Subject, chosen: Sequence[Case], device: str) -> list[Outcome]:
    """Measure with tensors that hypothesis draws, which searches near those that moved the sum most."""
    try:
        from hypothesis import HealthCheck, Phase, given, settings, target
        from hypothesis import strategies as st
    except ImportError:
        raise Unavailable("this search needs hypothesis, which is not installed: pip install hypothesis") from None
    found: list[Outcome] = []
    coming = iter(chosen)
    kinds = st.tuples(st.sampled_from(KINDS), st.integers(-20, 17), st.integers(0, 2**32 - 1))

    @settings(max_examples=len(chosen), database=None, derandomize=True, deadline=None,
              phases=(Phase.generate, Phase.target), suppress_health_check=list(HealthCheck))
    @given(st.fixed_dictionaries({part: kinds for part in ("A", "B", "weight", "bias")}))
    def search(drawn: Mapping[str, tuple[str, int, int]]) -> None:
        if (case := next(coming, None)) is not None:
            parts = {spec.name: (spec.shape, drawn.get(spec.name.rpartition(".")[2], drawn["B"]))
                     for spec in one.adapted.layout.state}
            state = {name: structured(shape, kind, exponent, seed + number)
                     for number, (name, (shape, (kind, exponent, seed))) in enumerate(parts.items())}
            found.append(outcome(one, case, neighbours(one, case, device), state))
            target(min(found[-1].ratio, 100.0))

    search()
    for case in coming:  # hypothesis stops early once it has drawn all possible values
        found.append(outcome(one, case, neighbours(one, case, device), adapters(one, 1.0, case.seed)))
    return found


def outcomes(one: Subject, chosen: Sequence[Case], device: str) -> list[Outcome]:
    """Measure cases that share the model, precision, threads and kind of head of `one`."""
    by: Mapping[str, Callable[[Subject, Case, str], Outcome]] = {"decision": by_decision, "gradients": by_gradients}
    found = by_hypothesis(one, drawn, device) if (drawn := [c for c in chosen if c.generator == "hypothesis"]) else []
    return found + [by[case.generator](one, case, device) for case in chosen if case.generator in by]


def measure(settings: Settings) -> Iterator[Row]:
    """Yield one row for each model, precision, number of threads and search; then one of an emulated processor."""
    rows = rows_of(settings)
    tiny = settings.data.parent / "tiny-bert"
    save_random_bert(rows, tiny)
    models = {Path(settings.model).name: settings.model, "tiny BERT": str(tiny)}
    before = torch.get_num_threads()
    threads = (settings.threads or before,) if settings.threads or settings.device == "cuda" else (1, 2)
    chosen = cases(INPUTS_QUICK if settings.quick else INPUTS, list(models), threads,
                   bf16=0.5 if len(precisions(settings)) == 2 else EMULATED)

    def group(case: Case) -> tuple[str, str, int]:
        return case.model, case.precision, case.threads

    try:
        for key, of_group in itertools.groupby(sorted(chosen, key=group, reverse=True), group):  # slowest last
            yield from _rows(settings, rows, key, list(of_group), models)
        yield _emulated(settings, rows, str(tiny), threads[0])
    finally:
        torch.set_num_threads(before)


def _rows(settings: Settings, rows: Rows, key: tuple[str, str, int], chosen: Sequence[Case],
          models: Mapping[str, str]) -> Iterator[Row]:
    name, precision, threads = key
    found: list[Outcome] = []
    made = partial(subject, replace(settings, model=models[name], threads=threads), rows, family="lora", rank=4,
                   precision=precision, expected_batch=MOST_RECORDS, max_length=48)
    for head in (True, False):
        one = made(train_head=head)
        one.trainer.rehearse()  # as a client does before its first charge
        found += outcomes(one, [case for case in chosen if case.head == head], settings.device)
    for generator in GENERATORS:
        those = [one for one in found if one.case.generator == generator]
        if not those:
            continue
        yield _row(f"{name}, {precision}, threads {threads}, {generator}", those)


def _emulated(settings: Settings, rows: Rows, model: str, threads: int) -> Row:
    """Measure on an emulated processor with every number of records, leaving the last record out."""
    one = subject(replace(settings, model=model, threads=threads), rows, family="lora", rank=4, precision="fp32",
                  expected_batch=MOST_RECORDS, max_length=48)
    one.trainer.rehearse()
    with rounding_otherwise(one, lambda rows: rows >= EMULATED_ROWS):
        found = [by_decision(one, Case("decision", "tiny BERT", "fp32", threads, True, records, "last", "one", records),
                             settings.device)
                 for records in (range(14, 19) if settings.quick else range(1, MOST_RECORDS + 1))]
    return _row(f"tiny BERT, fp32, threads {threads}, decision, another processor", found)


def _row(name: str, found: Sequence[Outcome]) -> Row:
    worst = max(found, key=lambda one: one.ratio)
    case = worst.case
    return Row(name, {
        "largest ‖S − S′‖ / C": exactly(worst.ratio, RATIO, better="lower", target=1.0),
        "inputs": exactly(len(found), "inputs"),
        "above 1": exactly(sum(one.ratio > 1 for one in found), "inputs", better="lower"),
        "others bit-equal": exactly(sum(one.equal for one in found), "inputs"),
        "refused for size": exactly(sum(one.refused for one in found), "inputs")},
        note=f"largest with {case.records} records, the {case.place} one out, texts of {case.lengths} padded length"
             f"{'s'[:case.lengths == 'several']}, head {'trained' if case.head else 'fixed'}, seed {case.seed}")


FIGURE = Figure(15, measure)
