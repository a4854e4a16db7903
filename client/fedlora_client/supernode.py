"""The client under a Flower SuperNode, which holds the connection and starts a process for each message.

Nothing stays in memory between two messages. Each time, the policy, the ledger and the state are opened, the data are
read and checked, and the model is loaded. Charges, frozen tensors, the last upload, and what was announced or refused
are on disk, in the same files that fedlora-client uses.

A SuperNode answers every run that its SuperLink submits; the data set's lifetime budget limits all of them together.
Nobody is there to be asked, so a real ledger needs `yes` and `declared-size` in the node's configuration. After a round
that failed, all further rounds of its run are refused until the owner removes a mark.
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
    """Answers the messages of a SuperNode. A new one is made for each message.

    Args:
        options: the options of fedlora-client. --server is not called; it is checked against the policy and named in
            reports.

    Attributes:
        name: this client's name at the server.
        private: whether this client trains under differential privacy.

    Raises:
        ValueError: an option cannot be used under a SuperNode.
    """

    def __init__(self, options: ClientConfig) -> None:
        if options.compile:
            raise ValueError("--compile: a SuperNode starts a process for each message, which would compile anew; "
                             "leave it out")
        self._options = options
        self.name: str = options.name or socket.gethostname()
        self.private: bool = options.epsilon != float("inf")

    def join(self, proposal: Proposal) -> tuple[str, ...] | Refusal:
        """Check the server's proposal against the policy, the data and the budget.

        Args:
            proposal: what the server proposes.

        Returns:
            The label names that are disclosed to the server, or why this client does not take part.
        """
        return self._take_part(proposal, lambda part: part.announced)

    def run_round(self, plan: RoundPlan, tensors: Tensors) -> Upload | Refusal:
        """Train once for an order, and bring the run's privacy report up to date.

        Args:
            plan: the order.
            tensors: the tensors that came with it.

        Returns:
            What may be sent: the upload, or a refusal.
        """

        def train(part: Participation) -> Upload | Refusal:
            answer = part.answer_unattended(plan, tensors)
            part.report(plan, answer)
            part.leave_report()
            return answer

        return self._take_part(Proposal(plan.run), train)

    def _take_part(self, proposal: Proposal, act: Callable[[Participation], Answer]) -> Answer | Refusal:
        """Call `act` with this client's part in the run. An error becomes a refusal.

        The error itself is written to the local log. The server learns nothing of it but the refusal.
        """
        if proposal.plan.secure_aggregation:
            log.error("The run has secure aggregation, whose secrets live in a process that stays connected, and a "
                      "SuperNode starts one for each message; refused. Take part with fedlora-client, at a "
                      "fedlora-server.")
            return Refusal("policy")
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
