"""The options of fedlora-simulate: those of a server, those of its clients, and how they are simulated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedlora.config import values
from fedlora.config.option import RUN, TUNING, option
from fedlora.config.shared import RECIPES, SIMULATE, LocalConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class SimulationConfig(RunConfig, LocalConfig):
    """Simulate federations: every method on the same split, seed by seed."""

    command: ClassVar[str] = SIMULATE
    forms: ClassVar[tuple[str, ...]] = (
        "fedlora-simulate --data DIR_OR_FILE [options]", "fedlora-simulate {audit,bench,poison} [--help]")

    strategy: tuple[str, ...] = option(
        ("fedsvd",), "one or more, separated by commas, or module:Class of your own, each if need be with a start of "
        "its own: fed-sb:weight; ffa-lora:orthonormal is FedSVD's control", RUN, values.strategies, keys=RECIPES,
        metavar="A[,B…]", plan="strategy", place=1)
    clients: int | None = option(None, "simulated clients", RUN, values.count,
                                 unset="2; with --partition files one for each", place=1)
    partition: str = option("iid", "iid, dirichlet:ALPHA, shards:K or files", RUN, place=1)
    seeds: tuple[int, ...] = option((0,), "one run per seed", RUN, values.seeds, metavar="N,…", place=1)

    batch_clients: int = option(
        1, "clients whose steps share one pass of the base model, for clients with few tokens a step; equal to 1 but "
        "for rounding", TUNING, values.count, place=7)
    workers: int = option(
        1, "processes that train clients at the same time, each with the base model and with --threads of its own "
        "[cores / workers]; several GPUs are dealt out among them", TUNING, values.count, place=7)
    engine: str = option(
        "in-process", "who trains: this process and the --workers it starts here, or as many workers of Ray, one base "
        "model each", TUNING, choices=("in-process", "ray"), place=8)
    ray_address: str | None = option(
        None, "a running Ray cluster, as in ray://HOST:10001 or auto; --threads is then 1 unless given", TUNING,
        unset="Ray is started on this machine", place=8)
