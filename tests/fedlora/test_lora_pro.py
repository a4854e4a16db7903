"""LoRA-Pro: the step of the update is the projection of the full gradient, and each factor's step keeps its length."""

import dataclasses

import pytest
import torch

from fedlora.training.adjustments import check_adjustment
from fedlora.training.adjustments.lora_pro import LoraPro, closest
from tests.federation import layout_of

MODULE, S = "layer.0.q", 1.7


def factors(seed=0, rank=3):
    """Return A, B and a full gradient G, all float64."""
    generator, shapes = torch.Generator().manual_seed(seed), ((rank, 5), (7, rank), (7, 5))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def adjusted(A, B, G):
    return closest(S * B.T @ G, S * G @ A.T, A, B, S)


def step_of_the_update(A, B, pair):
    return S * B @ pair.A + S * pair.B @ A


def projected(A, B, G):
    onto_B, onto_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    return onto_B @ G + G @ onto_A - onto_B @ G @ onto_A


def test_the_update_moves_along_the_projection_of_the_full_gradient():
    for seed in range(5):
        A, B, G = factors(seed)
        assert (step_of_the_update(A, B, adjusted(A, B, G)) - projected(A, B, G)).abs().max() < 1e-10


def test_directions_that_B_lacks_are_left_out_of_the_projection():
    A, B, G = factors()
    B[:, 2] = B[:, 0] - B[:, 1]
    assert (step_of_the_update(A, B, adjusted(A, B, G)) - projected(A, B, G)).abs().max() < 1e-10


def test_X_solves_its_equation_and_does_not_move_the_update():
    A, B, G = factors()
    first = torch.linalg.inv(B.T @ B) @ (S * B.T @ G) / S**2
    X = (adjusted(A, B, G).A - first) @ torch.linalg.pinv(A)
    torch.testing.assert_close(B.T @ B @ X + X @ A @ A.T, -first @ A.T, atol=1e-10, rtol=1e-10)
    pair, other = adjusted(A, B, G), torch.randn(3, 3, dtype=torch.float64)
    moved = type(pair)(pair.A + other @ A, pair.B - B @ other)
    torch.testing.assert_close(step_of_the_update(A, B, moved), step_of_the_update(A, B, pair), atol=1e-10, rtol=0)


def test_the_update_moves_alike_in_whatever_factors_it_is_written():
    A, B, G = factors()
    M = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    other = torch.linalg.inv(M) @ A, B @ M
    torch.testing.assert_close(step_of_the_update(*other, adjusted(*other, G)),
                               step_of_the_update(A, B, adjusted(A, B, G)), atol=1e-10, rtol=0)


def in_a_run(A, B, G, without=""):
    """Return the gradients of one layer that go in and come out, as a run has them: float32, with lengths kept."""
    layout = layout_of("lora", rank=3, modules=(MODULE,), head=False)
    layout = dataclasses.replace(layout, sites=(dataclasses.replace(layout.sites[0], scaling=S),))
    given = {f"{MODULE}.A": (S * B.T @ G).float(), f"{MODULE}.B": (S * G @ A.T).float()}
    given = {name: gradient for name, gradient in given.items() if name[-1] != without}
    tensors = {f"{MODULE}.A": A.float(), f"{MODULE}.B": B.float()}
    return given, LoraPro()(given, tensors, tensors, layout, 0)


def test_each_factors_gradient_is_the_adjusted_one_with_the_length_that_it_had():
    A, B, G = factors()
    given, found = in_a_run(A, B, G)
    for name, gradient in found.items():
        expected = getattr(adjusted(A, B, G), name[-1])
        torch.testing.assert_close(gradient.norm(), given[name].norm())
        torch.testing.assert_close(gradient / gradient.norm(), (expected / expected.norm()).float(), atol=1e-4, rtol=0)


def test_where_B_is_small_or_zero_nothing_grows():
    A, B, G = factors()
    for size in (1e-3, 1e-6, 0.0):
        given, found = in_a_run(A, size * B, G)
        assert all(found[name].norm() <= 1.001 * given[name].norm() for name in given)
    assert not found[f"{MODULE}.A"].any() and found[f"{MODULE}.B"].any()


@pytest.mark.parametrize("without", ["A", "B"])
def test_a_factor_that_trains_alone_is_preconditioned_by_the_other(without):
    A, B, G = factors()
    [(name, found)] = in_a_run(A, B, G, without)[1].items()
    expected = G @ A.T @ torch.linalg.inv(A @ A.T) if name.endswith(".B") else torch.linalg.inv(B.T @ B) @ B.T @ G
    torch.testing.assert_close(found / found.norm(), (expected / expected.norm()).float(), atol=1e-4, rtol=0)


def test_another_family_is_refused_by_name():
    with pytest.raises(ValueError, match=r"lora-pro: .*'frozen-a'"):
        check_adjustment("lora-pro", layout_of("frozen-a"))
