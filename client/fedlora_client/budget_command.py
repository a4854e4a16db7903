"""The command fedlora-client budget: show what was spent on which data set, and what is left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedlora.config import Parser
from fedlora.config.values import count


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(prog="fedlora-client budget", description="Show what was spent on which data set, when and by which "
                  "run, and what is left.")
    made.add_argument("--policy", type=Path, metavar="FILE.toml", help="the policy with the data sets' limits "
                      "[policy.toml in the user's configuration folder]")
    made.add_argument("--simulated-ledger", type=Path, metavar="DIR", help="show the ledger of a demo or simulation in "
                      "this folder")
    made.add_argument("--rounds", type=count, metavar="N", help="show the cost of N more rounds [of 1, 5 and 20]")
    made.add_argument("--json", action="store_true", dest="as_json", help="print JSON instead of tables")
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = vars(parser().parse_args(argv))
    from .budget import show_budget

    return show_budget(**options)
