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
    """Coordinate a federated run."""

    command: ClassVar[str] = SERVER
    forms: ClassVar[tuple[str, ...]] = (
        "fedlora-server [--strategy NAME] [--labels A,B,…] [options]", "fedlora-server --resume DIR",
        "fedlora-server presets [--json] | fedlora-server forget NAME --out DIR")

    strategy: str = option("fedsvd", "how uploads are combined, or module:Class of your own", RUN, values.strategy,
                           keys=RECIPES, metavar="NAME", plan="strategy", place=1)
    min_clients: int = option(2, "clients to wait for before round 1", RUN, values.count, place=2)
    resume: Path | None = option(
        None, "go on with the run whose --out folder this is, with the options that it was begun with", RUN,
        values.path, metavar="DIR", place=3)
    seed: int = option(0, "of the frozen tensors and the cohorts", RUN, values.natural)

    address: str = option("127.0.0.1:9092", "where to listen", NETWORK, metavar="HOST:PORT", place=1)
    round_timeout: float = option(1800.0, "seconds that clients have for a round; who needs longer is lost to it",
                                  NETWORK, values.positive)
    wait_timeout: float = option(600.0, "seconds to wait when too few clients are left", NETWORK, values.positive)
