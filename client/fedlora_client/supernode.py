"""fedlora-client where Flower's SuperNode holds the connection: each message is answered by a process of its own.

Nothing stays in memory between two messages: policy, ledger and state are opened, the data is read and checked, and
the model loaded, each time anew. The charges, the frozen tensors, the last upload and what was announced or refused
are on the disk, where fedlora-client has them too. A SuperNode answers every run that its SuperLink submits; what
bounds them all together is the data set's lifetime budget. Nobody is there to be asked, so that a real ledger needs
`yes` and `declared-size` in the node's configuration. A round that fails is the last of its run here, until the
owner says otherwise.
"""

from __future__ import annotations

import logging
import socket
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from fedlora.plan import Refusal, Refused, RoundPlan, Tensors, Upload
from fedlora.wire import Setup

from .cli import set_environment

if TYPE_CHECKING:
    from .participation import Participation

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")


class SuperNodeClient:
    """Answers messages; made for each of them.

    Args:
        options: of fedlora-client. --server is not called, only held against the policy and named in reports.

    Attributes:
        name: this client's at the server.
        private: whether it trains under differential privacy.
    Raises:
        ValueError: an option is not for SuperNodes.
    """

    def __init__(self, options: Namespace) -> None:
        if options.compile:
            raise ValueError("--compile: a SuperNode starts a process for each message, which would compile anew; "
                             "leave it out")
        self._options = options
        self.name: str = options.name or socket.gethostname()
        self.private: bool = options.epsilon != float("inf")

    def join(self, setup: Setup) -> tuple[str, ...] | Refusal:
        """Read the data and check it against what the server proposes; the label names that are disclosed, or why
        this client will not take part."""
        return self._take_part(setup, lambda part: part.announced)

    def run_round(self, plan: RoundPlan, tensors: Tensors) -> Upload | Refusal:
        """Train once for `plan`, as `ClientSession.run_round` does, and bring the run's privacy report up to date."""

        def train(part: Participation) -> Upload | Refusal:
            answer = part.answer_unattended(plan, tensors)
            part.report(plan, answer)
            part.leave_report()
            return answer

        return self._take_part(Setup.of(plan.run), train)

    def _take_part(self, setup: Setup, act: Callable[[Participation], Answer]) -> Answer | Refusal:
        """What `act` does with this client's part in the run. What goes wrong is told here, and to the server only
        what a refusal says."""
        set_environment(self._options)
        from fedlora.console import messages

        from .participation import DataHolder, Participation

        try:
            holder = DataHolder.of(self._options, messages())
            try:
                return act(Participation(holder, setup))
            finally:
                holder.close()
        except Refused as refused:
            log.error("%s", refused)
            return refused.refusal
        except (ValueError, MemoryError, OSError) as error:
            log.error("%s", error)
            return Refusal("unavailable")
