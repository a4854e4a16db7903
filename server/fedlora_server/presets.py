"""The command fedlora-server presets: prints each strategy's default values, with and without privacy, and one-step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from fedlora.config import Parser, flag, shown


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(
        prog="fedlora-server presets", description="Print each strategy's default values, with and without privacy, "
        "and with --one-step. The flag of the same name overrides a value; fedlora-server --help explains the flags.")
    made.add_argument("--json", action="store_true", dest="as_json", help="print JSON instead of a table")
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    as_json = parser().parse_args(argv).as_json
    from fedlora_strategies.recipe import STEPS_AT_SERVER, presets

    found: dict[str, dict[str, dict[str, object]]] = {"required": {}, "off": {}, "one-step": {}}
    for (strategy, private), preset in presets().items():
        found["required" if private else "off"][strategy] = asdict(preset)
    step = asdict(STEPS_AT_SERVER)
    server = {"server_optimizer": "adam", "server_lr": step.pop("lr"),
              "server_options": ",".join(f"{name}={value:g}" for name, value in step.items())}
    for (strategy, _), preset in presets(one_step=True).items():
        found["one-step"][strategy] = asdict(preset) | server
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        for privacy, rows in found.items():
            _print("--one-step" if privacy == "one-step" else f"--privacy {privacy}", rows)
    return 0


def _print(title: str, rows: Mapping[str, Mapping[str, object]]) -> None:
    """Print a row for each strategy. Values that are the same for all strategies stand above the table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    first = next(iter(rows.values()))
    differ = [name for name in first if any(row[name] != first[name] for row in rows.values())]
    same = " · ".join(f"{flag(name)} {shown(first[name])}" for name in first if name not in differ)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("strategy", no_wrap=True)
    for name in differ:
        table.add_column(flag(name), justify="left" if isinstance(first[name], str | tuple) else "right")
    for strategy, row in rows.items():
        table.add_row(strategy, *(shown(row[name]) for name in differ))
    console = Console(highlight=False)
    console.print(f"[bold]{title}[/bold]   {same}")
    console.print(table)
