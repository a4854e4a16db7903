"""Tables of results: one line for each run as CSV and parquet, one for each group on a terminal and as Markdown."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from fedlora.figures import MAJORITY, headline, title
from fedlora.files import replace_file
from fedlora.privacy import short
from fedlora.quantities import quantity

from .comparison import OF_SUMS, bytes_of_an_upload, mean_and_deviation, told_of_sums
from .pairing import Difference, Group
from .reference import Published, published_for
from .results import Result

MOST_SHOWN = 40
"""Most lines of a table on a terminal; the files have them all."""

Value = str | int | float | None


def lines(groups: Sequence[Group]) -> list[dict[str, Value]]:
    """Return one line for each run, with the same columns in each."""
    found = [_line(group, result) for group in groups for result in group.results]
    names = list(dict.fromkeys(name for line in found for name in line))
    return [{name: line.get(name) for name in names} for line in found]


def _line(group: Group, result: Result) -> dict[str, Value]:
    last = result.evaluated[-1].figures if result.evaluated else {}
    metric = result.metric or ""
    named: dict[str, Value] = {"method": result.method, **{name: _value(text) for name, text in group.settings.items()},
                               "seed": result.seed, "status": result.status}
    if result.tuned:
        named |= {f"tuned_{name}": _value(text) for name, text in result.tuned.items()}
    if result.metric:
        named |= {f"{metric}_before": None if math.isnan(result.before) else result.before, metric: result.value,
                  f"{metric}_low": last.get(f"{metric}/low"), f"{metric}_high": last.get(f"{metric}/high"),
                  "majority": last.get(MAJORITY),
                  **{name: value for name, value in headline(last).items() if name != metric}}
    low, high = result.sigma or (None, None)
    sums: dict[str, Value] = {} if result.epsilon_of_sums is None else {"epsilon_of_sums": result.epsilon_of_sums}
    return named | {
        "epsilon_spent": result.epsilon, **sums, "delta": result.delta, "sigma_low": low, "sigma_high": high,
        "rounds_done": result.last_round, "uploads": result.uploads, "values_up": result.values_up,
        "bytes_up": result.bytes_up, "bytes_down": result.bytes_down, "seconds": round(result.seconds, 3),
        "continued_after_rounds": " ".join(map(str, result.resumed)), "id": result.id, "folder": result.folder}


def _value(text: str) -> Value:
    """Return a setting's value as a number if it is one."""
    try:
        return float(text)
    except ValueError:
        return text


def write_csv(path: Path, groups: Sequence[Group]) -> None:
    """Write one line for each run as CSV."""
    found, text = lines(groups), io.StringIO()
    table = csv.DictWriter(text, list(found[0]))
    table.writeheader()
    table.writerows(found)
    replace_file(path, text.getvalue().encode(), 0o666)


def write_parquet(path: Path, groups: Sequence[Group]) -> None:
    """Write one line for each run as parquet. A column with numbers and words holds text."""
    import pyarrow as pa
    from pyarrow import parquet

    found = lines(groups)
    columns: dict[str, list[Value]] = {name: [line[name] for line in found] for name in found[0]}
    for name, values in columns.items():
        if any(isinstance(value, str) for value in values) and any(isinstance(value, float) for value in values):
            columns[name] = [value if value is None or isinstance(value, str) else f"{value:g}" for value in values]
    out = io.BytesIO()
    parquet.write_table(pa.table(columns), out)
    replace_file(path, out.getvalue(), 0o666)


def spread(group: Group) -> str:
    """Return the group's figure as mean ± standard deviation over the seeds; a dash if there is none."""
    if math.isnan(group.mean) and not group.values:
        return "–"
    return f"{group.mean:.3f}" + (f" ± {group.deviation:.3f}" if len(group.values) > 1 else "")


def change(difference: Difference | None) -> str:
    """Return a difference with its interval: "+0.012 [-0.003, 0.027]"."""
    if difference is None:
        return ""
    ends = "" if difference.interval is None else " [{:.3f}, {:.3f}]".format(*difference.interval)
    return f"{difference.mean:+.3f}{ends}"


def spent(epsilon: float) -> str:
    """Return an ε for a table."""
    return "not known" if math.isnan(epsilon) else "none" if math.isinf(epsilon) else f"{epsilon:.2f}"


def noise(group: Group) -> str:
    """Return the noise multipliers of the group's clients: "0.81", or "0.81 to 1.2"."""
    found = sorted({sigma for result in group.results for sigma in result.sigma or ()})
    return "" if not found else " to ".join(dict.fromkeys((short(found[0]), short(found[-1]))))


def tuned(group: Group) -> str:
    """Return the values that --tune chose for the group: "lr 0.03"."""
    chosen = dict.fromkeys(", ".join(f"{name} {value}" for name, value in one.tuned.items()) for one in group.results)
    return "; ".join(filter(None, chosen))


def terminal(groups: Sequence[Group], differences: Sequence[Difference],
             published: Sequence[Published] = ()) -> Table:
    """Return the table for a terminal, one line for each group."""
    by_group = {id(one.group): one for one in differences}
    settings = list(groups[0].settings)
    metric = title(groups[0].metric or "") or "no figure"
    left_out = len(groups) - MOST_SHOWN
    notes = [f"the {left_out} last of {len(groups)} lines are left out here"] if left_out > 0 else []
    shown = Table(box=None, pad_edge=False, padding=(0, 1), title_justify="left", caption_justify="left",
                  title=compared(differences) or None, caption="; ".join(notes) or None)
    has_tuned, has_sums = any(map(tuned, groups)), _has_sums(groups)
    has_epsilon = "epsilon" not in settings or has_sums
    names = (*settings, "method", "n", metric, *(("difference",) if differences else ()),
             *(("published",) if published else ()), *(("ε",) if has_epsilon else ()),
             *((OF_SUMS,) if has_sums else ()),
             *(("chosen",) if has_tuned else ()))
    for name in names:
        words = name in (*settings, "method", "chosen")  # those may break, so that no figure is cut
        shown.add_column(name, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    before: list[str] = []
    for group in groups[:MOST_SHOWN]:
        values = list(group.settings.values())
        told = ["" if values[:at + 1] == before[:at + 1] else value for at, value in enumerate(values)]
        before = values
        cells = [*told, group.method, str(len(group.values)), spread(group)]
        if differences:
            cells.append(change(by_group.get(id(group))))
        if published:
            cells.append(str(published_for(group, published) or ""))
        cells += [spent(group.epsilon)] * has_epsilon + [told_of_sums(group.epsilon_of_sums)] * has_sums
        cells += [tuned(group)] * has_tuned
        shown.add_row(*cells)
    return shown


def _has_sums(groups: Sequence[Group]) -> bool:
    return any(group.epsilon_of_sums is not None for group in groups)


def compared(differences: Sequence[Difference]) -> str:
    """Return what the differences are taken from, in a line; "" if there are none."""
    if not differences:
        return ""
    bases = dict.fromkeys(one.baseline.method for one in differences)
    one_method = all(one.group.method == one.baseline.method for one in differences)
    base = differences[0].baseline.label if one_method else ", ".join(bases)
    counts = sorted({len(one.seeds) for one in differences})
    paired = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    ends = "95 % t interval" if counts[-1] > 1 else "one seed gives no interval"
    return f"difference from {base}, paired over {paired} seed{'s' * (counts[-1] != 1)}; {ends}"


def cells(groups: Sequence[Group], differences: Sequence[Difference],
          published: Sequence[Published] = ()) -> tuple[list[str], list[list[str]]]:
    """Return the names of the columns and the lines of the full table, one line for each group."""
    by_group = {id(one.group): one for one in differences}
    metric = title(groups[0].metric or "")
    with_metric, has_tuned, has_sums = bool(metric), any(map(tuned, groups)), _has_sums(groups)
    names = [*groups[0].settings, "method", "seeds", *(("before", metric) if with_metric else ()),
             *(("difference",) if differences else ()), *(("published",) if published else ()), "ε",
             *((OF_SUMS,) if has_sums else ()), "σ", "rounds", "up", "down", "seconds",
             *(("chosen by --tune",) if has_tuned else ())]
    rows = []
    for group in groups:
        runs, (up, down) = group.results, bytes_of_an_upload(group.results)
        befores = [one.before for one in runs if not math.isnan(one.before)]
        row = [*group.settings.values(), group.method, str(len(group.values))]
        if with_metric:
            row += [f"{mean_and_deviation(befores)[0]:.3f}" if befores else "–", spread(group)]
        if differences:
            row.append(change(by_group.get(id(group))))
        if published:
            row.append(str(published_for(group, published) or ""))
        rows.append([*row, spent(group.epsilon), *((told_of_sums(group.epsilon_of_sums),) if has_sums else ()),
                     noise(group), str(max(one.last_round for one in runs)),
                     quantity(up), quantity(down),
                     f"{mean_and_deviation([one.seconds for one in runs])[0]:.0f}",
                     *((tuned(group),) if has_tuned else ())])
    return names, rows


def markdown(groups: Sequence[Group], differences: Sequence[Difference], published: Sequence[Published] = (),
             notes: Iterable[str] = ()) -> str:
    """Return the full table as Markdown, with its notes below."""
    names, rows = cells(groups, differences, published)
    words = {*groups[0].settings, "method", "chosen by --tune"}
    told = [f"| {' | '.join(map(_in_markdown, row))} |" for row in (names, *rows)]
    told.insert(1, "|" + "|".join("---" if name in words else "---:" for name in names) + "|")
    return "\n".join([*told, "", *(f"{_in_markdown(note)}.\n" for note in notes)])


def _in_markdown(text: str) -> str:
    return "".join(f"\\{one}" if one in "|*_`<>[]\\" else one for one in text)


def notes_on(groups: Sequence[Group], differences: Sequence[Difference], published: Sequence[Published] = (),
             more: Iterable[str] = (), *, figures_alone: bool = False) -> list[str]:
    """Return what a reader of the table has to know, one sentence each, without full stops.

    Args:
        groups: the groups.
        differences: the differences.
        published: the published figures.
        more: further sentences.
        figures_alone: whether the table has neither differences nor bytes.
    """
    found = []
    if groups[0].metric:
        named = title(groups[0].metric)
        counts = sorted({len(group.values) for group in groups})
        seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        found.append(f"{named[0].upper()}{named[1:]} after the last round: mean"
                     + (f" ± standard deviation over {seeds} seeds" if counts[-1] > 1 else ", of one seed"))
    if differences and not figures_alone:
        found.append(compared(differences)[0].upper() + compared(differences)[1:])
    if figures_alone:
        found.append("ε is that of the same runs in a deployment")
    else:
        found.append("Bytes are per client and round. ε and σ are those of the same runs in a deployment; the noise of "
                     "a simulation is seeded, so no ε holds for its own adapters")
    if _has_sums(groups):
        found.append(f"ε is for each client's own noise, and {OF_SUMS} for that of the honest members of a sum, "
                     "towards whoever sees the sums alone")
    continued = [one for group in groups for one in group.results if one.resumed]
    if continued and not figures_alone:
        found.append(f"{len(continued)} interrupted run{'s were' if len(continued) > 1 else ' was'} continued; the "
                     "clients received the frozen tensors once more, which the bytes include")
    if failed := [one for group in groups for one in group.failed]:
        found.append(f"{len(failed)} run{'s' * (len(failed) > 1)} ended early and "
                     f"{'are' if len(failed) > 1 else 'is'} left out of the means: " + ", ".join(
                         f"{one.folder.rpartition('/')[2]} ({one.status})" for one in failed[:5])
                     + (", …" if len(failed) > 5 else ""))
    matched = {id(figure) for group in groups for figure in [published_for(group, published)] if figure}
    found += [f"Published: {source}" for source in dict.fromkeys(one.source for one in published)]
    if lost := [one for one in published if id(one) not in matched]:
        found.append("No run has the setting of the published " + ", ".join(
            f"{one.method} {_told(one.settings)}{one}" for one in lost[:5]) + (", …" if len(lost) > 5 else ""))
    if any(map(tuned, groups)):
        found.append("--tune chose values by their figures on a fifth of the training rows. That choice depends on "
                     "private rows, and no ε here contains what it tells about them")
    return [*found, *more]


def _told(settings: Mapping[str, str]) -> str:
    return "".join(f"{name}={value}, " for name, value in settings.items())
