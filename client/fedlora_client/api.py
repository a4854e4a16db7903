"""The client from Python: the code of the command fedlora-client, in the calling process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.config import ClientConfig
from fedlora.config.client import JoinConfig
from fedlora.config.parser import given_in_python

from .cli import set_environment

if TYPE_CHECKING:  # the environment is set before these are imported
    from rich.console import Console

    from .app import TookPart


def join(config: ClientConfig | Path | str | None = None, /, *, console: Console | None = None,
         **options: object) -> TookPart | None:
    """Take part in a federated run until its server ends it as planned, as fedlora-client does.

    The options are those of `fedlora-client --help`, with underscores: `join(data="notes.csv", server="127.0.0.1:9092",
    name="north", epsilon=8, declared_size=1000, yes=True)`. With `kit` they are those of `fedlora-client join`, which
    checks the coordinator's kit and writes a file of options first: `join(kit="kit.toml", data="notes.csv", …)`.

    Questions are asked at a terminal, unless `yes` is given.

    Args:
        config: the options as a config, or a TOML file of them; None for the defaults. A `JoinConfig` is for a kit.
        console: where the data holder is told what happens; None for stderr.
        **options: options by name, which override `config`.

    Returns:
        What this client did; None with `check_only=True` or `start=False`.

    Raises:
        ValueError: an option, the data or the kit is wrong.
        Refused: this client or the server declined; the code says why.
        EndedEarly: the server ended the run before it was finished.
        RoundFailed: a round failed on this machine. It stays charged.
        ServerUnreachable: no server answered within `connect_timeout` seconds.
        Untrusted: the server could not prove who it is.
        WireError: the server does not speak this protocol.
        Awaiting: the certificate that the kit needs has not come back yet.
        OSError: a file cannot be read or written.
    """
    with_kit = isinstance(config, JoinConfig) or (options.get("kit") is not None and not isinstance(
        config, ClientConfig))
    given = given_in_python(JoinConfig if with_kit else ClientConfig, config, options, "join()")
    read = JoinConfig(**given) if with_kit else ClientConfig(**given)
    set_environment(allow_download=read.allow_download)
    from fedlora.console import messages

    from .app import take_part, take_part_with_kit

    console = console or messages()
    if not isinstance(read, JoinConfig):
        return take_part(read, console)
    if read.kit is None:
        raise ValueError("join(): name the coordinator's kit, as in join(kit=\"kit.toml\")")
    return take_part_with_kit(read, given, console)
