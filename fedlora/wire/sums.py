"""Conversion between protobuf messages and the values of `fedlora.secure_sum`.

Sizes are checked here, so that no message can make the other side hold more than a roster of `MOST_MEMBERS` needs. What
the values mean is checked by `fedlora.secure_sum` alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sized

from fedlora.plan.limits import LEAST_SCALE, MOST_CLIP_NORM, MOST_MEMBERS
from fedlora.secure_sum.integers import Grid
from fedlora.secure_sum.packages import Closing, CohortRequest, KeyPackage, PublicKeys, Reveal
from fedlora.secure_sum.roster import Entry, Roster

from . import fedlora_pb2 as pb
from .codec import check_name
from .tensors import WireError

LONGEST_CERTIFICATE, LONGEST_PART = 8192, 256
"""The most bytes of a member's certificates, and of a key, a digest, a signature, a share or sealed shares.

A roster of `MOST_MEMBERS` with certificates of this length still fits in a frame."""


def membership_to_wire(entry: Entry, noise: float) -> pb.Membership:
    """Return what a client gives for its place in a roster. `noise` is in units of the plan's clip norm."""
    return pb.Membership(certificate=entry.certificate, sealing_key=entry.sealing_key, signature=entry.signature,
                         noise=noise)


def membership_from_wire(message: pb.Membership, name: str) -> tuple[Entry, float]:
    """Return a client's entry, and the noise that it adds at least. Raise WireError if it is not valid."""
    if not (math.isfinite(message.noise) and message.noise >= 0):
        raise WireError("a member's noise is not finite or is negative")
    return _entry(name, message), message.noise


def _entry(name: str, message: pb.Membership | pb.Entry) -> Entry:
    return Entry(_name(name), _part(message.certificate, LONGEST_CERTIFICATE), _part(message.sealing_key),
                 _part(message.signature))


def roster_to_wire(roster: Roster) -> pb.Roster:
    """Return the message for a roster. The run is known from the stream's Welcome and is not sent."""
    grid = roster.grid
    entries = [pb.Entry(name=entry.name, certificate=entry.certificate, sealing_key=entry.sealing_key,
                        signature=entry.signature) for entry in roster.entries]
    return pb.Roster(entries=entries, colluding=roster.colluding, clip_norm=grid.clip_norm,
                     fraction_bits=grid.fraction_bits, ring_bits=grid.ring_bits, most=grid.most, values=roster.values,
                     noise=roster.noise)


def roster_from_wire(message: pb.Roster, run: bytes) -> Roster:
    """Return the roster in a message.

    Args:
        message: the message.
        run: digest of the run (`fedlora.secure_sum.roster.run_digest`).

    Raises:
        WireError: a value is out of range.
        fedlora.secure_sum.statements.Refused: it cannot be a roster.
    """
    _check_count(message.entries)
    if not (LEAST_SCALE <= message.clip_norm <= MOST_CLIP_NORM and 0 <= message.fraction_bits <= 52
            and message.ring_bits in (32, 64) and message.most > 0 and message.values > 0
            and math.isfinite(message.noise) and message.noise > 0):
        raise WireError("a roster's grid, its number of values or its noise is out of range")
    grid = Grid(message.clip_norm, message.fraction_bits, message.ring_bits, message.most)
    entries = tuple(_entry(entry.name, entry) for entry in message.entries)
    return Roster(run, entries, message.colluding, grid, message.values, message.noise)


def package_to_wire(package: KeyPackage, key: pb.Key) -> pb.KeyPackage:
    """Return the message for a key package."""
    return pb.KeyPackage(key=key, keys=_keys_to_wire(package.keys), sealed=_for_members(package.sealed))


def package_from_wire(message: pb.KeyPackage) -> KeyPackage:
    """Return the key package in a message. Raise WireError if it is not valid."""
    return KeyPackage(_keys(message.keys), _by_member(message.sealed))


def cohort_to_wire(request: CohortRequest) -> pb.Cohort:
    """Return the message for a cohort, as one of its members is sent it."""
    return pb.Cohort(keys=[_keys_to_wire(keys) for keys in request.cohort], sealed=_for_members(request.sealed),
                     sent=request.sent)


def cohort_from_wire(message: pb.Cohort) -> CohortRequest:
    """Return the cohort in a message. Raise WireError if it is not valid."""
    _check_count(message.keys)
    return CohortRequest(tuple(map(_keys, message.keys)), _by_member(message.sealed), _part(message.sent))


def survivors_from_wire(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of survivors in a message. Raise WireError if one is not valid."""
    found = tuple(map(_name, names))
    _check_count(found)
    return found


def closing_to_wire(closing: Closing, key: pb.Key) -> pb.Closing:
    """Return the message for the agreement on whose uploads are in a sum."""
    return pb.Closing(key=key, names=closing.survivors, signatures=_for_members(closing.signatures))


def closing_from_wire(message: pb.Closing) -> Closing:
    """Return the agreement in a message. Raise WireError if it is not valid."""
    return Closing(survivors_from_wire(message.names), _by_member(message.signatures))


def reveal_to_wire(reveal: Reveal, key: pb.Key) -> pb.Reveal:
    """Return the message for the shares that a survivor reveals."""
    return pb.Reveal(key=key, seeds=_for_members(reveal.seeds), keys=_for_members(reveal.keys))


def reveal_from_wire(message: pb.Reveal, name: str) -> Reveal:
    """Return the shares that the client of this name reveals. Raise WireError if they are not valid."""
    return Reveal(name, _by_member(message.seeds), _by_member(message.keys))


def _keys_to_wire(keys: PublicKeys) -> pb.PublicKeys:
    return pb.PublicKeys(name=keys.name, mask_key=keys.mask_key, seed_digest=keys.seed_digest,
                         signature=keys.signature)


def _keys(message: pb.PublicKeys) -> PublicKeys:
    return PublicKeys(_name(message.name), _part(message.mask_key), _part(message.seed_digest),
                      _part(message.signature))


def _for_members(parts: Mapping[str, bytes]) -> list[pb.ForMember]:
    return [pb.ForMember(name=name, content=parts[name]) for name in sorted(parts)]


def _by_member(parts: Iterable[pb.ForMember]) -> dict[str, bytes]:
    found = {_name(part.name): _part(part.content) for part in parts}
    _check_count(found)
    return found


def _check_count(members: Sized) -> None:
    if len(members) > MOST_MEMBERS:
        raise WireError(f"a message of a secure sum names more than {MOST_MEMBERS} members")


def _name(name: str) -> str:
    try:
        check_name(name)
    except ValueError:
        raise WireError("a member's name is not valid") from None
    return name


def _part(content: bytes, longest: int = LONGEST_PART) -> bytes:
    if not 0 < len(content) <= longest:
        raise WireError(f"a part of a secure sum has {len(content)} bytes; it must have 1 to {longest}")
    return content
