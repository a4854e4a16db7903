"""A short `tests.soak`, and what its judgements make of processes that hold too much."""

from dataclasses import replace

import pytest

from tests import footprints
from tests.footprints import Footprint
from tests.soak import MOST_GROWTH_BYTES, Soak, faults_of, rounds_in, table

ONE = Footprint(1, 1 << 20, {"heap": 4096}, {"in use": 2048}, {"socket": 5, "file": 9}, {"MainThread": 1, "native": 8})


def held(rounds=range(50, 500, 5), **changes):
    """Return footprints at these rounds; `changes` are functions of the round."""
    return [replace(ONE, round=number, **{name: value(number) for name, value in changes.items()}) for number in rounds]


def test_a_short_run_whose_clients_come_and_go_holds_no_more_at_its_end(tmp_path, checkpoint):
    soak = Soak(tmp_path, checkpoint("bert"), rounds=14, clients=4, real=1, every=1, warm_up=4)
    try:
        soak.run(lambda line: None)
    finally:
        soak.close()
    assert rounds_in(soak.out) == 14 and not soak.faults, soak.faults
    assert soak.done["killed"] and soak.done["link cut"] and soak.done["server renewed"] and soak.done["returned"]
    for name, found in soak.judged().items():
        assert len(found) > 3 and found[-1].traced > 0 and found[-1].rss_mb > 20, name
        left = {**footprints.left_over(found, lambda one: one.descriptors),
                **footprints.left_over(found, lambda one: one.threads)}
        assert all(number <= 2 for number in left.values()), (name, left)  # a client more, or a file just written
        assert footprints.growth(found) < 100 * MOST_GROWTH_BYTES, "a dozen rounds tell of large leaks alone"
    assert table(soak.judged()).row_count == 3


@pytest.mark.parametrize(("changes", "says"), [
    ({"traced": lambda number: (1 << 20) + 1100 * number}, "traced memory grows by 1,100 bytes a round"),
    ({"descriptors": lambda number: {"socket": 5 + number // 100, "file": 9}}, "descriptors are left: {'socket': 4}"),
    ({"threads": lambda number: {"MainThread": 1, "native": 8, "fedlora-reader": number // 50}},
     "threads are left: {'fedlora-reader': 8}"),
    ({"threads": lambda number: {"fedlora-stream": 10 + number // 20}}, "threads are left: {'fedlora-stream': 20}"),
])
def test_what_a_process_does_not_give_back_is_told(changes, says):
    assert [fault for fault in faults_of("server", held(**changes), clients=20)] == [f"server: {says}"]


def test_what_comes_and_goes_is_no_leak():
    found = held(traced=lambda number: (1 << 20) + 900 * number + (1 << 22) * (number % 20 == 0),
                 descriptors=lambda number: {"socket": 5 + number % 3, "file": 9 - number % 2},
                 threads=lambda number: {"native": 8 + number % 4, "fedlora-stream": min(28, number // 10)})
    assert not list(faults_of("server", found, clients=20))
    assert 800 < footprints.growth(found) < 1000


def test_a_run_that_nobody_looked_at_is_no_proof():
    assert list(faults_of("north", held()[:1], clients=20)) == ["north: only 1 footprints after the warm-up"]


def test_a_footprint_names_memory_descriptors_and_threads_of_this_process(tmp_path):
    with (tmp_path / "open").open("w"):
        one = footprints.footprint(3)
    assert one.round == 3 and one.rss_kb["anonymous"] > 1000 and one.rss_kb["files"] > 1000
    assert one.descriptors["file"] > footprints.footprint(3).descriptors["file"]
    assert one.threads["MainThread"] == 1
