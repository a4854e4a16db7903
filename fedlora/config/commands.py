"""The three commands with their configs, and what a command says about an option that is not its own."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping

from fedlora.config.client import ClientConfig
from fedlora.config.option import flag, options_of
from fedlora.config.server import ServerConfig
from fedlora.config.shared import CLIENT, SERVER, SIMULATE, Config
from fedlora.config.simulation import SimulationConfig

CONFIGS: Mapping[str, type[Config]] = {SERVER: ServerConfig, CLIENT: ClientConfig, SIMULATE: SimulationConfig}


def keys(config: type[Config]) -> list[str]:
    """Return the keys that a TOML file can have for a config."""
    return [flag(name) for name in options_of(config)]


def not_an_option(name: str, prog: str, own: Iterable[str], given: str, write: Callable[[str], str]) -> str:
    """Return a message about an option that a command does not have: whose it is, or which one may be meant.

    Args:
        name: the option's name, without hyphens in front.
        prog: the command, as in "fedlora-server".
        own: the names of the command's own options.
        given: the option as it was given.
        write: writes another option as it would be given, as in "--rounds".
    """
    own = list(own)
    if name not in own and (owners := _owners(name)):
        return f"{given} is an option of {' and '.join(owners)}, not of {prog}"
    message = f"{given} is not an option of {prog}"
    if close := difflib.get_close_matches(name, own, n=1):
        return f"{message}; did you mean {write(close[0])}?"
    if close := difflib.get_close_matches(name, [key for kind in CONFIGS.values() for key in keys(kind)], n=1):
        return f"{message}; did you mean {write(close[0])}? That is an option of {' and '.join(_owners(close[0]))}"
    return message


def _owners(name: str) -> list[str]:
    return [f"fedlora-{command}" for command, config in CONFIGS.items() if name in keys(config)]


def closest(given: str, known: Iterable[str]) -> str:
    """Return the end of a sentence: "; did you mean …?" with the known word closest to the given one, or "."."""
    close = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."
