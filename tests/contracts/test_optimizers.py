"""Contract tests for the clients' optimizers: they run on every optimizer that is installed."""

import pytest
import torch
from torch import nn

from fedlora import registry
from fedlora.training.optimizers import make_optimizer

PACKAGE = "fedlora.training.optimizers"


@pytest.fixture(params=registry.keys(PACKAGE))
def key(request):
    return request.param


def made(key, lr=0.01):
    """Make a fresh optimizer over two tensors."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]
    return make_optimizer(key, parameters, lr), parameters


def steps(key, gradients):
    optimizer, parameters = made(key)
    for gradient in gradients:
        for parameter, one in zip(parameters, gradient, strict=True):
            parameter.grad = one.clone()
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def random_gradients(count):
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(shape, generator=generator) for shape in ((3, 4), (5,))] for _ in range(count)]


def test_it_says_in_a_line_what_it_is(key):
    assert registry.titles(PACKAGE)[key]


def test_a_first_step_goes_down_the_gradient_of_every_value(key):
    optimizer, parameters = made(key)
    before = [parameter.detach().clone() for parameter in parameters]
    [gradients] = random_gradients(1)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()
    for parameter, then, gradient in zip(parameters, before, gradients, strict=True):
        assert ((parameter.detach() - then) * gradient < 0).all()


def test_a_fresh_one_moves_nothing_where_no_gradient_ever_was(key):
    zero = [[torch.zeros(3, 4), torch.zeros(5)]]
    for moved, still in zip(steps(key, zero), made(key)[1], strict=True):
        assert torch.equal(moved, still)


def test_the_same_gradients_end_at_the_same_bits_whoever_stepped_before(key):
    first = steps(key, random_gradients(5))
    steps(key, random_gradients(2))
    for one, other in zip(first, steps(key, random_gradients(5)), strict=True):
        assert torch.equal(one, other) and one.isfinite().all()


def test_it_writes_nothing_but_its_parameters(key):
    [gradients] = random_gradients(1)
    optimizer, parameters = made(key)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
