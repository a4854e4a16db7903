"""Text and tables for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def text(value: str) -> str:
    """Return a text that somebody chose as plain text in Markdown: no line breaks, no markup, no table cells."""
    plain = "".join(c if c.isprintable() else " " for c in value)
    for mark in "\\`*_[]<>|#":
        plain = plain.replace(mark, "\\" + mark)
    return plain


def code(value: str) -> str:
    """Return a text that somebody chose as code in Markdown."""
    return "`" + "".join(c if c.isprintable() and c != "`" else " " for c in value) + "`"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table.

    Args:
        head: the column titles.
        rows: the cells, which are Markdown already.
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
