"""What fedlora-adapter inspect prints and writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedlora.console import results

from .base_weights import BaseWeights
from .inspection import Figures, Overlap, Search, figures, mean_overlap, overlap, scaled_intruders
from .known_epsilon import known
from .peft_folder import Adapter, read
from .written import check_new, write

MOST_ROWS = 48
"""Layers shown in a table; --json has all."""


def inspect(adapter: Path, others: Sequence[Path], base: str | None, only: str | None, top: int, threshold: float,
            all_directions: bool, scale_intruders: float | None, out: Path | None, as_json: bool) -> int:
    """Measure an adapter, print the figures, and write the one with scaled intruders if that is asked for.

    Args:
        adapter: the adapter's folder.
        others: folders of adapters to compare it with.
        base: the base model's folder or hub id; None to leave it out.
        only: text that a layer's name must contain; None for all layers.
        top: leading directions among which to look for intruders.
        threshold: cosine below which a direction is an intruder.
        all_directions: compare with all directions of large weights too.
        scale_intruders: factor for intruders; None to write nothing.
        out: where to write the scaled adapter.
        as_json: print JSON instead of tables.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: something does not fit; the message says what.
    """
    if out is not None:
        check_new(out)
    read_one, read_others = read(adapter), [read(path) for path in others]
    weights = None if base is None else BaseWeights(base)
    search = Search(top, threshold, all_directions)
    names = [name for name in read_one.targets if only is None or only in name]
    if only is not None and not names:
        raise ValueError(f"--only {only!r}: no layer of {adapter} has that in its name. Layers are, for example, "
                         f"{', '.join(list(read_one.targets)[:3]) or 'none: it has a head alone'}")
    found = [figures(read_one, name, weights, search) for name in names]
    overlaps = {other.path: _overlaps(read_one, other, names) for other in read_others}
    written = None
    if out is not None and scale_intruders is not None:
        written = _write_scaled(read_one, found, scale_intruders, out)
    if as_json:
        print(json.dumps({
            "adapter": read_one.name, "base_model": read_one.base, "labels": read_one.labels,
            "whole_tensors": {name: list(shape) for name, shape in read_one.others.items()},
            "privacy": known([read_one]).to_dict(), "targets": [one.to_dict() for one in found],
            "overlaps": [{"with": other.name, "mean": mean_overlap(overlaps[other.path]) if overlaps[other.path] else
                          None, "targets": [asdict(one) for one in overlaps[other.path]]} for other in read_others],
            **({} if written is None else {"written": {"largest_error": written}})}, indent=1, allow_nan=False))
        return 0
    console = results()
    _show(console, read_one, found)
    for other in read_others:
        _show_overlap(console, read_one, other, overlaps[other.path])
    if written is not None:
        console.print(f"Wrote {out}. Cutting each layer back to its rank took at most {written:.2%} of an update's "
                      "norm.", soft_wrap=True, markup=False)
    return 0


def _overlaps(one: Adapter, other: Adapter, names: Sequence[str]) -> list[Overlap]:
    shared = [name for name in names if name in other.targets]
    if not shared:
        raise ValueError(f"{one.path} and {other.path} adapt no layer in common; there is nothing to compare")
    return [found for name in shared if (found := overlap(one, other, name)) is not None]


def _write_scaled(adapter: Adapter, found: Sequence[Figures], factor: float, out: Path) -> float:
    """Write the adapter with scaled intruders, and return the largest relative error over the layers."""
    new = {one.target.name: scaled_intruders(adapter, one, factor) for one in found}
    worst = max((error for _, error in new.values()), default=0.0)
    count = sum(len(one.base.intruders.S) for one in found if one.base is not None)
    write(out, [adapter], {name: target for name, (target, _) in new.items()},
          {key: adapter.tensor(key) for key in adapter.others},
          how={"how": "scale-intruders", "factor": factor, "intruders": count, "largest_error": worst},
          told=f"`fedlora-adapter inspect --scale-intruders {factor:g}` scaled {count} intruder dimensions of "
               f"{adapter.name} (arXiv:2410.21228).", known=known([adapter]))
    return worst


def _show(console: Console, adapter: Adapter, found: Sequence[Figures]) -> None:
    base = adapter.base
    console.print(f"{adapter.path}: {len(adapter.targets)} layers of {base or 'an unnamed base model'}, "
                  f"{sum(t.rank * (t.d_in + t.d_out) for t in adapter.targets.values()):,} values in their factors"
                  + (f"; {len(adapter.others)} whole tensors" if adapter.others else "")
                  + (f"; labels {', '.join(adapter.labels)}" if adapter.labels else ""), soft_wrap=True, markup=False)
    if not found:
        return
    shown = sorted(sorted(found, key=lambda one: -one.frobenius)[:MOST_ROWS], key=lambda one: found.index(one))
    prefix = _prefix([one.target.name for one in found])
    beside = found[0].base is not None
    table = Table(box=None, pad_edge=False, padding=(0, 1), title_justify="left",
                  title=f"layers of {prefix.rstrip('.')}" if prefix else None)
    for name in ("layer", "shape", "rank", "scale", "‖ΔW‖F", "‖ΔW‖₂", "stable", "effective",
                 *(("‖ΔW‖F/‖W‖F", "‖ΔW‖₂/‖W‖₂", "intruders") if beside else ())):
        table.add_column(name, justify="left" if name == "layer" else "right", no_wrap=name != "layer",
                         overflow="fold")
    for one in shown:
        row = [one.target.name.removeprefix(prefix), f"{one.target.d_out}×{one.target.d_in}", str(one.target.rank),
               f"{one.target.scaling:.3g}", f"{one.frobenius:.3g}", f"{one.spectral:.3g}", f"{one.stable_rank:.2f}",
               f"{one.effective_rank:.2f}"]
        if one.base is not None:
            row += [_share(one.frobenius, one.base.frobenius), _share(one.spectral, one.base.spectral),
                    f"{len(one.base.intruders.S)} of {one.base.looked_at}"]
        table.add_row(*row)
    console.print(table)
    if len(shown) < len(found):
        console.print(f"… and {len(found) - len(shown)} layers with smaller updates; --json has all", markup=False)
    partly = max((one.base.compared for one in found if one.base is not None
                  and one.base.compared < min(one.target.d_out, one.target.d_in)), default=0)
    if partly:
        console.print(f"Intruders of large layers were compared with the {partly} leading directions of the base's "
                      "weight; --all-directions compares with all.", soft_wrap=True, markup=False)
    console.print(known([adapter]).sentence(), soft_wrap=True, markup=False)


def _show_overlap(console: Console, one: Adapter, other: Adapter, found: Sequence[Overlap]) -> None:
    if not found:
        console.print(f"{one.name} and {other.name}: in each common layer one of the updates is 0", markup=False)
        return
    mean = mean_overlap(found)
    lowest, highest = min(o.cosine for o in found), max(o.cosine for o in found)
    table = Table(box=None, pad_edge=False, padding=(0, 1), title_justify="left",
                  title=f"{one.name} beside {other.name}: {len(found)} common layers, means")
    for name in ("", "overlap", "by chance", "smallest angle's cosine"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("inputs (row spaces)", f"{mean['rows']:.3f}", f"{mean['rows_by_chance']:.3f}",
                  f"{mean['largest_row_cosine']:.3f}")
    table.add_row("outputs (column spaces)", f"{mean['columns']:.3f}", f"{mean['columns_by_chance']:.3f}",
                  f"{mean['largest_column_cosine']:.3f}")
    console.print(table)
    console.print(f"Cosine between the updates: mean {mean['cosine']:.3f}, from {lowest:.3f} to {highest:.3f}.",
                  markup=False)


def _prefix(names: Sequence[str]) -> str:
    """Return the longest beginning, up to a dot, that all names share."""
    parts = [name.split(".")[:-1] for name in names]
    common = [same[0] for same in takewhile(lambda same: len(set(same)) == 1, zip(*parts, strict=False))]
    return "".join(f"{part}." for part in common)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "–"
