"""Scaled gradient descent: it follows its formula, and acts on the noised gradient before the optimizer."""

import dataclasses

import numpy as np
import pytest
import torch

from fedlora.training.adjustments.scaled_gd import DAMPING, ScaledGD
from tests.federation import layout_of
from tests.fedlora.private_training import make_trainer, plan
from tests.fedlora.test_training_multi_client import training

MODULE = "layer.0.q"


def factors(seed=0, rank=2):
    generator = torch.Generator().manual_seed(seed)
    return {f"{MODULE}.{name}": torch.randn(shape, generator=generator)
            for name, shape in (("A", (rank, 5)), ("B", (7, rank)))}


def adjusted(gradients, tensors, family="lora"):
    return ScaledGD()(gradients, tensors, tensors, layout_of(family), 0)


def test_gradients_are_those_of_the_formula():
    gradients, tensors = factors(1), factors(0)
    A, B = (tensors[f"{MODULE}.{name}"].double().numpy() for name in "AB")
    damping = DAMPING * ((A**2).sum() + (B**2).sum()) / 2 * np.eye(2)
    given = adjusted(gradients, tensors)
    expected = {f"{MODULE}.B": gradients[f"{MODULE}.B"].numpy() @ np.linalg.inv(A @ A.T + damping),
                f"{MODULE}.A": np.linalg.inv(B.T @ B + damping) @ gradients[f"{MODULE}.A"].numpy()}
    for name, array in expected.items():
        np.testing.assert_allclose(given[name].numpy(), array, rtol=1e-4, atol=1e-6)


def test_with_orthonormal_rows_and_nothing_learned_yet_the_gradient_is_a_multiple_of_what_it_was():
    tensors = {f"{MODULE}.A": torch.linalg.qr(torch.randn(5, 2))[0].T.contiguous(), f"{MODULE}.B": torch.zeros(7, 2)}
    gradients = factors(1)
    given = adjusted(gradients, tensors)
    torch.testing.assert_close(given[f"{MODULE}.B"], gradients[f"{MODULE}.B"] / (1 + DAMPING))
    torch.testing.assert_close(given[f"{MODULE}.A"], gradients[f"{MODULE}.A"] / DAMPING)


def test_how_long_the_factors_are_does_not_matter_but_for_the_step():
    """With factors c times as long, gradients are c times as long, and each factor must move c times as far."""
    gradients, tensors = factors(1), factors(0)
    given = adjusted(gradients, tensors)
    longer = adjusted({name: 10 * gradient for name, gradient in gradients.items()},
                      {name: 10 * tensor for name, tensor in tensors.items()})
    for name in given:
        torch.testing.assert_close(longer[name], given[name] / 10, rtol=1e-4, atol=1e-6)


def test_factors_of_zeros_leave_their_gradients_as_they_are():
    tensors = {name: torch.zeros_like(tensor) for name, tensor in factors(0).items()}
    gradients = factors(1)
    for name, given in adjusted(gradients, tensors).items():
        assert torch.equal(given, gradients[name])


def trained(run, count):
    trainer = make_trainer("bert", run)
    trainings = [training(trainer, run, number) for number in range(count)]
    return trainer, trainings, trainer.train_together(trainings)


@pytest.mark.parametrize("private", [True, False])
def test_a_step_is_that_of_the_adjusted_gradient_whoever_trains(private):
    """The adjusted step is the one that the formula gives for the gradient of the step without an adjustment.

    That gradient can be computed from the plain step, because stochastic gradient descent is linear. The runtime
    checks, which compare the gradient with the sum and the noise, accept both steps.
    """
    run = plan("lora", private=private, optimizer="sgd", local_steps=1, lr=1.0)
    trainer, trainings, plain = trained(run, 2)
    _, _, together = trained(dataclasses.replace(run, adjustment="scaled-gd"), 2)
    for one, before, after in zip(trainings, plain, together, strict=True):
        gradients = {name: torch.from_numpy(one.start[name] - before.tensors[name]) / one.lr for name in before.tensors}
        start = {name: torch.from_numpy(array) for name, array in one.start.items()}
        expected = ScaledGD()(gradients, start, start, trainer.adapted.layout, 0)
        alone = trainer.train(dataclasses.replace(one, run=dataclasses.replace(run, adjustment="scaled-gd")))
        for name, gradient in expected.items():
            step = one.lr * gradient.numpy()
            for found in (after.tensors[name], alone.tensors[name]):
                np.testing.assert_allclose(one.start[name] - found, step, rtol=2e-3, atol=2e-5 * abs(step).max() + 1e-6)
    moved = max(abs(after.tensors[name] - before.tensors[name]).max() for before, after in
                zip(plain, together, strict=True) for name in after.tensors)
    assert moved > 1e-2, "this test would not see an adjustment that is never made"
