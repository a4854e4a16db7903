"""The promises of every installed server optimizer, and each one's equations from its paper."""

import numpy as np
import pytest
import torch

from fedlora import registry
from fedlora_server import checkpoint
from fedlora_strategies import FFALoRA
from tests.federation import layout_of, plan_of, start_of

OPTIMIZERS = "fedlora_strategies.server_optimizers"
every = pytest.mark.parametrize("name", registry.keys(OPTIMIZERS))
SHAPES = {"q.B": (7, 3), "head": (4,)}


def made(name, **options):
    return registry.load(OPTIMIZERS, name).OPTIMIZER(**options)


def tensors(seed, shapes=SHAPES):
    generator = np.random.default_rng(seed)
    return {key: generator.standard_normal(shape) for key, shape in shapes.items()}


def steps(optimizer, gradients, own=None):
    """Return the change for each of the gradients, and the memory after the last."""
    own, changes = optimizer.begin(tensors(0)) if own is None else own, []
    for gradient in gradients:
        change, own = optimizer.step(gradient, own, progress=0.0)
        changes.append(change)
    return changes, own


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def near(one, other):
    return one.keys() == other.keys() and all(np.allclose(one[key], other[key], rtol=1e-12, atol=1e-15) for key in one)


def combined(name, state, reduced, sent=None, **options):
    layout = layout_of("frozen-a")
    strategy = FFALoRA(plan_of("ffa-lora"), layout, recipe=FFALoRA.recipe.with_optimizer(name, options))
    trained = {spec.name: state[spec.name] for spec in layout.trained}
    return strategy.step.combine(reduced or trained, sent or trained, state, strategy.step.begin(state), 1)[0]


@every
def test_what_came_back_as_it_was_sent_leaves_the_state(name):
    """This also holds where what is sent is rounded and the server's own tensors are not."""
    state = start_of(layout_of("frozen-a"), 0)
    trained = {spec.name: state[spec.name] for spec in layout_of("frozen-a").trained}
    rounded = {key: array + np.float32(1e-3) for key, array in trained.items()}
    assert same(combined(name, state, None), trained)
    assert same(combined(name, state, rounded, rounded), trained)


@every
def test_the_first_step_goes_where_the_clients_went(name):
    gradient = tensors(1)
    [change], _ = steps(made(name), [gradient])
    assert all((np.sign(change[key]) == np.sign(gradient[key])).all() for key in gradient)


@every
def test_the_same_uploads_give_the_same_bits_and_nothing_given_is_written_to(name):
    gradients = [tensors(seed) for seed in (1, 2, 3)]
    own = made(name).begin(tensors(0))
    before = {key: array.copy() for key, array in own.items()}
    one, after = steps(made(name), gradients, own)
    two, again = steps(made(name), gradients, own)
    assert all(same(*pair) for pair in zip(one, two, strict=True)) and same(after, again) and same(own, before)
    assert all(same(gradient, tensors(seed)) for gradient, seed in zip(gradients, (1, 2, 3), strict=True))


@every
def test_its_memory_is_float64_keeps_its_shape_and_comes_back_from_the_checkpoint(name, tmp_path):
    own = made(name).begin(tensors(0))
    _, after = steps(made(name), [tensors(1), tensors(2)])
    assert {key: (a.shape, a.dtype) for key, a in own.items()} == {key: (a.shape, a.dtype) for key, a in after.items()}
    assert all(array.dtype == np.float64 for array in after.values())
    checkpoint.save(tmp_path, "ab" * 8, 2, {"q.B": np.ones(3, np.float32)}, after)
    stored = checkpoint.load(tmp_path)
    assert same(stored.memory, after) and list(stored.state) == ["q.B"]
    assert all(array.dtype == np.float64 for array in stored.memory.values())


@every
def test_a_tensor_that_did_not_train_keeps_its_memory(name):
    _, own = steps(made(name), [tensors(1)])
    [change], after = steps(made(name), [{"head": tensors(2)["head"]}], own)
    assert set(change) == {"head"}
    assert same({k: v for k, v in own.items() if "q.B" in k}, {k: v for k, v in after.items() if "q.B" in k})


@every
def test_it_commutes_with_a_change_of_coordinates_that_permutes_and_flips(name):
    """The steps after the change are those of an optimizer that was in the new coordinates from the first round on."""
    M = np.array([[0.0, -1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    first, second = tensors(1), tensors(2)
    _, own = steps(made(name), [first])
    turned = made(name).turn(own, {"q.B": M})
    [change], _ = steps(made(name), [{**second, "q.B": second["q.B"] @ M}], turned)
    changes, _ = steps(made(name), [{**each, "q.B": each["q.B"] @ M} for each in (first, second)])
    assert near(change, changes[1])


@every
def test_a_rotation_keeps_the_length_of_directions_and_the_sum_of_squares(name):
    M = np.linalg.qr(np.random.default_rng(5).standard_normal((3, 3)))[0]
    optimizer = made(name)
    _, own = steps(optimizer, [tensors(1), tensors(2)])
    turned = optimizer.turn(own, {"q.B": M})
    for moment, power in optimizer.moments.items():
        before, after = own[f"{moment}/q.B"], turned[f"{moment}/q.B"]
        if power == 1:
            np.testing.assert_allclose((after**2).sum(axis=1), (before**2).sum(axis=1))
        elif power == 2:
            assert (after >= 0).all()
            np.testing.assert_allclose(after.sum(axis=1), before.sum(axis=1))
        else:
            np.testing.assert_array_equal(after, before)


@every
def test_where_no_factor_is_known_its_memory_of_the_tensor_begins_anew(name):
    fresh = made(name).begin(tensors(0))
    _, own = steps(made(name), [tensors(1)])
    turned = made(name).turn(own, {"q.B": None})
    assert same({k: v for k, v in turned.items() if "q.B" in k}, {k: v for k, v in fresh.items() if "q.B" in k})
    assert same({k: v for k, v in turned.items() if "head" in k}, {k: v for k, v in own.items() if "head" in k})


@every
def test_its_rate_falls_to_what_decay_leaves(name):
    optimizer = made(name, lr=0.5, decay=0.5)
    own = optimizer.begin(tensors(0))
    whole, late = (optimizer.step(tensors(1), own, progress)[0] for progress in (0.0, 0.75))
    assert near(late, {key: array * (1 - 0.5 * 0.75) for key, array in whole.items()})


@every
@pytest.mark.parametrize(("option", "value"), [("lr", 0.0), ("lr", float("inf")), ("decay", 1.5), ("momentumm", 1.0)])
def test_a_wrong_option_is_told(name, option, value):
    with pytest.raises(ValueError, match=option):
        FFALoRA.recipe.with_optimizer(name, {option: value})


def test_sgd_at_a_rate_of_one_is_no_optimizer():
    state = start_of(layout_of("frozen-a"), 0)
    reduced = {spec.name: np.random.default_rng(3).standard_normal(spec.shape, np.float32)
               for spec in layout_of("frozen-a").trained}
    assert same(combined("sgd", state, reduced), combined("none", state, reduced))
    assert not same(combined("sgd", state, reduced, lr=0.5), reduced)


@pytest.mark.parametrize(("name", "options", "reference"), [
    ("adam", dict(lr=0.1, beta1=0.9, beta2=0.99, tau=1e-3, correct_bias=1),
     lambda values: torch.optim.Adam(values, lr=0.1, betas=(0.9, 0.99), eps=1e-3)),
    ("adam", dict(lr=0.1, beta1=0.0, beta2=0.9, tau=1e-8, correct_bias=1),
     lambda values: torch.optim.Adam(values, lr=0.1, betas=(0.0, 0.9), eps=1e-8)),
    ("momentum", dict(lr=0.1, beta1=0.7), lambda values: torch.optim.SGD(values, lr=0.1, momentum=0.7)),
    ("sgd", dict(lr=0.1), lambda values: torch.optim.SGD(values, lr=0.1)),
])
def test_torchs_optimizer_takes_the_same_steps(name, options, reference):
    gradients = [tensors(seed)["q.B"] * 10.0**-seed for seed in range(1, 6)]
    value = torch.nn.Parameter(torch.zeros(SHAPES["q.B"], dtype=torch.float64))
    theirs = reference([value])
    for gradient in gradients:
        value.grad = -torch.tensor(gradient)
        theirs.step()
    changes, _ = steps(made(name, **options), [{"q.B": gradient} for gradient in gradients])
    np.testing.assert_allclose(sum(change["q.B"] for change in changes), value.detach().numpy(), rtol=1e-12)


@pytest.mark.parametrize("name", ["adam", "yogi"])
def test_adam_and_yogi_are_the_papers_recurrences_value_by_value(name):
    """Reddi et al., Algorithm 2, with v at τ² before the first round and without correction of the bias."""
    optimizer = made(name, lr=0.1, beta1=0.8, beta2=0.9, tau=0.01)
    gradients = [0.5, -0.2, 0.001, 0.3]
    changes, _ = steps(optimizer, [{"head": np.full(4, gradient)} for gradient in gradients])
    m, v = 0.0, 0.01**2
    for gradient, change in zip(gradients, changes, strict=True):
        m = 0.8 * m + 0.2 * gradient
        if name == "adam":
            v = 0.9 * v + 0.1 * gradient**2
        else:
            v -= 0.1 * gradient**2 * (1.0 if v > gradient**2 else -1.0)
        np.testing.assert_allclose(change["head"], 0.1 * m / (v**0.5 + 0.01), rtol=1e-12)


def test_adams_first_step_is_as_large_as_later_ones_once_its_bias_is_corrected():
    gradient = {"head": np.ones(4)}
    paper, corrected = ([abs(change["head"][0]) for change in steps(
        made("adam", beta1=0.0, tau=1e-8, correct_bias=correct), [gradient] * 400)[0]] for correct in (0, 1))
    np.testing.assert_allclose(corrected, 0.01, rtol=1e-6)
    assert paper[0] == pytest.approx(10 * 0.01, rel=1e-3) and paper[-1] == pytest.approx(0.01, rel=0.02)

