"""The command fedlora-client verify: check a privacy report. It opens no connection."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedlora.config import Parser


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(prog="fedlora-client verify", description="Recompute a privacy report's ε from its signed history, "
                  "and check the signature.")
    made.add_argument("report", type=Path, help="path of a privacy.json")
    made.add_argument("--public-key", metavar="HEX", help="the public key that must have signed the report; get it "
                      "from a source that you trust")
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(argv)
    from rich.console import Console

    from fedlora.privacy.report import verify_file

    return verify_file(options.report, Console(), public_key=options.public_key)
