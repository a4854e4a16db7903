"""The client's main loop: join a server, take part in the run that it proposes, answer its orders and leave."""

from __future__ import annotations

import sys

from rich.console import Console

from fedlora.config import ClientConfig
from fedlora.console import tell, tell_about
from fedlora.plan import Proposal, Refusal, Refused

from .connection import Connection, Goodbye, RunChanged
from .data_holder import DataHolder
from .participation import Participation


class EndedEarly(Exception):
    """The run ended before it was finished; the message says why."""


class RoundFailed(Exception):
    """A round failed on this machine, and further rounds could fail the same way; the message says what to do."""


def take_part(options: ClientConfig, console: Console) -> None:
    """Take part in the server's run until it says goodbye.

    Args:
        options: the options of fedlora-client.
        console: where the data holder is told what happens.

    Raises:
        EndedEarly: the server ended the run before it was finished.
        RoundFailed: a round failed on this machine.
        ValueError: an option or the data is wrong.
        Refused: this client or the server declined; the code says why.
        ServerUnreachable: no server answered within --connect-timeout.
        WireError: the server does not speak this protocol.
    """
    if options.log_format == "json" and not options.yes:
        raise ValueError("--log-format json leaves no place for questions; add --yes to take part without being asked")
    holder = DataHolder.of(options, console, asks=(options.log_format == "text" and sys.stdin.isatty()
                                                   and sys.stdout.isatty()))
    tell_about(console, client=holder.name)
    gate, limits = holder.gate, holder.limits
    connection = Connection(options.server, holder.name, private=limits.private, insecure=options.insecure,
                            connect_timeout_s=options.connect_timeout,
                            report=lambda line: console.print(line), tls=holder.tls, secrets=holder.state)
    try:
        proposal = connection.join()
        while True:
            try:
                _serve(holder, proposal, connection)
            except RunChanged as changed:
                if limits.private and gate.ledger.charges(gate.dataset, proposal.plan.run_id):
                    other = changed.proposal.plan.run_id
                    raise Refused("budget", f"the server came back with another run, {other}, which would spend "
                                            f"another ε of {limits.epsilon:g} on the same records; start "
                                            "fedlora-client again if you want that") from None
                proposal = changed.proposal
                console.print(f"The server was restarted with another run, {proposal.plan.run_id}.")
    except Goodbye as goodbye:
        if not goodbye.as_planned:
            raise EndedEarly(f"the server ended the run early: {goodbye}") from None
        console.print(f"The server says goodbye: {goodbye}")
    finally:
        connection.leave()


def _serve(holder: DataHolder, proposal: Proposal, connection: Connection) -> None:
    """Answer the orders of one run until the connection raises what ends it (`Goodbye`, `RunChanged`, …)."""
    tell_about(holder.console, run=proposal.plan.run_id)
    try:
        part = Participation(holder, proposal)
    except Refused as refused:
        connection.decline(refused.refusal)
        raise
    connection.max_tensor_bytes = part.most_tensor_bytes
    connection.ready(part.announced)
    console = holder.console
    tell(console, f"Joined {holder.options.server} as {holder.name}; waiting to be asked.", "joined")
    try:
        while True:
            plan, tensors = connection.next_request()
            with console.status(f"round {plan.round}: training"):
                answer = part.answer(plan, tensors, connection.is_unwanted)
            declined = connection.send(answer)
            part.report(plan, answer, declined,
                        f"; {connection.bytes_up:,} bytes up, {connection.bytes_down:,} down so far")
            if isinstance(answer, Refusal) and answer.code in ("policy", "labels"):
                raise Refused(answer.code, "see the messages above")
            if part.failed:
                raise RoundFailed(f"round {plan.round} failed on this machine, for the reason above. It stays charged "
                                  "if it had begun, and further rounds could fail the same way. Remove the cause, then "
                                  "start this client again")
    finally:
        part.conclude()
