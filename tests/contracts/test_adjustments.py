"""Contract tests for adjustments: they run on every adjustment that is installed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedlora import registry
from fedlora.training.adjustments import PACKAGE, Adjuster, StepAdjustment, check_adjustment
from tests.families import FAMILIES
from tests.federation import layout_of, start_of

KEYS = registry.keys(PACKAGE)


def _fits(key, family):
    return not registry.load(PACKAGE, key).ADJUSTMENT.fits(layout_of(family))


@pytest.fixture(params=[(key, family) for key in KEYS for family in FAMILIES if _fits(key, family)],
                ids=lambda pair: "-".join(pair))
def case(request):
    """Return (key of an adjustment, layout of an adapter that it fits)."""
    key, family = request.param
    return key, layout_of(family)


def state_of(layout, *, at_the_start=False):
    """Return the adapter's tensors: random ones, or those of a start, where some factors are zero."""
    generator = torch.Generator().manual_seed(3)
    return {name: torch.from_numpy(array) if at_the_start else torch.randn(array.shape, generator=generator)
            for name, array in start_of(layout, 0).items()}


def gradients_of(layout, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return {spec.name: torch.randn(spec.shape, generator=generator) for spec in layout.trained}


def steps_of(key, layout, state, several):
    """Return the steps of stochastic gradient descent with rate 1 that one client takes with an adjustment."""
    parameters = {name: nn.Parameter(tensor.clone()) for name, tensor in state.items()}
    adjuster = Adjuster(key, layout, parameters)
    optimizer = torch.optim.SGD([parameters[spec.name] for spec in layout.trained], lr=1.0)
    adjuster.follow(optimizer)
    taken = []
    for gradients in several:
        before = {name: parameters[name].detach().clone() for name in gradients}
        for name, gradient in gradients.items():
            parameters[name].grad = gradient.clone()
        adjuster()
        optimizer.step()
        taken.append({name: parameters[name].detach() - before[name] for name in gradients})
    return taken


def adjusted(key, layout, state, several):
    """Return what one client's adjustment makes of the gradients of several steps."""
    parameters = {name: nn.Parameter(tensor.clone()) for name, tensor in state.items()}
    adjuster = Adjuster(key, layout, parameters)
    given = []
    for gradients in several:
        for name, gradient in gradients.items():
            parameters[name].grad = gradient.clone()
        adjuster()
        given.append({name: parameters[name].grad.clone() for name in gradients})
    assert all(torch.equal(parameters[name], state[name]) for name in state), "an adjustment writes no tensor"
    return given


def test_it_says_in_a_line_what_it_is_and_fits_some_family():
    for key in KEYS:
        assert registry.titles(PACKAGE)[key] and any(_fits(key, family) for family in FAMILIES)


def test_an_adapter_that_it_does_not_fit_is_refused_by_name():
    for key in KEYS:
        for family in FAMILIES:
            if _fits(key, family):
                check_adjustment(key, layout_of(family))
            else:
                with pytest.raises(ValueError, match=f"--adjustment {key}: "):
                    check_adjustment(key, layout_of(family))


@pytest.mark.parametrize("at_the_start", [True, False])
def test_gradients_stay_finite_and_keep_their_names_shapes_and_types(case, at_the_start):
    key, layout = case
    several = [gradients_of(layout, seed) for seed in range(3)]
    for given, gradients in zip(adjusted(key, layout, state_of(layout, at_the_start=at_the_start), several), several,
                                strict=True):
        for name, gradient in gradients.items():
            assert (given[name].shape, given[name].dtype) == (gradient.shape, gradient.dtype)
            assert given[name].isfinite().all()


def test_the_same_released_values_give_the_same_bits_in_every_round(case):
    key, layout = case
    several = [gradients_of(layout, seed) for seed in range(3)]
    first, again = (adjusted(key, layout, state_of(layout), several) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_gradients_of_the_head_stay(case):
    key, layout = case
    gradients = gradients_of(layout)
    [given] = adjusted(key, layout, state_of(layout), [gradients])
    state = state_of(layout)
    [taken] = steps_of(key, layout, state, [gradients])
    plain = {name: state[name] - gradient - state[name] for name, gradient in gradients.items()}
    heads = [spec.name for spec in layout.trained if spec.group == "head"]
    assert heads and all(torch.equal(given[name], gradients[name]) for name in heads)
    assert all(torch.equal(taken[name], plain[name]) for name in heads)
    assert any(not torch.equal(taken[name], plain[name]) for name in gradients), "it would do nothing"


def test_no_value_goes_further_than_the_optimizer_moves_it(case):
    """Screening bounds an upload by the reach of the optimizer, which the steps of an adjustment must stay within."""
    key, layout = case
    if not isinstance(registry.load(PACKAGE, key).ADJUSTMENT(), StepAdjustment):
        return
    for at_the_start in (True, False):
        state, gradients = state_of(layout, at_the_start=at_the_start), gradients_of(layout)
        [given], [taken] = (made(key, layout, state, [gradients]) for made in (adjusted, steps_of))
        assert all((taken[name].abs() <= given[name].abs() + 1e-6).all() for name in gradients)


def test_an_adapter_without_a_head_is_adjusted_alike(case):
    key, layout = case
    headless = layout_of(layout.family.name, head=False)
    gradients, state = gradients_of(headless), state_of(headless)
    with_head = {spec.name: torch.zeros(spec.shape) for spec in layout.state if spec.group == "head"}
    [alone] = adjusted(key, headless, state, [gradients])
    [beside] = adjusted(key, layout, state | with_head, [gradients | with_head])
    assert all(torch.equal(alone[name], beside[name]) for name in alone)
