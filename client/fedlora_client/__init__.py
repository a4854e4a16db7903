"""The client: trains beside private data and sends noised adapters. It imports neither server nor strategies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import join
    from .app import TookPart

__all__ = ["TookPart", "join"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for, so that the command's --help stays quick."""
    if name == "join":
        from .api import join

        return join
    if name == "TookPart":
        from .app import TookPart

        return TookPart
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
