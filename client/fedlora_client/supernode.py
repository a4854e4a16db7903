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
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from fedlora.config import ClientConfig
from fedlora.plan import Proposal, Refusal, Refused, RoundPlan, Tensors, Upload

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

    def __init__(self, options: ClientConfig) -> None:
        if options.compile:
            raise ValueError("--compile: a SuperNode starts a process for each message, which would compile anew; "
                             "leave it out")
        self._options = options
        self.name: str = options.name or socket.gethostname()
        self.private: bool = options.epsilon != float("inf")

    def join(self, proposal: Proposal) -> tuple[str, ...] | Refusal:
        """Read the data and check it against what the server proposes; the label names that are disclosed, or why
        this client will not take part.
        """
        return self._take_part(proposal, lambda part: part.announced)

    def run_round(self, plan: RoundPlan, tensors: Tensors) -> Upload | Refusal:
        """Train once for `plan`, as `ClientSession.run_round` does, and bring the run's privacy report up to date."""

        def train(part: Participation) -> Upload | Refusal:
            answer = part.answer_unattended(plan, tensors)
            part.report(plan, answer)
            part.leave_report()
            return answer

        return self._take_part(Proposal(plan.run), train)

    def _take_part(self, proposal: Proposal, act: Callable[[Participation], Answer]) -> Answer | Refusal:
        """What `act` does with this client's part in the run. What goes wrong is told here, and to the server only
        what a refusal says.
        """
        set_environment(allow_download=self._options.allow_download)
        from fedlora.console import messages

        from .data_holder import DataHolder
        from .participation import Participation

        try:
            holder = DataHolder.of(self._options, messages())
            try:
                return act(Participation(holder, proposal))
            finally:
                holder.close()
        except Refused as refused:
            log.error("%s", refused)
            return refused.refusal
        except (ValueError, MemoryError, OSError) as error:
            log.error("%s", error)
            return Refusal("unavailable")
