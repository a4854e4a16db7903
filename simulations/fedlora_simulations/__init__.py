"""Simulations of whole federations on one machine, audits of their privacy, and attacks on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import simulate
    from .outcome import Simulation
    from .results import Result

__all__ = ["Result", "Simulation", "simulate"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for, so that the command's --help stays quick."""
    if name == "simulate":
        from .api import simulate

        return simulate
    if name in __all__:
        from . import outcome

        return getattr(outcome, name)  # it imports `Result`
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
