"""What the data holder sees of a round while it lasts: the step, records a second, the time left, and ε so far.

Nothing of it leaves this machine. The records a second are the expected ones, by the sampling rate and the declared
size. How many were drawn is not shown, because the noise hides it and a log file may be shown to others.
"""

from __future__ import annotations

import math
import threading
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from fedlora.console import tell
from fedlora.plan import RoundPlan
from fedlora.quantities import duration

REFRESHES = 2.0
"""Times a second that the line on a terminal is drawn anew."""
LINE_EVERY_S = 30.0
"""Seconds from one line to the next where there is no terminal."""


class RoundDisplay:
    """A live line on a terminal, or a line every `LINE_EVERY_S` seconds elsewhere, for as long as the block lasts.

    Args:
        console: where to show it; None shows nothing.
        plan: the round's order.
    """

    def __init__(self, console: Console | None, plan: RoundPlan) -> None:
        self._console, self._plan = console, plan
        self._per_step, self._units, self._spent = 0.0, "records", ""
        self._began: float | None = None
        self._done = 0, 0.0  # steps, and the monotonic time at which the last of them was done
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._live: Live | None = None

    def training(self, per_step: float, units: str, spent: str) -> None:
        """Begin to show the steps.

        Args:
            per_step: expected number of records in a step, or of other units of privacy.
            units: what they are.
            spent: what is charged so far, in words.
        """
        self._per_step, self._units, self._spent = per_step, units, spent
        self._began = time.monotonic()
        self._done = 0, self._began

    def stepped(self, steps: int) -> None:
        """Note how many steps are done. This only stores a number, so that it costs a step nothing."""
        self._done = steps, time.monotonic()

    def line(self) -> str:
        """Return how far the round is, in a line."""
        plan, now = self._plan, time.monotonic()
        told = [f"round {plan.round} of {plan.run.rounds}: " + ("preparing" if self._began is None else self._step())]
        if self._began is not None:
            (steps, at), took = self._done, self._done[1] - self._began
            if steps and took > 0:
                told.append(f"{self._per_step * steps / took:.3g} {self._units}/s")
                left = (plan.run.local_steps - steps) * took / steps - (now - at)
                told.append(f"about {duration(left)} left" if left > 0 else "")
        if math.isfinite(plan.until):
            told.append(f"the server waits for {duration(plan.left_s)} more")
        return "; ".join(filter(None, (*told, self._spent)))

    def _step(self) -> str:
        steps, planned = self._done[0], self._plan.run.local_steps
        return f"step {steps + 1} of {planned}" if steps < planned else f"{planned} steps done"

    def __enter__(self) -> Self:
        if self._console is None:
            return self
        if self._console.is_terminal:
            self._live = Live(get_renderable=lambda: Text(self.line(), overflow="ellipsis", no_wrap=True),
                              console=self._console, refresh_per_second=REFRESHES, transient=True)
            self._live.start()
        else:
            self._thread = threading.Thread(target=self._tell, args=(self._console,), name="fedlora-round", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._over.set()
        if self._live is not None:
            self._live.stop()
        if self._thread is not None:
            self._thread.join()

    def _tell(self, console: Console) -> None:
        while not self._over.wait(LINE_EVERY_S):
            tell(console, self.line(), "training", round=self._plan.round, attempt=self._plan.attempt)
