"""What docs/papers.md says of thirty-five systems: their commands can be run, and upload as many values as it says."""

import re
import shlex
from pathlib import Path

import pytest

from fedlora.config import SimulationConfig, read_config
from fedlora_server.run_setup import planned, recipe_of
from fedlora_strategies import strategy_class
from tests.federation import layout_of, plan_of

PAGE = Path(__file__).parent.parent / "docs" / "papers.md"
LAYERS = tuple(f"encoder.layer.{number}.attention.self.{name}" for number in range(6) for name in ("query", "value"))
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.read_text("utf-8").splitlines()
        if line.startswith("| ") and not line.startswith("| system")]
COMMANDS = [(command, row[4]) for row in ROWS for command in re.findall(r"^`(--strategy [^`]+)`", row[1])]


def test_every_system_has_a_row_with_what_is_faithful_and_what_is_left_out():
    assert len({row[0] for row in ROWS}) == len(ROWS) == 35
    assert all(row[1] and row[2] and row[3] for row in ROWS)


@pytest.mark.parametrize(("command", "up"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_a_rows_command_can_be_planned_at_epsilon_eight_and_uploads_what_the_row_says(command, up):
    options = read_config(SimulationConfig, ["--data=train/", "--eval-data=val.jsonl", "--epsilon=8", "--rounds=6",
                                             *shlex.split(command)])
    strategy, = options.strategy
    values, recipe = planned(options, strategy), recipe_of(options, strategy)
    family = dict(recipe.family_options(values.rank, values.rounds)) | dict(options.family_options)
    layout = layout_of(recipe.family, rank=values.rank, modules=LAYERS, head=False, rows=384, columns=384,
                       options=tuple(family.items()))
    plan = plan_of(strategy, family_options=tuple(sorted(family.items())), rank=values.rank, alpha=values.alpha)
    strategy_class(strategy)(plan, layout, recipe=recipe)
    sent = layout.activated(names) if (names := recipe.schedule.trains(1, layout)) else layout
    assert sent.num_trained / len(LAYERS) == int(up.rpartition(" to ")[2].replace(",", ""))
