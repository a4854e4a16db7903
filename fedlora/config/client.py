"""The options of fedlora-client."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fedlora.config import values
from fedlora.config.option import MODEL, NETWORK, PRIVACY, RUN, TUNING, option
from fedlora.config.shared import CLIENT, ConnectedConfig, LocalConfig
from fedlora.plan.usual import MAX_LENGTH


@dataclass(frozen=True, kw_only=True)
class ClientConfig(LocalConfig, ConnectedConfig):
    """Take part in a federated run with the records in --data. The records never leave this machine.

    Brackets show what applies if an option is not given. Flags are off unless given.
    """

    command: ClassVar[str] = CLIENT
    forms: ClassVar[tuple[str, ...]] = (
        "fedlora-client --data DIR_OR_FILE [options]", "fedlora-client join KIT.toml [options]",
        "fedlora-client {init,check,join,enroll,budget,verify,attach-audit} [--help]")

    name: str | None = option(None, "name of this client at the server", RUN, unset="host name", place=2,
                              example='"north"')
    labels: tuple[str, ...] | None = option(
        None, "names of the labels in --data: the rows and the server's label set are checked against them, and the "
        "server is told them if it asks", RUN, values.labels, metavar="A,B,…", unset="the policy's", place=2,
        example='["routine", "urgent"]')
    yes: bool = option(False, "show what the run costs, and take part without asking for confirmation", RUN, None,
                       place=3)
    state: Path | None = option(None, "folder for this client's uploads and reports", RUN, values.path,
                                unset="~/.local/state/fedlora/<name>", place=3, example='"state"')

    model: str | None = option(None, "folder of the base model", MODEL, metavar="PATH",
                               unset="found by the name in the server's plan", place=1,
                               example='"models/minilm"')

    policy: Path | None = option(None, "file that says which runs this machine's owner allows, and their budget",
                                 PRIVACY, values.path, metavar="FILE.toml", unset="~/.config/fedlora/policy.toml",
                                 place=4, example='"policy.toml"')
    kit: Path | None = option(None, "the coordinator's kit: refuse a server whose plan is not the one in it", PRIVACY,
                              values.path, metavar="KIT.toml", place=4, example='"kit.toml"')
    simulated_ledger: Path | None = option(
        None, "for made-up data only: keep the privacy ledger in this folder, apart from the real one", PRIVACY,
        values.path, metavar="DIR", place=7, example='"simulated-ledger"')
    new_ledger: bool = option(False, "go on although the privacy ledger or its witness file is lost; every report will "
                              "say so", PRIVACY, None, place=8)

    server: str = option("127.0.0.1:9092", "address of the server", NETWORK, metavar="HOST:PORT", place=1)
    proxy: str | None = option(None, "HTTP proxy that leads to the server; only with --tls", NETWORK,
                               metavar="HOST:PORT", place=3, example='"proxy:8080"')
    connect_timeout: float = option(120.0, "seconds to keep trying to reach the server", NETWORK, values.positive)


@dataclass(frozen=True, kw_only=True)
class JoinConfig(ClientConfig):
    """Take part in the run of a coordinator's kit.

    All that can be checked is checked before a server is called, and what is the owner's to decide is asked. The
    answers are written to a file of options, with which the client starts: now, and later with fedlora-client --config.

    An option that is given is not asked. Without a terminal, or with --yes, nothing is asked.
    """

    forms: ClassVar[tuple[str, ...]] = ("fedlora-client join KIT.toml [options]",)

    write: Path = option(Path("client.toml"), "the file of options to write", RUN, values.path, metavar="FILE.toml",
                         place=1)
    check_only: bool = option(False, "check all and show what the run would cost; write neither key nor file, and call "
                              "nobody", RUN, None, place=1)
    start: bool = option(True, "start the client when all is well; --no-start only writes its options", RUN, None,
                         place=1)
    pin: bool = option(False, "write the fingerprint of the server's key into the policy, which then allows no other "
                       "server", PRIVACY, None, place=4)


@dataclass(frozen=True, kw_only=True)
class CheckConfig(ClientConfig):
    """Check data, policy, model and this machine as a client does before it calls a server, and show what it would use.

    All that must be mended is told at once, by kind. Nobody is called, nothing is charged and no file is written.
    Records, and labels that are not declared, are shown on a terminal alone.
    """

    forms: ClassVar[tuple[str, ...]] = ("fedlora-client check --data DIR_OR_FILE [options]",)
    fixed: ClassVar[tuple[str, ...]] = ("yes", "state", "server", "insecure", "proxy", "connect_timeout", "log_format")

    records: bool = option(True, "show three records as the model will see them, on a terminal alone", RUN, None,
                           place=3)
    measure: bool = option(True, "train a few steps on made-up records, to learn the time and the memory of a round",
                           TUNING, None, place=3)
    max_length: int | None = option(None, "number of tokens kept of each record", MODEL, values.count,
                                    unset=f"the kit's, or {MAX_LENGTH}", place=3, example=str(MAX_LENGTH))
    rounds: int | None = option(None, "rounds of the run", TUNING, values.count, place=2, example="20",
                                unset="the kit's, or the usual number")
    local_steps: int | None = option(None, "steps of training in each round", TUNING, values.count, place=2,
                                     unset="the kit's, or the usual number", example="4")
    batch_size: int | None = option(None, "expected number of records in a step", TUNING, values.count, place=2,
                                    unset="the kit's, or the usual number", example="256")
