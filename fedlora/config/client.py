"""The options of fedlora-client."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fedlora.config import values
from fedlora.config.option import MODEL, NETWORK, PRIVACY, RUN, option
from fedlora.config.shared import CLIENT, ConnectedConfig, LocalConfig


@dataclass(frozen=True, kw_only=True)
class ClientConfig(LocalConfig, ConnectedConfig):
    """Take part in a federated run with the records in --data."""

    command: ClassVar[str] = CLIENT
    forms: ClassVar[tuple[str, ...]] = (
        "fedlora-client --data DIR_OR_FILE [options]", "fedlora-client budget [--help]",
        "fedlora-client verify privacy.json [--help]")

    name: str | None = option(None, "this client's name at the server", RUN, unset="host name", place=2)
    labels: tuple[str, ...] | None = option(
        None, "the label names in --data: its rows and the server's set are held against them, and they are announced "
        "where the server asks", RUN, values.labels, metavar="A,B,…", unset="as the policy has it", place=2)
    yes: bool = option(False, "take part without being asked first, when what the run costs was shown", RUN, None,
                       place=3)
    state: Path | None = option(None, "folder of this client's uploads and reports", RUN, values.path,
                                unset="by --name", place=3)

    model: str | None = option(None, "folder of the base model", MODEL, metavar="PATH",
                               unset="resolved from the plan's name", place=1)

    policy: Path | None = option(None, "what this machine's owner allows", PRIVACY, values.path, metavar="FILE.toml",
                                 unset="policy.toml in the user's configuration", place=4)
    simulated_ledger: Path | None = option(
        None, "keep a ledger for made-up data in this folder, apart from the real one", PRIVACY, values.path,
        metavar="DIR", place=7)
    new_ledger: bool = option(False, "go on where the ledger, or its witness, is lost; every report will say so",
                              PRIVACY, None, place=8)

    server: str = option("127.0.0.1:9092", "the coordinator", NETWORK, metavar="HOST:PORT", place=1)
    connect_timeout: float = option(120.0, "seconds to keep trying for a server", NETWORK, values.positive)
