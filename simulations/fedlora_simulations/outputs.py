"""All files of a comparison: one line for each run, tables for papers and pages, and a page with pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from fedlora.files import replace_file

from . import compare_page
from .compare_page import page
from .comparison import save, summarize_results
from .latex import latex
from .pairing import differences, grouped
from .reference import Published
from .results import Result
from .tables import markdown, notes_on, terminal, write_csv, write_parquet

STEM = "results"
"""Stem of the tables' file names."""


def show(results: Sequence[Result], console: Console, *, baseline: str | None = None,
         published: Sequence[Published] = ()) -> None:
    """Print the table of the results, one line for each method and setting.

    Args:
        results: the results.
        console: where it is printed.
        baseline: the method that the others are compared with; None for the first one.
        published: published figures.
    """
    groups = grouped(results)
    found = differences(groups, baseline)
    shown = terminal(groups, found, published)
    wide = console.options.update(max_width=1000)
    if found and console.measure(shown, options=wide).maximum > console.width:  # a cut figure is another figure
        shown = terminal(groups, (), published)
    console.print(shown)


def write(folder: Path, results: Sequence[Result], *, heading: str, baseline: str | None = None,
          published: Sequence[Published] = (), notes: Iterable[str] = (),
          about: Mapping[str, object] | None = None) -> str:
    """Write all files of the comparison into a folder, and return a line about what could not be written, or "".

    The page with pictures needs two results.

    Args:
        folder: the folder, which exists.
        results: the results, at least one.
        heading: title of the page.
        baseline: the method that the others are compared with; None for the first one.
        published: published figures.
        notes: further sentences for the tables, without full stops.
        about: goes into comparison.json too.

    Raises:
        ValueError: there is no such method.
    """
    groups = grouped(results)
    found = differences(groups, baseline)
    notes = list(notes)
    told = notes_on(groups, found, published, notes)
    write_csv(folder / f"{STEM}.csv", groups)
    write_parquet(folder / f"{STEM}.parquet", groups)
    replace_file(folder / f"{STEM}.md", markdown(groups, found, published, told).encode(), 0o666)
    replace_file(folder / f"{STEM}.tex", latex(groups, published, notes_on(
        groups, found, published, notes, figures_alone=True)).encode(), 0o666)
    ended = [group for group in groups if group.ended or not group.failed]
    if ended:
        save(folder, [summarize_results(group.ended or group.results, group.settings) for group in ended], about or {})
    if len(results) == 1:  # a page of one run would show nothing that its own pictures do not
        return ""
    if not compare_page.available():
        return compare_page.MISSING
    replace_file(folder / compare_page.FILE, page(groups, found, published, told, heading).encode(), 0o666)
    return ""
