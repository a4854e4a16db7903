"""Tests of an audit's lower bound on a report: it is attached to a run of the same mechanism, and to no other."""

import json

import pytest

from fedlora.privacy.report import attached, markdown, read_audit, sign, verify, verify_file
from fedlora.privacy.report.audited import SAME

from .test_privacy_report import KEY, MECHANISM, changed, made, replace, said, write_report

RUN = {"private": True, "noise_multiplier": 1.0, "sampling_rate": 0.01, "rounds": 500, "clip_norm": 0.5,
       "family": "frozen-a", "delta": 1e-5, "canaries": 1000, "holds": True,
       "white_box": {"guessed_in": 100, "guessed_out": 100, "right": 117, "epsilon": 0.1234567}}


def audit(folder, **changes):
    path = folder / "audit.json"
    path.write_text(json.dumps({"confidence": 0.95, "audits": [RUN | changes, {**RUN, "private": False}]}))
    return path


def report(**changes):
    return made(**({"mechanism": replace(MECHANISM, family="frozen-a")} | changes))


def test_the_lower_bound_is_on_the_page_and_in_the_signed_report(tmp_path):
    whole = attached(report(), read_audit(audit(tmp_path)))
    verified = verify(sign(whole, KEY))
    assert verified.report["audit"]["epsilon"] == 0.1234567 and verified.report["audit"]["steps"] == 500
    page = markdown(verified.report)
    assert "**ε ≥ 0.123** at δ = 1e-05, with 95% confidence, from 117 right guesses out of 200 about 1000" in page
    assert "no proof" in page and verified.report["audit"]["sha256"] in page
    assert "No audit is attached" in markdown(report())
    code, text = said(write_report(tmp_path / "out", sign(whole, KEY)), any_key=True)
    assert code == 0 and "ε is at least 0.1234, with 95% confidence" in text and verify_file


@pytest.mark.parametrize(("changes", "says"), [
    ({"noise_multiplier": 1.1}, "noise multiplier 1.1 in the audit and 1.0 in the report"),
    ({"sampling_rate": 0.02}, "sampling rate 0.02"), ({"rounds": 499}, "number of steps 499"),
    ({"clip_norm": 1.0}, "clip norm 1.0"), ({"family": "lora"}, "adapter family 'lora'"), ({"delta": 1e-6}, "δ 1e-06")])
def test_an_audit_of_another_mechanism_is_refused_with_the_options_for_the_right_one(tmp_path, changes, says):
    with pytest.raises(ValueError, match="of another mechanism") as error:
        attached(report(), read_audit(audit(tmp_path, **changes)))
    assert says in str(error.value)
    assert "--declared-size 5000 --batch-size 50 --rounds 500 --clip-norm 0.5" in str(error.value)


@pytest.mark.parametrize("name", SAME)
def test_a_signed_report_whose_audit_is_of_another_mechanism_does_not_verify(tmp_path, name):
    whole = attached(report(), read_audit(audit(tmp_path)))
    value = whole["audit"][name]
    other = changed(whole, ("audit", name), "lora" if isinstance(value, str) else 2 * value)
    with pytest.raises(ValueError, match="of another mechanism"):
        verify(sign(other, KEY))


def test_an_audit_that_refutes_the_claim_is_no_decoration(tmp_path):
    known = read_audit(audit(tmp_path, white_box={**RUN["white_box"], "epsilon": 1.4}))
    with pytest.raises(ValueError, match="the audit refutes the report"):
        attached(report(), known)
    with pytest.raises(ValueError, match="the audit refutes the report"):
        verify(sign({**report(), "audit": known}, KEY))


def test_a_run_of_patients_or_without_a_guarantee_takes_no_audit(tmp_path):
    known = read_audit(audit(tmp_path))
    with pytest.raises(ValueError, match="attacks single rows"):
        attached(report(unit="column:patient_id"), known)
    with pytest.raises(ValueError, match="states no guarantee"):
        attached(report(predictable="a simulation"), known)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"confidence": 0.95, "audits": []}', json.dumps(
    {"confidence": 0.95, "audits": [{k: v for k, v in RUN.items() if k != "clip_norm"}]}), json.dumps(
    {"confidence": 0.95, "audits": [RUN | {"delta": "small"}]}), json.dumps(
    {"confidence": 2, "audits": [RUN]}), json.dumps({"confidence": 0.95, "audits": 3})])
def test_what_is_no_audit_is_refused_naming_the_file(tmp_path, content):
    (tmp_path / "audit.json").write_text(content)
    with pytest.raises(ValueError, match=r"audit\.json is no result of an audit by this version"):
        read_audit(tmp_path / "audit.json")
