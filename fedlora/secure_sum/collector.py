"""The server's part in a secure sum: it forms the cohort, adds up masked uploads, and opens the sum.

A collector is for one attempt. What it must not lose over a restart are the packages, the sum of the uploads with
their names, and the closed set: `Collected` holds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedlora.secure_sum import shamir
from fedlora.secure_sum.masks import is_usable, mask, private_key, public_bytes
from fedlora.secure_sum.member import own_mask_key, pair_mask_key
from fedlora.secure_sum.packages import (
    Closing,
    CohortRequest,
    KeyPackage,
    PublicKeys,
    Reveal,
    survivors_statement,
)
from fedlora.secure_sum.roster import Roster
from fedlora.secure_sum.statements import Attempt, Refused, digest, is_signed


@dataclass
class Collected:
    """What the server holds of one attempt. None of it tells more than the sum.

    Attributes:
        packages: member → its key package.
        sent: digest of the tensors that the round starts from; set when the cohort is formed.
        cohort: who is in; empty before the cohort is formed.
        total: (values,) sum of the masked uploads in the ring; None before the first.
        uploaded: whose uploads are in the sum.
        survivors: whose uploads the closed sum holds; empty while uploads are still taken.
        signatures: survivor → its signature of the closed set.
        reveals: survivor → what it revealed.
    """

    packages: dict[str, KeyPackage] = field(default_factory=dict)
    sent: bytes = b""
    cohort: tuple[str, ...] = ()
    total: np.ndarray | None = None
    uploaded: set[str] = field(default_factory=set)
    survivors: tuple[str, ...] = ()
    signatures: dict[str, bytes] = field(default_factory=dict)
    reveals: dict[str, Reveal] = field(default_factory=dict)


class Collector:
    """The server's part in one attempt at one round.

    Args:
        roster: the roster.
        round: number of the round, from 1.
        attempt: number of the attempt at it, from 0.
        values: number of values in a vector of this round; None for the roster's.
        held: what was collected before a restart; None for a new attempt.

    Attributes:
        doubted: the member whose revealed shares are false, once a sum was opened without them; else None.

    Raises:
        ValueError: the round's vectors have more values than the roster's.
    """

    def __init__(self, roster: Roster, *, round: int, attempt: int, values: int | None = None,
                 held: Collected | None = None) -> None:
        self.roster, self.held = roster, held or Collected()
        self.doubted: str | None = None
        self.values = roster.values if values is None else values
        if self.values > roster.values:
            raise ValueError(f"the round's vectors have {self.values} values, and the roster's {roster.values} at most")
        self.attempt = Attempt(roster.run, roster.digest, round, attempt)

    def add_package(self, package: KeyPackage) -> None:
        """Take a member's key package.

        Raises:
            Refused: it is not signed by the member for this attempt, its mask key cannot be used, shares are missing,
                another package of the member is held, or the cohort is formed already.
        """
        keys, held = package.keys, self.held
        if not is_signed(self.roster.entry(keys.name).key, keys.signature, keys.statement(self.attempt)):
            raise Refused(f"the key package of {keys.name!r} is not signed for this round and attempt")
        if not is_usable(keys.mask_key):
            raise Refused(f"the mask key of {keys.name!r} is no usable X25519 key")
        if set(package.sealed) != set(self.roster.members) - {keys.name}:
            raise Refused(f"the key package of {keys.name!r} does not hold shares for each other member")
        if held.cohort:
            raise Refused(f"the key package of {keys.name!r} came after the cohort was formed; it waits for another")
        if held.packages.get(keys.name, package) != package:
            raise Refused(f"{keys.name!r} gave a second key package for the same attempt")
        held.packages[keys.name] = package

    def form_cohort(self, sent: bytes) -> dict[str, CohortRequest]:
        """Close the cohort to all who gave a package, and return what each of them is sent.

        Args:
            sent: digest of the tensors that the round starts from.

        Raises:
            Refused: there are fewer than the threshold.
        """
        held = self.held
        if not held.cohort:
            if len(held.packages) < self.roster.threshold:
                raise Refused(f"{len(held.packages)} clients are ready for a sum, and its threshold is "
                              f"{self.roster.threshold} of {len(self.roster.entries)}")
            held.cohort, held.sent = tuple(sorted(held.packages)), sent
        return {name: CohortRequest(self._keys, {other: held.packages[other].sealed[name] for other in held.cohort
                                                 if other != name}, held.sent) for name in held.cohort}

    def add_upload(self, name: str, vector: np.ndarray) -> None:
        """Add a masked vector to the sum.

        Raises:
            Refused: the client is not of the cohort, its vector is not one of the ring, or the sum is closed. An upload
                that came already is not added again.
        """
        held, grid = self.held, self.roster.grid
        if name not in held.cohort:
            raise Refused(f"{name!r} is not in the cohort of this sum")
        if vector.shape != (self.values,) or vector.dtype != grid.dtype:
            raise Refused(f"the upload of {name!r} is {vector.dtype} of shape {vector.shape}; it must be {grid.dtype} "
                          f"of shape ({self.values},)")
        if name in held.uploaded:
            return
        if held.survivors:
            raise Refused(f"the upload of {name!r} came after the sum was closed")
        held.total = vector.copy() if held.total is None else held.total + vector
        held.uploaded.add(name)

    def close(self) -> tuple[str, ...]:
        """Close the sum to those whose uploads are in it, and return their names, which each of them signs.

        Raises:
            Refused: there are fewer than the threshold; the attempt is over, and its charges stand.
        """
        if not self.held.survivors:
            if len(self.held.uploaded) < self.roster.threshold:
                raise Refused(f"{len(self.held.uploaded)} uploads are in the sum, and {self.roster.threshold} must be; "
                              "it cannot be opened")
            self.held.survivors = tuple(sorted(self.held.uploaded))
        return self.held.survivors

    def add_signature(self, name: str, signature: bytes) -> None:
        """Take a survivor's signature of the closed set.

        Raises:
            Refused: it is not a survivor's, or not of this set.
        """
        statement = survivors_statement(self.attempt, self._cohort_digest, self.held.survivors)
        if name not in self.held.survivors or not is_signed(self.roster.entry(name).key, signature, statement):
            raise Refused(f"the signature of {name!r} is not of the clients whose uploads are in the sum")
        self.held.signatures[name] = signature

    def closing(self) -> Closing | None:
        """Return the agreement that is sent to the survivors; None while too few have signed."""
        if len(self.held.signatures) < self.roster.threshold:
            return None
        return Closing(self.held.survivors, dict(self.held.signatures))

    def add_reveal(self, reveal: Reveal) -> None:
        """Take the shares that a survivor reveals.

        Raises:
            Refused: it is not a survivor's, or not exactly the shares of this closing.
        """
        alive = set(self.held.survivors)
        if reveal.name not in alive or set(reveal.seeds) != alive or set(reveal.keys) != set(self.held.cohort) - alive:
            raise Refused(f"the shares that {reveal.name!r} revealed are not those of this sum")
        self.held.reveals[reveal.name] = reveal

    def opened(self) -> np.ndarray | None:
        """Return the sum of the survivors' vectors, (values,) int64; None while too few have revealed their shares.

        Where more than the threshold revealed theirs, a single member with false ones does no harm, and is `doubted`.

        Raises:
            Refused: the shares do not give the secrets whose digests the packages hold: members revealed false ones.
        """
        names, threshold = sorted(self.held.reveals), self.roster.threshold
        if len(names) < threshold or self.held.total is None:
            return None
        failed: Refused | None = None
        for left_out in (None, *names[:threshold]) if len(names) > threshold else (None,):
            try:
                seeds, keys = self._secrets([name for name in names if name != left_out][:threshold])
            except Refused as refused:
                failed = failed or refused
                continue
            self.doubted = left_out
            return self._unmasked(self.held.total, seeds, keys)
        assert failed is not None
        raise failed

    def _secrets(self, chosen: Sequence[str]) -> tuple[dict[str, bytes], dict[str, X25519PrivateKey]]:
        """Return the seed of each survivor's own mask, and the key of each dropped member, from these members' shares.

        Raises:
            Refused: they do not fit what the packages say of the secrets.
        """
        held, factors = self.held, shamir.coefficients([self.roster.numbers[name] for name in chosen])
        seeds, keys = {}, {}
        for survivor in held.survivors:
            seeds[survivor] = self._recovered({name: held.reveals[name].seeds[survivor] for name in chosen}, factors)
            if digest(seeds[survivor]) != held.packages[survivor].keys.seed_digest:
                raise Refused(f"the revealed shares do not give the mask of {survivor!r}; a member revealed false ones")
        for dropped in set(held.cohort) - set(held.survivors):
            keys[dropped] = private_key(self._recovered({name: held.reveals[name].keys[dropped] for name in chosen},
                                                        factors))
            if public_bytes(keys[dropped]) != held.packages[dropped].keys.mask_key:
                raise Refused(f"the revealed shares do not give the key of {dropped!r}; a member revealed false ones")
        return seeds, keys

    def _unmasked(self, masked: np.ndarray, seeds: Mapping[str, bytes],
                  keys: Mapping[str, X25519PrivateKey]) -> np.ndarray:
        """Return the sum without the survivors' own masks and without those that they share with dropped members."""
        total, dtype = masked.copy(), self.roster.grid.dtype
        for seed in seeds.values():
            total -= mask(own_mask_key(seed), len(total), dtype)
        for dropped, key in keys.items():
            for survivor in seeds:
                shared = pair_mask_key(key, self.held.packages[survivor].keys.mask_key, self.attempt)
                pair = mask(shared, len(total), dtype)
                total = total - pair if survivor < dropped else total + pair
        return self.roster.grid.signed(total)

    def _recovered(self, shares: Mapping[str, bytes], factors: Mapping[int, int]) -> bytes:
        try:
            return shamir.combine({self.roster.numbers[name]: share for name, share in shares.items()}, factors)
        except ValueError as error:
            raise Refused(f"a secret cannot be recovered: {error}") from error

    @property
    def _keys(self) -> tuple[PublicKeys, ...]:
        return tuple(self.held.packages[name].keys for name in self.held.cohort)

    @property
    def _cohort_digest(self) -> bytes:
        return CohortRequest(self._keys, {}, self.held.sent).digest
