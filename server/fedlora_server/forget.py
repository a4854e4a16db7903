"""The command fedlora-server forget: frees a client's name, so that the next client to join under it owns it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedlora.config import Parser

from .names import FOLDER, Names, file_of

MOST_SHOWN = 20
"""Number of taken names shown if the given one is not among them."""


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(
        prog="fedlora-server forget", description="Free a client's name, if the client has lost its --state folder or "
        "somebody else took its name. The next client that joins under the name owns it. The server may keep running.")
    made.add_argument("name", metavar="NAME", help="the client's name")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run's folder")
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(argv)
    folder = options.out / FOLDER
    try:
        file_of(folder, options.name).unlink()
    except FileNotFoundError:
        print(f"fedlora-server forget: {_why_not(options.out, options.name)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"fedlora-server forget: {folder} cannot be changed: {error.strerror or error}", file=sys.stderr)
        return 2
    print(f"{options.name} is forgotten: the next client that joins under this name owns it, once nobody is connected "
          "with it.")
    return 0


def _why_not(out: Path, name: str) -> str:
    if not out.is_dir():
        return f"--out {out} is not a folder; give the run's folder"
    names = sorted(Names(out / FOLDER).taken)
    more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return (f"no client owns the name {name!r} in the run of {out}, so anybody can join under it. Taken names: "
            f"{', '.join(names[:MOST_SHOWN]) or 'none'}{more}")
