"""The table of what each layer of a written adapter lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from fedlora.console import results

MOST_ROWS = 48
"""Layers shown in a table; --json has all."""


def show_errors(out: Path, layers: Mapping[str, tuple[int, int, float]], *, as_json: bool,
                about: Mapping[str, object] | None = None) -> None:
    """Print each layer's ranks and error.

    Args:
        out: the folder that was written.
        layers: layer name → rank of the exact update, rank that was written, and relative error.
        as_json: print JSON instead of a table.
        about: further content of the JSON.
    """
    if as_json:
        print(json.dumps({**(about or {}), "targets": [
            {"target": name, "rank_before": before, "rank": after, "error": error}
            for name, (before, after, error) in layers.items()]}, indent=1, allow_nan=False))
        return
    console = results()
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for name in ("layer", "rank", "error"):
        table.add_column(name, justify="left" if name == "layer" else "right", no_wrap=name != "layer",
                         overflow="fold")
    shown = sorted(sorted(layers, key=lambda name: -layers[name][2])[:MOST_ROWS])
    for name in shown:
        before, after, error = layers[name]
        table.add_row(name, f"{before} → {after}" if before != after else str(after), f"{error:.2%}")
    console.print(table)
    if len(shown) < len(layers):
        console.print(f"… and {len(layers) - len(shown)} layers with smaller errors; --json has all", markup=False)
    console.print(f"Wrote {out}.", soft_wrap=True, markup=False)
