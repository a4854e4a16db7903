"""Messages of secure sums come back as they were, and none makes the other side hold more than a roster needs."""

from __future__ import annotations

import dataclasses

import pytest

from fedlora.plan.limits import MOST_MEMBERS
from fedlora.secure_sum.packages import Closing, CohortRequest, KeyPackage, PublicKeys, Reveal
from fedlora.secure_sum.roster import Entry
from fedlora.secure_sum.statements import Refused
from fedlora.wire import MAX_FRAME_BYTES, WireError, pb
from fedlora.wire.sums import (
    LONGEST_CERTIFICATE,
    LONGEST_PART,
    closing_from_wire,
    closing_to_wire,
    cohort_from_wire,
    cohort_to_wire,
    membership_from_wire,
    membership_to_wire,
    package_from_wire,
    package_to_wire,
    reveal_from_wire,
    reveal_to_wire,
    roster_from_wire,
    roster_to_wire,
    survivors_from_wire,
)
from tests.fedlora.secure_sums import RUN, SENT, Sum, roster

KEY = pb.Key(round=3, attempt=1)


@pytest.fixture(scope="module")
def messages():
    """Return every message of one sum of four members, in which one drops out, as sent and as it comes back."""
    total = Sum(roster(4))
    package = total.members["site-000"].offer()
    total.packages()
    cohort = total.collector.form_cohort(SENT)["site-000"]
    total.requests()
    total.collect({"site-003"})
    total.close()
    closing = total.collector.closing()
    reveal = total.members["site-000"].reveal(closing)
    return {
        "roster": (total.roster, roster_to_wire(total.roster), lambda message: roster_from_wire(message, RUN)),
        "membership": ((total.roster.entries[0], 1.5), membership_to_wire(total.roster.entries[0], 1.5),
                       lambda message: membership_from_wire(message, "site-000")),
        "package": (package, package_to_wire(package, KEY), package_from_wire),
        "cohort": (cohort, cohort_to_wire(cohort), cohort_from_wire),
        "closing": (closing, closing_to_wire(closing, KEY), closing_from_wire),
        "reveal": (reveal, reveal_to_wire(reveal, KEY), lambda message: reveal_from_wire(message, "site-000"))}


KINDS = ("roster", "membership", "package", "cohort", "closing", "reveal")


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_comes_back_as_it_was(messages, kind):
    value, message, read = messages[kind]
    again = type(message).FromString(message.SerializeToString())
    assert read(again) == value
    if kind in ("package", "closing", "reveal"):
        assert again.key == KEY


def test_a_roster_of_the_most_members_with_the_longest_certificates_is_one_frame_and_so_is_each_other_message():
    names = [f"{number:03}".ljust(64, "x") for number in range(MOST_MEMBERS)]
    entries = tuple(Entry(name, b"c" * LONGEST_CERTIFICATE, b"k" * 32, b"s" * 72) for name in names)
    of = dataclasses.replace(roster(4), entries=entries)
    keys = tuple(PublicKeys(name, b"k" * 32, b"d" * 32, b"s" * 72) for name in names)
    parts = dict.fromkeys(names, b"p" * 92)  # sealed shares: a nonce, two shares and a tag
    for request in (pb.SumRequest(roster=roster_to_wire(of)),
                    pb.SumRequest(closing=closing_to_wire(Closing(tuple(names), parts), KEY))):
        frame = pb.ServerFrame(sum=request)
        assert frame.ByteSize() < MAX_FRAME_BYTES
    assert pb.ServerFrame(request=pb.TrainRequest(cohort=cohort_to_wire(
        CohortRequest(keys, parts, b"d" * 32)))).ByteSize() < 100_000
    for answer in (pb.SumAnswer(package=package_to_wire(KeyPackage(keys[0], parts), KEY)),
                   pb.SumAnswer(reveal=reveal_to_wire(Reveal(names[0], parts, {}), KEY))):
        assert pb.ClientFrame(sum=answer).ByteSize() < 50_000


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_that_is_too_long_or_missing_is_refused(messages, kind):
    _, message, read = messages[kind]
    for size in (0, LONGEST_CERTIFICATE + 1 if kind in ("roster", "membership") else LONGEST_PART + 1):
        changed = type(message)()
        changed.CopyFrom(message)
        if kind in ("roster", "membership"):
            (changed.entries[0] if kind == "roster" else changed).certificate = bytes(size)
        elif kind == "package":
            changed.keys.mask_key = bytes(size)
        elif kind == "cohort":
            changed.sent = bytes(size)
        else:
            (changed.signatures if kind == "closing" else changed.seeds)[0].content = bytes(size)
        with pytest.raises(WireError, match="bytes"):
            read(changed)


MANY = [f"{number:03}" for number in range(MOST_MEMBERS + 1)]


@pytest.mark.parametrize(("read", "message"), [
    (lambda message: roster_from_wire(message, RUN), pb.Roster(entries=[pb.Entry(name=name) for name in MANY])),
    (package_from_wire, pb.KeyPackage(keys=pb.PublicKeys(name="a", mask_key=b"k", seed_digest=b"d", signature=b"s"),
                                      sealed=[pb.ForMember(name=name, content=b"x") for name in MANY])),
    (cohort_from_wire, pb.Cohort(keys=[pb.PublicKeys(name=name) for name in MANY])),
    (closing_from_wire, pb.Closing(names=MANY)), (survivors_from_wire, MANY),
    (lambda message: reveal_from_wire(message, "a"),
     pb.Reveal(seeds=[pb.ForMember(name=name, content=b"x") for name in MANY]))], ids=range(6))
def test_more_members_than_a_roster_can_have_are_refused(read, message):
    with pytest.raises(WireError, match=f"more than {MOST_MEMBERS}"):
        read(message)


@pytest.mark.parametrize("name", ["", "\x1b[2J", " a", "x" * 65])
def test_a_name_that_no_client_can_have_is_refused(messages, name):
    _, message, read = messages["cohort"]
    changed = pb.Cohort.FromString(message.SerializeToString())
    changed.keys[1].name = name
    with pytest.raises(WireError, match="name") as error:
        read(changed)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("changes", [
    {"clip_norm": float("nan")}, {"clip_norm": 0.0}, {"clip_norm": 5e-324}, {"clip_norm": 1e300},
    {"fraction_bits": -1}, {"fraction_bits": 53}, {"ring_bits": 33},
    {"most": 0}, {"values": 0}, {"noise": float("inf")}, {"noise": 0.0}], ids=str)
def test_numbers_of_a_roster_that_are_out_of_range_are_refused(messages, changes):
    _, message, read = messages["roster"]
    changed = pb.Roster.FromString(message.SerializeToString())
    for name, value in changes.items():
        setattr(changed, name, value)
    with pytest.raises(WireError, match="out of range"):
        read(changed)


@pytest.mark.parametrize("noise", [-1.0, float("nan"), float("inf")])
def test_a_members_noise_is_finite_and_not_negative(messages, noise):
    _, message, read = messages["membership"]
    changed = pb.Membership.FromString(message.SerializeToString())
    changed.noise = noise
    with pytest.raises(WireError, match="noise"):
        read(changed)


def test_what_cannot_be_a_roster_is_refused_by_name(messages):
    _, message, read = messages["roster"]
    for change, said in ((lambda changed: changed.entries.reverse(), "not in order"),
                         (lambda changed: changed.entries.MergeFrom(changed.entries[3:]), "there twice"),
                         (lambda changed: setattr(changed, "colluding", 2), "colluding")):
        changed = pb.Roster.FromString(message.SerializeToString())
        change(changed)
        with pytest.raises(Refused, match=said):
            read(changed)
