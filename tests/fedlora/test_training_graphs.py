"""Passes that are recorded once for each shape and then replayed give the same result as passes run each time.

Without a GPU, a substitute plays the recording: it computes again on the memory that was recorded. So what is copied
where, what the buffer is shown, and what a recording leaves behind are tested on any machine.
"""

import dataclasses
import gc
import weakref

import numpy as np
import pytest
import torch

from fedlora.privacy import RandomStream
from fedlora.training.graphs import GraphedPass
from tests.families import FAMILIES
from tests.fedlora.private_training import CASES, job_of, make_records, make_trainer, plan

OF_EACH_FAMILY = [*((*case, "lora") for case in CASES), *(
    ("bert", "classification", family) for family in FAMILIES if family != "lora")]
"""Every model type with each task that it supports, and every adapter family on one of them."""

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def played(compute):
    """Record on a CPU: return a replay that computes again, and the losses."""
    compute()  # warms up, and leaves gradients behind
    losses = compute().clone()
    return lambda: losses.copy_(compute()), losses


def graphed_trainer(kind, run, *, record=played, **options):
    trainer = make_trainer(kind, run, **options)
    trainer.few_shapes, trainer._graphed = True, GraphedPass(trainer.device, record)
    return trainer


def train(trainer, run, records, sigma=1.0, key=1, rate=0.7):
    return trainer.train(job_of(run, records, sampling_rate=rate, noise_multiplier=sigma, clip_norm=run.clip_norm,
                                sampling=RandomStream.derived(key, "a", 1, "sampling"),
                                noise=None if sigma is None else RandomStream.derived(key, "a", 1, "noise")))


def assert_same(one, other, tolerance=1e-4):
    assert (one.steps, one.drawn, one.nonfinite) == (other.steps, other.drawn, other.nonfinite)
    assert one.clipped_share == other.clipped_share
    assert one.mean_loss == pytest.approx(other.mean_loss, rel=tolerance, nan_ok=True)
    for name in one.tensors:
        np.testing.assert_allclose(one.tensors[name], other.tensors[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sigma", [1.0, None], ids=["private", "plain"])
@pytest.mark.parametrize(("kind", "task", "family", "units"), [
    *((*case, False) for case in OF_EACH_FAMILY), ("bert", "classification", "lora", True),
    ("llama", "causal-lm", "lora", True)])
def test_replayed_rounds_are_those_of_passes_that_are_run(kind, task, family, sigma, units):
    run = plan(family, task, local_steps=3)
    trainers = [make_trainer(kind, run), graphed_trainer(kind, run)]
    records = make_records(trainers[0], count=12)
    if units:
        records = dataclasses.replace(records, units=np.arange(12) // 3)
    for key in (1, 2):
        assert_same(*(train(trainer, run, records, sigma, key) for trainer in trainers))
    graphs = trainers[1]._graphed._graphs.values()
    assert {graph.batch.input_ids.shape[1] for graph in graphs} == {16, 32}, "one for each length, used in both rounds"


def test_one_trainer_may_train_with_and_without_privacy_by_turns():
    run = plan(local_steps=2)
    trainers = [make_trainer("bert", run), graphed_trainer("bert", run)]
    records = make_records(trainers[0])
    for key, sigma in enumerate([None, 1.0, None, 1.0]):
        assert_same(*(train(trainer, run, records, sigma, key) for trainer in trainers))
    assert {graph.rows is None for graph in trainers[1]._graphed._graphs.values()} == {True, False}


def test_what_a_graph_reads_is_this_batchs_mask_and_segments_and_no_other():
    run = plan(local_steps=2)
    trainers = [make_trainer("bert", run, micro_batch=1), graphed_trainer("bert", run, micro_batch=1)]
    # some records are exactly as long as the length that others are padded to
    records = make_records(trainers[0], lengths=(9, 16, 12, 32, 20, 32, 16, 7))
    random = np.random.default_rng(0)
    records = dataclasses.replace(records, segments=random.integers(0, 2, len(records.tokens), dtype=np.uint8))
    assert_same(*(train(trainer, run, records, rate=1.0) for trainer in trainers))
    assert {tuple(graph.batch.input_ids.shape) for graph in trainers[1]._graphed._graphs.values()} == {(1, 16), (1, 32)}


def test_a_micro_batch_is_filled_up_to_what_a_plan_needs_and_not_to_all_that_is_allowed():
    run = plan(expected_batch=3)
    trainer = graphed_trainer("bert", run, micro_batch=1000)
    train(trainer, run, make_records(trainer), rate=1.0)
    assert {graph.batch.input_ids.shape[0] for graph in trainer._graphed._graphs.values()} == {4}
    assert trainer.rows_of(16) == 1000, "what others ask of the trainer does not depend on what was trained before"


def test_dropout_has_no_graphs():
    run = plan(local_steps=2, dropout=0.3)
    one, other = graphed_trainer("bert", run), graphed_trainer("bert", run)
    other._graphed = None
    records = make_records(one)
    assert_same(train(one, run, records, None), train(other, run, records, None), tolerance=0)
    assert not one._graphed._graphs


def test_records_that_are_not_finite_count_as_zero_in_a_replay_too():
    run = plan(local_steps=2)
    trainers = [make_trainer("bert", run), graphed_trainer("bert", run)]
    records = make_records(trainers[0])
    for trainer in trainers:
        with torch.no_grad():
            trainer.adapted.model.get_input_embeddings().weight[records.tokens[records.offsets[2]]] = torch.inf
    assert_same(*(train(trainer, run, records, rate=1.0) for trainer in trainers))


@pytest.mark.parametrize("sigma", [1.0, None], ids=["private", "plain"])
def test_a_pass_that_cannot_be_recorded_goes_on_without_graphs(sigma, caplog):
    def refused(compute):
        compute()
        raise RuntimeError("this pass waits for the GPU")

    run = plan(local_steps=2)
    trainers = [make_trainer("bert", run), graphed_trainer("bert", run, record=refused)]
    records = make_records(trainers[0])
    caplog.set_level("INFO")
    assert_same(*(train(trainer, run, records, sigma) for trainer in trainers))
    assert trainers[1]._graphed is None and "without CUDA graphs" in caplog.text


@on_cuda
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "task", "family"), OF_EACH_FAMILY)
def test_cuda_graphs_are_recorded_and_train_as_without(kind, task, family, precision, compiled):
    run = plan(family, task, local_steps=3)
    trainers = [make_trainer(kind, run, device="cuda", precision=precision, compiled=also)
                for also in (compiled, False)]
    trainers[1]._graphed = None
    records = make_records(trainers[0], count=12)
    for key, sigma in enumerate([1.0, None, 1.0]):
        start = trainers[0].adapted.read("trained")
        trainers[1].adapted.write(start)
        one, other = (train(trainer, run, records, sigma, key) for trainer in trainers)
        if compiled and precision == "bf16":  # fused operations round less to bf16
            moved, by = (np.concatenate([(result.tensors[name] - start[name]).ravel() for name in start])
                         for result in (one, other))
            assert np.linalg.norm(moved - by) <= 0.25 * np.linalg.norm(by)
        else:
            assert_same(one, other, tolerance=1e-3 if precision == "fp32" else 2e-2)
    assert trainers[0]._graphed is not None, "the pass was not recorded"


@on_cuda
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "task", "family"), OF_EACH_FAMILY)
def test_no_records_gradient_on_cuda_depends_on_which_others_there_are(kind, task, family, precision, compiled):
    run = plan(family, task, clip_norm=1e6, head_scale=1.0)
    trainer = make_trainer(kind, run, device="cuda", precision=precision, compiled=compiled)
    records = make_records(trainer, count=24)
    assert set(trainer.show_batch_invariance(run).rows.values()) == {4}, "no shape had to be made smaller"

    def gradients(indices):
        found = {}
        for length, places in trainer.micro_batches(records, indices, private=True):
            size = trainer.shapes.rows[length]
            trainer.buffer.arm(size)
            trainer.one_pass(trainer.task.collate(records, indices[places], length, rows=size), None)
            for row, place in zip(trainer.buffer.rows, places, strict=False):
                found[int(indices[place])] = row.clone()
        trainer.buffer.disarm()
        return found

    rows = gradients(np.arange(24))
    for left_out in range(0, 24, 5):
        for index, row in gradients(np.delete(np.arange(24), left_out)).items():
            assert torch.equal(row, rows[index])


@on_cuda
def test_a_trainer_that_is_not_used_any_more_takes_its_graphs_with_it():
    run = plan()
    trainer = make_trainer("bert", run, device="cuda")
    train(trainer, run, make_records(trainer))
    there = weakref.ref(trainer)
    gc.disable()
    try:
        del trainer
        assert there() is None
    finally:
        gc.enable()
