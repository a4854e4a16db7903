"""The roster: who takes part in a run's secure sums, and the numbers that all of them hold each other to.

The server proposes it. Each member checks every entry before it makes a key package: a coordinator that runs the
certificate authority could otherwise invent members, and open a sum to which one real client contributed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import cached_property

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

from fedlora.identity.certificates import Certificate, comes_from, key_of, parse_certificate
from fedlora.plan import RunPlan, plan_digest
from fedlora.plan.limits import LEAST_MEMBERS, MOST_MEMBERS, sum_threshold
from fedlora.secure_sum.integers import Grid
from fedlora.secure_sum.masks import is_usable
from fedlora.secure_sum.statements import Refused, digest, is_signed, sign


@dataclass(frozen=True)
class Entry:
    """One member of a roster.

    Attributes:
        name: the common name of its certificate.
        certificate: its certificate and those of intermediate authorities, in PEM.
        sealing_key: its X25519 public key, under which shares are sealed for it in this run.
        signature: by the certificate's key, of the run, the name and the sealing key.
    """

    name: str
    certificate: bytes
    sealing_key: bytes
    signature: bytes

    @classmethod
    def signed(cls, name: str, certificate: bytes, sealing_key: bytes, run: bytes,
               key: EllipticCurvePrivateKey) -> Entry:
        """Return the entry that the owner of a certificate makes for a run."""
        return cls(name, certificate, sealing_key, sign(key, _statement(run, name, sealing_key)))

    @cached_property
    def key(self) -> EllipticCurvePublicKey:
        """The certificate's public key.

        Raises:
            Refused: the certificate is damaged, or its key is not ECDSA on P-256.
        """
        try:
            key = key_of(x509.load_pem_x509_certificate(self.certificate))
        except ValueError:
            key = None
        if key is None:
            raise Refused(f"the roster's certificate of {self.name!r} is damaged or its key is not ECDSA on P-256")
        return key

    def is_signed_for(self, run: bytes) -> bool:
        """Return whether the certificate's key has signed this entry for a run (its `run_digest`).

        Raises:
            Refused: the certificate is damaged, or its key is not ECDSA on P-256.
        """
        return is_signed(self.key, self.signature, _statement(run, self.name, self.sealing_key))

    def check(self, run: bytes, authority: bytes, now: datetime) -> Certificate:
        """Check the entry, as members and the server do, and return what its certificate says.

        Args:
            run: digest of the run (`run_digest`).
            authority: certificates of the trusted authority, in PEM.
            now: the time at which the certificate must be valid.

        Raises:
            Refused: the certificate is damaged, out of its time, another name's or not the authority's; or the sealing
                key cannot be used, or is not signed by the certificate's key for this run.
        """
        said = _certificate_of(self, authority)
        if invalid := said.why_invalid(now):
            raise Refused(invalid)
        if not is_usable(self.sealing_key):
            raise Refused(f"the roster's sealing key of {self.name!r} is no usable X25519 key")
        if not self.is_signed_for(run):
            raise Refused(f"the roster's entry of {self.name!r} is not signed by its certificate's key for this run")
        return said


def run_digest(plan: RunPlan) -> bytes:
    """Return the digest of a run's id, plan and model, by which a roster and all statements name the run.

    It is the same before and after the label set is fixed.
    """
    return digest("run", plan.run_id, plan_digest(plan.with_open_labels()))


def _statement(run: bytes, name: str, sealing_key: bytes) -> bytes:
    return digest("fedlora secure sum 1 entry", run, name, sealing_key)


@dataclass(frozen=True)
class Roster:
    """The members of a run's sums, and what they agree on.

    Attributes:
        run: digest of the run's id, its plan and its model.
        entries: the members, in order of their names.
        colluding: t, how many of them may tell the server all they know, without a sum's noise becoming less than
            stated.
        grid: the integers.
        values: the most values in a vector; a round that trains a part of the tensors has fewer.
        noise: least standard deviation, in units of the grid, of the noise that each member adds before it rounds.
    """

    run: bytes
    entries: tuple[Entry, ...]
    colluding: int
    grid: Grid
    values: int
    noise: float

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.entries]
        if names != sorted(set(names)):
            raise Refused("the roster's names are not in order, or one is there twice")
        if not LEAST_MEMBERS <= len(names) <= MOST_MEMBERS:
            raise Refused(f"the roster has {len(names)} members; secure aggregation takes {LEAST_MEMBERS} to "
                          f"{MOST_MEMBERS}")
        if not 0 <= self.colluding <= len(names) - self.threshold:
            raise Refused(f"the roster allows for {self.colluding} colluding members; with {len(names)} members it can "
                          f"be at most {len(names) - self.threshold}")

    @property
    def threshold(self) -> int:
        """T = ⌊2n/3⌋ + 1, the fewest members whose vectors a sum may hold and who can open it."""
        return sum_threshold(len(self.entries))

    @property
    def honest(self) -> int:
        """The fewest shares of noise by honest members in a sum that can be opened, h = T − t."""
        return self.threshold - self.colluding

    @cached_property
    def members(self) -> dict[str, Entry]:
        """Name → entry."""
        return {entry.name: entry for entry in self.entries}

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Name → the member's number in secret sharing, from 1."""
        return {entry.name: number for number, entry in enumerate(self.entries, start=1)}

    @cached_property
    def digest(self) -> bytes:
        """The SHA-256 of all that the roster says."""
        parts = [part for entry in self.entries for part in (entry.name, entry.certificate, entry.sealing_key)]
        grid = [repr(getattr(self.grid, field.name)) for field in fields(self.grid)]
        return digest("roster", self.run, len(self.entries), *parts, self.colluding, *grid, self.values,
                      repr(self.noise))

    def entry(self, name: str) -> Entry:
        """Return a member's entry.

        Raises:
            Refused: nobody of this name is a member.
        """
        if name not in self.members:
            raise Refused(f"{name!r} is not a member of the roster")
        return self.members[name]

    def check(self, own: Entry, authority: bytes, now: datetime, *, pins: Collection[str] | None = None,
              least: int = LEAST_MEMBERS) -> None:
        """Check the roster as a member does before it takes part.

        Args:
            own: the entry that this member sent.
            authority: certificates of the authority that it trusts, in PEM.
            now: the time at which certificates must be valid.
            pins: fingerprints of the keys that may be members; None if the owner named none.
            least: the fewest members that the owner's policy takes part with.

        Raises:
            Refused: an entry is invalid, unknown to the authority or not pinned, two entries have the same key, the own
                entry was changed, or the roster is too small.
        """
        if len(self.entries) < least:
            raise Refused(f"the roster has {len(self.entries)} members, and this site's policy takes part with {least} "
                          "or more")
        if self.members.get(own.name) != own:
            raise Refused(f"the roster does not hold the entry of {own.name!r} as this site sent it")
        holders: dict[str, str] = {}  # fingerprint → the member that holds the key
        for entry in self.entries:
            key = entry.check(self.run, authority, now).fingerprint
            if pins is not None and key not in pins:
                raise Refused(f"{entry.name!r} is in the roster and is none of the members that this site's policy "
                              f"names; its fingerprint is {key}")
            if (other := holders.setdefault(key, entry.name)) != entry.name:
                raise Refused(f"{other!r} and {entry.name!r} are in the roster with the same key, and so are one "
                              "member; each needs a key of its own (fedlora-client enroll)")

    def check_numbers(self, plan: RunPlan, deviation: float) -> None:
        """Check the numbers of the roster against the plan and against this member's own noise.

        Args:
            plan: the run's plan.
            deviation: standard deviation of the noise that this member adds to a whole vector, in units of the grid.

        Raises:
            Refused: a number is not the plan's, this member adds less noise than the roster promises, or the sum could
                overflow with the noise that it adds.
        """
        if len(self.entries) < plan.least_members or self.colluding != plan.colluding:
            raise Refused(f"the roster has {len(self.entries)} members of whom {self.colluding} may collude; by the "
                          f"plan it must have {plan.least_members} or more, of whom {plan.colluding} may")
        own = deviation * self.grid.step / plan.clip_norm
        try:
            fitting = Grid.fitting(self.values, clip_norm=plan.clip_norm, expected_batch=plan.expected_batch,
                                   members=len(self.entries), noise=own)
        except ValueError as error:
            raise Refused(f"an overflow can be foreseen: {error}") from None
        if replace(fitting, ring_bits=self.grid.ring_bits) != self.grid:
            raise Refused(f"the roster's grid is {self.grid}; for {self.values} values of this plan it must be "
                          f"{fitting}")
        if fitting.ring_bits > self.grid.ring_bits:
            raise Refused(f"an overflow can be foreseen: {len(self.entries)} members whose noise is as large as this "
                          f"one's, {own:.4g} clip norms, can exceed the {self.grid.ring_bits} bits of the roster's "
                          "integers. Let the coordinator know this noise: announce-size = true in policy.toml")
        if deviation < self.noise:
            raise Refused(f"the roster promises noise of {self.noise:.6g} units of the grid by each member, and this "
                          f"one adds {deviation:.6g}")


def _certificate_of(entry: Entry, authority: bytes) -> Certificate:
    """Return what an entry's certificate says, once it is known to be its own and the authority's."""
    try:
        said = parse_certificate(entry.certificate)
        known = comes_from(entry.certificate, authority)
    except ValueError as error:
        raise Refused(f"the roster's certificate of {entry.name!r} is not valid: {error}") from error
    if said.name != entry.name:
        raise Refused(f"the roster's certificate of {entry.name!r} is that of {said.name!r}")
    if not known:
        raise Refused(f"the roster's certificate of {entry.name!r} does not come from the authority that this site "
                      "trusts")
    return said
