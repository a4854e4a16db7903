"""The command python -m benchmarks: what privacy and federation cost, as ratios of things measured in turn.

Each sub-command measures one figure. `all` measures all of them into one result file; `compare` says which values got
worse from one result file to another. `benchmarks/measure.py` says how to add a figure.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import pkgutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from fedlora.files import replace_file

from . import figures
from .compare import FORMAT, compare, joined, read_result, same_setup
from .compare import table as comparison
from .measure import Figure, Row, Settings, Unavailable, Value, machine, to_json, versions

_GENERATED_ROWS = 10_000
"""Number of generated rows: ten for each of a thousand clients."""


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code.

    It is 0 when done, 1 if a figure failed or got worse, 2 for wrong input, and 130 if interrupted.
    """
    options = _parser().parse_args(argv)
    try:
        if options.command == "compare":
            return _compare(options)
        return _measure(options)
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"benchmarks: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks: interrupted", file=sys.stderr)
        return 130


def figure_titles() -> dict[str, str]:
    """Return the title of every figure by the name of its sub-command.

    A title is the first line of the docstring of a module in `benchmarks/figures`. It is read without importing the
    module, because what the figures import takes seconds to load.
    """
    folder = Path(figures.__path__[0])
    return {name.replace("_", "-"): (ast.get_docstring(ast.parse((folder / f"{name}.py").read_text("utf-8"))) or "")
            .partition("\n")[0].rstrip(".") for _, name, _ in pkgutil.iter_modules([str(folder)])}


def load_figures(names: Iterable[str]) -> dict[str, Figure]:
    """Import the figures of these sub-commands; return them by name, in the order of their numbers."""
    found = {name: importlib.import_module(f"{figures.__name__}.{name.replace('-', '_')}").FIGURE for name in names}
    return dict(sorted(found.items(), key=lambda item: item[1].number))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="FIGURE")
    for name, title in figure_titles().items():
        _add_settings(commands.add_parser(name, help=title, description=f"{title}."))
    everything = commands.add_parser("all", help="measure all figures, into one result file")
    _add_settings(everything)
    changes = commands.add_parser("compare", help="show which figures got worse from one result file to another",
                                  description="Compare two result files ratio by ratio. If both were measured on the "
                                              "same machine with the same settings, compare seconds and bytes too. "
                                              "The exit code is 1 if a median got worse and the quartiles are apart "
                                              "by more than the tolerance, if a value is gone, or if a figure that "
                                              "could be measured before fails.")
    changes.add_argument("old", type=Path, metavar="OLD.json")
    changes.add_argument("new", type=Path, metavar="NEW.json")
    changes.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="file or folder of rows with a text and a label; default: generated "
                                                  "triage notes")
    parser.add_argument("--model", help="base model: an alias, a folder or a hub id; llama-1b is a model of that shape "
                                        "with random weights; default: minilm, with --device cuda llama-1b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device to measure on; default: cpu")
    parser.add_argument("--threads", type=_positive, help="CPU threads; default: PyTorch's choice")
    parser.add_argument("--repeats", type=_positive, help="repeat each measurement at most so many times")
    parser.add_argument("--quick", action="store_true", help="use tiny sizes: shows that the figures run, not how fast")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write a result file for compare; if it "
                        "exists and is of this machine and these settings, its other figures are kept")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _measure(options: argparse.Namespace) -> int:
    """Measure one figure or all of them.

    With `all`, a figure that fails is noted in the result and the others go on; the exit code is then 1.
    """
    titles = figure_titles()
    chosen = load_figures(titles if options.command == "all" else [options.command])
    if options.out is not None and not options.out.parent.is_dir():
        raise ValueError(f"--out {options.out}: there is no folder {options.out.parent}; create it first")
    import torch

    console, progress = _console(), Console(stderr=True)
    failed = False
    with TemporaryDirectory(prefix="fedlora-bench-") as folder:
        settings = _settings(options, Path(folder))
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        result: dict[str, Any] = {
            "format": FORMAT, "began": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions(),
            "machine": machine(settings.device), "figures": {},
            "settings": {"data": options.data.name if options.data else "triage notes", "model": _model(options),
                         "device": settings.device, "threads": settings.threads, "quick": settings.quick}}
        if options.out is not None and options.out.exists():
            result = joined(read_result(options.out), result, options.out)
        for name, figure in chosen.items():
            began, rows, error = time.monotonic(), [], None
            try:
                for row in figure.measure(settings):
                    rows.append(row)
                    result["figures"][name] = to_json(figure, titles[name], rows, time.monotonic() - began)
                    _save(result, options.out)  # after each row, so that an interrupted measurement keeps what it has
                    progress.print(f"[dim]{name}: {row.case}[/dim]", highlight=False)
            except Unavailable as reason:
                error = str(reason)
            except Exception as fault:
                if options.command != "all":
                    raise
                error, failed = f"{type(fault).__name__}: {fault}", True
            result["figures"][name] = to_json(figure, titles[name], rows, time.monotonic() - began) | {
                "repeats": settings.most_repeats} | ({"error": error} if error else {})
            _save(result, options.out)
            if not options.json:
                _show(console, f"{figure.number}. {titles[name]}", rows, error, targets=not settings.quick)
    if options.json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
    else:
        console.print(_described(result), style="dim", highlight=False)
    return int(failed)


def _console() -> Console:
    """Return a console that is wide enough for the tables, also where the output is not a terminal."""
    return Console() if sys.stdout.isatty() else Console(width=140)


def _save(result: Mapping[str, Any], out: Path | None) -> None:
    if out is not None:
        replace_file(out, (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode(), 0o666)


def _settings(options: argparse.Namespace, folder: Path) -> Settings:
    from fedlora.tasks import read
    from fedlora.training.precision import resolve_device

    from .subjects import RANDOM_LLAMA, save_random_llama

    resolve_device(options.device)
    data = options.data
    if data is None:
        from fedlora_simulations.triage import write_hospitals

        data = write_hospitals(folder, 0, hospitals=1, rows=200 if options.quick else _GENERATED_ROWS)[0]
    model = _model(options)
    if model == RANDOM_LLAMA:
        model = str(folder / model)
        save_random_llama(read(data, "classification"), Path(model), device=options.device, quick=options.quick)
    return Settings(data=data, model=model, device=options.device, threads=options.threads, quick=options.quick,
                    most_repeats=options.repeats)


def _model(options: argparse.Namespace) -> str:
    return options.model or ("llama-1b" if options.device == "cuda" else "minilm")


def _show(console: Console, title: str, rows: Sequence[Row], error: str | None, *, targets: bool) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    table = Table(title=f"{title}: medians and quartiles", box=None, title_justify="left",
                  padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        cells = [_cell(row.values[name], targets) if name in row.values else "" for name in names]
        table.add_row(row.case, *cells)
    if rows:
        console.print(table)
    for row in rows:
        if row.note:
            console.print(f"{row.case}: {row.note}", style="dim", highlight=False, markup=False)
    if error:
        console.print(f"{title}: {error}", style="red", highlight=False, markup=False)
    console.print()


def _cell(value: Value, targets: bool) -> str:
    unit = "" if value.unit == "ratio" else f" {value.unit}"
    text = f"{_short(value.median)}{unit}"
    if value.target is not None and targets:
        at_least = value.better == "higher"
        sign = ("≥" if at_least else "≤") if value.reached else ("<" if at_least else ">")
        colour = "green" if value.reached else "red"
        text = f"[{colour}]{text} {sign} {_short(value.target)}[/{colour}]"
    return text if value.low == value.high else f"{text}\n[dim]{_short(value.low)}–{_short(value.high)}[/dim]"


def _short(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3f}" if abs(number) < 10 else f"{number:.1f}"


def _described(result: Mapping[str, Any]) -> str:
    told = {**result["machine"], **result["settings"], **result["versions"]}
    return ", ".join(f"{name} {value}" for name, value in told.items())


def _compare(options: argparse.Namespace) -> int:
    old, new = read_result(options.old), read_result(options.new)
    changes = compare(old, new)
    worse = sum(change.verdict == "worse" for change in changes)
    gone = sum(change.verdict == "gone" and change.figure in new["figures"] for change in changes
               if old["settings"] == new["settings"])
    left_out = [name for name in old["figures"] if name not in new["figures"]]
    broken = [name for name, figure in new["figures"].items()
              if "error" in figure and "error" not in old["figures"].get(name, {"error": ""})]
    if options.json:
        print(json.dumps([{"figure": c.figure, "case": c.case, "value": c.name, "verdict": c.verdict,
                           "old": c.old and c.old.median, "new": c.new and c.new.median} for c in changes], indent=1))
        return int(bool(worse or gone or broken))
    console = _console()
    console.print(comparison(changes))
    for key in ("machine", "settings", "versions"):
        if old[key] != new[key]:
            console.print(f"{key}: {old[key]} → {new[key]}", style="dim", highlight=False)
    if not same_setup(old, new):
        console.print("The machines or the settings differ, so only ratios are compared.", highlight=False)
    for name in broken:
        console.print(f"{name} was measured before but could not be now: {new['figures'][name]['error']}", style="red",
                      highlight=False, markup=False)
    if left_out:
        console.print(f"Not measured again: {', '.join(left_out)}", highlight=False)
    console.print(f"{len(changes)} values, {worse} worse by more than the spread, {gone} gone", highlight=False)
    return int(bool(worse or gone or broken))
