"""The command fedlora-adapter prune-base: a smaller base model to train adapters on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fedlora.config import Parser
from fedlora.config.subcommands import faults_in_words
from fedlora.config.values import count, natural, number, path, text


def way(given: str) -> str:
    """Parse --by: magnitude, or public:FILE."""
    kind, colon, rest = given.partition(":")
    if given == "magnitude" or (kind == "public" and colon and rest.strip()):
        return given
    raise argparse.ArgumentTypeError(f"{given!r} is neither magnitude nor public:FILE")


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(prog="fedlora-adapter prune-base", usage="fedlora-adapter prune-base MODEL --ratio X --out DIR "
                  "[options]", description="Write a base model without some of its attention heads and MLP neurons, "
                  "for clients with little memory. Adapters are trained on it, and fedlora-adapter recover makes them "
                  "adapters of the full model.")
    made.add_argument("model", type=text, metavar="MODEL", help="the full base model: a folder, or a model in the "
                      "hub's cache")
    made.add_argument("--ratio", type=number(float, 0, 0.95), required=True, metavar="X", help="share of "
                      "the heads and neurons of each layer that goes, at most 0.95; never more, and less where "
                      "the config allows only certain numbers of heads")
    made.add_argument("--by", type=way, default="magnitude", metavar="HOW", help="magnitude: the smallest weights go; "
                      "public:FILE: those that matter least by LoRAPrune's score on public texts, for language models "
                      "[magnitude]")
    made.add_argument("--max-length", type=count, default=128, metavar="N", help="tokens kept of a public text [128]")
    made.add_argument("--seed", type=natural, default=0, metavar="N", help="seed of what the score of public texts "
                      "draws [0]")
    made.add_argument("--four-bit", action="store_true", help="store the weights in 4 bits with bitsandbytes, for "
                      "training with PEFT (QLoRA); FedLoRA's own runs need 16 or 32 bits")
    made.add_argument("--out", type=path, required=True, metavar="DIR", help="new folder")
    made.add_argument("--json", action="store_true", dest="as_json", help="print JSON instead of sentences")
    return made


@faults_in_words("fedlora-adapter prune-base")
def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(argv)
    from .prune_report import prune_base

    return prune_base(**vars(options))
