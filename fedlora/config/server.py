"""The options of fedlora-server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fedlora.config import values
from fedlora.config.option import NETWORK, RUN, option
from fedlora.config.shared import RECIPES, SERVER, ConnectedConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class ServerConfig(RunConfig, ConnectedConfig):
    """Coordinate a federated run: wait for clients, have them train, and combine what they send.

    Brackets show what applies if an option is not given; [preset] depends on --strategy and --privacy (see
    `fedlora-server presets`). Flags are off unless given.
    """

    command: ClassVar[str] = SERVER
    forms: ClassVar[tuple[str, ...]] = (
        "fedlora-server [--strategy NAME] [--labels A,B,…] [options]", "fedlora-server --resume DIR",
        "fedlora-server {init,presets,pki,kit,status,stop,forget,audit-log,export,predict,generate} [--help]")

    strategy: str = option("fedsvd", "what clients train and how uploads are combined; module:Class for a strategy of "
                           "your own", RUN, values.strategy, keys=RECIPES, metavar="NAME", plan="strategy", place=1)
    min_clients: int = option(2, "number of clients to wait for before round 1", RUN, values.count, place=2)
    resume: Path | None = option(
        None, "continue the run whose --out folder this is, with the options that it was started with", RUN,
        values.path, metavar="DIR", place=3)
    on_event: str | None = option(
        None, "command to run for each of a few events, without a shell; it gets the event as JSON on its stdin", RUN,
        values.command, metavar="CMD", place=7, example='"notify-send FedLoRA"')
    data_description: str | None = option(
        None, "what the clients' data are, in your own words, for the adapter's model card; @FILE for a file's text",
        RUN, values.words, metavar="TEXT|@FILE", place=6, example='"Notes of three hospitals, 2019 to 2023"')
    seed: int = option(0, "random seed of the adapter's initial values and of the choice of clients in each round", RUN,
                       values.natural)

    address: str = option("127.0.0.1:9092", "address to listen on", NETWORK, metavar="HOST:PORT", place=1)
    round_timeout: float = option(1800.0, "seconds that clients have to answer in a round; a client that needs longer "
                                  "is dropped from the round", NETWORK, values.positive)
    wait_timeout: float = option(600.0, "seconds to wait for more clients when a round has too few, before the run "
                                 "ends", NETWORK, values.positive)
    metrics: str | None = option(None, "answer HTTP requests for /metrics and /healthz here; on this machine alone, "
                                 "unless a host is named", NETWORK, values.endpoint, metavar="[HOST:]PORT", place=7,
                                 example='"9464"')


@dataclass(frozen=True, kw_only=True)
class KitConfig(ServerConfig):
    """Write the kit of a run to come: the file that tells each institution all it needs for `fedlora-client join`.

    Give it the options with which the server will be started, on the command line or with --config. --address and --out
    alone have a meaning of their own.
    """

    forms: ClassVar[tuple[str, ...]] = (
        "fedlora-server kit --out KIT.toml --address HOST:PORT [the other options of the run]",)
    fixed: ClassVar[tuple[str, ...]] = ("dry_run",)

    address: str = option("127.0.0.1:9092", "address at which clients reach the server", NETWORK, metavar="HOST:PORT",
                          place=1)
    out: Path | None = option(None, "the file to write; it holds no secret", RUN, values.path, metavar="KIT.toml",
                              place=1)
