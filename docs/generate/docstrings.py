"""Docstrings as Markdown, for mkdocstrings: tables and formulas keep their lines."""

from __future__ import annotations

import re
from typing import Any

import griffe


class AsWritten(griffe.Extension):
    """Keeps the lines of tables and formulas in docstrings, and angle brackets, as their authors wrote them.

    Docstrings here are written for editors and terminals: columns are aligned with spaces. Markdown would join such
    lines, so a paragraph whose lines have columns becomes a code block.
    """

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if isinstance(obj, griffe.Object) and obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """Return a docstring whose text reads in Markdown as it does in an editor.

    - A paragraph whose lines have columns is indented as code.
    - An entry of several names, `a, b: text`, becomes one entry for each.
    - `<` before a name, and `][`, are escaped where they are not in backticks.
    """
    paragraphs = []
    for paragraph in re.split(r"\n{2,}", docstring):
        lines = paragraph.split("\n")
        if re.match(r"(Args|Attributes):$", lines[0]):
            paragraph = re.sub(r"^    (\w+(?:, \w+)+): (.*(?:\n {5,}.*)*)", _one_each, paragraph, flags=re.MULTILINE)
        elif any(line.startswith("    ") for line in lines):
            paragraphs.append(paragraph)
            continue
        elif len(lines) > 1 and sum(bool(re.search(r"\S {2,}\S", line)) for line in lines) >= 0.6 * len(lines):
            paragraphs.append("\n".join(f"    {line}" for line in lines))
            continue
        paragraphs.append(re.sub(r"(`[^`]*`)|<(?=[A-Za-z/])|\]\[", _escape, paragraph))
    return "\n\n".join(paragraphs)


def _one_each(entry: re.Match[str]) -> str:
    return "\n".join(f"    {name}: {entry[2]}" for name in entry[1].split(", "))


def _escape(found: re.Match[str]) -> str:
    return found[1] or ("&lt;" if found[0] == "<" else "]\\[")
