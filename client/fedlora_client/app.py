"""The client's main loop: join a server, take part in the run that it proposes, answer its orders and leave."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fedlora.config import ClientConfig
from fedlora.config.client import JoinConfig
from fedlora.console import tell, tell_about
from fedlora.plan import Proposal, Refusal, Refused

from .connection import SEE_ABOVE, Connection, Goodbye, RunChanged
from .data_holder import DataHolder
from .onboarding import join
from .participation import Participation
from .round_display import RoundDisplay


@dataclass(frozen=True)
class TookPart:
    """A client's part in a run that its server ended as planned.

    Attributes:
        name: the client's name at the server.
        run_id: the run's id.
        sent: the rounds whose upload the server accepted.
        goodbye: the server's last words.
        report: privacy.json, the privacy report of the run; None if there was nothing to report.
        bytes_up: bytes sent, in all.
        bytes_down: bytes received, in all.
    """

    name: str
    run_id: str
    sent: tuple[int, ...]
    goodbye: str
    report: Path | None
    bytes_up: int
    bytes_down: int


class EndedEarly(Exception):
    """The run ended before it was finished; the message says why."""


class RoundFailed(Exception):
    """A round failed on this machine, and further rounds could fail the same way; the message says what to do."""


def take_part_with_kit(options: JoinConfig, given: Collection[str], console: Console) -> TookPart | None:
    """Check a coordinator's kit and all that it needs here, and take part in its run.

    Args:
        options: the options of `fedlora-client join`.
        given: names of the options that are given and so not asked.
        console: where the data holder is told what happens, and asked.

    Returns:
        The client's part; None with --check-only or --no-start.

    Raises:
        Awaiting: the certificate has not come back yet.
        ValueError: something has to be done first, or `take_part` raises it. So do its other errors.
    """
    asks = sys.stdin.isatty() and sys.stdout.isatty() and not options.yes and options.log_format == "text"
    ready = join(options, given, console, asks=asks)
    return None if ready is None else take_part(ready, console)


def take_part(options: ClientConfig, console: Console) -> TookPart:
    """Take part in the server's run until it says goodbye as planned.

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
    sent: list[int] = []
    connection = Connection(options.server, holder.name, private=limits.private, insecure=options.insecure,
                            connect_timeout_s=options.connect_timeout,
                            report=lambda line: console.print(line), tls=holder.tls, secrets=holder.state)
    try:
        proposal = connection.join()
        while True:
            try:
                _serve(holder, proposal, connection, sent)
            except RunChanged as changed:
                if limits.private and gate.ledger.charges(gate.dataset, proposal.plan.run_id):
                    other = changed.proposal.plan.run_id
                    raise Refused("budget", f"the server came back with another run, {other}, which would spend "
                                            f"another ε of {limits.epsilon:g} on the same records; start "
                                            "fedlora-client again if you want that") from None
                proposal = changed.proposal
                sent.clear()
                console.print(f"The server was restarted with another run, {proposal.plan.run_id}.")
    except Goodbye as goodbye:
        if not goodbye.as_planned:
            raise EndedEarly(f"the server ended the run early: {goodbye}") from None
        console.print(f"The server says goodbye: {goodbye}")
        report = holder.state.run_folder(proposal.plan.run_id) / "privacy.json"
        return TookPart(holder.name, proposal.plan.run_id, tuple(sent), str(goodbye),
                        report if report.exists() else None, connection.bytes_up, connection.bytes_down)
    finally:
        connection.leave()
        holder.close()


def _serve(holder: DataHolder, proposal: Proposal, connection: Connection, sent: list[int]) -> None:
    """Answer the orders of one run until the connection raises what ends it (`Goodbye`, `RunChanged`, …).

    Args:
        holder: the data holder's policy, ledger and data.
        proposal: what the server proposes.
        connection: the connection to the server.
        sent: the rounds whose upload the server accepts are added here.
    """
    tell_about(holder.console, run=proposal.plan.run_id)
    try:
        part = Participation(holder, proposal)
    except Refused as refused:
        connection.decline(refused.refusal)
        raise
    connection.max_tensor_bytes = part.most_tensor_bytes
    connection.ready(part.announced, part.member)
    console = holder.console
    tell(console, f"Joined {holder.options.server} as {holder.name}; waiting to be asked.", "joined")
    try:
        while True:
            plan, tensors = connection.next_request()
            with RoundDisplay(console, plan) as display:
                answer = part.answer(plan, tensors, connection.is_unwanted, display)
            declined = connection.send(answer)
            if declined is None and not isinstance(answer, Refusal):
                sent.append(plan.round)
            part.report(plan, answer, declined,
                        f"; {connection.bytes_up:,} bytes up, {connection.bytes_down:,} down so far")
            if isinstance(answer, Refusal) and answer.code in ("policy", "labels"):
                raise Refused(answer.code, SEE_ABOVE)
            if part.failed:
                raise RoundFailed(f"round {plan.round} failed on this machine, for the reason above. It stays charged "
                                  "if it had begun, and further rounds could fail the same way. Remove the cause, then "
                                  "start this client again")
    finally:
        part.conclude()
