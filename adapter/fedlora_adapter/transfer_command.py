"""The command fedlora-adapter transfer: teach another base model what an adapter does, from public prompts."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.config import Parser
from fedlora.config.subcommands import faults_in_words
from fedlora.config.values import columns, count, finite, names, natural, number, path, text


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(prog="fedlora-adapter transfer", description="Make an adapter for another base model, or of another "
                  "rank or kind, by training it on what the old one answers to public prompts. No private record is "
                  "read, so what is known of ε stays true of the new one.")
    made.add_argument("adapter", type=path, metavar="ADAPTER", help="folder of the adapter; any type of PEFT's")
    made.add_argument("--to", type=text, required=True, metavar="MODEL", help="the new base model: a folder, or a "
                      "model in the hub's cache")
    made.add_argument("--prompts", type=path, required=True, metavar="FILE", help="public texts as for training, "
                      "without labels; for a language model a column prompt, text or messages")
    made.add_argument("--base", type=text, metavar="MODEL", help="the adapter's base model: a folder, or a model in "
                      "the hub's cache [the one that the adapter names]")
    made.add_argument("--column", type=columns, default={}, metavar="NAME=COLUMN", help="which column of the prompts "
                      "holds which field, as in text=note")
    made.add_argument("--rank", type=count, metavar="N", help="rank of the new adapter [the old one's]")
    made.add_argument("--alpha", type=finite, metavar="X", help="the new update is multiplied by alpha / rank [twice "
                      "the rank]")
    made.add_argument("--targets", type=names, metavar="NAME,…", help="linear layers to adapt, by the end of their "
                      "names; all for each of a block [queries and values]")
    made.add_argument("--epochs", type=count, default=3, metavar="N", help="passes over the prompts [3]")
    made.add_argument("--lr", type=finite, default=5e-4, metavar="X", help="learning rate of AdamW; it falls to 0 in a "
                      "straight line [0.0005]")
    made.add_argument("--batch-size", type=count, default=16, metavar="N", help="prompts of a step [16]")
    made.add_argument("--max-length", type=count, default=128, metavar="N", help="tokens kept of a prompt and its "
                      "answer [128]")
    made.add_argument("--max-new-tokens", type=count, default=64, metavar="N", help="most tokens of a language model's "
                      "answer [64]")
    made.add_argument("--min-confidence", type=number(float, 0, 1), default=0.0, metavar="X", help="leave out prompts "
                      "of which the old model is less sure: the probability of its label, or the geometric mean of "
                      "those of its answer's tokens [0]")
    made.add_argument("--held-out", type=number(float, 0, 0.9, open_low=True), default=0.1, metavar="X", help="share "
                      "of the prompts that measures the agreement, and is not trained on [0.1]")
    made.add_argument("--seed", type=natural, default=0, metavar="N", help="seed of first values, order and choice of "
                      "the prompts held out [0]")
    made.add_argument("--device", type=text, default="auto", metavar="NAME", help="where to compute: cpu, cuda, mps "
                      "[the best that is there]")
    made.add_argument("--out", type=path, required=True, metavar="DIR", help="new folder")
    made.add_argument("--json", action="store_true", dest="as_json", help="print JSON instead of sentences")
    return made


@faults_in_words("fedlora-adapter transfer")
def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(argv)
    from .transfer_report import transfer

    return transfer(**vars(options))
