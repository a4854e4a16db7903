"""The results of a campaign, as a table in the terminal, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rich.console import Console
from rich.table import Table

from tests.chaos.cases import KINDS
from tests.chaos.score import Score

HEADS = ("kind", "case", "result", "seconds", "lost s", "restarts", "by hand", "charged again", "left behind")


def show(console: Console, scores: Sequence[Score]) -> None:
    """Print every case, and a line for each kind."""
    table = Table(*HEADS, title="Cases")
    for one in scores:
        style = "red" if one.wrong else "yellow" if one.skipped else None
        table.add_row(*_cells(one), style=style)
    console.print(table)
    kinds = Table(*_KIND_HEADS, title="By kind")
    for row in by_kind(scores):
        kinds.add_row(*row)
    console.print(kinds)


_KIND_HEADS = ("kind", "cases", "passed", "skipped", "median s lost", "most s lost")


def by_kind(scores: Sequence[Score]) -> list[tuple[str, ...]]:
    """Return for each kind: cases, passed, skipped, and the median and the most seconds lost."""
    rows = []
    for kind in (*KINDS, "all"):
        of_kind = [one for one in scores if one.case.kind == kind or (kind == "all" and one.case.kind != "quiet")]
        lost = [one.lost_s for one in of_kind if not one.skipped]
        if of_kind:
            rows.append((kind, str(len(of_kind)), str(sum(one.passed for one in of_kind)),
                         str(sum(bool(one.skipped) for one in of_kind)),
                         f"{median(lost):.1f}" if lost else "", f"{max(lost):.1f}" if lost else ""))
    return rows


def markdown(scores: Sequence[Score]) -> str:
    """Return the results as two Markdown tables."""
    def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        lines = (heads, ["---"] * len(heads), *rows)
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    return f"{table(_KIND_HEADS, by_kind(scores))}\n{table(HEADS, [_cells(one) for one in scores])}"


def plain(one: Score) -> dict[str, object]:
    """Return a score for JSON."""
    return {"kind": one.case.kind, "case": one.case.name, "passed": one.passed, "skipped": one.skipped,
            "wrong": list(one.wrong), "seconds": round(one.seconds, 2), "lost_s": round(one.lost_s, 2),
            "restarts": one.restarts, "by_hand": one.hands, "charged_again": one.again,
            "left_behind": list(one.left_behind)}


def _cells(one: Score) -> tuple[str, ...]:
    if one.skipped:
        return one.case.kind, one.case.name, f"skipped: {one.skipped}", *[""] * 6
    return (one.case.kind, one.case.name, "; ".join(one.wrong) or "passed", f"{one.seconds:.1f}", f"{one.lost_s:+.1f}",
            str(one.restarts), str(one.hands), str(one.again), ", ".join(one.left_behind))
