"""The server: waits for clients, asks them to train, combines their updates and writes the run's results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import serve
    from .app import Served

__all__ = ["Served", "serve"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for, so that the command's --help stays quick."""
    if name == "serve":
        from .api import serve

        return serve
    if name == "Served":
        from .app import Served

        return Served
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
