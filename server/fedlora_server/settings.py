"""The block printed when a run starts: each value that shapes the training, by whether it was given or is a default.

    given    rounds 3 · batch-size 64
    preset   rank 2 · alpha 5 · targets auto · init orthonormal · lr 0.03 · …
    default  strategy fedsvd · model minilm · task classification · max-length 128 · …

It lists the options that become fields of the run's plan.
"""

from __future__ import annotations

import dataclasses

from rich.table import Table
from rich.text import Text

from fedlora.config import GROUPS, RunConfig, flag, options_of, shown
from fedlora_strategies import Preset

SOURCES = ("given", "preset", "default")

OF_SUMS = ("secure_aggregation", "colluding", "least_noise", "hold_out")
"""Options that are told in a run with secure aggregation alone."""


def settings(config: RunConfig, strategy: str, values: Preset) -> Table:
    """Return the block as a table, which has three lines on a wide terminal.

    A given value that equals the default counts as the default.

    Args:
        config: the command's options.
        strategy: the strategy's name.
        values: the preset's values, with those that were given in their place.
    """
    found: dict[str, list[str]] = {source: [] for source in SOURCES}
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, option in sorted(options_of(type(config)).items(), key=lambda item: (
            GROUPS.index(item[1].group), item[1].place)):
        given = getattr(config, name)
        value = strategy if name == "strategy" else getattr(values, name, given)
        if name in OF_SUMS and not config.secure_aggregation:
            continue
        if option.plan and value not in (None, ()):
            source = "given" if given != defaults[name] else "preset" if hasattr(values, name) else "default"
            found[source].append(f"{flag(name)} {shown(value)}")
    table = Table.grid(padding=(0, 2))
    for source, items in found.items():
        if items:
            table.add_row(source, Text(" · ".join(items)))
    return table
