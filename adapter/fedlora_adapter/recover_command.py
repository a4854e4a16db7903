"""The command fedlora-adapter recover: an adapter of a pruned base becomes one of the full model."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.config import Parser
from fedlora.config.subcommands import faults_in_words
from fedlora.config.values import path, text


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(prog="fedlora-adapter recover", description="Make an adapter that was trained on a base of "
                  "fedlora-adapter prune-base one of the full model: its factors are spread over the rows and columns "
                  "that were kept, and are 0 elsewhere.")
    made.add_argument("adapter", type=path, metavar="ADAPTER", help="folder of the adapter")
    made.add_argument("--base", type=text, required=True, metavar="FULL", help="the full base model: a folder, or a "
                      "model in the hub's cache")
    made.add_argument("--pruned", type=path, metavar="DIR", help="folder of the pruned base [the one that the adapter "
                      "names]")
    made.add_argument("--out", type=path, required=True, metavar="DIR", help="new folder")
    return made


@faults_in_words("fedlora-adapter recover")
def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(argv)
    from .recovering import recover

    return recover(**vars(options))
