"""The private step: its sensitivity, its noise and what must not change it; and the step without privacy."""

import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers import AutoModel, DebertaV2Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fedlora.adapters import attach, automatic_targets
from fedlora.models import load
from fedlora.privacy import RandomStream
from fedlora.tasks import task_for
from fedlora.training import Trainer
from fedlora.training import precision as precision_module
from fedlora.training.gradient_buffer import GradientBuffer
from fedlora.training.optimizer import PerRecordOptimizer
from tests.families import FAMILIES, MODELS
from tests.fedlora.private_training import (
    CASES,
    brute_force_row,
    clipped_sum,
    job_of,
    loaded,
    make_optimizer,
    make_records,
    make_trainer,
    plan,
)


def _train(trainer, run, records, *, rate=0.5, sigma=1.0, key=1, **options):
    streams = {"sampling": RandomStream.derived(key, "a", 1, "sampling"),
               "noise": None if sigma is None else RandomStream.derived(key, "a", 1, "noise")}
    stop = options.pop("stop", lambda: False)
    return trainer.train(job_of(run, records, sampling_rate=rate, noise_multiplier=sigma, clip_norm=run.clip_norm,
                                **(streams | options)), stop)


def _flat(trainer, tensors):
    """Return the trained tensors as one vector, in the order of the buffer's columns."""
    names = {id(parameter): spec.name for spec, parameter in trainer.adapted.trained_parameters()}
    return np.concatenate([tensors[names[id(slot.parameter)]].ravel() for slot in trainer.buffer.slots])


@pytest.fixture(params=FAMILIES)
def private(request):
    run = plan(request.param)
    trainer = make_trainer("bert", run)
    return trainer, run, make_records(trainer)


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_the_sum_is_that_of_scaled_gradients_clipped_once_as_whole_vectors(kind, task):
    run = plan("lora", task, adapter_scale=2.0, head_scale=0.1, clip_norm=0.7)
    trainer = make_trainer(kind, run)
    records = make_records(trainer)
    expected = torch.zeros(trainer.buffer.values, dtype=torch.float64)
    scale = torch.cat([torch.full((slot.parameter.numel(),), {"adapter": 2.0, "head": 0.1}[slot.group])
                       for slot in trainer.buffer.slots]).double()
    for i in range(len(records)):
        g = brute_force_row(trainer, records, i).double() * scale
        expected += g * min(1.0, 0.7 / g.norm().item())
    error = (clipped_sum(trainer, run, records, range(len(records))) - expected).norm() / expected.norm()
    assert error < 3e-5  # 1e-5 of it is the margin below the clip norm


@pytest.mark.parametrize("clip_norm", [1e-3, 0.5, 1e4])
def test_one_record_moves_the_clipped_sum_by_at_most_the_clip_norm(private, clip_norm):
    trainer, run, records = private
    run = plan(run.family, clip_norm=clip_norm)
    whole = clipped_sum(trainer, run, records, range(8))
    for left_out in range(8):
        moved = whole - clipped_sum(trainer, run, records, [i for i in range(8) if i != left_out])
        assert moved.norm() <= clip_norm
        assert clipped_sum(trainer, run, records, [left_out]).norm() <= clip_norm


def test_a_clipped_record_uses_the_whole_clip_norm(private):
    trainer, run, records = private
    run = plan(run.family, clip_norm=1e-3)
    for record in range(8):
        assert clipped_sum(trainer, run, records, [record]).norm() >= 1e-3 * (1 - 2e-5)


@pytest.mark.parametrize(("clip_norm", "scale"), [(1.0, 1.0), (1e-6, 1e-6), (1e-6, 1e16), (1e6, 1.0)])
@pytest.mark.parametrize("size", [1.0, 1e-24])
@pytest.mark.parametrize("values", [10, 2_000_000])
def test_no_share_is_above_the_clip_norm_whatever_the_server_chooses(clip_norm, scale, size, values):
    """A server chooses the clip norm and the scales, and can send tensors that make gradients as small as it likes."""
    parameter = torch.nn.Parameter(torch.zeros(values))
    buffer = GradientBuffer([(parameter, "adapter")])
    optimizer = PerRecordOptimizer(torch.optim.SGD([parameter], lr=1.0), buffer, scales={"adapter": scale},
                                   clip_norm=clip_norm, noise_multiplier=1.0, expected_batch_size=1,
                                   noise=RandomStream.derived(0, "a", 1, "noise"))
    buffer.arm(1)
    buffer.write(parameter, torch.full((1, values), 0.3 * size))
    length = scale * size * 0.3 * values**0.5
    optimizer.clip_and_accumulate()
    share = optimizer.clipped_sum.norm().item()
    assert share <= clip_norm and share == pytest.approx(min(length, clip_norm), rel=1e-4)


@pytest.mark.parametrize("head_scale", [1e-3, 1.0, 1e3])
def test_the_head_alone_moves_the_clipped_sum_by_at_most_the_clip_norm(head_scale):
    run = plan("frozen-a", head_scale=head_scale)
    trainer = make_trainer("bert", run)
    records = make_records(trainer)
    head = torch.cat([torch.full((slot.parameter.numel(),), slot.group == "head") for slot in trainer.buffer.slots])
    for record in range(8):
        part = clipped_sum(trainer, run, records, [record])[head]
        assert 0 < part.norm() <= run.clip_norm


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "task"), [("bert", "classification"), ("llama", "causal-lm")])
def test_order_and_split_of_a_drawn_batch_do_not_matter(kind, task, precision):
    run = plan("lora", task)
    model = loaded(kind, task)
    trainer = make_trainer(kind, run, precision=precision, model=model)
    records = make_records(trainer, count=24)
    expected = clipped_sum(trainer, run, records, range(24))
    shuffled = np.random.default_rng(0).permutation(24)
    for micro_batch in (1, 2, 5, None):
        trainer.micro_batch = micro_batch
        error = (clipped_sum(trainer, run, records, shuffled) - expected).norm() / expected.norm()
        assert error < {"fp32": 1e-5, "bf16": 3e-2}[precision]


def test_an_empty_draw_releases_noise_alone_and_is_a_step(private):
    trainer, run, records = private
    start = _flat(trainer, trainer.adapted.read("trained"))
    noise = RandomStream.derived(1, "a", 1, "noise").gaussian(len(start))
    result = _train(trainer, run, records, rate=1e-12, sigma=2.0)
    assert result.drawn == (0,) and result.steps == 1
    scale = np.concatenate([np.full(slot.parameter.numel(), run.head_scale if slot.group == "head" else 1.0)
                            for slot in trainer.buffer.slots])
    moved = -run.lr * (2.0 * run.clip_norm * noise) / run.expected_batch / scale
    np.testing.assert_allclose(_flat(trainer, result.tensors) - start, moved, atol=1e-6)


def test_the_noise_in_the_scaled_space_has_standard_deviation_sigma_times_clip_norm():
    run = plan("lora", rank=8, clip_norm=0.3, adapter_scale=5.0, head_scale=0.2)
    trainer = make_trainer("bert", run)
    optimizer = make_optimizer(trainer, run, noise_multiplier=1.7)
    draws = []
    for _ in range(20):
        optimizer.add_noise()
        optimizer.scale_grad()
        draws.append(torch.cat([
            slot.parameter.grad.flatten() * (5.0 if slot.group == "adapter" else 0.2)
            for slot in trainer.buffer.slots]) * run.expected_batch)
    values = torch.stack(draws)
    assert values.std().item() == pytest.approx(1.7 * 0.3, rel=5 / (2 * values.numel()) ** 0.5)
    assert abs(torch.corrcoef(values[:2])[0, 1].item()) < 5 / values.shape[1] ** 0.5


def test_the_divisor_is_the_expected_batch_and_not_the_drawn_one():
    run = plan("lora", expected_batch=4)
    trainer = make_trainer("bert", run)
    records = make_records(trainer)
    start = _flat(trainer, trainer.adapted.read("trained"))
    total = clipped_sum(trainer, run, records, range(8)).numpy()
    scale = np.concatenate([np.full(slot.parameter.numel(), run.head_scale if slot.group == "head" else 1.0)
                            for slot in trainer.buffer.slots])
    result = _train(trainer, run, records, rate=1.0, sigma=1e-9)
    assert result.drawn == (8,)
    np.testing.assert_allclose(_flat(trainer, result.tensors) - start, -run.lr * total / 4 / scale, atol=2e-6)


def test_fixed_keys_give_identical_bits(private):
    trainer, _, records = private
    run = plan(trainer.adapted.layout.family.name, local_steps=3, optimizer="adamw")
    start = trainer.adapted.read("state")
    first = _train(trainer, run, records)
    trainer.adapted.write(start)
    second = _train(trainer, run, records)
    assert first.drawn == second.drawn
    assert all(first.tensors[name].tobytes() == second.tensors[name].tobytes() for name in first.tensors)
    trainer.adapted.write(start)
    other = _train(trainer, run, records, key=2)
    assert any(first.tensors[name].tobytes() != other.tensors[name].tobytes() for name in first.tensors)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_without_clipping_and_noise_the_private_path_is_the_non_private_one(private, optimizer):
    trainer, _, records = private
    run = plan(trainer.adapted.layout.family.name, local_steps=3, optimizer=optimizer, clip_norm=1e6, head_scale=1.0)
    start = trainer.adapted.read("state")
    noised = _train(trainer, run, records, sigma=1e-18)
    trainer.adapted.write(start)
    plain = _train(trainer, run, records, sigma=None)
    assert noised.drawn == plain.drawn and plain.clipped_share == 0
    assert noised.mean_loss == pytest.approx(plain.mean_loss, rel=1e-4)
    for name, tensor in plain.tensors.items():
        assert not np.array_equal(tensor, start[name])
        np.testing.assert_allclose(noised.tensors[name], tensor, atol=2e-4 if optimizer == "adamw" else 1e-5)


def test_frozen_weights_do_not_move(private):
    trainer, run, records = private
    trained = {id(parameter) for _, parameter in trainer.adapted.trained_parameters()}
    before = {name: p.detach().clone() for name, p in trainer.adapted.model.named_parameters() if id(p) not in trained}
    _train(trainer, plan(run.family, optimizer="adamw"), records)
    after = dict(trainer.adapted.model.named_parameters())
    assert before and all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_record_whose_gradient_is_not_finite_counts_as_zero(kind):
    run = plan("lora")
    trainer = make_trainer(kind, run)
    records = make_records(trainer)
    token = int(records.tokens[records.offsets[3]])
    with torch.no_grad():
        trainer.adapted.model.get_input_embeddings().weight[token] = float("nan")
    touched = [i for i in range(8) if token in records.tokens[records.offsets[i]:records.offsets[i + 1]]]
    healthy = [i for i in range(8) if i not in touched]
    everything = clipped_sum(trainer, run, records, range(8))
    assert torch.isfinite(everything).all()
    torch.testing.assert_close(everything, clipped_sum(trainer, run, records, healthy), rtol=1e-4, atol=1e-6)
    result = _train(trainer, run, records, rate=1.0)
    assert result.nonfinite == len(touched) and all(np.isfinite(t).all() for t in result.tensors.values())


def test_stopping_discards_the_unfinished_step():
    run = plan("lora", local_steps=5)
    trainer = make_trainer("bert", run, micro_batch=1)
    records = make_records(trainer)
    assert _train(trainer, run, records, stop=lambda: True).steps == 0
    start = trainer.adapted.read("state")
    one = _train(trainer, plan("lora", local_steps=1), records)
    trainer.adapted.write(start)
    asked = iter(range(10_000))
    stopped = _train(trainer, run, records, stop=lambda: next(asked) > one.drawn[0] + 1)
    assert stopped.steps == 1 and stopped.drawn == one.drawn
    assert all(np.array_equal(stopped.tensors[name], one.tensors[name]) for name in one.tensors)


def test_an_optimizer_of_other_parameters_is_refused():
    trainer = make_trainer("bert", plan("lora"))
    copies = [torch.nn.Parameter(slot.parameter.detach().clone()) for slot in trainer.buffer.slots]
    with pytest.raises(RuntimeError, match="does not hold"):
        PerRecordOptimizer(torch.optim.SGD(copies, lr=0.1), trainer.buffer, scales={"adapter": 1.0, "head": 1.0},
                           clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=4, noise=RandomStream.from_os())


def test_a_loss_that_is_cut_off_from_the_adapters_is_noticed_before_anything_is_charged(monkeypatch):
    run = plan("lora")
    trainer = make_trainer("bert", run)
    loss = trainer.task.per_record_loss
    monkeypatch.setattr(trainer.task, "per_record_loss", lambda *given: loss(*given) * 0 + 1)
    with pytest.raises(ValueError, match="have no influence on the loss"):
        trainer.rehearse()


def test_adapter_dropout_repeats_with_the_sampling_stream_and_ends_with_the_round():
    run = plan("lora", dropout=0.5, local_steps=2)
    trainer = make_trainer("bert", run)
    records = make_records(trainer)
    start = trainer.adapted.read("state")
    results = []
    for dropout in (0.5, 0.5, 0.0):
        trainer.adapted.write(start)
        torch.rand(3)  # PyTorch's own random state must not matter
        results.append(_train(trainer, plan("lora", dropout=dropout, local_steps=2), records, sigma=None).tensors)
    assert not any(module.training for module in trainer.adapted.model.modules())
    assert all(np.array_equal(results[0][name], results[1][name]) for name in start if name in results[0])
    assert any(not np.array_equal(results[0][name], results[2][name]) for name in results[0])


def test_dropout_is_refused_with_privacy():
    run = plan("lora", dropout=0.5)
    trainer = make_trainer("bert", run)
    with pytest.raises(ValueError, match="depends on the others in its batch"):
        _train(trainer, run, make_records(trainer))


def test_training_lowers_the_loss():
    run = plan("lora", local_steps=30, optimizer="adamw", lr=0.02, expected_batch=8)
    trainer = make_trainer("bert", run)
    records = make_records(trainer)
    before = trainer.task.evaluate(trainer.adapted.model, records)["loss"]
    _train(trainer, run, records, rate=1.0, sigma=None)
    assert trainer.task.evaluate(trainer.adapted.model, records)["loss"] < before / 2


def test_out_of_memory_names_the_flags_that_help(monkeypatch):
    run = plan("lora")
    trainer = make_trainer("bert", run)

    def exhausted(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(trainer.task, "per_record_loss", exhausted)
    with pytest.raises(MemoryError, match=r"--micro-batch.*--max-length.*--precision"):
        _train(trainer, run, make_records(trainer), rate=1.0)
    monkeypatch.setattr(trainer.adapted.model, "to", exhausted)
    with pytest.raises(MemoryError, match="--precision bf16"):
        Trainer(trainer.adapted, trainer.task, device="cpu", precision="fp32")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "task", "family"), MODELS)
def test_a_rehearsal_passes_and_leaves_everything_as_it_was(kind, task, family, precision):
    trainer = make_trainer(kind, plan(family, task), precision=precision)
    before = trainer.adapted.read("state")
    trainer.rehearse()
    after = trainer.adapted.read("state")
    assert all(np.array_equal(before[name], after[name]) for name in before) and not trainer.buffer.armed


def test_a_model_that_mixes_its_records_is_refused_in_the_rehearsal(monkeypatch):
    trainer = make_trainer("bert", plan("lora"))
    alone = trainer.task.per_record_loss
    monkeypatch.setattr(trainer.task, "per_record_loss", lambda model, batch: (
        (losses := alone(model, batch)) * (1 + 0.1 * losses.flip(0).detach())))
    with pytest.raises(ValueError, match="mixes the records of a batch"):
        trainer.rehearse()


def test_a_model_of_nonsense_is_refused_in_the_rehearsal():
    trainer = make_trainer("llama", plan("lora"))
    with torch.no_grad():
        trainer.adapted.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        trainer.rehearse()


@pytest.mark.parametrize(("targets", "refused"), [(("value_proj",), False), (("query_proj", "value_proj"), True)])
def test_deberta_gives_its_queries_rows_of_no_record(targets, refused, checkpoint, tmp_path):
    """DeBERTa applies its query layers to the relative positions too, whose rows belong to no record."""
    small = DebertaV2Config(vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                            intermediate_size=64, max_position_embeddings=64, relative_attention=True,
                            pos_att_type=["p2c", "c2p"], share_att_key=True, position_biased_input=False,
                            type_vocab_size=0)
    folder = shutil.copytree(checkpoint("roberta"), tmp_path / "deberta")
    AutoModel.from_config(small).save_pretrained(folder)
    model = load(folder, "classification", 2)
    assert automatic_targets(model.model) == ("value_proj",)
    run = plan("lora", targets=targets)
    trainer = Trainer(attach(model, family="lora", rank=2, alpha=2.0, targets=targets, train_head=True),
                      task_for(run, model.tokenizer), device="cpu", precision="fp32")
    with pytest.raises(ValueError, match="Choose other --targets") if refused else nullcontext():
        trainer.rehearse()


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_has_a_mask_whether_or_not_a_record_of_the_batch_is_padded(kind, precision, monkeypatch):
    run = plan("lora")
    trainer, seen = make_trainer(kind, run, precision=precision), []
    monkeypatch.setattr(precision_module, "sdpa_attention_forward", lambda module, query, key, value, mask, **options: (
        seen.append(mask), sdpa_attention_forward(module, query, key, value, mask, **options))[1])
    records = make_records(trainer)
    clipped_sum(trainer, run, records, np.flatnonzero(records.lengths == 8))
    assert seen and all(mask is not None for mask in seen)
