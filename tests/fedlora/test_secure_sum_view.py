"""The view of a secure sum's server and of colluding members: it holds the sum of the honest vectors, and no more."""

from __future__ import annotations

import os
from collections.abc import Collection
from functools import cache
from itertools import combinations, pairwise
from typing import ClassVar

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from scipy import stats

from fedlora.secure_sum import collector, member, shamir
from fedlora.secure_sum.masks import agreed, mask, public_bytes
from fedlora.secure_sum.member import own_mask_key
from fedlora.secure_sum.roster import Roster
from fedlora.secure_sum.statements import digest, sign
from tests.fedlora.secure_sums import SENT, Sum, attendance, roster, seeded, vectors

COLLUDING, LATE = ("site-001", "site-004"), ("site-000", "site-005")
"""The most that a sum of 7 members bears: three honest survivors are left."""

colluding_and_late = pytest.mark.parametrize("colluding, late", [((), ()), (COLLUDING, ()), ((), LATE),
                                                                 (COLLUDING, LATE)])


def prepared(of: Roster, given: dict[str, np.ndarray]) -> Sum:
    """Return a sum of the given vectors. Its members draw the same random bytes whatever the vectors are."""
    total = Sum(of)
    total.vectors = given
    total.members = {name: attendance(of, name, random=seeded(name)) for name in of.members}
    return total


def finish(total: Sum, late: Collection[str]) -> None:
    """Open a sum. The late members' uploads reach the server too, but after it has closed the sum without them."""
    total.packages()
    total.requests()
    total.collect(set(late))
    total.close()
    total.reveal()
    np.testing.assert_array_equal(total.collector.opened(), total.expected())


# Masks

def without_known_masks(total: Sum, name: str, colluding: Collection[str]) -> np.ndarray:
    """Return an upload without the masks whose keys the server recovers or colluding members know."""
    held, values, dtype = total.collector.held, total.roster.values, total.roster.grid.dtype
    seeds, keys = total.collector._secrets(sorted(held.reveals)[:total.roster.threshold])
    keys |= {other: total.members[other]._key for other in colluding}
    left = total.uploads[name].copy()
    if name in seeds:
        left -= member.mask(member.own_mask_key(seeds[name]), values, dtype)
    for other in set(held.cohort) - {name}:
        if other in keys or name in keys:
            known, public = (other, name) if other in keys else (name, other)
            key = member.pair_mask_key(keys[known], held.packages[public].keys.mask_key, total.collector.attempt)
            pair = member.mask(key, values, dtype)
            left = left - pair if name < other else left + pair
    return left


def zero_vectors_opened(colluding: Collection[str], late: Collection[str]) -> tuple[Sum, dict[str, np.ndarray]]:
    """Return an opened sum of zero vectors, and each honest member's upload without the known masks."""
    of = roster(7, values=60_000, colluding=2)
    total = prepared(of, dict.fromkeys(of.members, np.zeros(of.values, np.int64)))
    finish(total, late)
    return total, {name: without_known_masks(total, name, colluding) for name in of.members if name not in colluding}


def are_uniform(uploads: Collection[np.ndarray]) -> bool:
    """Return whether the bytes of uploads, and of the difference of each two, are uniform by a chi-square test.

    Each test rejects uniform bytes with a probability of 2e-12.
    """
    counts = [np.bincount(vector.view(np.uint8), minlength=256)
              for vector in (*uploads, *(one - other for one, other in combinations(uploads, 2)))]
    return all(1e-12 < stats.chisquare(count).pvalue < 1 - 1e-12 for count in counts)


@colluding_and_late
def test_uploads_without_all_known_masks_are_uniform(colluding, late):
    total, left = zero_vectors_opened(colluding, late)
    assert are_uniform(total.uploads.values())
    assert are_uniform(left.values())
    assert not sum(left[name] for name in left if name not in late).any(), "a known mask is left"


@pytest.mark.parametrize("name, function", [
    ("pair_mask_key", lambda key, other, attempt: bytes(32)),
    ("own_mask_key", lambda seed: bytes(32)),
    ("mask", lambda key, count, dtype: np.zeros(count, dtype)),
])
def test_masks_that_hide_nothing_open_the_same_sum_but_leave_uploads_that_are_not_uniform(name, function, monkeypatch):
    for module in (member, collector):
        monkeypatch.setattr(module, name, function)
    _, left = zero_vectors_opened(COLLUDING, LATE)
    assert not are_uniform(left.values())


# The whole view

repeated_sign = cache(sign)
"""Gives the same statement the same signature, though ECDSA draws a random number, so that views can be compared."""


class ZeroSealing:
    """AES-GCM that encrypts zeros. The plain text reaches its recipient unseen."""

    unseen: ClassVar[dict[bytes, bytes]] = {}

    def __init__(self, key: bytes) -> None:
        self._real = AESGCM(key)

    def encrypt(self, nonce: bytes, plain: bytes, data: None) -> bytes:
        sealed = self._real.encrypt(nonce, bytes(len(plain)), data)
        self.unseen[sealed] = plain
        return sealed

    def decrypt(self, nonce: bytes, sealed: bytes, data: None) -> bytes:
        assert not any(self._real.decrypt(nonce, sealed, data))
        return self.unseen[sealed]


def independent_key(*public: bytes) -> bytes:
    """Return the key of two members in the ideal world, which has nothing to do with their private keys."""
    return digest("ideal", *sorted(public))


def ideal_view(total: Sum, colluding: Collection[str], late: Collection[str], moved: dict[object, np.ndarray],
               monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Return all that the server and colluding members see of a sum in an ideal world.

    Members and server are the real ones but for three replacements. To tell that they were made, one has to break
    X25519, HKDF, SHA-256 or AES:

    - Two honest members agree on an independent key where they would agree by X25519: to seal shares, and, if both
      survive, for their mask. With such a key zeros are sealed, and the mask is an independent uniform vector.
    - A late member's own mask is an independent uniform vector too.
    - Colluding members hold shares of zeros in place of the secrets behind these masks. Honest members' shares of them
      are new random bytes at each call, so two views in which one is seen differ.

    Args:
        total: the sum, not begun.
        colluding: members that tell the server all they know.
        late: honest members whose uploads come after the sum was closed.
        moved: pair of honest survivors, or late member → what is added to its uniform vector.
        monkeypatch: makes the replacements.
    """
    of, members = total.roster, total.members
    honest = [name for name in members if name not in colluding]
    alive = [name for name in honest if name not in late]
    hidden = {members[name]._key_seed for name in alive} | {members[name]._mask_seed for name in late}
    sealing = {independent_key(of.entry(one).sealing_key, of.entry(other).sealing_key)
               for one, other in combinations(honest, 2)}
    public = {name: public_bytes(members[name]._key) for name in alive}
    keys = {pair: independent_key(*(public[name] for name in pair)) for pair in combinations(alive, 2)}
    keys |= {name: own_mask_key(members[name]._mask_seed) for name in late}
    rng = np.random.default_rng(0)
    drawn = {key: rng.integers(1 << of.grid.ring_bits, size=of.values, dtype=of.grid.dtype) + moved.get(owner, 0)
             for owner, key in keys.items()}
    split = shamir.split

    def ideal_agreed(key: X25519PrivateKey, other: bytes, purpose: bytes) -> bytes:
        independent = independent_key(public_bytes(key), other)
        return independent if independent in sealing | drawn.keys() else agreed(key, other, purpose)

    def ideal_split(secret: bytes, *arguments: object) -> dict[int, bytes]:
        if secret not in hidden:
            return split(secret, *arguments)
        return split(bytes(len(secret)), *arguments) | {of.numbers[name]: os.urandom(shamir.SHARE_BYTES)
                                                        for name in honest}

    with monkeypatch.context() as patch:
        patch.setattr(member, "sign", repeated_sign)
        patch.setattr(member, "agreed", ideal_agreed)
        patch.setattr(member, "AESGCM", lambda key: ZeroSealing(key) if key in sealing else AESGCM(key))
        patch.setattr(member, "mask", lambda key, *shape: drawn[key] if key in drawn else mask(key, *shape))
        patch.setattr(shamir, "split", ideal_split)
        finish(total, late)
    held, uploads = total.collector.held, {name: vector.tobytes() for name, vector in total.uploads.items()}
    told = [(members[name]._shares, members[name]._pairs, total.vectors[name].tobytes()) for name in colluding]
    view = repr((of, held.packages, total.collector.form_cohort(SENT), uploads, held.survivors, held.signatures,
                 total.collector.closing(), held.reveals, total.collector.opened().tobytes(), told))
    assert not any(repr(key) in view for key in drawn)
    return view.encode()


@colluding_and_late
def test_the_view_depends_on_the_honest_vectors_through_their_sum_alone(colluding, late, monkeypatch):
    """Sets of honest vectors with the same sum give the same view, once the difference is added to uniform masks.

    The masks stay uniform, so both sets give any view with the same probability. Late members' vectors are in no sum.
    """
    of = roster(7, colluding=2)
    alive = [name for name in of.members if name not in {*colluding, *late}]
    ones, others = vectors(of, seed=1), vectors(of, seed=2)
    others |= {name: ones[name] for name in colluding}
    others[alive[-1]] += sum(ones[name] - others[name] for name in alive)
    differences = {name: of.grid.wrapped(ones[name] - others[name]) for name in of.members}
    assert all(difference.any() == (name not in colluding) for name, difference in differences.items())

    # each survivor adds the mask that it shares with the next, and the next one subtracts it
    sums = np.cumsum([differences[name] for name in alive[:-1]], axis=0, dtype=of.grid.dtype)
    moved = dict(zip(pairwise(alive), sums, strict=True)) | {name: differences[name] for name in late}

    view = ideal_view(prepared(of, ones), colluding, late, {}, monkeypatch)
    assert view == ideal_view(prepared(of, others), colluding, late, moved, monkeypatch)
    others[alive[0]][0] += 1
    assert view != ideal_view(prepared(of, others), colluding, late, moved, monkeypatch)
