"""fedlora-server forget: whoever joins next under a name has it, whatever secret it was used with before."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .names import FOLDER, Names, file_of

MOST_SHOWN = 20
"""Names, where one is not found."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="fedlora-server forget", description="Free the name of a client that has lost its --state folder, or "
        "whose name somebody else took, for whoever joins next under it. A server that runs need not be stopped.")
    parser.add_argument("name", metavar="NAME", help="of the client")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run's folder")
    options = parser.parse_args(argv)
    folder = options.out / FOLDER
    try:
        file_of(folder, options.name).unlink()
    except FileNotFoundError:
        print(f"fedlora-server forget: {_why_not(options.out, options.name)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"fedlora-server forget: {folder} cannot be changed: {error.strerror or error}", file=sys.stderr)
        return 2
    print(f"{options.name} is forgotten: whoever joins next under this name has it, once nobody is connected with it.")
    return 0


def _why_not(out: Path, name: str) -> str:
    if not out.is_dir():
        return f"--out {out} is no folder; name that of the run"
    names = sorted(Names(out / FOLDER).taken)
    more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return (f"no client has become ready as {name!r} in the run of {out}, so nobody has to prove anything for this "
            f"name. Taken are: {', '.join(names[:MOST_SHOWN]) or 'none'}{more}")
