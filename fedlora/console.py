"""What people are told while a command runs."""

from __future__ import annotations

from rich.console import Console


def messages() -> Console:
    """On stderr, so that a command's output can be piped; a message in a file is one line, however long."""
    console = Console(stderr=True, markup=False, highlight=False)
    console.soft_wrap = not console.is_terminal
    return console
