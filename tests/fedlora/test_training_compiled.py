"""Compiled blocks train like the model's own. (`test_training_graphs` tests on a GPU that they are compiled well.)"""

import pytest
import torch
from torch._dynamo.utils import counters

from fedlora.models import load
from fedlora.training import check_computing
from fedlora.training.compiled import CompiledBlocks
from tests import tiny
from tests.covering import few
from tests.families import FAMILIES
from tests.fedlora.private_training import make_records, make_trainer, plan
from tests.fedlora.test_training_graphs import assert_same, graphed_trainer, train


def compiled_trainer(kind, run, **options):
    trainer = graphed_trainer(kind, run, **options)
    trainer.blocks = CompiledBlocks(trainer.adapted.model, trainer.adapted.trained_leaves(),
                                     backend="aot_eager")
    return trainer


@pytest.mark.parametrize(("kind", "task", "family"), [("llama", "causal-lm", "lora"), *few(
    ("bert", "classification", "lora"), ("modernbert", "classification", "lora"), ("gpt2", "causal-lm", "lora"),
    *(("bert", "classification", family) for family in FAMILIES if family != "lora"))])
def test_rounds_of_compiled_blocks_are_those_of_the_models_own(kind, task, family):
    run = plan(family, task, local_steps=2)
    trainers = [make_trainer(kind, run), compiled_trainer(kind, run)]
    records = make_records(trainers[0], lengths=(9, 12, 16, 7))  # one padded length: each takes seconds
    torch._dynamo.reset()  # what another family compiled may fit this one too
    counters.clear()
    for key, sigma in enumerate([1.0, None]):
        assert_same(*(train(trainer, run, records, sigma, key) for trainer in trainers))
    assert counters["stats"]["unique_graphs"] and not counters["inductor"]
    assert trainers[1]._graphed is not None


def test_later_blocks_need_no_more_versions(monkeypatch, tmp_path):
    """Check that a model with more blocks compiles no more versions.

    PyTorch stops compiling beyond a limit on versions. The first block has a version of its own, because no gradient
    leaves it.
    """
    run = plan("lora", local_steps=1)
    versions = []
    for layers in (2, 3):
        torch._dynamo.reset()
        counters.clear()
        monkeypatch.setattr(tiny, "LAYERS", layers)
        checkpoint = tiny.tiny_checkpoint("llama", tmp_path / str(layers))
        trainer = compiled_trainer("llama", run, model=load(checkpoint, run.task, 2))
        train(trainer, run, make_records(trainer, lengths=(9, 12, 16, 7)))
        versions.append(counters["stats"]["unique_graphs"])
    assert versions[0] == versions[1] > 0


def test_what_cannot_be_compiled_is_trained_without(caplog):
    run = plan(local_steps=2)
    trainers = [make_trainer("bert", run), compiled_trainer("bert", run)]

    def refuses(*_):
        raise RuntimeError("no such kernel")

    trainers[1].blocks = CompiledBlocks(trainers[1].adapted.model, [], backend=refuses)
    records = make_records(trainers[0])
    assert_same(*(train(trainer, run, records) for trainer in trainers))
    assert trainers[1].blocks is None and trainers[1]._graphed is not None and "without --compile" in caplog.text


def test_only_training_is_compiled():
    run = plan(local_steps=1)
    trainer = compiled_trainer("bert", run)
    records = make_records(trainer)
    train(trainer, run, records)
    assert not any("forward" in module.__dict__ for module in trainer.adapted.model.modules())
    counters.clear()
    trainer.rehearse()
    trainer.task.evaluate(trainer.adapted.model, records)
    assert not counters["stats"]


def test_what_a_pass_raises_leaves_the_model_as_it_was():
    run = plan()
    trainer = compiled_trainer("bert", run)
    with pytest.raises(ZeroDivisionError), trainer.blocks():
        assert any("forward" in module.__dict__ for module in trainer.adapted.model.modules())
        _ = 1 / 0
    assert not any("forward" in module.__dict__ for module in trainer.adapted.model.modules())


def test_without_cuda_it_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="--compile with --device cpu"):
        check_computing("cpu", "fp32", compiled=True)
    with pytest.raises(ValueError, match="--compile with --device cpu"):
        make_trainer("bert", plan(), compiled=True)
    check_computing("cpu", "fp32", compiled=False)
