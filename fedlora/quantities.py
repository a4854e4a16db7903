"""Numbers as people read them: bytes and durations with their units, and figures."""

from __future__ import annotations


def quantity(count: int | float) -> str:
    """Return a number of bytes with a unit: 1234567 is "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def decimal(value: float) -> str:
    """Return a figure with three decimals, or a very large one with three digits: 0.8125 is "0.812", 1e30 "1e+30"."""
    return f"{value:.3f}" if abs(value) < 1e5 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Return a duration in one unit or two: 75 is "1 min 15 s", 7300 is "2 h 1 min"."""
    minutes, left = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    counts = (days, "d"), (hours, "h"), (minutes, "min"), (left, "s")
    parts = [f"{number} {unit}" for number, unit in counts if number]
    return " ".join(parts[:2]) or "0 s"
