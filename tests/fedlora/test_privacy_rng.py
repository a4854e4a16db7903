"""Tests of the random streams: reproducible from a key, independent between keys, and of the right distribution."""

import numpy as np
import pytest
from scipy import stats

from fedlora.privacy.rng import INSECURE_SEED_VARIABLE, RandomStream, RunStreams, run_streams


def test_a_fixed_key_gives_identical_bits():
    for draw in (RandomStream.uniform, RandomStream.gaussian):
        first, second = draw(RandomStream(b"k" * 32), 1001), draw(RandomStream(b"k" * 32), 1001)
        assert first.dtype == np.float64 and first.tobytes() == second.tobytes()


def test_a_stream_never_repeats_itself():
    stream = RandomStream(b"k" * 32)
    assert len(np.unique(np.concatenate([stream.uniform(1000) for _ in range(5)]))) == 5000


def test_uniforms_are_uniform_in_the_half_open_unit_interval():
    u = RandomStream(b"k" * 32).uniform(200_000)
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-3


def test_gaussians_are_standard_normal():
    z = RandomStream(b"k" * 32).gaussian(200_001)
    assert len(z) == 200_001
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert abs(z.std() - 1) < 0.01


@pytest.mark.parametrize("other", [
    RandomStream.derived(1, "b", 3, "noise"), RandomStream.derived(2, "a", 3, "noise"),
    RandomStream.derived(1, "a", 4, "noise"),
    RandomStream.derived(1, "a", 3, "sampling"), RandomStream.derived(1, "a", 3, "noise", 1), RandomStream.from_os(),
])
def test_different_streams_are_uncorrelated(other):
    n = 100_000
    correlation = np.corrcoef(RandomStream.derived(1, "a", 3, "noise").gaussian(n), other.gaussian(n))[0, 1]
    assert abs(correlation) < 5 / np.sqrt(n)


def test_every_deployed_stream_is_fresh_and_every_simulated_one_is_reproducible(monkeypatch):
    monkeypatch.delenv(INSECURE_SEED_VARIABLE, raising=False)
    deployed, simulated = run_streams("a"), RunStreams("a", 7)
    assert not deployed.predictable and simulated.predictable
    assert not np.array_equal(deployed.stream(1, "noise").uniform(9), deployed.stream(1, "noise").uniform(9))
    assert np.array_equal(simulated.stream(1, "noise").uniform(9), simulated.stream(1, "noise").uniform(9))


def test_the_insecure_variable_makes_a_deployed_client_equal_to_a_simulated_one(monkeypatch):
    monkeypatch.setenv(INSECURE_SEED_VARIABLE, "7")
    assert run_streams("a") == RunStreams("a", 7)
    monkeypatch.setenv(INSECURE_SEED_VARIABLE, "seven")
    with pytest.raises(ValueError, match="must be an integer"):
        run_streams("a")


def test_a_short_key_is_refused():
    with pytest.raises(ValueError, match="32"):
        RandomStream(b"short")
