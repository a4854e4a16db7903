"""The settings that a run prints when it starts, and the values that fedlora-server presets prints."""

import dataclasses
import json
from io import StringIO

import pytest
from rich.console import Console

from fedlora.config import CONFIGS, PRESET, flag, options_of, read_config, shown
from fedlora_server.cli import main
from fedlora_server.run_setup import planned, recipe_of
from fedlora_server.settings import settings
from fedlora_strategies import Preset, strategy_class
from fedlora_strategies.recipe import STEPS_AT_SERVER, presets
from fedlora_strategies.schedules.constant import Constant
from fedlora_strategies.schedules.grow import Grow
from fedlora_strategies.schedules.nested import Nested
from fedlora_strategies.schedules.shrink import Shrink


def told(command, *argv):
    """Run a command on a terminal of 80 columns, and return its settings by source, and its lines."""
    config = read_config(CONFIGS[command], argv)
    console = Console(file=StringIO(), width=80)
    console.print(settings(config, "fedsvd", planned(config, "fedsvd")))
    lines = console.file.getvalue().splitlines()
    text = " ".join(line.rstrip() for line in lines)
    found = {}
    for source in ("default", "preset", "given"):
        text, _, items = text.partition(f"{source} ")
        found[source] = {" ".join(item.split()) for item in items.split("·") if item.strip()}
    return found, lines


@pytest.mark.parametrize("command", ["server", "simulate"])
def test_the_values_of_a_run_are_told_with_their_sources_in_at_most_six_lines(command):
    found, lines = told(command, "--rounds=3", "--lr=0.01", "--max-length=64")
    assert len(lines) <= 6
    assert found["given"] == {"rounds 3", "lr 0.01", "max-length 64"}
    values = dataclasses.asdict(strategy_class("fedsvd").recipe.preset(True))
    assert found["preset"] == {f"{flag(name)} {shown(value)}" for name, value in values.items()} - {
        f"rounds {values['rounds']}", f"lr {values['lr']:g}"}
    assert {"strategy fedsvd", "privacy required", "model minilm"} <= found["default"]
    assert not [item for items in found.values() for item in items if "None" in item]


def test_the_options_that_a_preset_stands_in_for_are_those_that_it_has():
    for command in ("server", "simulate"):
        assert {name for name, option in options_of(CONFIGS[command]).items() if option.unset == PRESET} == {
            field.name for field in dataclasses.fields(Preset)}


def test_a_rank_stabilised_scale_is_the_plain_one_with_alpha_times_the_root_of_the_rank():
    """Everything else of a run, and so each of its bits, follows from the same values."""
    def values(*argv):
        return planned(read_config(CONFIGS["simulate"], ["--data=rows.jsonl", *argv]), "fed-sb")

    assert values("--rank=9", "--alpha=4", "--scaling=rs") == values("--rank=9", "--alpha=12")
    preset = strategy_class("fed-sb").recipe.preset(True)
    assert values("--scaling=rs") == dataclasses.replace(preset, alpha=preset.alpha * preset.rank**0.5)
    with pytest.raises(ValueError, match="--scaling rs and --ranks exclude each other"):
        values("--scaling=rs", "--ranks=bert.encoder.layer.0.attention.self.query=3")


def test_ranks_that_change_are_the_servers_and_decided_after_a_quarter_and_half_of_the_rounds():
    def schedule(*argv):
        return recipe_of(read_config(CONFIGS["simulate"], ["--data=rows.jsonl", *argv]), "ffa-lora").schedule

    assert schedule("--ranks=grow:30", "--rounds=10") == Grow(30, first=2, last=5)
    assert schedule("--ranks=shrink:30", "--rounds=2") == Shrink(30, first=1, last=1)
    preset = strategy_class("ffa-lora").recipe.preset(True)
    assert schedule("--ranks=grow:30") == Grow(30, preset.rounds // 4, preset.rounds // 2)
    assert schedule("--ranks=nested", "--scaling=rs") == Nested() and schedule("--ranks=q=3") == Constant()
    with pytest.raises(ValueError, match=r"--ranks nested: .*one-factor"):
        recipe_of(read_config(CONFIGS["simulate"], ["--data=rows.jsonl", "--ranks=nested"]), "rolora")


def test_presets_are_printed_as_they_are(capsys):
    assert main(["presets", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    for (strategy, private), values in presets().items():
        assert printed["required" if private else "off"][strategy] == dataclasses.asdict(values) | {
            "targets": list(values.targets)}
    assert main(["presets"]) == 0
    table = capsys.readouterr().out
    assert "--privacy required" in table and "--privacy off" in table
    for (strategy, _), values in presets().items():
        assert strategy in table and f"{values.lr:g}" in table
    for (strategy, _), values in presets(one_step=True).items():
        told = printed["one-step"][strategy]
        assert told["server_optimizer"] == "adam" and told["server_lr"] == STEPS_AT_SERVER.lr
        assert {name: told[name] for name in ("rounds", "rank", "lr")} == {
            "rounds": values.rounds, "rank": values.rank, "lr": values.lr}
    assert "--one-step" in table and "beta1=0" in table
