"""The command fedlora-simulate init: write a TOML file with every option, for --config."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.config import Parser, SimulationConfig
from fedlora.config.template import init_parser, write_template


def parser() -> Parser:
    """Return the command's parser."""
    return init_parser(SimulationConfig)


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    from fedlora_server.init import default_preset

    return write_template(SimulationConfig, argv, default_preset)
