"""Configs: command-line flags, the TOML file, defaults, and the parser made from a config's fields."""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import pytest

from fedlora.config import CONFIGS, GROUPS, ServerConfig, config_from, flag, options_of, read_config
from fedlora.config.values import method
from fedlora.plan import RunPlan


def options(command, *argv):
    return read_config(CONFIGS[command], argv)


def config(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return f"--config={path}"


def test_one_file_drives_all_three_commands(tmp_path):
    file = config(tmp_path, 'strategy = "fed-sb"\nepsilon = 3\nrounds = 7\ndata = "local"\n[client]\nname = "north"\n')
    assert options("server", file).strategy == "fed-sb" and options("server", file).rounds == 7
    assert options("client", file).epsilon == 3.0 and options("client", file).name == "north"
    assert options("simulate", file).strategy == ("fed-sb",) and options("simulate", file).data == "local"


def test_a_flag_overrides_the_command_s_table_which_overrides_the_top_level(tmp_path):
    file = config(tmp_path, "seed = 1\nrounds = 5\n[server]\nrounds = 6\n")
    assert options("server", file).rounds == 6
    assert options("server", "--rounds", "8", file).rounds == 8
    assert options("server", file).seed == 1


@pytest.mark.parametrize(("text", "seeds"), [("seed = 5", (5,)), ("seed = 5\nseeds = [1, 2]", (1, 2)),
                                             ("seed = 5\n[simulate]\nseeds = [3]", (3,)), ("[server]\nseed = 5", (0,))])
def test_the_seed_of_a_shared_file_is_the_one_seed_of_a_simulation_that_names_none(tmp_path, text, seeds):
    assert options("simulate", config(tmp_path, text)).seeds == seeds


def test_a_wrong_value_is_told_in_one_line(capsys):
    with pytest.raises(SystemExit):
        options("client", "--epsilon", "0")
    assert capsys.readouterr().err.count("\n") == 1


def test_lists_tables_and_booleans_read_as_their_flags_do(tmp_path):
    file = config(tmp_path, 'labels = ["no", "yes"]\ninsecure = true\ncolumn = {text = "note"}\n')
    read = options("server", file)
    assert (read.labels, read.insecure, read.column) == (("no", "yes"), True, {"text": "note"})


@pytest.mark.parametrize(("text", "names"), [
    ("roundz = 3", ["roundz", "rounds"]), ("rounds = 0", ["--rounds", "'0'"]), ("strategy = 'fedprox'", ["fedprox"]),
    ("= 3", ["not TOML"]), ("server = 'h:1'\n[server]\nseed = 1", ["not TOML", "under [client]"]),
    ("labels = ['a,b', 'c']", ["labels", "'a,b'", "comma"]), ("out = ''", ["--out", "empty"]),
    ("insecure = 1", ["insecure", "true or false"]),
    ("[server]\ndata = 'x'", ["'data' is an option of fedlora-client and fedlora-simulate, not of fedlora-server"])])
def test_a_wrong_file_ends_with_code_2_and_names_what_is_wrong(tmp_path, capsys, text, names):
    with pytest.raises(SystemExit) as exit_:
        options("server", config(tmp_path, text))
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert all(name in message for name in names), message


@pytest.mark.parametrize("argv", [["--epsilon", "0"], ["--epsilon", "nan"], ["--epsilon", "-1"], ["--delta", "1.5"],
                                  ["--micro-batch", "2.5"], ["--column", "text"], ["--config", "missing.toml"],
                                  ["--data", ""], ["--name", " "]])
def test_a_wrong_value_ends_with_code_2(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        options("client", *argv)
    assert exit_.value.code == 2
    assert argv[-1] in capsys.readouterr().err


def test_a_mistyped_option_of_another_command_is_named_too(tmp_path, capsys):
    with pytest.raises(SystemExit):
        options("client", config(tmp_path, "roundz = 3"))
    assert "did you mean 'rounds'?" in capsys.readouterr().err


def test_columns_given_one_by_one_add_up():
    for command in ("server", "client", "simulate"):
        given = options(command, "--column=text=note", "--column=label=triage", "--column=text=words")
        assert given.column == {"text": "words", "label": "triage"}


def test_seeds_and_labels_are_compared_as_what_they_mean(capsys):
    assert options("simulate", "--seeds", "1,02").seeds == (1, 2)
    assert options("server", "--labels", "0.0, 1.0").labels == ("0", "1")
    for given, value in (("--seeds", "1,01"), ("--labels", "1,1.0")):
        with pytest.raises(SystemExit) as exit_:
            options("simulate", given, value)
        assert exit_.value.code == 2 and "none twice" in capsys.readouterr().err


def test_epsilon_may_be_infinite():
    assert options("client", "--epsilon", "inf").epsilon == float("inf")


def test_a_table_reads_as_flags_do_and_an_empty_value_is_not_given():
    given = {"epsilon": 3, "new-ledger": True, "column": "text=note", "name": "", "threads": 2}
    assert config_from(given, CONFIGS["client"], "--node-config") == options(
        "client", "--epsilon=3", "--new-ledger", "--column=text=note", "--threads=2")


@pytest.mark.parametrize(("given", "names"), [
    ({"epsilom": 3}, ["--node-config", "epsilom", "epsilon"]), ({"epsilon": 0}, ["--node-config", "--epsilon", "'0'"]),
    ({"new-ledger": "yes"}, ["new-ledger", "true or false"]), ({"config": "no.toml"}, ["no.toml"])])
def test_a_wrong_table_is_a_value_error_that_names_what_is_wrong(given, names):
    with pytest.raises(ValueError) as wrong:
        config_from(given, CONFIGS["client"], "--node-config")
    assert all(name in str(wrong.value) for name in names), wrong.value


@pytest.mark.parametrize("command", CONFIGS)
def test_help_stands_in_groups_names_every_option_once_and_has_a_short_usage(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        options(command, "--help")
    assert exit_.value.code == 0
    usage, *parts = capsys.readouterr().out.split("\n\n")
    assert usage.startswith(f"usage: fedlora-{command} ") and usage.count("\n") < 3
    groups = {part.partition(":\n")[0]: re.findall(r"^  (?:-h, )?--([a-z-]+)", part, re.M) for part in parts[1:]}
    assert tuple(groups) == GROUPS and all(groups.values())
    assert sorted(name for names in groups.values() for name in names) == sorted(
        [*map(flag, options_of(CONFIGS[command])), "help", "version"])


MADE_BY_THE_SERVER = {"run_id", "fedlora_version", "family", "adapter_scale", "weight_by_examples", "protocol",
                      "least_members", "whole_gradients"}
"""Fields of a plan that no single option decides."""


@pytest.mark.parametrize("command", ["server", "simulate"])
def test_every_value_of_a_plan_follows_from_one_option_or_is_made_by_the_server(command):
    planned = [option.plan for option in options_of(CONFIGS[command]).values() if option.plan]
    assert len(set(planned)) == len(planned)
    assert set(planned) | MADE_BY_THE_SERVER == {field.name for field in dataclasses.fields(RunPlan)}
    assert not set(planned) & MADE_BY_THE_SERVER


def test_an_option_and_the_value_of_the_plan_that_has_its_name_have_one_type():
    plan = {field.name: field.type for field in dataclasses.fields(RunPlan)}
    for field in dataclasses.fields(ServerConfig):
        option = field.metadata["option"]
        if option.plan == field.name != "model":  # an option names the model; a plan also has its hashes
            kind = field.type.removesuffix(" | None")
            kind = kind.removesuffix(" | str") if field.name == "ranks" else kind  # a schedule is not in the plan
            assert kind == plan[field.name], field.name


def test_a_field_that_two_commands_have_is_declared_once_for_both():
    kinds = {kind for config in CONFIGS.values() for kind in config.__mro__ if dataclasses.is_dataclass(kind)}
    owners = Counter(name for kind in kinds for name in set(kind.__annotations__) - {"command", "forms", "fixed"})
    assert {name for name, count in owners.items() if count > 1} == {
        "strategy", "model", "labels", "resume"}, "they mean others"


def test_a_config_is_frozen_and_names_only_what_is_known():
    with pytest.raises(dataclasses.FrozenInstanceError):
        options("server").rounds = 3
    with pytest.raises(TypeError, match="roundz"):
        ServerConfig(roundz=3)


@pytest.mark.parametrize(("text", "strategy", "init"), [
    ("fed-sb", "fed-sb", None), ("fed-sb:weight", "fed-sb", "weight"),
    ("ffa-lora:public:a.jsonl", "ffa-lora", "public:a.jsonl"),
    ("own.module:Mine", "own.module:Mine", None), ("own.module:Mine:dp", "own.module:Mine", "dp")])
def test_a_strategy_is_one_of_ours_or_of_a_module_and_a_start_may_follow(text, strategy, init):
    assert method(text) == (strategy, init)


@pytest.mark.parametrize(("flag", "told"), [
    ("--strategy=fedprox", "fed-sb, fedavg-lora"), ("--strategy=:Mine", "module:Class"),
    ("--strategy=own:", "module:Class"),
    ("--strategy=fed-sb:weight", "--init weight"), ("--server-optimizer=lion", "adam"),
    ("--server-options=beta1", "name=number"), ("--strategy-options=period=often", "name=number"),
    ("--server-options=beta1=inf", "name=number"), ("--track=csv,radar", "console, csv, mlflow"),
    ("--ranks=q", "whole number"), ("--ranks=q=0", "not a whole number"), ("--ranks=grow", "grow:TOTAL, nested"),
    ("--ranks=shrink:0", "TOTAL a whole number"), ("--ranks=nested:3", "nor one of"), ("--ranks=constant", "nor one")])
def test_a_wrong_name_or_number_is_told_with_what_there_is(flag, told, capsys):
    with pytest.raises(SystemExit):
        options("server", flag)
    assert told in capsys.readouterr().err


def test_numbers_of_the_server_add_up_over_flags_and_file(tmp_path):
    file = config(tmp_path, "server-options = {beta1 = 0, tau = 1e-4}\n")
    assert options("server", file).server_options == (("beta1", 0.0), ("tau", 1e-4))
    given = "--server-options=tau=1", "--server-options=beta1=0", "--server-options=tau=2"
    assert options("server", *given).server_options == (("beta1", 0.0), ("tau", 2.0))


def test_two_numbers_for_one_name_in_one_list_are_refused(capsys):
    with pytest.raises(SystemExit) as exit_:
        options("server", "--server-options", "beta1=0,beta1=0.5")
    assert exit_.value.code == 2 and "two numbers for the same name" in capsys.readouterr().err
