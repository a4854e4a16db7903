"""The command fedlora-client check: everything that a client checks before it calls a server, without a server."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fedlora.config import Parser, build_parser, faults_in_words
from fedlora.config.client import CheckConfig
from fedlora.config.parser import given_options

EXIT_CODES = "exit codes: 0 ready; 2 something must be mended first; 130 interrupted by Ctrl-C"


def parser() -> Parser:
    """Return the command's parser."""
    return build_parser(CheckConfig, epilog=EXIT_CODES)


@faults_in_words("fedlora-client check")
def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code: 0 ready, 2 something must be mended, 130 interrupted."""
    given = given_options(CheckConfig, argv, epilog=EXIT_CODES)
    options = CheckConfig(**given)

    from .cli import set_environment

    set_environment(allow_download=options.allow_download)
    from fedlora.console import results

    from .check import check

    try:
        return 2 if check(options, frozenset(given), results(markup=False)) else 0
    except KeyboardInterrupt:
        print("fedlora-client check: interrupted", file=sys.stderr)
        return 130
