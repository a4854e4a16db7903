"""Records per second of private local training on real text, against a loop as in published code.

That loop pads to the longest text of the data set, clips with Opacus's ghost clipping in float32, and wraps model,
optimiser and data anew in each round. Both draw batches of 128 expected records by Poisson sampling.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..measure import Figure, Row, Settings, Times, Value, interleaved
from ..peers import PublishedLoop
from ..subjects import Subject, precisions, rows_of, settle, subject

TARGETS = {"fp32": 5.0, "bf16": 12.0}
STEPS = 4


def measure(settings: Settings) -> Iterator[Row]:
    """Yield one row for each precision."""
    batch = 8 if settings.quick else 128
    made = partial(subject, settings, rows_of(settings), family="frozen-a", rank=8, expected_batch=batch,
                   max_length=128, steps=STEPS)
    published = PublishedLoop(made(precision="fp32"))
    longest, mean = int(published.records.lengths.max()), float(published.records.lengths.mean())
    for precision in precisions(settings):
        ours = made(precision=precision)
        rate = min(1.0, batch / len(ours.records))
        drawn: dict[str, dict[int, int]] = {"published": {}, "ours": {}}

        def train(block: int, ours: Subject = ours, rate: float = rate,
                  drawn: dict[str, dict[int, int]] = drawn) -> None:
            drawn["ours"][block] = sum(ours.train(block, private=True, sampling_rate=rate).drawn)

        def publish(block: int, drawn: dict[str, dict[int, int]] = drawn) -> None:
            drawn["published"][block] = published(block)

        times = interleaved({"published": publish, "ours": train}, settings.repeats(9),
                            settle=settle(settings.device))
        each = {name: _per_record(taken, drawn[name]) for name, taken in times.items()}
        yield Row(f"{precision}, {batch} expected records", {
            "published ÷ ours": each["published"].over(each["ours"], better="higher", target=TARGETS[precision]),
            "CPU time": each["published"].cpu_over(each["ours"], better="higher"),
            "ours": Value.of([1 / second for second in each["ours"].wall], "records/s"),
            "published": Value.of([1 / second for second in each["published"].wall], "records/s")},
            note=f"texts of {mean:.0f} tokens, the longest {longest}")


def _per_record(times: Times, drawn: dict[int, int]) -> Times:
    """Return the seconds per drawn record, block by block."""
    return Times(*([second / drawn[block] for block, second in enumerate(taken)] for taken in (times.wall, times.cpu)))


FIGURE = Figure(3, measure)
