"""A report of a run with secure sums holds both guarantees; what its author embellishes does not verify."""

from __future__ import annotations

import math
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from fedlora.privacy import Accountant, RosterFacts, Spend
from fedlora.privacy.accounting import four_digits, pld_epsilon
from fedlora.privacy.ledger.lifetime_budget import filter_epsilon
from fedlora.privacy.report import (
    LifetimeAccount,
    LifetimeCharge,
    Mechanism,
    ReportedRun,
    Sums,
    announced,
    markdown,
    privacy_report,
    public_key,
    sign,
    verify,
    verify_file,
    write_report,
)

from .test_privacy_report import KEY, MECHANISM, RUN, changed, made, training

ROUNDS, DELTA, RATE, SIGMA, VALUES, STEP, CLIP_NORM = 80, 1e-5, 0.03, 0.6, 10_000, 2.0**-14, 0.5
SENSITIVITY = CLIP_NORM / STEP + math.sqrt(VALUES)
DONE = tuple(training(number, noise_multiplier=SIGMA, sampling_rate=RATE, steps=1) for number in (1, 2, 3))


def facts(members=6, colluding=1, honest=4, *, deviation=SIGMA * SENSITIVITY, pinned=True, digest="ab",
          plan_clip_norm=CLIP_NORM):
    return RosterFacts(digest * 32, members, colluding, math.sqrt(honest) * deviation / SENSITIVITY, deviation, STEP,
                       plan_clip_norm, VALUES, pinned)


SIX = facts()


def made_sums(*, rosters=(SIX,), aggregate=None, trainings=DONE, **changes):
    """Return a report of a run with secure sums, of which three rounds were begun."""
    charged = SIGMA if aggregate is None else aggregate
    lifetime = LifetimeAccount(8.0, DELTA, [LifetimeCharge("ward-7", RUN, charged, RATE, len(trainings),
                                                           aggregate is not None)] if trainings else [])
    mechanism = Mechanism(SIGMA, RATE, 150, 1, ROUNDS, CLIP_NORM, {"adapter": 1.0}, rows={8: 32},
                          key="distributed-gaussian")
    arguments = {
        "dataset": "ward-7", "run_id": RUN, "client": "north", "server": "127.0.0.1:9092", "plan_sha256": "cd" * 32,
        "strategy": "fedsvd", "base_model": {"name": "minilm"}, "unit": "row", "declared_size": 5000, "delta": DELTA,
        "mechanism": mechanism, "trainings": trainings, "lifetime": lifetime,
        "disclosed": announced(client="north", private=True), "sums": Sums(
            aggregate, 6, 1, rosters, [(1, 0), (2, 0)] if trainings else [])}
    return privacy_report(ReportedRun(**(arguments | changes)), now=1.8e9)


def epsilon(sigma, steps, delta=DELTA):
    return Accountant((Spend(sigma, RATE, steps),)).epsilon(delta)


def test_a_report_states_both_guarantees_and_verifies_by_two_accountants():
    verified = verify(sign(made_sums(), KEY))
    sums = verified.report["sums"]
    assert verified.epsilon == epsilon(SIGMA, ROUNDS) and verified.aggregate == epsilon(2 * SIGMA, ROUNDS, 0.99 * DELTA)
    assert sums["spent"]["epsilon"] == epsilon(2 * SIGMA, 3, 0.99 * DELTA) < verified.spent == epsilon(SIGMA, 3)
    assert sums["guarantee"]["accountants"]["PLD"] == pld_epsilon((Spend(2 * SIGMA, RATE, ROUNDS),), 0.99 * DELTA)
    assert 0 < sums["rounding_delta"] <= 0.01 * DELTA
    assert verified.aggregate < sums["two_clients"] == SIX.noise(RATE).epsilon(DELTA, ROUNDS, clients=2)
    assert sums["charged"] == "local" and sums["rosters"][0]["honest"] == 4
    assert {check.accountant for check in verified.checks if check.label.startswith("in the sums")} == {
        "PRV", "RDP", "PLD"}
    assert "by this client's own noise; and (" in verified.text and "pinned keys" in verified.text


def test_the_events_of_dp_accounting_are_in_the_report_for_whoever_has_another_accountant():
    from dp_accounting.dp_event import (  # noqa: F401  # the report's texts are evaluated with these names
        ComposedDpEvent,
        GaussianDpEvent,
        PoissonSampledDpEvent,
        SelfComposedDpEvent,
    )
    from dp_accounting.pld import PLDAccountant

    report = made_sums()
    for text, claimed, delta in ((report["mechanism"]["event"], report["privacy"], DELTA),
                                 (report["sums"]["event"], report["sums"], 0.99 * DELTA)):
        found = PLDAccountant().compose(eval(text)).get_epsilon(delta)
        assert claimed["guarantee"]["epsilon"] == pytest.approx(found, abs=0.02)
    assert "SelfComposedDpEvent" in made()["mechanism"]["event"] and made()["sums"] is None


def test_the_weakest_of_several_rosters_decides():
    weak = facts(3, 0, 3, digest="cd")
    report = made_sums(rosters=(facts(6, 0, 5), weak), sums=Sums(None, 3, 0, (facts(6, 0, 5), weak)))
    assert verify(sign(report, KEY)).aggregate == epsilon(math.sqrt(3) * SIGMA, ROUNDS, 0.99 * DELTA)


@pytest.mark.parametrize(("rosters", "why"), [
    ((), "no roster"), ((SIX, facts(pinned=False, digest="cd")), "does not name the keys"),
    ((facts(deviation=1.5),), "too coarse")], ids=["no roster", "no pins", "coarse"])
def test_without_pinned_members_or_a_fine_grid_the_own_noise_is_all_that_is_stated(rosters, why):
    report = made_sums(rosters=rosters, trainings=DONE if rosters else ())
    sums = report["sums"]
    assert why in sums["no_guarantee"] and sums["guarantee"]["epsilon"] is None and sums["two_clients"] is None
    verified = verify(sign(report, KEY))
    assert verified.aggregate is None and verified.epsilon == epsilon(SIGMA, ROUNDS) and why in verified.text
    assert "No ε is stated for the sums" in markdown(report) and why in markdown(report).lower()
    with pytest.raises(ValueError, match="sums"):
        verify(sign(changed(report, ("sums", "guarantee", "epsilon"), 1.0), KEY))
    with pytest.raises(ValueError, match=r"sums.no_guarantee"):
        verify(sign(changed(report, ("sums", "no_guarantee"), None), KEY))


def test_where_the_sums_are_charged_the_lifetime_counts_what_they_cost():
    report = made_sums(aggregate=1.1)
    lifetime = report["lifetime"]
    assert lifetime["spent"] == filter_epsilon([(Spend(1.1, RATE, 3),)], 0.99 * DELTA, tuple(lifetime["orders"]))
    assert lifetime["spent"] < made_sums()["lifetime"]["spent"]
    assert verify(sign(report, KEY)).report["sums"]["charged"] == "aggregate"
    page = markdown(report)
    assert 'charged for the noise of the sums, as the owner\'s policy says (trust = "aggregate")' in page
    assert "relies on the members whose keys the owner pinned" in page


@pytest.mark.parametrize(("path", "value", "what"), [
    (("sums", "rosters", 0, "honest"), 5, "honest is 5; of 6 members, 1 of whom collude, it must be 4"),
    (("sums", "rosters", 0, "colluding"), 0, "honest is 4; of 6 members, 0 of whom collude"),
    (("sums", "rosters", 0, "members"), 9, "honest is 4; of 9 members"),
    (("sums", "rosters", 0, "members"), 300, "3 to 200"),
    (("sums", "rosters", 0, "noise_multiplier"), 1.3, "by the roster's own numbers it is at most"),
    (("sums", "rosters", 0, "noise_multiplier"), 0.9, "sums.event"),
    (("sums", "rosters", 0, "pinned"), False, "no_guarantee"),
    (("sums", "rosters"), [], "no_guarantee"),
    (("sums", "guarantee", "epsilon"), 0.5, "PRV's or RDP's"),
    (("sums", "guarantee", "accountants", "PLD"), 0.5, "own history amounts to"),
    (("sums", "spent", "steps"), 2, "spent"),
    (("sums", "two_clients"), 0.5, "own history amounts to"),
    (("sums", "two_clients"), None, "two_clients"),
    (("sums", "rounding_delta"), 0.0, "rounding_delta"),
    (("sums", "event"), "none", "sums.event"),
    (("sums", "charged"), "aggregate", "it must be 'local'"),
    (("sums", "revealed"), [{"round": 9, "attempt": 0}], "no upload was sent for it"),
    (("sums", "aggregate_noise_multiplier"), 1.1, "it must be 'aggregate'"),
    (("sums", "least_members"), 7, "7 members or more"),
    (("sums", "colluding"), 0, "of whom 0 collude"),
    (("sums",), None, "with the mechanism distributed-gaussian"),
    (("mechanism", "key"), "dp-sgd", "and only then"),
    (("mechanism", "key"), "trust-me", "mechanism.key"),
    (("mechanism", "event"), "none", "mechanism.event"),
    (("mechanism", "local_steps"), 4, "with secure sums it must be 1"),
    (("lifetime", "charges", 0, "sums"), True, "not charged for the noise of its sums"),
    (("lifetime", "charges", 0, "noise_multiplier"), 1.2, "the lifetime covers 0 steps"),
], ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else str(value)[:20])
def test_an_embellished_report_is_refused_even_if_signed(path, value, what):
    with pytest.raises(ValueError) as error:
        verify(sign(changed(made_sums(), path, value), KEY))
    assert what in str(error.value)


def test_a_lower_epsilon_of_the_sums_in_both_places_is_caught():
    report = made_sums()
    for kind in ("guarantee", "spent"):
        stated = report["sums"][kind]["epsilon"] - 1e-4
        lower = changed(report, ("sums", kind, "epsilon"), stated)
        lower = changed(lower, ("sums", kind, "accountants", "PRV"), stated)
        with pytest.raises(ValueError, match=r"in the sums, .*, PRV: .* own history amounts to"):
            verify(sign(lower, KEY))
    verify(sign(report, KEY))


def test_sums_of_members_who_are_not_pinned_or_add_too_little_cannot_be_what_is_charged():
    for roster, why in ((facts(pinned=False), "may not be charged"), (facts(deviation=0.5 * SENSITIVITY), "1.0 only")):
        with pytest.raises(ValueError, match=why):
            verify(sign(made_sums(aggregate=1.1, rosters=(roster,)), KEY))


def test_the_page_shows_both_guarantees_and_says_in_two_sentences_what_each_assumes(tmp_path):
    report = verify(sign(made_sums(), KEY)).report
    page = markdown(report)
    section = page.partition("## Two guarantees")[2].partition("\n## ")[0]
    own, sums = (section.partition(f"- **{name}.** ")[2].partition("\n")[0] for name in ("By own noise", "In the sums"))
    assert own.count(". ") == sums.count(". ") == 1 and "nobody has to be trusted" in own and "pinned keys" in sums
    assert f"**{epsilon(SIGMA, ROUNDS):.3f}"[:6] in section and "One person's records at two clients: ε = " in section
    assert "Of 3 masked uploads that left, this client revealed its shares of 2" in section
    assert "at least 4 of 6 members honest in a sum, 1 may collude" in section and "are pinned" in section
    assert "**pinned**" in page and "**pinned**" not in markdown(made()) and "## Two guarantees" not in markdown(made())
    assert len(page.partition("## Appendix A")[0].splitlines()) < 120
    path = write_report(tmp_path, sign(made_sums(), KEY))
    console = Console(width=150, file=StringIO())
    assert verify_file(path, console, public_key(KEY)) == 0
    assert "in the sums, guarantee at the run's maximum" in console.file.getvalue()


def test_one_persons_epsilon_at_several_clients_counts_what_the_others_may_clip_to():
    lower = verify(sign(made_sums(rosters=(facts(plan_clip_norm=1.0),)), KEY)).report
    alike = verify(sign(made_sums(), KEY)).report
    assert lower["sums"]["guarantee"] == alike["sums"]["guarantee"]
    assert lower["sums"]["two_clients"] > 1.5 * alike["sums"]["two_clients"]
    with pytest.raises(ValueError, match=r"clip_norm is 0\.25; this client clips to 0\.5"):
        verify(sign(made_sums(rosters=(facts(plan_clip_norm=0.25),)), KEY))


def test_verification_tells_what_the_sums_cost_one_person_at_any_number_of_clients(tmp_path):
    def told(report, clients):
        console = Console(width=150, file=StringIO())
        code = verify_file(write_report(tmp_path, sign(report, KEY)), console, public_key(KEY), clients=clients)
        return code, console.file.getvalue()

    code, text = told(made_sums(), 3)
    three = SIX.noise(RATE).epsilon(DELTA, ROUNDS, clients=3)
    assert code == 0 and f"One person's records at 3 clients: ε = {four_digits(three)} in the sums" in text
    assert three > made_sums()["sums"]["two_clients"]
    for report, clients, why in ((made_sums(), 1, "it must be 2 to 6"), (made_sums(), 7, "it must be 2 to 6"),
                                 (made_sums(rosters=(facts(pinned=False),)), 2, "does not name the keys"),
                                 (made(), 2, "without secure sums")):
        code, text = told(report, clients)
        assert code == 2 and f"The report has no ε for {clients} clients" in text and why in text


def test_a_predictable_run_states_no_epsilon_of_its_sums_either():
    report = made_sums(predictable="a simulation")
    assert "PREDICTABLE" in report["sums"]["no_guarantee"] and report["sums"]["event"] is None
    assert not verify(sign(report, KEY)).guarantee
    with pytest.raises(ValueError, match="no epsilon may be stated for the sums"):
        verify(sign(changed(report, ("sums", "two_clients"), 1.0), KEY))


def test_a_report_of_dp_sgd_names_its_mechanism():
    assert made()["mechanism"]["key"] == "dp-sgd" == replace(MECHANISM).key


def test_the_report_tells_what_the_members_were_shown_and_what_was_held_out():
    sums = Sums(None, 6, 1, (SIX,), [(1, 0)], 0.2)
    page = markdown(verify(sign(made_sums(sums=sums), KEY)).report)
    assert "A share of 0.2 of the units is held out" in page and "held out" not in markdown(made_sums())
    assert "membership in secure sums: this client's name, its certificate" in page
    for announced_terms in (True, False):
        said = markdown(made_sums(terms_announced=announced_terms))
        assert ("a roster tells the least of all members" in said) == announced_terms
    assert "keys and shares of secure sums" in page and "secure sums" not in markdown(made()).partition("What left")[2]
