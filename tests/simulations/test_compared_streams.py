"""Two simulated clients never use the same random numbers; if they did, the simulation would end with an error."""

import numpy as np
import pytest

from fedlora.config import SimulationConfig, read_config
from fedlora.privacy import RandomStream, RunStreams
from fedlora_server.run_setup import find_model
from fedlora_simulations.compared_streams import ComparedStreams
from fedlora_simulations.population import Method, populate
from fedlora_simulations.simulated_run import simulate
from tests.processes import write_rows


def test_comparing_changes_no_number():
    plain, compared = RunStreams("a", 7).stream(3, "noise", 1), ComparedStreams("a", 7).stream(3, "noise", 1)
    for draw in ("uniform", "gaussian", "uniform"):
        np.testing.assert_array_equal(getattr(plain, draw)(5), getattr(compared, draw)(5))


def test_streams_of_one_client_or_of_several_are_told_apart():
    for name in ("a", "b"):
        for purpose in ("sampling", "noise"):
            for round, attempt in ((1, 0), (1, 1), (2, 0)):
                ComparedStreams(name, 7, "r").stream(round, purpose, attempt).uniform(3)
    ComparedStreams("a", 7, "another run").stream(1, "noise").uniform(3)
    ComparedStreams("a", 7, "r").stream(1, "noise").uniform(3)
    with pytest.raises(RuntimeError, match="the noise of 'a' in round 1, attempt 0 repeats the noise of 'a'"):
        ComparedStreams("a", 7, "r").stream(1, "noise").uniform(3)


def options(tmp_path, checkpoint) -> SimulationConfig:
    data = write_rows(tmp_path / "rows.jsonl", seed=0, rows=80)
    return read_config(SimulationConfig, [
        "--data", str(data), "--model", str(checkpoint("bert")), "--strategy", "fed-sb", "--rounds", "1", "--rank", "2",
        "--batch-size", "4", "--local-steps", "1", "--device", "cpu", "--precision", "fp32", "--threads", "1"])


@pytest.mark.parametrize("purpose", ["noise", "sampling"])
def test_a_simulation_whose_clients_share_random_numbers_ends_with_an_error(tmp_path, checkpoint, monkeypatch, purpose):
    chosen = options(tmp_path, checkpoint)
    method, base, population = Method.parse("fed-sb"), find_model(chosen), populate(chosen, 0)
    assert simulate(chosen, method, 0, base, population).result.ended == "finished"
    derived = RandomStream.derived

    def one_for_all(seed, name, round, kind, attempt=0):
        return derived(seed, "everybody" if kind == purpose else name, round, kind, attempt)

    monkeypatch.setattr(RandomStream, "derived", one_for_all)
    with pytest.raises(RuntimeError, match=f"{purpose} of 'client-1' in round 1.* repeats the {purpose} of 'client-0'"):
        simulate(chosen, method, 0, base, population)
