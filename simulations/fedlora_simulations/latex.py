"""A comparison as a LaTeX table for booktabs: a line for each method, a column for each value of one swept option."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedlora.figures import title

from .pairing import Group, best
from .reference import Published, published_for

SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
           **{one: f"\\{one}" for one in "&%$#_{}"}, "ε": r"$\varepsilon$", "σ": r"$\sigma$", "δ": r"$\delta$",
           "±": r"$\pm$", "–": "--", "…": r"\dots{}", "<": r"\textless{}", ">": r"\textgreater{}"}


ON_BOLD = ("Bold: better than every other line of its column, by 95 % t intervals of the differences paired over "
           "seeds, not corrected for their number")


def escaped(text: str) -> str:
    """Return a text as LaTeX prints it unchanged."""
    return "".join(SPECIAL.get(one, one) for one in text)


def latex(groups: Sequence[Group], published: Sequence[Published] = (), notes: Sequence[str] = ()) -> str:
    """Return the table.

    The best mean of a column is bold if it is better than that of every other line by its paired interval.

    Args:
        groups: the groups.
        published: published figures, each on a line of its own below the method's.
        notes: sentences for the caption, without full stops.
    """
    across = _across(groups)
    columns = list(dict.fromkeys(group.settings[across] for group in groups)) if across else [""]
    others = [name for name in groups[0].settings if name != across]
    heads = list(dict.fromkeys((*(group.settings[name] for name in others), group.method) for group in groups))
    metric = title(groups[0].metric or "no figure")
    bold = {id(found) for column in columns
            for found, clear in [best([group for group in groups if not across or group.settings[across] == column])]
            if clear}
    told = [*notes, *([ON_BOLD] if any(len(group.values) > 1 for group in groups) and len(heads) > 1 else [])]
    lines = ["% needs \\usepackage{booktabs}", "\\begin{table}", "  \\centering",
             f"  \\caption{{{' '.join(f'{escaped(note)}.' for note in told)}}}",
             f"  \\begin{{tabular}}{{{'l' * (len(others) + 1)}{'r' * len(columns)}}}", "    \\toprule"]
    first = [*map(escaped, others), "method"]
    if across:
        lines += [f"    {' & '.join('' for _ in first)} & \\multicolumn{{{len(columns)}}}{{c}}"
                  f"{{{escaped(metric)} at {_symbol(across)}}} \\\\",
                  f"    \\cmidrule(lr){{{len(first) + 1}-{len(first) + len(columns)}}}"]
    named = [_in_maths(column) for column in columns] if across else [escaped(metric)]
    lines += [f"    {' & '.join([*first, *named])} \\\\", "    \\midrule"]
    for head in heads:
        found = [next((group for group in groups if _head(group, others) == head
                       and (not across or group.settings[across] == column)), None) for column in columns]
        values = ["--" if group is None else _figure(group, bold=id(group) in bold) for group in found]
        lines.append(f"    {' & '.join([*map(escaped, head), *values])} \\\\")
        others_say = [published_for(group, published) if group else None for group in found]
        if any(others_say):
            values = ["" if one is None else _number(one.value, one.deviation) for one in others_say]
            lines.append(f"    {' & '.join([*('' for _ in others), escaped(head[-1]) + ' (published)', *values])} \\\\")
    return "\n".join([*lines, "    \\bottomrule", "  \\end{tabular}", "\\end{table}", ""])


def _across(groups: Sequence[Group]) -> str:
    """Return the option whose values are the columns: ε if it varies, else the last one that does; "" for none."""
    names = list(groups[0].settings)
    return "epsilon" if "epsilon" in names else names[-1] if names else ""


def _head(group: Group, others: Sequence[str]) -> tuple[str, ...]:
    return (*(group.settings[name] for name in others), group.method)


def _symbol(option: str) -> str:
    return r"$\varepsilon$" if option == "epsilon" else escaped(option)


def _in_maths(value: str) -> str:
    return r"$\infty$" if value == "inf" else escaped(value)


def _figure(group: Group, *, bold: bool) -> str:
    if not group.values:
        return "--"
    return _number(group.mean, group.deviation if len(group.values) > 1 else None, bold=bold)


def _number(value: float, deviation: float | None, *, bold: bool = False) -> str:
    if not math.isfinite(value):
        return "--"
    shown = f"\\mathbf{{{value:.3f}}}" if bold else f"{value:.3f}"
    return f"${shown}$" if deviation is None else f"${shown} \\pm {deviation:.3f}$"
