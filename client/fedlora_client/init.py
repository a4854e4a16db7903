"""The command fedlora-client init: write a TOML file with every option, for --config."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.config import ClientConfig, Parser
from fedlora.config.template import init_parser, write_template


def parser() -> Parser:
    """Return the command's parser."""
    return init_parser(ClientConfig)


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    return write_template(ClientConfig, argv)
