import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.algebra import Factors, WeightedMean, leading_factors, orthonormal_rows, reorthogonalize


def random_factors(d_out, rank, d_in, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return Factors(B=torch.randn(d_out, rank, generator=generator, dtype=dtype),
                   A=torch.randn(rank, d_in, generator=generator, dtype=dtype))


shapes = st.tuples(st.integers(1, 4), st.integers(0, 8), st.integers(0, 8), st.integers(0, 2**31)).map(
    lambda s: (s[0] + s[1], s[0], s[0] + s[2], s[3]))


@given(shapes)
@settings(max_examples=50, deadline=None)
def test_reorthogonalize_preserves_the_update_and_makes_rows_orthonormal(shape):
    factors = random_factors(*shape)
    new = reorthogonalize(factors)
    rank = factors.A.shape[0]
    torch.testing.assert_close(new.B @ new.A, factors.B @ factors.A, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(new.A @ new.A.T, torch.eye(rank, dtype=torch.float64), atol=1e-12, rtol=0)


def test_reorthogonalize_is_the_svd_of_the_full_product():
    factors = random_factors(9, 3, 7, seed=1)
    new = reorthogonalize(factors)
    U, S, Vh = torch.linalg.svd(factors.B @ factors.A, full_matrices=False)
    torch.testing.assert_close(new.B.norm(dim=0), S[:3])
    signs = torch.sign((new.A * Vh[:3]).sum(1))
    torch.testing.assert_close(new.A, Vh[:3] * signs[:, None])
    torch.testing.assert_close(new.B, U[:, :3] * S[:3] * signs)


def test_reorthogonalize_keeps_the_norm_of_the_update_in_B():
    new = reorthogonalize(random_factors(9, 3, 7, seed=2))
    torch.testing.assert_close(new.B.norm(), (new.B @ new.A).norm())


def test_reorthogonalize_does_not_depend_on_signs_or_order_of_the_factors():
    factors = random_factors(9, 3, 7, seed=3)
    flips, order = torch.tensor([1.0, -1, -1], dtype=torch.float64), [2, 0, 1]
    other = reorthogonalize(Factors(B=(factors.B * flips)[:, order], A=(factors.A * flips[:, None])[order]))
    mine = reorthogonalize(factors)
    torch.testing.assert_close(other.A, mine.A)
    torch.testing.assert_close(other.B, mine.B)
    assert all(row[row.abs().argmax()] > 0 for row in mine.A)


def test_reorthogonalize_twice_changes_nothing_more():
    once = reorthogonalize(random_factors(9, 3, 7, seed=4))
    twice = reorthogonalize(once)
    torch.testing.assert_close(twice.A, once.A)
    torch.testing.assert_close(twice.B, once.B)


def test_reorthogonalize_leaves_a_zero_update_alone():
    factors = Factors(B=torch.zeros(6, 2), A=torch.randn(2, 5, generator=torch.Generator().manual_seed(0)))
    assert reorthogonalize(factors) is factors


def test_reorthogonalize_of_a_rank_deficient_B_stays_inside_the_rows_of_A():
    factors = random_factors(9, 3, 12, seed=5)
    factors.B[:, 2] = factors.B[:, 0] - 2 * factors.B[:, 1]
    new = reorthogonalize(factors)
    torch.testing.assert_close(new.B @ new.A, factors.B @ factors.A)
    torch.testing.assert_close(new.A @ new.A.T, torch.eye(3, dtype=torch.float64))
    projector = torch.linalg.pinv(factors.A) @ factors.A
    torch.testing.assert_close(new.A @ projector, new.A)
    assert new.B[:, 2].norm() < 1e-12


def test_reorthogonalize_of_a_rank_deficient_A_still_gives_orthonormal_rows():
    factors = random_factors(9, 3, 12, seed=6)
    factors.A[2] = factors.A[0]
    new = reorthogonalize(factors)
    torch.testing.assert_close(new.B @ new.A, factors.B @ factors.A)
    torch.testing.assert_close(new.A @ new.A.T, torch.eye(3, dtype=torch.float64))


def test_reorthogonalize_keeps_float32_to_its_rounding():
    factors = random_factors(64, 8, 48, seed=7, dtype=torch.float32)
    new = reorthogonalize(factors)
    assert new.A.dtype == new.B.dtype == torch.float32
    torch.testing.assert_close(new.B @ new.A, factors.B @ factors.A, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("shape_b", "shape_a", "message"), [
    ((5, 2), (3, 5), "ranks differ"), ((2, 3), (3, 5), "exceeds min")])
def test_reorthogonalize_refuses_factors_that_do_not_fit(shape_b, shape_a, message):
    with pytest.raises(ValueError, match=message):
        reorthogonalize(Factors(B=torch.ones(shape_b), A=torch.ones(shape_a)))


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_leading_factors_are_the_leading_singular_vectors(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    factors = leading_factors(matrix, 3)
    singular_values = torch.linalg.svdvals(matrix)[:3]
    torch.testing.assert_close(factors.B.T @ matrix @ factors.A.T, torch.diag(singular_values))
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(factors.A @ factors.A.T, eye)
    torch.testing.assert_close(factors.B.T @ factors.B, eye)


def test_leading_factors_of_a_rank_deficient_matrix_are_orthonormal():
    matrix = torch.outer(torch.arange(1.0, 7), torch.ones(5))
    factors = leading_factors(matrix, 3)
    torch.testing.assert_close(factors.A @ factors.A.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(factors.B.T @ factors.B, torch.eye(3, dtype=torch.float64))


def test_leading_factors_refuse_a_rank_above_the_smaller_side():
    with pytest.raises(ValueError, match="rank 4 exceeds"):
        leading_factors(torch.ones(3, 9), 4)


def test_orthonormal_rows_span_the_same_space():
    matrix = random_factors(1, 3, 8, seed=9).A
    rows = orthonormal_rows(matrix)
    torch.testing.assert_close(rows @ rows.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(matrix @ rows.T @ rows, matrix)


def test_weighted_mean_is_the_float64_mean_rounded_once():
    rng = np.random.default_rng(10)
    uploads = [{"a": rng.standard_normal((3, 4)).astype(np.float32), "b": rng.standard_normal(5).astype(np.float32)}
               for _ in range(7)]
    weights = rng.uniform(0.1, 3, 7)
    mean = WeightedMean()
    for upload, weight in zip(uploads, weights, strict=True):
        mean.add(upload, weight)
    for name in ("a", "b"):
        expected = np.average([u[name].astype(np.float64) for u in uploads], axis=0, weights=weights)
        assert mean.result()[name].dtype == np.float32
        np.testing.assert_array_equal(mean.result()[name], expected.astype(np.float32))


def test_weighted_mean_of_equal_tensors_is_that_tensor():
    tensors = {"a": np.float32([0.1, -3e-7, 1e20])}
    mean = WeightedMean()
    for _ in range(3):
        mean.add(tensors, 1.0)
    np.testing.assert_array_equal(mean.result()["a"], tensors["a"])


def test_weighted_mean_keeps_no_reference_to_what_it_was_given():
    array = np.ones(3, np.float32)
    mean = WeightedMean()
    mean.add({"a": array}, 1.0)
    array[:] = 9
    np.testing.assert_array_equal(mean.result()["a"], np.ones(3))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weighted_mean_refuses_an_impossible_weight(weight):
    with pytest.raises(ValueError, match="positive and finite"):
        WeightedMean().add({"a": np.ones(1, np.float32)}, weight)


@pytest.mark.parametrize("other", [{"b": np.ones(2, np.float32)}, {"a": np.ones(3, np.float32)}, {}])
def test_weighted_mean_refuses_other_names_or_shapes_and_adds_nothing(other):
    mean = WeightedMean()
    mean.add({"a": np.ones(2, np.float32)}, 1.0)
    with pytest.raises(ValueError, match="differ"):
        mean.add(other, 1.0)
    np.testing.assert_array_equal(mean.result()["a"], np.ones(2))


def test_weighted_mean_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no tensors"):
        WeightedMean().result()
