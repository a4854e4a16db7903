"""Every flag of the three commands, declared once, and the TOML file that can stand in for them.

A value comes from, in falling order: the command line, the file's table named after the command ([server], [client],
[simulate]), the file's top level, the run that is resumed, the preset of (strategy, privacy), the default below. A key
that belongs to another command is left to it, so that one file drives all three; one that belongs to none is an error.
The server's `seed` is also the one seed of a simulation, if `seeds` names none.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fedlora import registry
from fedlora.plan import FOUND, LR_SCHEDULES, STRATEGIES, WIRE_DTYPES, check_unit

SERVER, CLIENT, SIMULATE = "server", "client", "simulate"
TRACKERS = "fedlora_server.trackers"
"""The package whose files they are; read, and not imported."""


def _number(kind: Callable[[str], Any], low: float, high: float = math.inf, *, open_low: bool = False) -> Callable:
    """A parser of numbers in [low, high], or (low, high] if `open_low`; its errors say what was expected."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value <= high if open_low else low <= value <= high):
            wanted = "whole number" if kind is int else "number"
            bound = f"above {low:g}" if open_low else f"of at least {low:g}"
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a {wanted} {bound}" + (f" and at most {high:g}" if high < math.inf else ""))
        return value

    return parse


count = _number(int, 1)
_natural = _number(int, 0)
_positive = _number(float, 0, open_low=True)
_finite = _number(float, 0, 1e300, open_low=True)
_names = lambda text: tuple(part.strip() for part in text.split(",") if part.strip())  # noqa: E731


def _text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; give a value, or leave the option out")
    return text


def _path(text: str) -> Path:
    return Path(_text(text))


def _distinct(text: str, each: Callable[[str], Any] = str) -> tuple:
    values = tuple(map(each, _names(text)))
    if not values or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{text!r} must name at least one, and none twice")
    return values


def _labels(text: str) -> tuple[str, ...]:
    from fedlora.data.rows import normalize_label  # --help needs no numpy

    return _distinct(text, lambda name: normalize_label(name) or name)


def _init(text: str) -> str:
    if text in ("kaiming", "orthonormal", "weight", "dp") or (text.startswith("public:") and text != "public:"):
        return text
    known = "choose kaiming, orthonormal, weight, public:FILE or dp"
    reasons = {"gradient": "a start from the clients' raw gradients would release private rows without noise; ",
               "public": "name the file of public rows: ", "public:": "name the file of public rows: "}
    raise argparse.ArgumentTypeError(f"{text!r}: {reasons.get(text, 'there is no such start; ')}{known}")


def _strategies(text: str) -> tuple[str, ...]:
    names = _distinct(text)
    for name in names:
        strategy, colon, init = name.partition(":")
        if strategy not in STRATEGIES:
            raise argparse.ArgumentTypeError(f"{name!r} is not a strategy; choose from {', '.join(STRATEGIES)}")
        if colon:
            _init(init)
    return names


def _trackers(text: str) -> tuple[str, ...]:
    names, known = _distinct(text), registry.keys(TRACKERS)
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is not a tracker; choose from {', '.join(known)}")
    return names


def _unit(text: str) -> str:
    try:
        check_unit(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _columns(text: str) -> dict[str, str]:
    pairs = dict(part.partition("=")[::2] for part in _names(text))
    if not all(pairs.values()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=column, as in text=note")
    return pairs


class _Merged(argparse.Action):
    """Given twice, the mappings add up."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, getattr(namespace, self.dest, {}) | values)


@dataclass(frozen=True)
class Option:
    """One flag: `commands` are those that have it; a default of None means the preset's value or none at all."""

    flag: str
    commands: tuple[str, ...]
    help: str
    default: Any = None
    parse: Callable[[str], Any] | None = _text
    choices: Sequence[str] | None = None
    metavar: str | None = None

    @property
    def key(self) -> str:
        return self.flag.removeprefix("--")


RUN, ALL, LOCAL = (SERVER, SIMULATE), (SERVER, CLIENT, SIMULATE), (CLIENT, SIMULATE)

OPTIONS: tuple[Option, ...] = (
    Option("--config", ALL, "a TOML file with any of these options", parse=_path, metavar="FILE.toml"),
    # what is trained
    Option("--strategy", (SERVER,), "how uploads are combined", "fedsvd", choices=STRATEGIES),
    Option("--strategy", (SIMULATE,), "one or more, separated by commas, each if need be with a start of its own: "
           "fed-sb:weight; ffa-lora:orthonormal is FedSVD's control", ("fedsvd",), _strategies, metavar="A[,B…]"),
    Option("--privacy", RUN, "whether clients must train under differential privacy", "required",
           choices=("required", "off")),
    Option("--model", RUN, "alias (minilm), folder, or hub id[@commit]", "minilm"),
    Option("--task", ALL, "what the model learns", "classification", choices=registry.keys(FOUND["task"])),
    Option("--labels", (SERVER,), "the label set; without it clients announce their label names", None, _labels,
           metavar="A,B,…"),
    Option("--labels", (CLIENT,), "the label names in --data: its rows and the server's set are held against them, and "
           "they are announced where the server asks [as the policy has it]", None, _labels, metavar="A,B,…"),
    Option("--labels", (SIMULATE,), "the label set [that of --data]", None, _labels, metavar="A,B,…"),
    Option("--max-length", RUN, "tokens kept of a record", 128, count),
    Option("--rank", RUN, "rank of the adapters [preset]", None, count),
    Option("--alpha", RUN, "the update is scaled by alpha / rank [preset]", None, _finite),
    Option("--targets", RUN, "adapted linear layers: names or name endings; or auto (query and value), all, none "
           "[preset]", None, _names, metavar="NAME,…"),
    Option("--init", RUN, "how the frozen factors start: kaiming, orthonormal, weight (its singular vectors), "
           "public:FILE (those of the loss's gradient on public rows), or dp (those of the clients' noised gradients, "
           "at the price of a round) [preset]", None, _init, metavar="START"),
    Option("--head", RUN, "train a classifier's final linear layer too, or leave it as drawn [train]", None,
           choices=("train", "freeze")),
    Option("--dropout", RUN, "dropout on the adapters' input", 0.0, _number(float, 0, 0.99)),
    # how it is trained
    Option("--rounds", RUN, "rounds [preset]", None, count),
    Option("--local-steps", RUN, "optimiser steps of a client per round [preset]", None, count),
    Option("--batch-size", RUN, "expected records of a Poisson-sampled step [preset]", None, count),
    Option("--lr", RUN, "learning rate [preset]", None, _finite),
    Option("--lr-schedule", RUN, "linear lowers the rate from round to round, towards 0 after the last [preset]", None,
           choices=LR_SCHEDULES),
    Option("--optimizer", RUN, "a fresh one each round [preset]", None, choices=registry.keys(FOUND["optimizer"])),
    Option("--adjustment", RUN, "what is done to the noised gradient of each step before the optimiser", "none",
           choices=("none", *registry.keys(FOUND["adjustment"]))),
    Option("--clip-norm", RUN, "L2 bound of one record's gradient [preset]", None, _finite),
    Option("--head-scale", RUN, "factor on the head's gradient before clipping [preset]", None, _finite),
    Option("--wire-dtype", RUN, "what adapters travel as, both ways: bf16 halves the bytes and rounds each value to 8 "
           "significant bits", "fp32", choices=WIRE_DTYPES),
    # who takes part
    Option("--min-clients", (SERVER,), "clients to wait for before round 1", 2, count),
    Option("--clients-per-round", RUN, "size of a round's cohort [all]", None, count),
    Option("--min-replies", RUN, "uploads that close a round once nobody else trains, or --round-timeout is over "
           "[half the cohort, rounded up]", None, count),
    Option("--max-participations", RUN, "most rounds one client may start; privacy is calibrated to it [rounds]",
           None, count),
    Option("--round-timeout", (SERVER,), "seconds before idle clients are asked as backups for missing ones", 600.0,
           _positive),
    Option("--wait-timeout", (SERVER,), "seconds to wait when too few clients are left", 600.0, _positive),
    Option("--address", (SERVER,), "where to listen", "127.0.0.1:9092", metavar="HOST:PORT"),
    Option("--insecure", (SERVER, CLIENT), "allow plaintext beyond this machine", False, None),
    # what is left behind
    Option("--eval-data", RUN, "held-out rows: shows accuracy after each round", None, _path),
    Option("--trackers", RUN, f"what watches the run: {', '.join(registry.keys(TRACKERS))}", ("console", "plots"),
           _trackers, metavar="A[,B…]"),
    Option("--eval-every", RUN, "rounds between two evaluations; the last round always has one", 1, count),
    Option("--seed", (SERVER,), "of the frozen tensors and the cohorts", 0, _natural),
    Option("--seeds", (SIMULATE,), "one run per seed", (0,), lambda text: _distinct(text, _natural),
           metavar="N,…"),
    Option("--out", (SERVER,), "folder for adapter, report and curves [runs/<time>-<strategy>]", None, _path),
    Option("--out", (SIMULATE,), "folder for adapters, reports and the comparison [runs/<time>-simulation]", None,
           _path),
    Option("--resume", (SERVER,), "go on with the run whose --out folder this is, with the options that it was begun "
           "with", None, _path, metavar="DIR"),
    # the data holder's side
    Option("--data", LOCAL, "folder or file: .jsonl .csv .tsv .parquet, or a hub dataset", None,
           metavar="DIR_OR_FILE"),
    Option("--column", ALL, "where a field stands, as in text=note,label=triage", {}, _columns, metavar="NAME=COLUMN"),
    Option("--server", (CLIENT,), "the coordinator", "127.0.0.1:9092", metavar="HOST:PORT"),
    Option("--name", (CLIENT,), "this client's name at the server [host name]"),
    Option("--epsilon", LOCAL, "privacy budget of the run; inf turns privacy off", 8.0, _positive),
    Option("--delta", LOCAL, "[min(1e-5, 0.1 / declared size)]", None, _number(float, 0, 1, open_low=True)),
    Option("--declared-size", (CLIENT,), "public number of records, or of units [as the policy has it, or asked for]",
           None, count),
    Option("--declared-size", (SIMULATE,), "public number of records, or of units, of each client [rounded down to two "
           "digits]", None, count),
    Option("--yes", (CLIENT,), "take part without being asked first, when what the run costs was shown", False, None),
    Option("--privacy-unit", LOCAL, "what is protected as one: row, or column:NAME for all rows with one value there "
           "[row]", None, _unit, metavar="UNIT"),
    Option("--rows-per-unit", LOCAL, "most rows of one unit that enter a step", 8, count),
    Option("--max-clip-norm", LOCAL, "lowers the plan's clip norm to at most this", None, _finite),
    Option("--model", (CLIENT,), "folder of the base model [resolved from the plan's name]", metavar="PATH"),
    Option("--allow-download", ALL, "fetch the base model, or a hub dataset, if it is not here", False, None),
    Option("--device", LOCAL, "where to train", "auto", choices=("auto", "cpu", "cuda", "mps")),
    Option("--precision", LOCAL, "auto takes bf16 where the hardware has it", "auto", choices=("auto", "fp32", "bf16")),
    Option("--threads", LOCAL, "CPU threads", None, count),
    Option("--micro-batch", LOCAL, "records computed at once [a bound on tokens, by device]", None, count),
    Option("--compile", LOCAL, "torch.compile the model's blocks, on CUDA: up to half a minute for each padded length, "
           "then faster steps; equal but for rounding", False, None),
    Option("--state", (CLIENT,), "folder of this client's uploads and reports [by --name]", None, _path),
    Option("--policy", (CLIENT,), "what this machine's owner allows [policy.toml in the user's configuration]", None,
           _path, metavar="FILE.toml"),
    Option("--new-ledger", (CLIENT,), "go on where the ledger, or its witness, is lost; every report will say so",
           False, None),
    Option("--simulated-ledger", (CLIENT,), "keep a ledger for made-up data in this folder, apart from the real one",
           None, _path, metavar="DIR"),
    Option("--connect-timeout", (CLIENT,), "seconds to keep trying for a server", 120.0, _positive),
    # simulation
    Option("--clients", (SIMULATE,), "simulated clients [2; with --partition files one for each]", None, count),
    Option("--batch-clients", (SIMULATE,), "clients whose steps share one pass of the base model, for clients with few "
           "tokens a step; equal to 1 but for rounding", 1, count),
    Option("--engine", (SIMULATE,), "who trains: this process and the --workers it starts here, or as many workers of "
           "Ray, one base model each", "in-process", choices=("in-process", "ray")),
    Option("--ray-address", (SIMULATE,), "a running Ray cluster, as in ray://HOST:10001 or auto; --threads is then 1 "
           "unless given [Ray is started on this machine]", None),
    Option("--workers", (SIMULATE,), "processes that train clients at the same time, each with the base model and with "
           "--threads of its own [cores / workers]; several GPUs are dealt out among them", 1, count),
    Option("--partition", (SIMULATE,), "iid, dirichlet:ALPHA, shards:K or files", "iid"),
)


class _Parser(argparse.ArgumentParser):
    """Its errors are one line: the usage would be thirty more."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser(command: str, description: str) -> argparse.ArgumentParser:
    """The parser of one command. Its defaults are all absent, so that `read_options` can tell what was given."""
    parser = _Parser(prog=f"fedlora-{command}", description=description, allow_abbrev=False,
                     argument_default=argparse.SUPPRESS)
    for option in _options_of(command):
        if option.parse is None:
            parser.add_argument(option.flag, action=argparse.BooleanOptionalAction, help=option.help)
            continue
        default = "" if option.default in (None, {}) else f" [{_shown(option.default)}]"
        parser.add_argument(option.flag, action=_Merged if option.parse is _columns else "store", type=option.parse,
                            choices=option.choices, metavar=option.metavar,
                            help=(option.help + default).replace("%", "%%"))
    return parser


def read_options(parser: argparse.ArgumentParser, command: str, argv: Sequence[str] | None, *,
                 begun_with: Callable[[Path], Mapping[str, Any]] | None = None) -> argparse.Namespace:
    """Parse `argv` over the --config file over the defaults; a bad value ends the process with code 2.

    Args:
        begun_with: the options of the run in the folder that --resume names, which then stand in for the defaults; it
            raises ValueError where there is none.
    """
    given = parser.parse_args(argv)
    values = {option.key.replace("-", "_"): option.default for option in _options_of(command)}
    try:
        if begun_with is not None and "resume" in given:
            values |= vars(parser.parse_args(_arguments(begun_with(given.resume), command, f"--resume {given.resume}")))
        if "config" in given:
            values |= vars(parser.parse_args(_config_arguments(given.config, command)))
    except ValueError as error:
        parser.error(str(error))
    return argparse.Namespace(**values | vars(given))


def options_from(table: Mapping[str, str | int | float | bool], command: str, source: str) -> argparse.Namespace:
    """Options of a command from keys and values, as Flower's run and node configurations give them; "" is not given.

    Args:
        source: named in errors.
    Raises:
        ValueError: a key is not an option of the command, or a value is not one of its values.
    """
    def complain(message: str) -> NoReturn:
        raise ValueError(f"{source}: {message.removeprefix('argument ')}")

    parser = build_parser(command, "")
    parser.error = complain  # type: ignore[method-assign]
    given = {key: value for key, value in table.items() if value != ""}
    return read_options(parser, command, _arguments(given, command, source))


def _options_of(command: str) -> list[Option]:
    return [option for option in OPTIONS if command in option.commands]


def _shown(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else f"{default:g}" if isinstance(
        default, float) else str(default)


def _config_arguments(path: Path, command: str) -> list[str]:
    """The file's values as command-line arguments, so that file and flags are checked by the same code."""
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        both = all(re.search(rf"(?m)^\s*{start}", text) for start in (r"server\s*=", r"\[server\]"))
        hint = "; beside a table [server], the client's `server` belongs under [client]" if both else ""
        raise ValueError(f"--config {path} is not TOML: {error}{hint}") from None
    own = table.pop(command, {})
    for other in {SERVER, CLIENT, SIMULATE} - {command}:
        table.pop(other, None) if isinstance(table.get(other), dict) else None
    if not isinstance(own, dict):  # `server = "host:port"` is the client's flag, not a table
        table[command], own = own, {}
    others = {option.key for option in OPTIONS} - {option.key for option in _options_of(command)}
    values = {key: value for key, value in table.items() if key.replace("_", "-") not in others} | own
    if command == SIMULATE and "seed" in table:
        values = {"seeds": table["seed"]} | values
    if "config" in values:
        raise ValueError(f"--config {path}: 'config' cannot name another file")
    if "resume" in values:
        raise ValueError(f"--config {path}: 'resume' is a flag alone, for the run brings its own options")
    return _arguments(values, command, f"--config {path}")


def _arguments(values: Mapping[str, Any], command: str, source: str) -> list[str]:
    """The values as command-line arguments."""
    here = {option.key: option for option in _options_of(command)}
    arguments: list[str] = []
    for key, value in values.items():
        name = key.replace("_", "-")
        if name not in here:
            close = difflib.get_close_matches(name, [option.key for option in OPTIONS], n=1)
            raise ValueError(f"{source}: {key!r} is not an option of fedlora-{command}"
                             + (f"; did you mean {close[0]!r}?" if close else ""))
        if here[name].parse is None:
            if not isinstance(value, bool):
                raise ValueError(f"{source}: {key} must be true or false, not {value!r}")
            arguments.append(f"--{name}" if value else f"--no-{name}")
        else:
            if isinstance(value, dict):
                value = ",".join(f"{k}={v}" for k, v in value.items())
            elif isinstance(value, list):
                if split := [item for item in value if "," in str(item)]:
                    raise ValueError(f"{source}: {key} holds {split[0]!r}, which its comma would make two of")
                value = ",".join(map(str, value))
            arguments.append(f"--{name}={value}")
    return arguments
