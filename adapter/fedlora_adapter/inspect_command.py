"""The command fedlora-adapter inspect: measure an adapter, also against its base and against other adapters."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.config import Parser
from fedlora.config.subcommands import faults_in_words
from fedlora.config.values import count, number, path, text


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(prog="fedlora-adapter inspect", description="Measure an adapter's updates: size, rank, how they lie "
                  "to the base model's weights and to those of other adapters.")
    made.add_argument("adapter", type=path, metavar="ADAPTER", help="folder of the adapter")
    made.add_argument("others", type=path, nargs="*", metavar="OTHER", help="folders of adapters to compare it with")
    made.add_argument("--base", type=text, metavar="MODEL", help="the base model: a folder, or a model in the hub's "
                      "cache. Norms are then shown as shares of its weights', and intruder dimensions are counted")
    made.add_argument("--only", type=text, metavar="TEXT", help="measure only layers with this in their name [all]")
    made.add_argument("--top", type=count, default=10, metavar="N", help="look for intruders among the N leading "
                      "directions of each tuned weight [10]")
    made.add_argument("--threshold", type=number(float, 0, 1), default=0.5, metavar="X", help="a direction is an "
                      "intruder if its cosine to all of the base's is below X [0.5]")
    made.add_argument("--all-directions", action="store_true", help="compare with all directions of weights whose "
                      "smaller side exceeds 2048 too, at minutes for each [the leading 256]")
    made.add_argument("--scale-intruders", type=number(float, 0, 1), metavar="FACTOR", help="write the adapter with "
                      "intruder dimensions scaled by this, as by 0.75; 0 takes them away [write nothing]")
    made.add_argument("--out", type=path, metavar="DIR", help="new folder for --scale-intruders")
    made.add_argument("--json", action="store_true", dest="as_json", help="print JSON instead of tables, with all "
                      "layers")
    return made


@faults_in_words("fedlora-adapter inspect")
def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    made = parser()
    options = made.parse_args(argv)
    if (options.scale_intruders is None) != (options.out is None):
        made.error("--scale-intruders and --out go together: the one says what to change, the other where to write it")
    if options.scale_intruders is not None and options.base is None:
        made.error("--scale-intruders needs --base MODEL, because intruders are directions that the base does not have")
    if options.scale_intruders is not None and options.only is not None:
        made.error("--scale-intruders changes all layers; leave out --only")
    from .inspect_report import inspect

    return inspect(**vars(options))
