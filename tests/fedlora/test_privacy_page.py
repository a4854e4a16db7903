"""Tests of privacy.md for the one who signs it: an attacker's success, the owner's words, the terms, the hazards."""

import re
from dataclasses import replace

import pytest

from fedlora.privacy import About
from fedlora.privacy.about import KEYS
from fedlora.privacy.accounting import Spend
from fedlora.privacy.report import LifetimeCharge, markdown, sign, verify
from fedlora.privacy.report.figures import LABELS, STATES
from fedlora.privacy.report.hazards import MET, NONE, OPEN, PARTLY, hazards
from fedlora.privacy.report.plain_words import RESPONSIBLE, TERMS, percent
from fedlora.privacy.trade_off import attack, suspicion

from .test_privacy_report import KEY, LIFETIME, MECHANISM, changed, made, not_private

WORDS = About("Hospital | North", "North IT", "triage of *referral* notes", "Art. 9(2)(j) GDPR", "until 2027-12-31",
              "the coordinator")


def section(page, title):
    return page.partition(f"## {title}")[2].partition("\n## ")[0]


def test_the_percentages_are_those_of_the_exact_trade_off_rounded_up():
    page = section(markdown(made()), "What an attacker can learn about one row")
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")]
            for line in page.splitlines() if "at most" in line]
    most, spent = attack((Spend(1.0, 0.01, 500),)), attack((Spend(1.0, 0.01, 40),))
    exact = [[one.even_odds, one.found[0], suspicion(0.01, one.found[0], 0.01), one.found[1],
              suspicion(0.01, one.found[1], 0.001)] for one in (most, spent)]
    assert len(rows) == 5 and [row[3] for row in rows] == ["50 %", "1 %", "1 %", "0.1 %", "1 %"]
    for column, values in enumerate(exact, start=1):
        for row, value in zip(rows, values, strict=True):
            shown = float(row[column].removeprefix("at most ").removesuffix(" %")) / 100
            assert value <= shown < value * 1.1, row


@pytest.mark.parametrize(("share", "shown"), [(0.5, "50 %"), (0.01, "1 %"), (0.001, "0.1 %"), (1.0, "100 %"),
                                              (0.55701, "55.8 %"), (0.0028, "0.28 %"), (0.00281, "0.29 %"), (0, "0 %")])
def test_percentages_are_rounded_up(share, shown):
    assert percent(share) == shown


def test_a_unit_with_many_rows_is_named_in_the_heading():
    page = markdown(made(unit="column:patient_id", rows_per_unit=8))
    assert "## What an attacker can learn about one patient\\_id with all its rows" in page


def test_hardly_any_noise_is_said_to_leave_no_bound():
    loud = replace(MECHANISM, noise_multiplier=0.2)
    report = made(mechanism=loud, trainings=[], lifetime=None)
    assert report["privacy"]["attack"]["guarantee"] is None
    assert "no useful bound" in markdown(report) and verify(sign(report, KEY)).guarantee
    stated = changed(report, ("privacy", "attack", "guarantee"), {"even_odds": 0.5, "found": []})
    with pytest.raises(ValueError, match=r"privacy\.attack\.guarantee"):
        verify(sign(stated, KEY))


@pytest.mark.parametrize("path", [(kind, *figure) for kind in ("guarantee", "spent")
                                  for figure in (("even_odds",), ("found", 0, "at_most"), ("found", 1, "at_most"))],
                         ids=lambda path: "-".join(map(str, path)))
def test_a_smaller_success_of_an_attacker_signed_by_its_own_author_is_caught(path):
    report = made()
    value = report["privacy"]["attack"]
    for name in path:
        value = value[name]
    with pytest.raises(ValueError, match="attacker's success: the report states probability"):
        verify(sign(changed(report, ("privacy", "attack", *path), value - 1e-4), KEY))
    verify(sign(changed(report, ("privacy", "attack", *path), value + 1e-4), KEY))


def test_an_attackers_success_cannot_be_left_out_nor_stated_for_other_rates():
    for path, value in ((("guarantee",), None), (("spent", "found"), []),
                        (("guarantee", "found", 0, "false_alarms"), 0.02)):
        with pytest.raises(ValueError, match=r"privacy\.attack"):
            verify(sign(changed(made(), ("privacy", "attack", *path), value), KEY))


def test_the_owners_words_are_on_the_page_and_in_the_signed_report_and_what_is_missing_is_said():
    report = made(about=WORDS)
    assert verify(sign(report, KEY)).report["about"] == {field: getattr(WORDS, field) for field in KEYS.values()}
    page = section(markdown(report), "Who is responsible, and what for")
    for text in ("Hospital \\| North", "triage of \\*referral\\* notes", "until 2027-12-31", "the coordinator"):
        assert text in page
    assert page.count("not stated in policy.toml") == 0 and RESPONSIBLE.keys() == set(KEYS.values())
    silent = section(markdown(made()), "Who is responsible, and what for")
    assert silent.count("*not stated in policy.toml*") == len(KEYS)


def test_every_state_of_a_training_and_every_sum_is_explained():
    assert set(STATES) | set(LABELS.values()) <= TERMS.keys()
    page = section(markdown(made()), "Appendix A: words on this page")
    assert all(f"| **{word}** | {meaning} |" in page for word, meaning in TERMS.items())
    names = {"charged", "counted", "remaining", "closed", "given up", "limit", "unit", "declared size"}
    assert names <= TERMS.keys()


def states(report):
    return {(one.section, one.hazard): one.state for one in hazards(report)}


def test_the_hazards_are_in_the_order_of_the_guideline_and_follow_from_the_facts():
    found = list(hazards(made(about=WORDS)))
    sections = [tuple(map(int, one.section.split("."))) for one in found]
    assert sections == sorted(sections) and {s[0] for s in sections} == {2, 3, 4}
    assert {one.state for one in found} == {MET, PARTLY, OPEN, NONE}
    page = section(markdown(made(about=WORDS)), "Appendix B")
    assert all(f"| {one.section} | {one.hazard} | {one.state} | {one.how} |" in page for one in found)
    assert not re.search(r"`(?!fedlora)", "".join(one.how for one in found).replace("` ", " "))

    before = states(made())
    for changes, differ in (
            ({"about": WORDS}, {"4.5"}),
            ({"unit": "column:patient_id"}, {"2.4", "3.4"}),
            ({"lifetime": replace(LIFETIME, epsilon=None)}, {"4.1"}),
            ({"lifetime": replace(LIFETIME, charges=(*LIFETIME.charges, LifetimeCharge("ward-7", "a" * 16, None, None,
                                                                                    10)))}, {"2.6"}),
            ({"mechanism": replace(MECHANISM, noise_multiplier=4.0), "trainings": [], "lifetime": None},
             {"2.2", "4.1"})):
        after = states(made(**changes))
        assert {key[0] for key in after if after[key] != before.get(key)} == differ


def test_without_a_guarantee_no_hazard_of_the_guarantee_is_ticked():
    for report in (not_private(), made(predictable="a simulation")):
        found = list(hazards(report))
        assert [one.state for one in found if one.section == "2, 3"] == [OPEN]
        assert not [one for one in found if one.state == MET]
        page = markdown(report)
        assert "What an attacker can learn" not in page and "at most 5" not in page
