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
    """Take part in a federated run with the records in --data. The records never leave this machine.

    Brackets show what applies if an option is not given. Flags are off unless given.
    """

    command: ClassVar[str] = CLIENT
    forms: ClassVar[tuple[str, ...]] = (
        "fedlora-client --data DIR_OR_FILE [options]", "fedlora-client {enroll,budget,verify} [--help]")

    name: str | None = option(None, "name of this client at the server", RUN, unset="host name", place=2)
    labels: tuple[str, ...] | None = option(
        None, "names of the labels in --data: the rows and the server's label set are checked against them, and the "
        "server is told them if it asks", RUN, values.labels, metavar="A,B,…", unset="the policy's", place=2)
    yes: bool = option(False, "show what the run costs, and take part without asking for confirmation", RUN, None,
                       place=3)
    state: Path | None = option(None, "folder for this client's uploads and reports", RUN, values.path,
                                unset="~/.local/state/fedlora/<name>", place=3)

    model: str | None = option(None, "folder of the base model", MODEL, metavar="PATH",
                               unset="found by the name in the server's plan", place=1)

    policy: Path | None = option(None, "file that says which runs this machine's owner allows, and their budget",
                                 PRIVACY, values.path, metavar="FILE.toml", unset="~/.config/fedlora/policy.toml",
                                 place=4)
    simulated_ledger: Path | None = option(
        None, "for made-up data only: keep the privacy ledger in this folder, apart from the real one", PRIVACY,
        values.path, metavar="DIR", place=7)
    new_ledger: bool = option(False, "go on although the privacy ledger or its witness file is lost; every report will "
                              "say so", PRIVACY, None, place=8)

    server: str = option("127.0.0.1:9092", "address of the server", NETWORK, metavar="HOST:PORT", place=1)
    proxy: str | None = option(None, "HTTP proxy that leads to the server; only with --tls", NETWORK,
                               metavar="HOST:PORT", place=3)
    connect_timeout: float = option(120.0, "seconds to keep trying to reach the server", NETWORK, values.positive)
