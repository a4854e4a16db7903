"""The command fedlora-simulate notes: write made-up notes of a few hospitals, to try FedLoRA on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedlora.config import Parser
from fedlora.config.values import count, natural

HELD_OUT = 300
"""Number of held-out notes: few, so that a first try is not spent on evaluating."""


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(
        prog="fedlora-simulate notes", description="Write short made-up triage notes, about nobody, to try FedLoRA on: "
        "DIR/data/hospital-1.jsonl and so on, and DIR/held-out.jsonl for --eval-data. Labels: routine, urgent.")
    made.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    made.add_argument("--hospitals", type=count, default=3, metavar="N", help="number of hospitals [3]")
    made.add_argument("--rows", type=count, default=6000, metavar="N", help="notes of each hospital [6000]")
    made.add_argument("--seed", type=natural, default=0, metavar="N", help="random seed of the notes [0]")
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code: 0 when done, 2 for wrong input."""
    options = parser().parse_args(argv)
    if options.folder.exists():
        print(f"fedlora-simulate notes: {options.folder} exists already; name a new folder", file=sys.stderr)
        return 2

    from .triage import write_held_out, write_hospitals

    try:
        write_hospitals(options.folder / "data", options.seed, hospitals=options.hospitals, rows=options.rows)
        write_held_out(options.folder / "held-out.jsonl", options.seed, rows=HELD_OUT)
    except ValueError as error:
        print(f"fedlora-simulate notes: {error}; lower --rows or --hospitals", file=sys.stderr)
        return 2
    print(f"{options.hospitals} hospitals wrote {options.rows} notes each into {options.folder / 'data'}; "
          f"{options.folder / 'held-out.jsonl'} has {HELD_OUT} that none of them holds.")
    return 0
