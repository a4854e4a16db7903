"""The file of options that `fedlora-client join` leaves, from which the client starts again."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from pathlib import Path

from fedlora.config import ClientConfig, flag, options_of
from fedlora.config.toml import as_toml


def command(path: Path) -> str:
    """Return the command that starts the client with a file of options."""
    return f"fedlora-client --config {shlex.quote(str(path))}"


def options_text(options: ClientConfig, names: Collection[str], path: Path, origin: str) -> str:
    """Return the text of a file of options. It means the same in any working directory.

    Args:
        options: the options of fedlora-client.
        names: names of the options to write; those without a value are left out.
        path: where the file will be.
        origin: what the options come from, for the file's first line.
    """
    lines = [f"# Options of fedlora-client, by fedlora-client join from {origin}.", f"# Start with: {command(path)}",
             ""]
    for name in options_of(ClientConfig):
        value = getattr(options, name)
        if name in names and name != "config" and value not in (None, {}):
            lines.append(f"{flag(name)} = {as_toml(_lasting(name, value))}")
    return "\n".join(lines) + "\n"


def _lasting(name: str, value: object) -> object:
    if isinstance(value, Path):
        return value.absolute()
    if name in ("data", "model") and isinstance(value, str) and Path(value).exists():
        return Path(value).absolute()
    return value
