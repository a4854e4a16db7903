"""The steps of `fedlora-client join` and `check`: each tells what was found (✓) or what has to be done first (✗)."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from fedlora.data import DataFaults
from fedlora.plan import Refused


class NotReady(ValueError):
    """Something has to be done before this client can take part; the steps that failed have said what."""


class Awaiting(Exception):
    """The coordinator has to answer this client's request for a certificate; the message says what to send."""


class Steps:
    """Makes steps, and tells how each ended.

    Args:
        console: where to tell.

    Attributes:
        failed: names of the steps before which something has to be done.
        faults: number of things that have to be done; the data's faults count by their kinds.
        awaits: whether a step waits for the coordinator.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self.failed: list[str] = []
        self.faults = 0
        self.awaits = False

    def make(self, name: str, step: Callable[[], str], *, needed: bool = False) -> bool:
        """Make a step, and tell what it returns; "" tells nothing.

        Args:
            name: what is checked, in a word.
            step: raises ValueError, MemoryError, Refused or OSError if something has to be done first, and Awaiting if
                the coordinator has to.
            needed: whether nothing can follow if the step fails.

        Returns:
            Whether nothing has to be done.

        Raises:
            NotReady: the step failed, and nothing can follow.
        """
        kinds = 1
        try:
            self._tell("✓", name, step(), "green")
            return True
        except Awaiting as awaits:
            self._tell("…", name, str(awaits), "yellow")
            self.awaits = True
            return False
        except Refused as refused:
            why = refused.refusal.detail or f"{refused}; the reason is above"
        except OSError as error:
            why = f"{error.filename or 'a file'}: {error.strerror or error}"
        except DataFaults as error:
            why, kinds = str(error), error.kinds
        except (ValueError, MemoryError) as error:
            why = str(error)
        self._tell("✗", name, why, "red")
        self.failed.append(name)
        self.faults += kinds
        if needed:
            self.check()
        return False

    def check(self) -> None:
        """Raise NotReady if a step has failed."""
        if self.failed:
            raise NotReady(f"not ready: {', '.join(self.failed)} (✗ above). Do what is said there, then start the same "
                           "command again")

    def _tell(self, mark: str, name: str, text: str, style: str) -> None:
        if text:
            self._console.print(f"{mark} {name:<9} {text}", style=style, soft_wrap=True)
