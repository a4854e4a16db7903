"""The protocols of papers: every file is read by the command, fits a model, and has figures for its own methods."""

from pathlib import Path

import pytest

from fedlora.config import SimulationConfig, read_config
from fedlora_server.run_setup import find_model, planned, prepare
from fedlora_simulations.population import Method
from fedlora_simulations.reference import read_published

PROTOCOLS = Path(__file__).parents[2] / "simulations" / "protocols"
FILES = sorted(path.relative_to(PROTOCOLS).as_posix() for path in PROTOCOLS.glob("*/*.toml")
               if not path.name.startswith("published"))
PUBLISHED = sorted(path.relative_to(PROTOCOLS).as_posix() for path in PROTOCOLS.glob("*/published-*.toml"))
KEPT = ("clients", "clients_per_round", "partition", "epsilon", "delta", "clip_norm", "targets", "strategy")


def options(name, *others):
    return read_config(SimulationConfig, [f"--config={PROTOCOLS / name}", *others])


@pytest.mark.parametrize("name", FILES)
def test_a_protocol_is_a_plan_of_each_of_its_methods(name, checkpoint):
    read = options(name, f"--model={checkpoint('bert')}", "--rank=2")
    base = find_model(read)
    for method in map(Method.parse, read.strategy):
        own = method.options(read)
        plan = prepare(own, method.strategy, base, ("no", "yes"), read.seeds[0]).plan
        assert plan.private and (plan.rounds, plan.local_steps) == (read.rounds, read.local_steps)
        assert plan.max_participations <= plan.rounds and planned(own, method.strategy).lr == read.lr


@pytest.mark.parametrize("paper", sorted({Path(name).parent.name for name in FILES}))
def test_the_small_edition_keeps_what_is_private_and_who_takes_part(paper):
    large, small = options(f"{paper}/options.toml"), options(f"{paper}/small.toml")
    assert {name: getattr(small, name) for name in KEPT} == {name: getattr(large, name) for name in KEPT}
    assert (small.model, small.rounds <= large.rounds, small.local_steps < large.local_steps) == ("minilm", True, True)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures_are_of_the_protocol_s_methods_at_its_epsilon(name):
    protocol = options(f"{Path(name).parent.name}/options.toml")
    published = read_published(PROTOCOLS / name)
    assert len({figure.method for figure in published}) == len(published) > 1
    for figure in published:
        assert figure.method in protocol.strategy and 0.5 < figure.value < 1 and "arXiv" in figure.source
        assert float(figure.settings["epsilon"]) == protocol.epsilon
