from __future__ import annotations

import numpy as np
import pytest

from fedlora.data import partition

LABELS = ["a"] * 300 + ["b"] * 200 + [None] * 10


@pytest.mark.parametrize("scheme", ["iid", "dirichlet:0.5", "dirichlet:100", "shards:2"])
@pytest.mark.parametrize("clients", [1, 3, 7])
def test_a_partition_covers_every_row_once_and_depends_on_the_seed_alone(scheme, clients):
    parts = partition(len(LABELS), LABELS, scheme, clients, 3)
    assert len(parts) == clients and all(len(part) for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(LABELS)))
    again = partition(len(LABELS), LABELS, scheme, clients, 3)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))
    if clients > 1:
        other = partition(len(LABELS), LABELS, scheme, clients, 4)
        assert not all(np.array_equal(one, two) for one, two in zip(parts, other, strict=True))


def test_iid_parts_differ_by_at_most_one_row():
    assert {len(part) for part in partition(100, None, "iid", 7, 0)} == {14, 15}


def test_a_small_alpha_makes_clients_more_unlike_than_a_large_one():
    labels = [0, 1] * 500

    def spread(scheme):
        splits = [partition(1000, labels, scheme, 5, seed) for seed in range(10)]
        return np.mean([np.std([np.mean([labels[i] for i in part]) for part in split]) for split in splits])

    assert spread("dirichlet:0.2") > 3 * spread("dirichlet:50")


def test_shards_give_a_client_at_most_as_many_labels_as_shards_plus_cuts():
    labels = list(np.repeat(np.arange(10), 20))
    for part in partition(200, labels, "shards:2", 10, 0):
        assert len({labels[i] for i in part}) <= 2


@pytest.mark.parametrize(("n", "labels", "scheme", "clients"), [
    (10, None, "iid", 11), (10, None, "iid", 0), (10, None, "dirichlet:1", 2), (10, None, "shards:1", 2),
    (10, [0] * 9, "shards:1", 2), (10, [0] * 10, "shards:0", 2), (10, [0] * 10, "shards:1.5", 2),
    (10, [0] * 10, "dirichlet:-1", 2), (10, [0] * 10, "dirichlet:nan", 2), (10, [0] * 10, "dirichlet", 2),
    (10, [0] * 10, "sorted", 2), (10, [0] * 10, "shards:6", 2), (10, [0] * 10, "dirichlet:0.001", 9)])
def test_an_impossible_partition_is_an_error(n, labels, scheme, clients):
    with pytest.raises(ValueError):
        partition(n, labels, scheme, clients, 0)
