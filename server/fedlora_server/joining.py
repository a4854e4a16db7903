"""Checks of a client's Join: its version, its privacy, and whether it may have the name that it asks for."""

from __future__ import annotations

import shlex

from fedlora import wire
from fedlora.plan import Refused, RunPlan
from fedlora.wire import pb

from .seats import Seat


class Unproven(Refused):
    """A Join without a secret, under a name that belongs to a client. The client may join again with the secret."""


def check_join(join: pb.Join, plan: RunPlan) -> str:
    """Check what a Join shows by itself, and return the client's version.

    Raises:
        Refused: version or privacy do not fit the run.
        WireError: the name, the process token or the secret is malformed.
    """
    ours, theirs = plan.fedlora_version, wire.clean(join.fedlora_version)
    if not wire.is_spoken(join) or ours.split(".")[:2] != theirs.split(".")[:2]:
        raise Refused("version-mismatch", f"the server runs FedLoRA {ours} ({wire.SPOKEN}), the client FedLoRA "
                                          f"{theirs} ({wire.spoken_by(join)}); install the same version")
    try:
        wire.check_name(join.name)
    except ValueError as error:
        raise wire.WireError(str(error)) from None
    if len(join.process) != 16:
        raise wire.WireError("the process token does not have 16 bytes")
    if len(join.secret) not in (0, wire.SECRET_BYTES):
        raise wire.WireError(f"the name's secret does not have {wire.SECRET_BYTES} bytes")
    if plan.private and not join.private:
        raise Refused("privacy-mismatch", "the server runs with --privacy required and this client with "
                                          "--epsilon inf; change one of the two options")
    return theirs


def check_name(join: pb.Join, seat: Seat | None, taken: bool) -> None:
    """Check that a process may have a name for which it shows neither the secret nor the token of the last process.

    Raises:
        Refused: a client with this name is connected, or the name belongs to another client (`taken`).
    """
    why = Unproven if taken and not join.secret else Refused
    if seat is not None and seat.stream is not None:
        raise why("name-in-use", f"a client named {join.name!r} is connected; choose another --name, or stop the "
                                 "other client first. (One whose machine is gone is forgotten within "
                                 f"{wire.NOTICED_WITHIN_S} s.)")
    if taken:
        shown = "another secret than it was given" if join.secret else "no secret of it"
        raise why("name-in-use", f"{join.name!r} took part in this run before, and this client shows {shown}. "
                                 "Start it with the --state folder that the name was used with; if that is lost, "
                                 "the coordinator frees the name with `fedlora-server forget "
                                 f"{shlex.quote(join.name)} --out RUN_FOLDER`")
