"""What several commands have: each option stands once, in the part that names whose it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fedlora import registry
from fedlora.config import values
from fedlora.config.option import MODEL, NETWORK, PRESET, PRIVACY, RUN, TUNING, option
from fedlora.plan import FOUND, LR_SCHEDULES, WIRE_DTYPES

SERVER, CLIENT, SIMULATE = "server", "client", "simulate"
"""The commands: fedlora-server, …; and their tables in a file."""

RECIPES, SERVER_OPTIMIZERS = values.RECIPES, "fedlora_strategies.server_optimizers"
TRACKERS = "fedlora_server.trackers"
"""Packages whose files are values of options; read, and not imported."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of every command.

    Attributes:
        command: its name without fedlora-.
        forms: how it is called, for --help.
    """

    command: ClassVar[str]
    forms: ClassVar[tuple[str, ...]]

    config: Path | None = option(None, "a TOML file with any of these options", RUN, values.path, metavar="FILE.toml")
    task: str = option("classification", "what the model learns", RUN,
                       choices=lambda: registry.keys(FOUND["task"]), plan="task", place=4)
    column: Mapping[str, str] = option({}, "where a field stands, as in text=note,label=triage", RUN, values.columns,
                                       metavar="NAME=COLUMN", place=4)
    allow_download: bool = option(False, "fetch the base model, or a hub dataset, if it is not here", MODEL, None)


@dataclass(frozen=True, kw_only=True)
class ConnectedConfig(Config):
    """Of the two that speak with each other."""

    insecure: bool = option(False, "allow plaintext beyond this machine", NETWORK, None)


@dataclass(frozen=True, kw_only=True)
class LocalConfig(Config):
    """Of whoever holds data: the client, and the simulation for all of its clients."""

    data: str | None = option(None, "folder or file: .jsonl .csv .tsv .parquet, or a hub dataset", RUN,
                              metavar="DIR_OR_FILE", place=1)

    epsilon: float = option(8.0, "privacy budget of the run; inf turns privacy off", PRIVACY, values.positive, place=1)
    delta: float | None = option(None, "of the budget", PRIVACY, values.number(float, 0, 1, open_low=True),
                                 unset="min(1e-5, 0.1 / declared size)", place=2)
    declared_size: int | None = option(
        None, "public number of records, or of units, of a client", PRIVACY, values.count, place=2,
        unset={CLIENT: "as the policy has it, or asked for", SIMULATE: "rounded down to two digits"})
    privacy_unit: str | None = option(
        None, "what is protected as one: row, or column:NAME for all rows with one value there", PRIVACY, values.unit,
        metavar="UNIT", unset="row", place=3)
    rows_per_unit: int = option(8, "most rows of one unit that enter a step", PRIVACY, values.count)
    max_clip_norm: float | None = option(None, "lowers the plan's clip norm to at most this", PRIVACY, values.finite)

    device: str = option("auto", "where to train", TUNING, choices=("auto", "cpu", "cuda", "mps"), place=6)
    precision: str = option("auto", "auto takes bf16 where the hardware has it", TUNING,
                            choices=("auto", "fp32", "bf16"), place=6)
    threads: int | None = option(None, "CPU threads", TUNING, values.count, place=6)
    micro_batch: int | None = option(None, "records computed at once", TUNING, values.count,
                                     unset="a bound on tokens, by device", place=6)
    compile: bool = option(False, "torch.compile the model's blocks, on CUDA: up to half a minute for each padded "
                           "length, then faster steps; equal but for rounding", TUNING, None, place=6)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """Of whoever plans a run: the server, and the simulation in its place."""

    labels: tuple[str, ...] | None = option(
        None, "the label set", RUN, values.labels, metavar="A,B,…", plan="labels", place=2,
        unset={SERVER: "clients announce their label names", SIMULATE: "that of --data"})
    rounds: int | None = option(None, "rounds", RUN, values.count, unset=PRESET, plan="rounds", place=2)
    eval_data: Path | None = option(None, "held-out rows: shows accuracy after each round", RUN, values.path, place=2)
    eval_every: int = option(1, "rounds between two evaluations; the last round always has one", RUN, values.count)
    out: Path | None = option(
        None, "folder for adapters, reports and curves", RUN, values.path, place=3,
        unset={SERVER: "runs/<time>-<strategy>", SIMULATE: "runs/<time>-simulation"})
    clients_per_round: int | None = option(None, "size of a round's cohort", RUN, values.count, unset="all", place=4)
    min_replies: int | None = option(
        None, "uploads without which no round closes, whoever is lost or declines", RUN, values.count,
        unset="half of those asked that are left; until --round-timeout is over, and while idle clients can be asked, "
        "of all", place=6)

    model: str = option("minilm", "alias (minilm), folder, or hub id[@commit]", MODEL, plan="model", place=1)
    rank: int | None = option(None, "rank of the adapters", MODEL, values.count, unset=PRESET, plan="rank", place=2)
    alpha: float | None = option(None, "the update is scaled by alpha / rank", MODEL, values.finite, unset=PRESET,
                                 plan="alpha", place=2)
    targets: tuple[str, ...] | None = option(
        None, "adapted linear layers: names or name endings; or auto (query and value), all, none", MODEL, values.names,
        metavar="NAME,…", unset=PRESET, plan="targets", place=2)
    init: str | None = option(
        None, "how the frozen factors start: kaiming, orthonormal, weight (its singular vectors), public:FILE (those "
        "of the loss's gradient on public rows), or dp (those of the clients' noised gradients, at the price of a "
        "round)", MODEL, values.start, metavar="START", unset=PRESET, plan="private_start", place=2)
    family_options: tuple[tuple[str, float], ...] = option(
        (), "numbers of the adapter family's own", MODEL, values.numbers, metavar="NAME=X,…", plan="family_options",
        place=6)
    ranks: tuple[tuple[str, int], ...] = option(
        (), "ranks of single adapted layers, by full module name", MODEL, values.whole_numbers,
        metavar="MODULE=R,…", plan="ranks", place=6)
    max_length: int = option(128, "tokens kept of a record", MODEL, values.count, plan="max_length", place=3)
    head: str | None = option(None, "train a classifier's final linear layer too, or leave it as drawn", MODEL,
                              choices=("train", "freeze"), unset="train", plan="train_head")
    dropout: float = option(0.0, "dropout on the adapters' input", MODEL, values.number(float, 0, 0.99), plan="dropout")

    privacy: str = option("required", "whether clients must train under differential privacy", PRIVACY,
                          choices=("required", "off"), plan="private", place=1)
    clip_norm: float | None = option(None, "L2 bound of one record's gradient", PRIVACY, values.finite, unset=PRESET,
                                     plan="clip_norm", place=3)
    max_participations: int | None = option(
        None, "most rounds one client may start; privacy is calibrated to it", PRIVACY, values.count, unset="rounds",
        plan="max_participations", place=4)

    strategy_options: tuple[tuple[str, float], ...] = option(
        (), "numbers of the strategy's own, as in period=2,warmup=1 of fedsvd", TUNING, values.numbers,
        metavar="NAME=X,…", place=4)
    server_optimizer: str | None = option(
        None, "what the server does with the mean of the uploads", TUNING,
        choices=lambda: ("none", *registry.keys(SERVER_OPTIMIZERS)), unset="the strategy's", place=4)
    server_lr: float | None = option(None, "its learning rate", TUNING, values.finite,
                                     unset="1, of adam and yogi 0.01", place=4)
    server_options: tuple[tuple[str, float], ...] = option(
        (), "its other numbers, as in beta1=0,beta2=0.99,decay=1", TUNING, values.numbers, metavar="NAME=X,…", place=4)

    screen: float | None = option(
        None, "leave out uploads that move the adapter more than so many times as far as is usual in the round; inf "
        "takes all", TUNING, values.number(float, 1), metavar="K", unset="5, with privacy 10", place=4)

    lr: float | None = option(None, "learning rate", TUNING, values.finite, unset=PRESET, plan="lr", place=1)
    local_steps: int | None = option(None, "optimiser steps of a client per round", TUNING, values.count, unset=PRESET,
                                     plan="local_steps", place=1)
    batch_size: int | None = option(None, "expected records of a Poisson-sampled step", TUNING, values.count,
                                    unset=PRESET, plan="expected_batch", place=1)
    lr_schedule: str | None = option(
        None, "linear lowers the rate from round to round, towards 0 after the last", TUNING,
        choices=lambda: LR_SCHEDULES, unset=PRESET, plan="lr_schedule", place=2)
    optimizer: str | None = option(None, "a fresh one each round", TUNING,
                                   choices=lambda: registry.keys(FOUND["optimizer"]), unset=PRESET, plan="optimizer",
                                   place=2)
    adjustment: str = option("none", "what is done to the noised gradient of each step before the optimiser", TUNING,
                             choices=lambda: ("none", *registry.keys(FOUND["adjustment"])), plan="adjustment")
    trackers: tuple[str, ...] = option(("console", "plots"), "what watches the run", RUN,
                                       values.several(lambda: registry.keys(TRACKERS), "tracker"), keys=TRACKERS,
                                       metavar="A[,B…]",
                                       place=6)
    head_scale: float | None = option(None, "factor on the head's gradient before clipping", TUNING, values.finite,
                                      unset=PRESET, plan="head_scale", place=3)

    wire_dtype: str = option("fp32", "what adapters travel as, both ways: bf16 halves the bytes and rounds each value "
                             "to 8 significant bits", NETWORK, choices=WIRE_DTYPES, plan="wire_dtype")
