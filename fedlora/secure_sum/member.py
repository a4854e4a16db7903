"""A member's part in a secure sum. All its secrets live in memory, and each is used for one attempt at most.

    offer      makes the key package for one attempt
    accept     checks the cohort that the server formed, and opens the shares that others sealed for this member
    masked     masks its vector, once
    agree      signs whose uploads are in the sum, once
    reveal     gives its shares, once: of each survivor's own mask, or of the private key of who dropped out, never both
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedlora.secure_sum import shamir
from fedlora.secure_sum.masks import agreed, mask, private_key, public_bytes
from fedlora.secure_sum.packages import (
    Closing,
    CohortRequest,
    KeyPackage,
    PublicKeys,
    Reveal,
    survivors_statement,
)
from fedlora.secure_sum.roster import Roster
from fedlora.secure_sum.statements import Attempt, Refused, Unreadable, digest, is_signed, sign

_NONCE_BYTES = 12


class Attendance:
    """A member's part in one attempt at one round.

    Args:
        name: the member.
        roster: the roster, which was checked (`Roster.check`).
        identity: the private key of the member's certificate.
        sealing: the private half of the member's sealing key in the roster.
        round: number of the round, from 1.
        attempt: number of the attempt at it, from 0.
        random: returns that many random bytes; the operating system's but in tests.
    """

    def __init__(self, name: str, roster: Roster, identity: EllipticCurvePrivateKey, sealing: X25519PrivateKey, *,
                 round: int, attempt: int, random: Callable[[int], bytes] = os.urandom) -> None:
        self.name, self.roster = name, roster
        self.attempt = Attempt(roster.run, roster.digest, round, attempt)
        self._identity, self._sealing, self._random = identity, sealing, random
        self._key_seed, self._mask_seed = random(shamir.SECRET_BYTES), random(shamir.SECRET_BYTES)
        self._key = private_key(self._key_seed)
        self._own_shares: tuple[bytes, bytes] | None = None
        self._package: KeyPackage | None = None
        self._request: CohortRequest | None = None
        self._shares: dict[str, tuple[bytes, bytes]] = {}
        self._pairs: dict[str, bytes] = {}  # other member of the cohort → the key of the mask shared with it
        self._uploaded = self._revealed = False
        self._agreed: tuple[str, ...] | None = None

    def offer(self) -> KeyPackage:
        """Return the key package for this attempt. It is made once, and is the same at each call."""
        if self._package is None:
            numbers = self.roster.numbers
            threshold, points = self.roster.threshold, list(numbers.values())
            key_shares = shamir.split(self._key_seed, threshold, points, self._random)
            mask_shares = shamir.split(self._mask_seed, threshold, points, self._random)
            sealed = {}
            for name, number in numbers.items():
                shares = key_shares[number], mask_shares[number]
                if name == self.name:
                    self._own_shares = shares
                else:
                    sealed[name] = self._sealed(name, b"".join(shares))
            keys = PublicKeys(self.name, public_bytes(self._key), digest(self._mask_seed), b"")
            signature = sign(self._identity, keys.statement(self.attempt))
            self._package = KeyPackage(PublicKeys(keys.name, keys.mask_key, keys.seed_digest, signature), sealed)
        return self._package

    def accept(self, request: CohortRequest, sent: bytes) -> None:
        """Check a cohort before anything is charged, and open the shares that its members sealed for this one.

        Args:
            request: the cohort, as the server formed it.
            sent: digest of the tensors that this member received.

        Raises:
            Refused: the tensors are others than the cohort's; the cohort is smaller than the threshold; it holds a
                stranger, a key package of another attempt or a key that cannot be used; this member's package was
                changed; or shares cannot be opened (`Unreadable`).
        """
        package = self.offer()
        if self._request is not None and self._request != request:
            raise Refused(f"{self.attempt_text} was given a second cohort; a client takes part in one")
        if request.sent != sent:
            raise Refused(f"the tensors received for {self.attempt_text} are not those that its cohort starts from")
        names = [keys.name for keys in request.cohort]
        if names != sorted(set(names)):
            raise Refused("the cohort's names are not in order, or one is there twice")
        if len(names) < self.roster.threshold:
            raise Refused(f"the cohort has {len(names)} clients, and a sum that this client takes part in must have "
                          f"{self.roster.threshold} at least")
        if package.keys not in request.cohort:
            raise Refused(f"the cohort does not hold the key package that {self.name!r} gave for {self.attempt_text}")
        for keys in request.cohort:
            if not is_signed(self.roster.entry(keys.name).key, keys.signature, keys.statement(self.attempt)):
                raise Refused(f"the key package of {keys.name!r} was not made for {self.attempt_text} of this run")
        shares = {self.name: self._own_shares} if self._own_shares else {}
        pairs = {}
        for keys in request.cohort:
            if keys.name != self.name:
                pairs[keys.name] = self._paired(keys)
                shares[keys.name] = self._opened(keys.name, request.sealed.get(keys.name, b""))
        self._request, self._shares, self._pairs = request, shares, pairs

    def masked(self, integers: np.ndarray) -> np.ndarray:
        """Return the masked vector that is uploaded.

        Args:
            integers: (values,) the encoded sum with this client's noise, in units of the grid; at most as many values
                as the roster's.

        Raises:
            Refused: no cohort was accepted, or a vector was masked already: a second one under the same masks would
                give away the difference of the two.
        """
        self._accepted()
        grid = self.roster.grid
        if self._uploaded:
            raise Refused(f"the upload of {self.attempt_text} was made already, and its masks serve one vector only")
        if not (integers.ndim == 1 and 0 < integers.size <= self.roster.values):
            raise Refused(f"the vector has the shape {integers.shape}; the roster's have {self.roster.values} values "
                          "at most")
        self._uploaded = True
        total = grid.wrapped(integers)
        total += mask(own_mask_key(self._mask_seed), len(total), grid.dtype)
        for name, key in self._pairs.items():
            pair = mask(key, len(total), grid.dtype)
            total = total + pair if self.name < name else total - pair
        return total

    def agree(self, survivors: tuple[str, ...]) -> bytes:
        """Sign whose uploads are in the sum.

        Raises:
            Refused: another set was signed already, the set is not one of this cohort, or too small.
        """
        request = self._accepted()
        if self._agreed is not None and self._agreed != survivors:
            raise Refused(f"{self.attempt_text} was closed already with other clients; a client agrees to one set")
        self._check_survivors(survivors)
        self._agreed = survivors
        return sign(self._identity, survivors_statement(self.attempt, request.digest, survivors))

    def reveal(self, closing: Closing) -> Reveal:
        """Return this member's shares, once as many members as the threshold signed the same set.

        Raises:
            Refused: this member signed another set or none, or too few signatures are valid.
        """
        request = self._accepted()
        if self._agreed is None or self._agreed != closing.survivors:
            raise Refused(f"{self.name!r} did not agree to this set of clients for {self.attempt_text}")
        statement = survivors_statement(self.attempt, request.digest, closing.survivors)
        signed = [name for name, signature in closing.signatures.items() if name in closing.survivors
                  and is_signed(self.roster.entry(name).key, signature, statement)]
        if len(signed) < self.roster.threshold:
            raise Refused(f"{len(signed)} clients signed whose uploads are in the sum of {self.attempt_text}, and "
                          f"{self.roster.threshold} must")
        self._revealed = True
        alive = set(closing.survivors)
        return Reveal(self.name, seeds={name: self._shares[name][1] for name in self._shares if name in alive},
                      keys={name: self._shares[name][0] for name in self._shares if name not in alive})

    @property
    def revealed(self) -> bool:
        """Whether this member revealed its shares. If not, it did not help to open the sum."""
        return self._revealed

    @property
    def attempt_text(self) -> str:
        """The round and the attempt, for messages."""
        return f"attempt {self.attempt.attempt} at round {self.attempt.round}"

    def _accepted(self) -> CohortRequest:
        if self._request is None:
            raise Refused(f"no cohort was accepted for {self.attempt_text}")
        return self._request

    def _check_survivors(self, survivors: tuple[str, ...]) -> None:
        cohort = [keys.name for keys in self._accepted().cohort]
        if list(survivors) != [name for name in cohort if name in set(survivors)]:
            raise Refused("the survivors' names are not in order, one is there twice, or one is not of the cohort")
        if self.name not in survivors or not self._uploaded:
            raise Refused(f"{self.name!r} is asked to open a sum of {self.attempt_text} that it is not part of")
        if len(survivors) < self.roster.threshold:
            raise Refused(f"{len(survivors)} clients' uploads are in the sum, and a sum that this client helps to open "
                          f"must have {self.roster.threshold} at least")

    def _paired(self, keys: PublicKeys) -> bytes:
        try:
            return pair_mask_key(self._key, keys.mask_key, self.attempt)
        except ValueError:
            raise Refused(f"the mask key of {keys.name!r} is no usable X25519 key") from None

    def _sealed(self, recipient: str, plain: bytes) -> bytes:
        key = agreed(self._sealing, self.roster.entry(recipient).sealing_key, self._purpose(self.name, recipient))
        nonce = self._random(_NONCE_BYTES)
        return nonce + AESGCM(key).encrypt(nonce, plain, None)

    def _opened(self, sender: str, sealed: bytes) -> tuple[bytes, bytes]:
        key = agreed(self._sealing, self.roster.entry(sender).sealing_key, self._purpose(sender, self.name))
        try:
            plain = AESGCM(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], None)
        except (InvalidTag, ValueError):
            plain = b""
        if len(plain) != 2 * shamir.SHARE_BYTES:
            raise Unreadable(f"the shares that {sender!r} sealed for {self.name!r} cannot be opened for "
                             f"{self.attempt_text}: they are missing, changed, or of another attempt")
        return plain[:shamir.SHARE_BYTES], plain[shamir.SHARE_BYTES:]

    def _purpose(self, sender: str, recipient: str) -> bytes:
        return self.attempt.statement("shares", sender, recipient)


def own_mask_key(seed: bytes) -> bytes:
    """Return the key of a member's own mask, from its seed."""
    return digest("own mask", seed)


def pair_mask_key(key: X25519PrivateKey, other: bytes, attempt: Attempt) -> bytes:
    """Return the key of the mask that two members share."""
    return agreed(key, other, attempt.statement("pair mask"))
