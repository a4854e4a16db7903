"""Answers of clients in a secure sum: which questions they fit, and whether they are well formed."""

from __future__ import annotations

from fedlora.plan import Refusal
from fedlora.wire import WireError, pb, refusal_from_wire
from fedlora.wire.sums import LONGEST_PART, package_from_wire, reveal_from_wire

KINDS = {"package": "package", "survivors": "agreement", "closing": "reveal"}
"""Kind of a question about one attempt at a sum → kind of its answer."""


def check_answer(answer: pb.SumAnswer, name: str) -> None:
    """Check an answer's form and sizes, before anything of it is kept. What it says is checked by `Collector`.

    Args:
        answer: the answer.
        name: the client that sent it.

    Raises:
        WireError: it is of no known kind, or a part of it is missing, too long or too often there.
    """
    kind = answer.WhichOneof("kind")
    if kind == "package":
        package_from_wire(answer.package)
    elif kind == "reveal":
        reveal_from_wire(answer.reveal, name)
    elif kind == "declined":
        refusal_from_wire(answer.declined.refusal)
    elif kind is None or len(answer.roster if kind == "roster" else answer.agreement.signature) > LONGEST_PART:
        raise WireError("an answer in a secure sum is empty, or its signature or digest is too long")


def declined(answer: pb.SumAnswer) -> Refusal | None:
    """Return why a client will not or cannot take part in a sum; None if it answers what it was asked."""
    return refusal_from_wire(answer.declined.refusal) if answer.HasField("declined") else None


def fits(request: pb.SumRequest, digest: bytes, answer: pb.SumAnswer) -> bool:
    """Return whether an answer is one to this question, and not to an earlier one.

    Args:
        request: the question.
        digest: digest of the roster in it; empty in a question without one.
        answer: the answer.
    """
    kind, about = answer.WhichOneof("kind"), _key(request)
    if kind == "roster":
        return bool(digest) and answer.roster == digest
    if kind == "declined":
        return (answer.declined.key if answer.declined.HasField("key") else None) == about
    asked = KINDS.get(request.WhichOneof("kind") or "")
    return kind is not None and kind == asked and getattr(answer, kind).key == about


def _key(request: pb.SumRequest) -> pb.Key | None:
    """Return the round and the attempt that a question is about; None if it is about a roster."""
    kind = request.WhichOneof("kind")
    if kind == "roster" or kind is None:
        return None
    key: pb.Key = request.package if kind == "package" else getattr(request, kind).key
    return key
