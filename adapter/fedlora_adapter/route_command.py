"""The command fedlora-adapter route: several adapters side by side, of which each token takes those that fit it."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.config import Parser
from fedlora.config.subcommands import faults_in_words
from fedlora.config.values import count, finite, natural, path


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(prog="fedlora-adapter route", description="Put adapters of one base model into a folder from which "
                  "PEFT loads them with Arrow routing: each token takes, in each layer, the adapters whose leading "
                  "input direction is most like it. Nothing is trained, and no adapter is changed.")
    made.add_argument("adapters", type=path, nargs="+", metavar="ADAPTER", help="folders of at least two adapters, of "
                      "the same layers and without heads")
    made.add_argument("--top-k", type=count, metavar="N", help="adapters that a token takes [3, or all if they are "
                      "fewer]")
    made.add_argument("--temperature", type=finite, default=1.0, metavar="X", help="of the softmax over the likeness: "
                      "the lower, the more the most alike adapter counts [1]")
    made.add_argument("--seed", type=natural, default=0, metavar="N", help="seed of the search for the leading "
                      "directions [0]")
    made.add_argument("--same-base", action="store_true", help="the base models are the same, although the adapters "
                      "name them differently")
    made.add_argument("--out", type=path, required=True, metavar="DIR", help="new folder")
    return made


@faults_in_words("fedlora-adapter route")
def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    made = parser()
    options = made.parse_args(argv)
    number = len(options.adapters)
    if number < 2:
        made.error("name at least two adapters")
    if options.top_k is not None and options.top_k > number:
        made.error(f"--top-k {options.top_k} is more than the {number} adapters; give {number} at most")
    options.top_k = options.top_k or min(3, number)
    from .routing import route

    return route(**vars(options))
