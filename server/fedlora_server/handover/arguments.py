"""Arguments that the commands for finished runs share."""

from __future__ import annotations

import argparse
import os

from fedlora.config import values as parse


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add --model and --allow-download."""
    parser.add_argument("--model", metavar="PATH", type=parse.text, help="the run's base model, checked by its hashes: "
                        "an alias, a folder or a hub id [the one that the run used]")
    parser.add_argument("--allow-download", action="store_true", help="download the base model if it is not on this "
                        "machine")


def add_device(parser: argparse.ArgumentParser, batch: str) -> None:
    """Add --device and --batch-size.

    Args:
        parser: the command's parser.
        batch: what --batch-size counts, for its help text.
    """
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute "
                        "[auto]")
    parser.add_argument("--batch-size", type=parse.count, metavar="N", help=batch)


def offline_unless(allowed: bool) -> None:
    """Keep the hub's client, which is imported later, from the network unless downloads are allowed."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not allowed:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
