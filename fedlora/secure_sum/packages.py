"""Messages of a secure sum: what goes from a member to the server, and from the server to the members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedlora.secure_sum.statements import Attempt, digest

SUM = "sum"
"""Name of the one tensor of an upload for a secure sum."""


@dataclass(frozen=True)
class PublicKeys:
    """What everybody may know of a member's key package for one attempt.

    Attributes:
        name: the member.
        mask_key: its fresh X25519 public key, from which pairwise masks come.
        seed_digest: SHA-256 of the seed of its own mask, so that a recovered seed can be checked.
        signature: by its certificate's key, of the attempt and the two.
    """

    name: str
    mask_key: bytes
    seed_digest: bytes
    signature: bytes

    def statement(self, attempt: Attempt) -> bytes:
        """Return what the signature is of."""
        return attempt.statement("package", self.name, self.mask_key, self.seed_digest)


@dataclass(frozen=True)
class KeyPackage:
    """A member's key package for one attempt: its public keys, and for each member sealed shares of their secrets.

    Attributes:
        keys: the public part.
        sealed: name of each other member → its shares of the secrets behind the two keys, which it alone can open.
    """

    keys: PublicKeys
    sealed: Mapping[str, bytes]


@dataclass(frozen=True)
class CohortRequest:
    """What the server sends to each member of a cohort.

    Attributes:
        cohort: the public keys of all who gave a package for this attempt, in order of their names.
        sealed: name of each other member of the cohort → the shares of its secrets, sealed for the recipient.
        sent: digest of the tensors that the round starts from.
    """

    cohort: tuple[PublicKeys, ...]
    sealed: Mapping[str, bytes]
    sent: bytes

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the cohort and of the tensors that it starts from."""
        return cohort_digest(self.cohort, self.sent)


def cohort_digest(cohort: Sequence[PublicKeys], sent: bytes) -> bytes:
    """Return the SHA-256 of a cohort's public keys and of the digest of the tensors that it starts from."""
    return digest("cohort", *(part for keys in cohort for part in (keys.name, keys.mask_key, keys.seed_digest)), sent)


def sent_digest(trained_sha256: str, frozen_sha256: str) -> bytes:
    """Return the digest of the tensors that a round starts from, by which a cohort names them.

    Args:
        trained_sha256: `fedlora.wire.tensors_digest` of the trained tensors, as they are sent.
        frozen_sha256: that of the frozen ones, as in the order (`fedlora.plan.RoundPlan`).
    """
    return digest("sent", trained_sha256, frozen_sha256)


def survivors_statement(attempt: Attempt, cohort: bytes, survivors: Sequence[str]) -> bytes:
    """Return what each survivor signs: whose uploads are in the sum.

    Args:
        attempt: the attempt.
        cohort: the cohort's digest.
        survivors: names, in order.
    """
    return attempt.statement("survivors", cohort, *survivors)


@dataclass(frozen=True)
class Closing:
    """The agreement on whose uploads are in the sum.

    Attributes:
        survivors: names, in order.
        signatures: name of a survivor → its signature of `survivors_statement`; of as many as the threshold at least.
    """

    survivors: tuple[str, ...]
    signatures: Mapping[str, bytes]


@dataclass(frozen=True)
class Reveal:
    """The shares that one survivor reveals: of each survivor the mask's seed, of each other member the private key.

    Attributes:
        name: who reveals.
        seeds: survivor → share of the seed of its own mask.
        keys: member that dropped out → share of the seed of its mask key.
    """

    name: str
    seeds: Mapping[str, bytes]
    keys: Mapping[str, bytes]
