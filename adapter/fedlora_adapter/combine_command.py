"""The command fedlora-adapter combine: make one adapter of several."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fedlora.config import Parser
from fedlora.config.subcommands import faults_in_words
from fedlora.config.values import columns, count, natural, path, probability, text

WAYS = ("mean", "norm-consistent", "cat", "svd", "ties", "dare")


def weights(given: str) -> str | tuple[float, ...]:
    """Parse --weights: numbers with commas, public:FILE or description:TEXT."""
    kind, colon, rest = given.partition(":")
    if colon and kind in ("public", "description") and rest.strip():
        return given
    try:
        found = tuple(float(part) for part in given.split(","))
    except ValueError:
        found = ()
    if not found or any(abs(number) > 1e6 or number != number for number in found):
        raise argparse.ArgumentTypeError(f"{given!r} is neither numbers with commas, as in 0.5,0.3,0.2, nor "
                                         "public:FILE, nor description:TEXT")
    return found


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(prog="fedlora-adapter combine", description="Make one adapter of several of the same base model. "
                  "Their heads must have the same labels in the same order.")
    made.add_argument("adapters", type=path, nargs="+", metavar="ADAPTER", help="folders of at least two adapters")
    made.add_argument("--how", choices=WAYS, default="mean", help="mean: the weighted sum of the updates, exactly; "
                      "norm-consistent: the same after each layer's updates are scaled to equal norms; cat: the sum "
                      "with all factors side by side; svd: the sum cut to a rank; ties, dare: TIES and DARE, cut to a "
                      "rank [mean]")
    made.add_argument("--weights", type=weights, metavar="W,…", help="factor of each adapter, taken as it is; or "
                      "public:FILE to fit them to labelled public rows; or description:TEXT to weight by how alike "
                      "descriptions of the tasks are [equal shares of 1; 1 each for ties]")
    made.add_argument("--rank", type=count, metavar="N", help="largest rank of the result [mean, norm-consistent: that "
                      "of the exact sum; svd, ties, dare: the adapters' own]")
    made.add_argument("--density", type=probability, default=0.5, metavar="X", help="share of the values that ties and "
                      "dare keep [0.5]")
    made.add_argument("--seed", type=natural, default=0, metavar="N", help="seed of what dare drops [0]")
    made.add_argument("--base", type=text, metavar="MODEL", help="the base model, for --weights public:FILE: a folder, "
                      "or a model in the hub's cache")
    made.add_argument("--column", type=columns, default={}, metavar="NAME=COLUMN", help="which column of the public "
                      "rows holds which field, as in text=note,label=triage")
    made.add_argument("--max-length", type=count, default=128, metavar="N", help="tokens kept of a public row [128]")
    made.add_argument("--describe", action="append", type=text, default=[], metavar="TEXT", help="description of an "
                      "adapter's task, for --weights description:TEXT; one for each adapter, in their order")
    made.add_argument("--encoder", type=text, default="minilm", metavar="MODEL", help="sentence encoder for "
                      "descriptions: a folder, or a model in the hub's cache [minilm]")
    made.add_argument("--same-base", action="store_true", help="the base models are the same, although the adapters "
                      "name them differently")
    made.add_argument("--out", type=path, required=True, metavar="DIR", help="new folder")
    made.add_argument("--json", action="store_true", dest="as_json", help="print JSON instead of a table, with all "
                      "layers")
    return made


@faults_in_words("fedlora-adapter combine")
def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    made = parser()
    options = made.parse_args(argv)
    number, given = len(options.adapters), options.weights
    if number < 2:
        made.error("name at least two adapters")
    if isinstance(given, tuple) and len(given) != number:
        made.error(f"--weights has {len(given)} numbers for {number} adapters; give one for each, in their order")
    if isinstance(given, str) and given.startswith("public:") and options.base is None:
        made.error("--weights public:FILE needs --base MODEL, which is run on the rows")
    if isinstance(given, str) and given.startswith("description:") and len(options.describe) != number:
        made.error(f"--weights description:TEXT needs a --describe TEXT for each of the {number} adapters, in their "
                   f"order; {len(options.describe)} are given")
    if options.how == "cat" and options.rank is not None:
        made.error("--how cat keeps all factors as they are; leave out --rank, or choose --how mean")
    from .combine_report import combine

    return combine(**vars(options))
