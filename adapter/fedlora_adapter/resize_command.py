"""The command fedlora-adapter resize: write an adapter at a smaller rank."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.config import Parser
from fedlora.config.subcommands import faults_in_words
from fedlora.config.values import count, path


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(prog="fedlora-adapter resize", description="Write an adapter at a smaller rank, and tell the "
                  "error of each layer: the change of its update in the Frobenius norm.")
    made.add_argument("adapter", type=path, metavar="ADAPTER", help="folder of the adapter")
    made.add_argument("--rank", type=count, required=True, metavar="N", help="the new rank; layers whose rank is no "
                      "larger stay as they are")
    made.add_argument("--by", choices=("svd", "prefix"), default="svd", help="svd: the closest update of this rank; "
                      "prefix: the first rows and columns of the factors, for adapters whose training saw to it [svd]")
    made.add_argument("--out", type=path, required=True, metavar="DIR", help="new folder")
    made.add_argument("--json", action="store_true", dest="as_json", help="print JSON instead of a table, with all "
                      "layers")
    return made


@faults_in_words("fedlora-adapter resize")
def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(argv)
    from .resize_report import resize

    return resize(**vars(options))
