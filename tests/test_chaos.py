"""A sample of `tests.chaos`, and proof that its score is red where something is wrong."""

from dataclasses import replace
from signal import SIGKILL

import pytest

from tests.chaos import tested
from tests.chaos.__main__ import Campaign
from tests.chaos.cases import KINDS, QUIET, SETTINGS, at, cases
from tests.chaos.faults import Signal
from tests.chaos.observed import EVERYONE
from tests.chaos.score import score
from tests.kills import found

SAMPLE = ("each client is killed, one in each round",
          "all links are cut for 3 s while an upload comes (at the server)",
          "the disk of the server is full for 3 s before a round's checkpoint")


def test_the_cases_are_many_and_each_has_its_own_name():
    every = cases()
    assert len(every) >= 80 and len({case.name for case in every}) == len(every)
    assert {case.kind for case in every} == set(KINDS) and {case.setting for case in every} == set(SETTINGS)


@pytest.mark.parametrize("point", sorted({step.point for case in cases() for step in case.steps if step.point}))
def test_every_moment_of_a_case_is_a_function_that_is_there(point):
    owner, name = found(tested.place_of(point)[0])
    assert callable(getattr(owner, name))


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    return Campaign(tmp_path_factory.mktemp("chaos"))


NEVER = replace(QUIET["plain"], steps=(at("north", "while sending", Signal(("north",), SIGKILL), times=99),))


@pytest.fixture(scope="module")
def judged(campaign):
    """Return the score of a run whose only fault has a moment that never comes, so that nothing happens to it."""
    return campaign.run(NEVER)


@pytest.fixture(scope="module")
def quiet(campaign, judged):
    """Return the outcome of that run, as of one to which nothing was to happen."""
    return replace(campaign.quiet["plain"], missed=[])


def test_a_fault_whose_moment_never_comes_is_no_success(judged):
    assert judged.wrong == ("north never came to the point 'while sending'",)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_federation_outlives_a_fault_with_the_same_adapter_and_a_ledger_that_lacks_nothing(campaign, quiet, name):
    [case] = [case for case in cases() if case.name == name]
    if why := case.why_skipped:
        pytest.skip(why)
    campaign.quiet[case.setting] = quiet
    outlived = campaign.run(case)
    assert outlived.passed, outlived.wrong


WRONG = {
    "another adapter": ({"adapter": b"x"}, "another than that of a run with the same updates"),
    "no adapter": ({"adapter": b""}, "there is no adapter"),
    "a ledger that has forgotten a charge": ({"charges": {"north": 2, "south": 3, "east": 3}}, "its ledger charges 2"),
    "an update that no ledger knows": ({"left": frozenset({"0" * 64})}, "1 updates left that no ledger records"),
    "a round without a client": ({"rounds": {1: ("east", "north"), 2: EVERYONE[1:], 3: EVERYONE[1:]}},
                                 "a round closed without south"),
    "a lost round": ({"rounds": {1: EVERYONE[1:], 3: EVERYONE[1:]}}, "the rounds are"),
    "a run that does not end": ({"in_time": False}, "not at its end within"),
    "a file left behind": ({"files": frozenset({"server/run/checkpoint.safetensors.new"})}, "left behind"),
    "a traceback": ({"logs": {"north": "Traceback (most recent call last)"}}, "a traceback in the log of north"),
    "a leak": ({"most": dict.fromkeys(EVERYONE, (900, 900))}, "900 descriptors"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_score_is_red_where_something_is_wrong(quiet, wrong):
    changes, says = WRONG[wrong]
    case = QUIET["plain"]
    assert not score(case, quiet, quiet, quiet).wrong
    assert says in "; ".join(score(case, replace(quiet, **changes), quiet, quiet).wrong)
