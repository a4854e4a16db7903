"""The options of fedlora-simulate: those of a server, those of its clients, and those of the simulation itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fedlora.config import values
from fedlora.config.option import PRIVACY, RUN, TUNING, option
from fedlora.config.shared import RECIPES, SIMULATE, LocalConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class SimulationConfig(RunConfig, LocalConfig):
    """Simulate federated runs on one machine: every method on the same data split, one run for each seed.

    A run with one method, one seed and one value of each swept option is a cell. Its result is kept in a folder of its
    own below --out, and is not computed again.

    Brackets show what applies if an option is not given; [preset] depends on --strategy and --privacy (see
    `fedlora-server presets`). Flags are off unless given.
    """

    command: ClassVar[str] = SIMULATE
    forms: ClassVar[tuple[str, ...]] = (
        "fedlora-simulate --data DIR_OR_FILE [options]",
        "fedlora-simulate {init,notes,compare,audit,poison,rank-starts} [--help]")

    strategy: tuple[str, ...] = option(
        ("fedsvd",), "one or more strategies, each a name or module:Class of your own, with an --init of its own after "
        "a colon if you like: fed-sb:weight; ffa-lora:orthonormal is the control for FedSVD", RUN, values.strategies,
        keys=RECIPES, metavar="A[,B…]", plan="strategy", place=1)
    clients: int | None = option(None, "number of simulated clients", RUN, values.count,
                                 unset="2; with --partition files, one for each file", place=1, example="2")
    partition: str = option("iid", "how rows are split over clients: iid, dirichlet:ALPHA (label shares drawn at "
                            "random), shards:K (K pieces of the rows sorted by label), or files (one file each)", RUN,
                            metavar="SCHEME", place=1)
    seeds: tuple[int, ...] = option((0,), "random seeds, one run for each", RUN, values.seeds, metavar="N,…", place=1)
    sweep: Mapping[str, tuple[str, ...]] = option(
        {}, "another option and the values to run it with, as in epsilon=1,3,8,inf; several options give every "
        "combination. Semicolons separate values that contain commas", RUN, values.settings, metavar="NAME=A,B,…",
        place=2, example='{epsilon = [1, 3, 8, "inf"], rank = [2, 8]}')
    resume: bool = option(False, "go on in the folder --out: what is finished there is kept, and an interrupted run "
                          "goes on after its last finished round", RUN, None, place=3)
    reference: Path | None = option(None, "TOML file with published figures, to be shown beside those of the runs", RUN,
                                    values.path, metavar="FILE.toml", place=6, example='"published.toml"')

    tune: Mapping[str, tuple[str, ...]] = option(
        {}, "another option and values of which to choose the best, for each method, on a fifth of the training rows "
        "that is held out for this alone", TUNING, values.settings, metavar="NAME=A,B,…", place=3,
        example="{lr = [0.01, 0.03, 0.1]}")
    tune_budget: int | None = option(
        None, "most runs of --tune for each method and each combination of swept values; if there are more "
        "combinations of values, this many are drawn at random", TUNING, values.count, unset="all combinations",
        place=3, example="8")

    trust: str = option(
        "local", "with --secure-aggregation, whose noise --epsilon counts: each client's own, or that of a sum, to "
        "which each adds a share. A deployed client says it in its policy.toml", PRIVACY,
        choices=("local", "aggregate"), place=3)

    batch_clients: int = option(
        1, "clients that share one pass of the base model in each step, for clients with few tokens a step; results "
        "are equal up to rounding", TUNING, values.count, place=7)
    workers: int = option(
        1, "processes that train clients in parallel, each with a base model and with --threads of its own (by default "
        "cores / workers); several GPUs are shared out among them", TUNING, values.count, place=7)
    engine: str = option(
        "in-process", "what trains the clients: this process and its --workers, or --workers of Ray, each with a base "
        "model of its own", TUNING, choices=("in-process", "ray"), place=8)
    ray_address: str | None = option(
        None, "address of a running Ray cluster, as in ray://HOST:10001, or auto; --threads is then 1 unless given",
        TUNING, unset="Ray is started on this machine", place=8, example='"auto"')
