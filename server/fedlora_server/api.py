"""The server from Python: the code of the command fedlora-server, in the calling process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.config import ServerConfig
from fedlora.config.parser import given_in_python

from .cli import begun_with, set_environment

if TYPE_CHECKING:  # the environment is set before these are imported
    from rich.console import Console

    from .app import Served


def serve(config: ServerConfig | Path | str | None = None, /, *, console: Console | None = None,
          **options: object) -> Served:
    """Run a federation from the first client to the report, as fedlora-server does.

    The options are those of `fedlora-server --help`, with underscores: `serve(labels=("routine", "urgent"),
    min_clients=2, rounds=5, out="runs/first")`; `serve(resume="runs/first")` goes on with a run.

    In the main thread, Ctrl-C stops the run after the last finished round, and a second Ctrl-C raises
    KeyboardInterrupt. In another thread, `fedlora-server stop` on the run's folder stops it. Where gRPC has used TLS
    in this process before, a client may be let in with TLS 1.2; the command takes 1.3 alone.

    Args:
        config: the options as a config, or a TOML file of them; None for the defaults.
        console: shows what happens; None for stderr.
        **options: options by name, which override `config`.

    Raises:
        ValueError: an option is wrong, the port is taken, or the clients announced no usable label set.
        OSError: a file cannot be read or written.
    """
    read = ServerConfig(**given_in_python(ServerConfig, config, options, "serve()", begun_with))
    if read.dry_run:
        raise ValueError("serve(): dry_run works only with the command fedlora-server; leave it out")
    set_environment(allow_download=read.allow_download)
    from fedlora.console import messages

    from . import app
    from .stopping import Stopping

    console = console or messages()
    return app.serve(read, console, stopping=Stopping(console, ends_process=False))
