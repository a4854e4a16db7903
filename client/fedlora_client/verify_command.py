"""The command fedlora-client verify: check a privacy report. It opens no connection."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedlora.config import Parser

EXIT_CODES = ("exit codes: 0 the report is consistent, and signed by the key of --public-key or of this machine (or "
              "--any-key is given); 2 it does not verify, cannot be read, or has no ε for --clients; 3 it is "
              "consistent, but signed by a key that is not known here: compare the key")


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(prog="fedlora-client verify", description="Recompute a privacy report's ε, and what an attacker can "
                  "achieve, from its signed history, and check the signature.", epilog=EXIT_CODES)
    made.add_argument("report", type=Path, help="path of a privacy.json, whose signature privacy.dsse.json stands "
                      "beside it; or of a privacy.dsse.json alone")
    made.add_argument("--clients", type=int, metavar="M", help="in a run with secure sums, show ε for one person whose "
                      "records are at this client and M − 1 others")
    keys = made.add_mutually_exclusive_group()
    keys.add_argument("--public-key", metavar="HEX", help="the public key that must have signed the report; get it "
                      "from a source that you trust")
    keys.add_argument("--any-key", action="store_true", help="accept a valid signature by whatever key: it shows that "
                      "the report was not changed since, and not whose it is")
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(argv)
    from rich.console import Console

    from fedlora.privacy.report import verify_file

    return verify_file(options.report, Console(), public_key=options.public_key, known=_own(), any_key=options.any_key,
                       clients=options.clients)


def _own() -> dict[str, str]:
    """Return this machine's public key → whose it is; nothing if it has none, or none that can be used."""
    from fedlora.privacy.report import load_or_create_key, public_key

    from . import paths

    try:
        if not paths.signing_key().exists():
            return {}
        return {public_key(load_or_create_key(paths.signing_key())): "the key of this machine and user"}
    except (ValueError, OSError):
        return {}
