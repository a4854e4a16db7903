"""The command fedlora-server init: write a TOML file with every option, for --config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from fedlora.config import Parser, ServerConfig
from fedlora.config.template import init_parser, write_template


def parser() -> Parser:
    """Return the command's parser."""
    return init_parser(ServerConfig)


def default_preset() -> dict[str, object]:
    """Return the preset of a private run with the default strategy, as option → value."""
    from fedlora_strategies.recipe import presets

    return asdict(presets()[ServerConfig().strategy, True])


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    return write_template(ServerConfig, argv, default_preset)
