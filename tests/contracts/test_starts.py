"""Contract tests for starts: they run on every start that is installed."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from fedlora import registry
from fedlora.adapters import family_of, start_of
from fedlora.adapters.family import Site
from fedlora.adapters.layout import MOST_RECEIVED
from fedlora.adapters.start import STARTS, Reads, Source, fitting
from tests.families import FAMILIES

SITE = Site("layer.0.q", 9, 7, 3, 1.0)


@pytest.fixture(params=registry.keys(STARTS))
def start(request):
    takes = registry.literals(STARTS, request.param, "START").get("takes")
    return start_of(f"{request.param}:file" if takes else request.param)[0]


def matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def source(seed=1):
    """Return a source with every value that a start may read."""
    return Source(seed, lambda site: matrix(site.d_out, site.d_in), lambda site: matrix(site.d_out, site.d_in, seed=2),
                  lambda site: (matrix(site.rank, site.d_in, seed=3), matrix(site.d_out, site.rank, seed=4)),
                  lambda site: matrix(20, site.d_in, seed=5))


def test_it_has_a_line_that_says_what_it_is(start):
    assert all(registry.titles(STARTS).values())
    assert start.reads in get_args(Reads)
    assert set(start.gives) <= {"A", "B", "V"}
    assert not start.whole or start.reads == "clients without noise"


def test_bases_have_the_sites_shape_and_what_it_gives_is_there(start):
    bases = start.bases(SITE, source())
    assert bases.A.shape == (SITE.rank if "A" in start.gives else 0, SITE.d_in)
    assert (bases.B is not None) is ("B" in start.gives) and (bases.V is not None) is ("V" in start.gives)
    assert bases.B is None or bases.B.shape == (SITE.d_out, SITE.rank)
    assert bases.V is None or bases.V.shape == (SITE.d_out,)


def test_orthonormal_bases_are_and_others_are_not(start):
    A, B, _ = start.bases(SITE, source())
    eye = torch.eye(SITE.rank, dtype=torch.float64)
    product = A.double() @ A.double().T
    assert (product.shape == eye.shape and torch.allclose(product, eye, atol=1e-6)) is start.orthonormal
    if B is not None and start.orthonormal:
        torch.testing.assert_close(B.double().T @ B.double(), eye, atol=1e-6, rtol=0)


def test_bases_are_float64_and_no_larger_than_what_clients_take(start):
    for basis in start.bases(SITE, source()):
        assert basis is None or (basis.dtype == torch.float64 and (basis.abs() < MOST_RECEIVED).all())


def test_the_same_source_gives_the_same_bits_and_two_sites_differ_where_something_is_drawn(start):
    first, again = start.bases(SITE, source()), start.bases(SITE, source())
    assert torch.equal(first.A, again.A) and (first.B is None or torch.equal(first.B, again.B))
    if start.reads == "nothing" and not torch.equal(first.A, start.bases(SITE, source(2)).A):
        other = start.bases(Site("layer.1.q", 9, 7, 3, 1.0), source())
        assert not torch.equal(first.A, other.A)


def test_it_fits_the_families_whose_bases_it_gives_unless_it_says_why_not(start):
    key = type(start).__module__.rpartition(".")[2].replace("_", "-")
    for family in map(family_of, FAMILIES):
        assert (not start.lacks(family)) is (set(family.bases) <= set(start.gives))
        fits = not start.lacks(family) and not start.unfit(family)
        named = {one.partition(":")[0] for one in fitting(family).replace(" or ", ", ").split(", ")}
        assert fits is (key in named)
