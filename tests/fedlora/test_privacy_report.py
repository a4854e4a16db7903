"""Tests of the privacy report: its figures, its signature, and what a dishonest author cannot get past `verify`."""

import base64
import copy
import hashlib
import json
import math
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from io import StringIO

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedlora.identity import Certificate
from fedlora.privacy.accounting import Accountant, Spend
from fedlora.privacy.ledger.lifetime_budget import filter_epsilon
from fedlora.privacy.report import (
    Disclosure,
    LifetimeAccount,
    LifetimeCharge,
    Mechanism,
    ReportedRun,
    TrainingEntry,
    announced,
    encrypted,
    load_or_create_key,
    markdown,
    privacy_report,
    public_key,
    read_signed,
    sign,
    verify,
    verify_file,
    write_report,
)
from fedlora.privacy.report.dsse import spelled
from fedlora.privacy.report.figures import shown

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
RUN = "0123456789abcdef"
MECHANISM = Mechanism(noise_multiplier=1.0, sampling_rate=0.01, expected_batch=50, local_steps=10,
                      max_participations=50, clip_norm=0.5, scales={"adapter": 1.0, "head": 0.1}, precision="bf16",
                      rows={8: 32, 16: 16})


def training(round, state="released", **changes):
    stored = {"upload_bytes": 148_000, "upload_sha256": f"{round:064x}"} if state in ("stored", "released") else {}
    return TrainingEntry(**{"round": round, "attempt": 0, "state": state, "steps": 10, "time": 1.7e9 + 60 * round,
                       "noise_multiplier": 1.0, "sampling_rate": 0.01, **stored, **changes})


TRAININGS = (training(1), training(2), training(3, "voided"), training(3, "stored", attempt=1), training(4, "reserved"))
CERTIFICATES = (Certificate("north", "ab" * 32, datetime(2026, 11, 28), datetime(2027, 11, 28), b""),
                Certificate("fedlora-server", "cd" * 32, datetime(2025, 12, 20), datetime(2026, 12, 20), b""))
LIFETIME = LifetimeAccount(epsilon=8.0, delta=1e-5, charges=(
    LifetimeCharge("ward-7", RUN, 1.0, 0.01, 40), LifetimeCharge("ward-7-old", "fedcba9876543210", 1.3, 0.02, 100)),
    overlapping=("ward-7-old",), distinct=("ward-8",), ledger_id="3f2a")


def made(**changes):
    """Return a report of a private run with four charged trainings."""
    arguments = {
        "dataset": "ward-7", "run_id": RUN, "client": "north", "server": "127.0.0.1:9092", "plan_sha256": "cd" * 32,
        "strategy": "fedsvd", "base_model": {"name": "minilm", "weights_sha256": "ef" * 32}, "unit": "row",
        "declared_size": 5000, "delta": 1e-5, "mechanism": MECHANISM, "trainings": TRAININGS, "lifetime": LIFETIME,
        "disclosed": announced(client="north", private=True, labels=["negative", "positive"]),
        "refusals": [(5, "budget")]}
    return privacy_report(ReportedRun(**(arguments | changes)), now=1.8e9)


def not_private():
    """Return a report of a run without noise over 4,321 records, with no declared size."""
    off = replace(MECHANISM, noise_multiplier=None, sampling_rate=50 / 4321, rows={})
    return made(mechanism=off, delta=None, declared_size=None, disclosed=announced(client="north", private=False),
                trainings=[training(1, noise_multiplier=None, sampling_rate=50 / 4321)],
                lifetime=replace(LIFETIME, epsilon=None, charges=(LifetimeCharge("ward-7", RUN, None, 50 / 4321, 10),)))


def leaves(value, path=()):
    """Yield the (path, value) of every leaf of a JSON document; empty objects and lists are leaves too."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [leaf for name, inner in items for leaf in leaves(inner, (*path, name))]
    return found or [(path, value)]


def changed(report, path, value):
    report = copy.deepcopy(report)
    place = report
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return report


def test_a_signed_report_verifies_after_a_trip_through_a_file(tmp_path):
    path = write_report(tmp_path, sign(made(), KEY))
    verified = verify(read_signed(path))
    assert verified.guarantee and verified.public_key == public_key(KEY) and verified.delta == 1e-5
    assert verified.epsilon == Accountant((Spend(1.0, 0.01, 500),)).epsilon(1e-5)
    assert verified.spent == Accountant((Spend(1.0, 0.01, 40),)).epsilon(1e-5)
    assert "does not prove that noise was added" in verified.text
    assert verified.report == json.loads(path.read_text())
    assert f"`{hashlib.sha256(path.read_bytes()).hexdigest()}`" in (tmp_path / "privacy.md").read_text()
    assert sorted(os.listdir(tmp_path)) == ["privacy.dsse.json", "privacy.json", "privacy.md"]


def test_the_guarantee_is_at_the_runs_maximum_and_what_was_spent_is_less():
    privacy = made()["privacy"]
    assert privacy["guarantee"]["label"] == "guarantee at the run's maximum" and privacy["guarantee"]["steps"] == 500
    assert privacy["spent"]["label"] == "spent so far" and privacy["spent"]["steps"] == 40
    assert privacy["spent"]["epsilon"] < privacy["guarantee"]["epsilon"]
    assert round(privacy["guarantee"]["accountants"]["PRV"], 3) == 1.336
    assert round(privacy["guarantee"]["accountants"]["RDP"], 3) == 1.653
    assert round(privacy["guarantee"]["accountants"]["PLD"], 3) == 1.326


def with_payload(envelope, report):
    return {**envelope, "payload": base64.b64encode(spelled(report)).decode()}


def test_tampering_with_any_field_breaks_verification():
    envelope = sign(made(), KEY)
    report = verify(envelope).report
    other = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v * 1.5 + 1, str: lambda v: v + "0",
             type(None): lambda v: 0, list: lambda v: ["x"], dict: lambda v: {"x": "x"}}
    for path, value in leaves(report):
        with pytest.raises(ValueError, match="does not fit"):
            verify(with_payload(envelope, changed(report, path, other[type(value)](value))))
    for path, value in leaves(envelope):
        if path[-1] != "keyid":  # a hint, which is not relied on
            with pytest.raises(ValueError):
                verify(changed(envelope, path, "x" + value))
    for name in envelope:
        with pytest.raises(ValueError):
            verify({k: v for k, v in envelope.items() if k != name})


def test_a_report_that_lacks_a_field_is_refused_even_if_signed():
    report = made()
    for name in report:
        with pytest.raises(ValueError):
            verify(sign({k: v for k, v in report.items() if k != name}, KEY))


@pytest.mark.parametrize("path", [
    *(("privacy", kind, *figure) for kind in ("guarantee", "spent")
      for figure in (("epsilon",), ("accountants", "PRV"), ("accountants", "RDP"), ("accountants", "PLD"))),
    ("lifetime", "spent")], ids="-".join)
def test_a_lower_epsilon_signed_again_by_its_own_author_is_caught(path):
    report = made()
    value = report
    for name in path:
        value = value[name]
    lower = changed(report, path, value - 1e-4)
    if path[-1] == "epsilon":  # lower both places, so that the report is consistent
        lower = changed(lower, (*path[:-1], "accountants", "PRV"), value - 1e-4)
    with pytest.raises(ValueError, match="its own history amounts to"):
        verify(sign(lower, KEY))
    verify(sign(report, KEY))


@pytest.mark.parametrize(("path", "value", "what"), [
    (("mechanism", "max_participations"), 3, "steps"),
    (("trainings", 0, "steps"), 500, "steps"),
    (("trainings", 0, "noise_multiplier"), 0.5, "covers 0 steps"),
    (("mechanism", "sampling_rate"), 0.001, "sampling_rate"),
    (("unit", "declared_size"), 50_000, "sampling_rate"),
    (("unit", "name"), "hospital", "unit.name"),
    (("unit", "relation"), "replace-one", "relation"),
    (("privacy", "delta"), 0.01, "delta"),
    (("privacy", "delta"), 1e-7, "amounts to"),
    (("privacy", "guarantee", "label"), "expected", "label"),
    (("privacy", "guarantee", "steps"), 100, "steps"),
    (("privacy", "spent", "epsilon"), None, "epsilon"),
    (("privacy", "spent", "accountant"), "PLD", "accountant"),
    (("privacy", "no_guarantee"), "none", "no_guarantee"),
    (("lifetime", "charges", 0, "steps"), 30, "lifetime"),
    (("lifetime", "charges", 1, "noise_multiplier"), 0.7, "amounts to"),
    (("lifetime", "remaining"), 8.0, "remaining"),
    (("randomness", "predictable"), True, "why"),
    (("trainings", 0, "state"), "sent", "state"),
    (("trainings", 1, "round"), 1, "twice"),
    (("trainings", 0, "extra"), 1, "unknown"),
    (("mechanism", "clip_norm"), True, "type"),
    (("privacy", "guarantee", "epsilon"), "small", "not PRV's figure"),
    (("privacy", "guarantee", "epsilon"), -1.0, "not PRV's figure"),
], ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else str(value))
def test_what_contradicts_itself_is_refused_naming_it_even_if_signed(path, value, what):
    with pytest.raises(ValueError, match=what):
        verify(sign(changed(made(), path, value), KEY))


def test_a_guarantee_for_fewer_steps_than_were_begun_is_refused():
    report = made(mechanism=replace(MECHANISM, max_participations=3))  # four were begun
    with pytest.raises(ValueError, match=r"the guarantee covers 30 steps .* and 40 were begun"):
        verify(sign(report, KEY))


def test_a_higher_epsilon_than_recomputed_is_conservative_and_passes():
    report = made()
    for name in ("epsilon", "accountants"):
        value = {"PRV": 2.0, "RDP": 2.0, "PLD": 2.0} if name == "accountants" else 2.0
        report = changed(report, ("privacy", "guarantee", name), value)
    assert verify(sign(report, KEY)).epsilon == 2.0


def test_another_authors_signature_is_told_apart():
    report = sign(made(), Ed25519PrivateKey.generate())
    assert verify(report).guarantee
    with pytest.raises(ValueError, match="not by"):
        verify(report, public_key(KEY))
    grafted = with_payload(report, {**verify(report).report, "public_key": public_key(KEY)})
    with pytest.raises(ValueError, match="does not fit"):
        verify(grafted)
    with pytest.raises(ValueError, match="no signature"):
        verify(made())


def test_a_predictable_run_prints_no_epsilon_anywhere_and_says_why():
    real, report = made(), made(predictable="FEDLORA_INSECURE_NOISE_SEED is set")
    figures = [value for path, value in leaves(real) if isinstance(value, float)
               and {"epsilon", "PRV", "RDP", "PLD", "spent", "remaining"} & set(path[-2:])]
    assert len(figures) > 8
    for path, value in leaves(report):
        if {"epsilon", "PRV", "RDP", "PLD", "spent", "remaining"} & set(path[-1:]):
            assert value is None, path
    page, text = markdown(report), json.dumps(report)
    for value in figures:
        assert repr(value) not in text and shown(value) not in page
    assert "ε =" not in page and "PREDICTABLE" in page and "FEDLORA" in page.replace("\\", "")
    verified = verify(sign(report, KEY))
    assert not verified.guarantee and verified.epsilon is None and verified.spent is None
    assert verified.text.startswith("No guarantee. PREDICTABLE")


@pytest.mark.parametrize("path", [("privacy", "guarantee", "epsilon"), ("privacy", "spent", "accountants", "PLD"),
                                  ("lifetime", "epsilon"), ("lifetime", "spent")], ids="-".join)
def test_a_predictable_report_with_an_epsilon_is_refused(path):
    report = made(predictable="a simulation")
    with pytest.raises(ValueError, match="without a guarantee"):
        verify(sign(changed(report, path, 1.0), KEY))


def test_a_run_without_noise_verifies_as_no_guarantee_and_does_not_tell_the_number_of_records():
    verified = verify(sign(not_private(), KEY))
    report = verified.report
    assert not verified.guarantee and "privacy was off" in verified.text
    both = json.dumps(report) + markdown(report)
    assert "4321" not in both and f"{50 / 4321:.4g}" not in both and "exact number of records" in both
    assert "ε =" not in markdown(report)


def test_a_private_run_beside_one_without_noise_has_an_infinite_lifetime():
    report = made(lifetime=replace(LIFETIME, charges=(*LIFETIME.charges, LifetimeCharge("ward-7", "a" * 16, None, 0.01,
                                                                                     10))))
    assert report["lifetime"]["spent"] == "infinite" and report["lifetime"]["remaining"] == 0
    assert verify(sign(report, KEY)).guarantee and "counted infinite" in markdown(report)


def test_the_page_has_the_jsons_figures():
    report = verify(sign(made(), KEY)).report
    page = markdown(report)
    for kind in ("guarantee", "spent"):
        figures = report["privacy"][kind]
        [row] = [line for line in page.splitlines() if line.startswith(f"| {figures['label']} |")]
        cells = [cell.strip(" *") for cell in row.strip("|").split("|")]
        stated = [figures["epsilon"], *(figures["accountants"][name] for name in ("PRV", "RDP", "PLD"))]
        assert cells[1] == str(figures["steps"])
        assert all(0 <= float(cell) - value < 1e-3 for cell, value in zip(cells[2:], stated, strict=True))
    lifetime = report["lifetime"]
    spent, remaining = re.search(r"counted ([\d.]+), remaining ([\d.]+)", page).groups()
    assert 0 <= float(spent) - lifetime["spent"] < 1e-3 and 0 <= lifetime["remaining"] - float(remaining) < 1e-3
    for value in (RUN, "5000", "1e-05", "0.5", "head × 0.1", "8 tokens × 32", "ward-7-old", "ward-8", "127.0.0.1:9092",
                  public_key(KEY), "296000 bytes", "2 uploads", "by the factor e^ε, plus δ",
                  "the charge was taken back"):
        assert value in page, value
    for item in report["left_without_noise"]:
        assert item["value"].split("_")[0] in page
    assert len(page.partition("## Appendix A")[0].splitlines()) < 110


def test_many_trainings_stay_on_one_page():
    trainings = [training(i, "released" if i % 3 else "reserved") for i in range(1, 50)]
    page = markdown(made(trainings=trainings, lifetime=None))
    assert len(page.partition("## Appendix A")[0].splitlines()) < 110 and "more lines in privacy.json" in page


def test_the_keys_at_both_ends_of_the_connection_are_in_the_report():
    over = encrypted(*CERTIFICATES)
    report = made(disclosed=(*announced(client="north", private=True), over))
    [connection] = verify(sign(report, KEY)).connections
    assert connection == over.value and all(word in connection for word in (
        "ab" * 32, "valid until 2027-11-28", "cd" * 32, "valid until 2026-12-20"))
    assert f"- certificate of this client, over mutual TLS 1.3: {connection}" in markdown(report)
    assert verify(sign(made(), KEY)).connections == ()


def test_a_name_cannot_write_lines_of_its_own_onto_the_page():
    evil = "north\n\n**ε = 0.001 at δ = 1e-99** is guaranteed | x"
    report = made(client=evil, dataset=evil, server="a`b\n# c", refusals=[], strategy="<b>",
                  disclosed=[Disclosure("label names", evil)], lifetime=None)
    page = markdown(report)
    assert not [line for line in page.splitlines() if line.startswith("**ε = 0.001")] and "# c" not in page.split("\n")
    assert "<b>" not in page.replace("\\<b\\>", "")
    assert verify(sign(report, KEY)).guarantee


def test_the_lifetime_is_recomputed_by_the_ledgers_rule():
    report = made()
    spends = [(Spend(1.0, 0.01, 40),), (Spend(1.3, 0.02, 100),)]
    assert report["lifetime"]["spent"] == filter_epsilon(spends, 1e-5, LIFETIME.orders)
    assert report["lifetime"]["remaining"] == 8.0 - report["lifetime"]["spent"]
    held = made(lifetime=replace(LIFETIME, spent=7.0, remaining=0.5))  # the ledger holds more for unfinished runs
    assert (held["lifetime"]["spent"], held["lifetime"]["remaining"]) == (7.0, 0.5)
    assert verify(sign(held, KEY)).guarantee


def test_a_run_that_closed_the_budget_is_charged_its_whole_maximum():
    whole = LifetimeCharge("ward-7", RUN, 1.0, 0.01, 500)
    closed = replace(LIFETIME, epsilon=1.4, charges=(whole,), closed_by=RUN, overlapping=())
    report = made(lifetime=closed)
    assert report["lifetime"]["spent"] == report["privacy"]["guarantee"]["epsilon"]  # PRV's; RDP would say 1.7
    assert report["lifetime"]["remaining"] == 0
    assert verify(sign(report, KEY)).guarantee and "whose planned maximum counts in full" in markdown(report)
    with pytest.raises(ValueError, match="the lifetime covers 40 steps"):
        verify(sign(made(lifetime=replace(closed, charges=(replace(whole, steps=40),))), KEY))


def test_a_training_that_was_voided_may_be_begun_again_under_its_key():
    assert verify(sign(made(trainings=(training(1, "voided"), training(1))), KEY)).guarantee


def test_noise_without_a_sampling_rate_is_not_accounted_as_nothing():
    charges = (*LIFETIME.charges, LifetimeCharge("ward-7-old", "b" * 16, 0.7, None, 1000))
    with pytest.raises(ValueError, match="have no sampling rate"):
        made(lifetime=replace(LIFETIME, charges=charges))
    with pytest.raises(ValueError, match="have no sampling rate"):
        verify(sign(changed(made(), ("lifetime", "charges", 1, "sampling_rate"), None), KEY))


def test_an_infinite_limit_is_none():
    report = made(lifetime=replace(LIFETIME, epsilon=math.inf))
    assert verify(sign(report, KEY)).guarantee and report["lifetime"]["remaining"] is None
    assert "No limit" in markdown(report)


def test_marks_of_the_ledger_are_stated():
    page = markdown(made(lifetime=replace(LIFETIME, new_ledger="ledger 3f2a, 12 rows", simulated=True)))
    assert "earlier ledger was given up:** ledger 3f2a, 12 rows" in page and "simulation's" in page


def test_a_private_start_is_a_training_of_round_0_and_is_named():
    report = made(trainings=(training(0), *TRAININGS), lifetime=None)
    assert report["privacy"]["spent"]["steps"] == made()["privacy"]["spent"]["steps"] + TRAININGS[0].steps
    assert verify(sign(report, KEY)).guarantee
    assert "their sum is noised as in any other round" in markdown(report) and "Round 0" not in markdown(made())
    plain = made(trainings=(replace(training(0), noise_multiplier=None),), lifetime=None, delta=None,
                 mechanism=replace(MECHANISM, noise_multiplier=None))
    assert "neither clipped nor noised" in markdown(plain) and "their sum is noised" not in markdown(plain)



@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.floats(0.8, 4.0), st.integers(1, 200), st.integers(1, 30),
       st.lists(st.sampled_from(["reserved", "stored", "released", "voided"]), max_size=6), st.text(max_size=20))
def test_every_signed_report_verifies(sigma, batch, steps, states, name):
    mechanism = replace(MECHANISM, noise_multiplier=sigma, sampling_rate=batch / 1000, expected_batch=batch,
                        local_steps=steps, max_participations=6)
    trainings = [training(i, state, steps=steps, noise_multiplier=sigma, sampling_rate=batch / 1000)
                 for i, state in enumerate(states)]
    charges = [LifetimeCharge(name, RUN, t.noise_multiplier, t.sampling_rate, t.steps) for t in trainings
               if t.state != "voided"]
    report = sign(made(declared_size=1000, mechanism=mechanism, trainings=trainings, dataset=name, client=name,
                       lifetime=replace(LIFETIME, charges=charges)), KEY)
    verified = verify(json.loads(json.dumps(report)))
    assert verified.guarantee and verified.spent <= verified.epsilon + 0.02
    assert math.isfinite(verified.epsilon)
    markdown(verified.report).encode()


def test_the_key_is_made_once_and_only_its_owner_may_read_it(tmp_path):
    path = tmp_path / "keys" / "signing.pem"
    with ThreadPoolExecutor(4) as pool:
        keys = set(pool.map(lambda _: public_key(load_or_create_key(path)), range(8)))
    assert len(keys) == 1 and stat.S_IMODE(path.stat().st_mode) == 0o600 and os.listdir(path.parent) == [path.name]
    for mode in (0o640, 0o604, 0o620):
        path.chmod(mode)
        with pytest.raises(ValueError, match="chmod 600"):
            load_or_create_key(path)
    path.chmod(0o600)
    path.write_text("not a key")
    with pytest.raises(ValueError, match="holds no unencrypted Ed25519 key"):
        load_or_create_key(path)


def test_nothing_is_written_that_would_not_verify(tmp_path):
    for report in (made(), sign(changed(made(), ("privacy", "delta"), 0.5), KEY)):
        with pytest.raises(ValueError):
            write_report(tmp_path / "out", report)
    assert not (tmp_path / "out").exists()


def said(path, key=None, **options):
    console = Console(file=StringIO(), width=200)
    return verify_file(path, console, key, **options), console.file.getvalue()


def test_verifying_a_file_prints_the_figures_and_answers_with_an_exit_code(tmp_path):
    path = write_report(tmp_path, sign(made(), KEY))
    for file in (path, path.with_suffix(".dsse.json")):
        code, text = said(file, public_key(KEY).upper())
        assert code == 0 and text.count(" 1.337 ") >= 2 and "1.336161" not in text
        assert "does not prove that noise was added" in text
    assert said(path, "00" * 32)[0] == 2
    over = encrypted(*CERTIFICATES)
    code, text = said(write_report(tmp_path / "tls", sign(made(disclosed=(over,)), KEY)), any_key=True)
    assert code == 0 and f"Certificate of this client, over mutual TLS 1.3: {over.value}." in text
    code, text = said(tmp_path / "missing.json")
    assert code == 2 and "Not verified" in text
    for name, broken in {
        "tampered": path.read_text().replace('"steps": 10,', '"steps": 9,', 1),
        "duplicate": path.read_text().replace('"audit": null', '"client": "a", "client": "b", "audit": null'),
        "nan": path.read_text().replace("0.01", "NaN", 1),
        "not json": "{",
        "binary": "\x00[/]",
        "another": "[]",
        "nested": "[" * 100_000,
        "newer": json.dumps({**made(), "version": 5, "signature": {}}),
        "newer envelope": json.dumps(sign({**made(), "version": 5}, KEY)),
        "another envelope": json.dumps({**sign(made(), KEY), "payloadType": "application/vnd.in-toto+json"}),
    }.items():
        (tmp_path / "broken.json").write_text(broken)
        code, text = said(tmp_path / "broken.json")
        assert code == 2 and "Not verified" in text, name
    path = write_report(tmp_path, sign(made(predictable="a simulation"), KEY))
    code, text = said(path, public_key(KEY))
    assert code == 0 and "No guarantee" in text and "ε at" not in text


def test_a_valid_signature_by_a_key_that_nobody_vouches_for_has_an_exit_code_of_its_own(tmp_path):
    path = write_report(tmp_path, sign(made(), KEY))
    code, text = said(path)
    assert code == 3 and public_key(KEY) in text and "but by whom?" in text and "--public-key" in text
    code, text = said(path, known={public_key(KEY): "the key of this machine and user"})
    assert code == 0 and "the key of this machine" in text
    assert said(path, known={"00" * 32: "another"})[0] == 3
    code, text = said(path, any_key=True)
    assert code == 0 and "nobody has said whose key" in text
