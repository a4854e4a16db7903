"""A client's part in the secure sums of a run: it checks who is in, answers the server, and masks its uploads.

The server asks while another thread trains. So the answers are given in the connection's thread, and the training gets
a `MaskedPart`. Sealing key, seeds and shares live in this process's memory alone. Those of an attempt are dropped when
a later one begins.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedlora.identity import Identity
from fedlora.identity.certificates import utc_now
from fedlora.plan import LEAST_MEMBERS, Refusal, RunPlan
from fedlora.privacy import RunTerms
from fedlora.privacy.ledger.rosters import RosterFacts
from fedlora.secure_sum.guarantee import facts_of
from fedlora.secure_sum.masks import public_bytes
from fedlora.secure_sum.member import Attendance
from fedlora.secure_sum.packages import Closing, CohortRequest
from fedlora.secure_sum.roster import Entry, Roster, run_digest
from fedlora.secure_sum.statements import Refused
from fedlora.wire import Key, WireError, key_from_wire, key_to_wire, pb, refusal_to_wire
from fedlora.wire.sums import (
    closing_from_wire,
    membership_to_wire,
    package_to_wire,
    reveal_to_wire,
    roster_from_wire,
    survivors_from_wire,
)

log = logging.getLogger(__name__)


@dataclass
class _Attempt:
    """One attempt at one round, with the cohort that the server formed, and whether a vector was masked for it."""

    key: Key
    attendance: Attendance
    facts: RosterFacts
    cohort: CohortRequest | None = None
    masked: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)


class MaskedPart:
    """A deployed client's part in one sum (`SumPart`): what it uploads is masked.

    Args:
        attempt: the attempt, with its cohort.
        note: called with the roster's facts once the cohort is accepted.

    Attributes:
        grid: the integers of the run.
        values: the most values in a vector.
        noise: least standard deviation, in units of the grid, of the noise that this client must add.
    """

    def __init__(self, attempt: _Attempt, note: Callable[[RosterFacts], None]) -> None:
        self._attempt, self._note = attempt, note
        roster = attempt.attendance.roster
        self.grid, self.values, self.noise = roster.grid, roster.values, roster.noise

    def accept(self, sent: bytes) -> None:
        """Check the cohort, before anything is charged.

        Args:
            sent: digest of the tensors that the round starts from (`fedlora.secure_sum.packages.sent_digest`).

        Raises:
            fedlora.secure_sum.statements.Refused: the cohort is not one that this client takes part in.
        """
        assert self._attempt.cohort is not None
        with self._attempt.lock:
            self._attempt.attendance.accept(self._attempt.cohort, sent)
        self._note(self._attempt.facts)

    def masked(self, integers: np.ndarray) -> np.ndarray:
        """Return the masked vector, (values,) unsigned integers of the ring.

        Args:
            integers: (values,) the encoded sum with this client's noise, int64, in units of the grid.
        """
        with self._attempt.lock:
            self._attempt.masked = True
            return self._attempt.attendance.masked(integers)


class SumMember:
    """A client as a member of the rosters of one run. Any thread may call it.

    Args:
        plan: the run's plan.
        identity: returns this client's key and certificate, as they are on the disk now.
        terms: the run's terms, with the noise that this client adds by itself.
        announced: whether the server is told that noise, by which it can make the roster's larger.
        pins: fingerprints of the keys that may be members; None if the owner named none.
        least: the fewest members of a roster that the owner takes part with.
        note: called with what the ledger keeps of a roster, before anything is charged under it.
        reveals: called with the key of an attempt before this client reveals its shares of it, from any thread.
        tell: called from any thread with a line for the data holder, and the key of the attempt that it is about.

    Raises:
        ValueError: the identity cannot be used.
    """

    def __init__(self, plan: RunPlan, identity: Callable[[], Identity], terms: RunTerms, *, announced: bool = True,
                 pins: Collection[str] | None = None, least: int = LEAST_MEMBERS,
                 note: Callable[[RosterFacts], None] = lambda facts: None,
                 reveals: Callable[[Key], None] = lambda key: None,
                 tell: Callable[[str, Key | None], object] = lambda line, key: None) -> None:
        assert terms.noise_multiplier is not None, "a run with secure aggregation is private"
        self._plan, self._read, self._terms, self._pins, self._tell = plan, identity, terms, pins, tell
        self._least, self._note, self._reveals = least, note, reveals
        self._noted: set[str] = set()  # digests of the rosters that the ledger has from this process
        self._multiplier: float = terms.noise_multiplier
        self._noise = terms.noise_multiplier * (terms.clip_norm / plan.clip_norm) if announced else 0.0
        self._run, self._sealing = run_digest(plan), X25519PrivateKey.generate()
        self._lock = threading.RLock()
        self._roster: tuple[Roster, RosterFacts] | None = None
        self._attempt: _Attempt | None = None
        self._over = False  # the server asked for what must not be: nothing more is answered
        self._identity = identity()
        self._entry = self._signed()

    def membership(self) -> pb.Membership:
        """Return what this client gives for its place in a roster. A renewed certificate is taken up here."""
        with self._lock:
            try:
                present = self._read()
            except ValueError as error:  # it was right before, and is being replaced, or has ended
                log.warning("%s; the certificate of before stays in use for secure sums.", error)
                present = self._identity
            if present != self._identity:
                self._identity = present
                self._entry = self._signed()
            return membership_to_wire(self._entry, self._noise)

    def answer(self, request: pb.SumRequest) -> pb.SumAnswer:
        """Return the answer to a request of the server's. The same request gets the same answer again.

        The answer is "declined" where the request is not what the protocol or the owner's policy allows (policy; the
        local log says why), and where this process does not hold the secrets that it would take (unavailable).

        Raises:
            WireError: the request is not a valid message.
        """
        kind = request.WhichOneof("kind")
        try:
            with self._lock:
                if self._over:
                    return _declined(request)
                if kind == "roster":
                    return pb.SumAnswer(roster=self._checked(roster_from_wire(request.roster, self._run)).digest)
                if kind == "package":
                    return self._package(self._key(request.package))
                if kind == "survivors":
                    return self._agreement(request.survivors.key, survivors_from_wire(request.survivors.names))
                if kind == "closing":
                    return self._reveal(request.closing.key, closing_from_wire(request.closing))
        except Refused as refused:
            self._refuse(refused)
            return _declined(request)
        raise WireError("a SumRequest is empty")

    def take(self, key: Key, cohort: CohortRequest) -> bool:
        """Take the cohort that came with an order, for `part`.

        Args:
            key: names the order.
            cohort: the cohort, as the server formed it.

        Returns:
            False if another cohort was given for the same attempt, which breaks the protocol. The log says so.
        """
        with self._lock:
            attempt = self._attempt
            if attempt is None or attempt.key != key:
                return True  # nothing can be masked for it, and `part` says so
            if attempt.cohort not in (None, cohort):
                self._refuse(Refused(f"{attempt.attendance.attempt_text} was given a second cohort; a client takes "
                                     "part in one"))
                return False
            attempt.cohort = cohort
            return True

    def part(self, key: Key) -> MaskedPart | None:
        """Return this client's part in the sum of an order.

        Args:
            key: names the order.

        Returns:
            The part; None if this process holds no secrets for the order, as after a restart.
        """
        with self._lock:
            attempt = self._attempt
            return MaskedPart(attempt, self._note_once) if attempt and attempt.key == key and attempt.cohort else None

    def close(self) -> None:
        """Drop the secrets of the attempt in hand. The data holder is told if no share of its upload was revealed."""
        with self._lock:
            attempt, self._attempt = self._attempt, None
        if attempt and attempt.masked and not attempt.attendance.revealed:
            self._tell(f"{_named(attempt.key)}: this client revealed no share, and other members may have opened a sum "
                       "that holds its upload. Its charge stands.", attempt.key)

    def _note_once(self, facts: RosterFacts) -> None:
        if facts.digest not in self._noted:
            self._note(facts)
            self._noted.add(facts.digest)

    def _checked(self, roster: Roster) -> Roster:
        """Return the roster, from now on this client's, once it is checked. The data holder is told who is in."""
        if self._roster is not None and roster == self._roster[0]:
            return roster
        roster.check(self._entry, self._identity.authority_pem, utc_now(), pins=self._pins, least=self._least)
        terms = self._terms
        roster.check_numbers(self._plan, self._multiplier * roster.grid.sensitivity(roster.values, terms.clip_norm))
        self._roster = roster, facts_of(roster, terms, pinned=self._pins is not None)
        self._tell(what_a_roster_means(roster, pinned=self._pins is not None), None)
        return roster

    def _package(self, key: Key) -> pb.SumAnswer:
        held = self._attempt
        if self._roster is None or (held is not None and key < held.key):
            return self._unavailable(key)
        roster, facts = self._roster
        if held is None or held.key != key or held.attendance.roster != roster:
            if held is not None and held.key == key and held.cohort is not None:
                raise Refused(f"{held.attendance.attempt_text} was given a cohort, and is to begin anew with another "
                              "roster; it needs a number of its own")
            self.close()
            _, number, attempt = key
            self._attempt = held = _Attempt(key, Attendance(
                self._entry.name, roster, self._identity.key, self._sealing, round=number, attempt=attempt), facts)
        with held.lock:
            return pb.SumAnswer(package=package_to_wire(held.attendance.offer(), key_to_wire(key)))

    def _agreement(self, of: pb.Key, survivors: tuple[str, ...]) -> pb.SumAnswer:
        held, key = self._attempt, self._key(of)
        if held is None or held.key != key:
            return self._unavailable(key)
        with held.lock:
            return pb.SumAnswer(agreement=pb.Agreement(key=of, signature=held.attendance.agree(survivors)))

    def _reveal(self, of: pb.Key, closing: Closing) -> pb.SumAnswer:
        held, key = self._attempt, self._key(of)
        if held is None or held.key != key:
            return self._unavailable(key)
        with held.lock:
            again, revealed = held.attendance.revealed, held.attendance.reveal(closing)
        if not again:
            assert held.cohort is not None, "the attendance has accepted it"
            self._reveals(key)
            self._tell(f"{_named(key)}: the sum of {len(closing.survivors)} of {len(held.cohort.cohort)} clients' "
                       "uploads is closed, and this client revealed its shares, so that the server can open it.", key)
        return pb.SumAnswer(reveal=reveal_to_wire(revealed, of))

    def _unavailable(self, key: Key) -> pb.SumAnswer:
        log.warning("The server goes on with %s, for which this process holds no secrets: it was started later, or a "
                    "later attempt has begun. This client takes part in the next one.", _named(key))
        return pb.SumAnswer(declined=pb.Declined(key=key_to_wire(key),
                                                 refusal=refusal_to_wire(Refusal("unavailable"))))

    def _refuse(self, refused: Refused) -> None:
        """Tell the data holder's log why nothing more is answered, and drop all secrets."""
        log.error("The server broke the protocol of secure sums, or this site's policy forbids what it asks: %s. "
                  "Nothing more is answered in this run.", refused)
        self._over = True
        self.close()

    def _key(self, key: pb.Key) -> Key:
        if key.round < 1 or key.attempt < 0:
            raise WireError("a secure sum is of a round below 1, or of an attempt below 0")
        return key_from_wire(key, self._plan.run_id)

    def _signed(self) -> Entry:
        identity = self._identity
        return Entry.signed(identity.certificate.name, identity.chain_pem, public_bytes(self._sealing), self._run,
                            identity.key)


def what_a_roster_means(roster: Roster, *, pinned: bool) -> str:
    """Return a roster in words for the data holder: who is in, and what the server can learn.

    Args:
        roster: the roster, once it is checked.
        pinned: whether the owner's policy names who may be a member.
    """
    colluding = f"even if {roster.colluding} of them tell it all they know" if roster.colluding else (
        "as long as none of them tells it what it knows")
    pins = "" if pinned else (" The policy does not name the members' keys (members), so whoever runs the authority "
                              "could be several of them: what holds by itself is this client's own noise.")
    return (f"Secure sums with {len(roster.entries)} members: {', '.join(roster.members)}. The server learns sums of "
            f"{roster.threshold} or more clients' uploads and nothing else of this one, {colluding}; each sum holds "
            f"the noise of {roster.honest} honest members at least.{pins}")


def _named(key: Key) -> str:
    return f"round {key[1]}" + (f", attempt {key[2]}" if key[2] else "")


def _declined(request: pb.SumRequest) -> pb.SumAnswer:
    keys = {"package": request.package, "survivors": request.survivors.key, "closing": request.closing.key}
    return pb.SumAnswer(declined=pb.Declined(key=keys.get(request.WhichOneof("kind") or ""),
                                             refusal=refusal_to_wire(Refusal("policy"))))
