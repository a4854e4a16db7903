"""Real clients whose policies rely on the other members of secure sums, by the keys that they pinned."""

from __future__ import annotations

import pytest

from fedlora.identity.folder import read_identity
from fedlora.privacy import Ledger
from fedlora.privacy.report import read_signed, verify
from tests.secure_deployments import SecureDeployment

EPSILON = 3.0


@pytest.fixture
def deploy(tmp_path, checkpoint):
    with SecureDeployment(tmp_path, checkpoint("bert"), 3, "--rounds", 2, "--wait-timeout", 5) as deployment:
        yield deployment


def trusting(deployment, name, members):
    """Write the policy of a client that charges its budget for the sums of these members."""
    keys = [read_identity(deployment.folder / "tls" / member).certificate.fingerprint for member in members]
    path = deployment.home(name) / "config" / "fedlora" / "policy.toml"
    path.parent.mkdir(parents=True)
    path.write_text(f'trust = "aggregate"\nleast-members = 3\nmembers = {keys}\n'.replace("'", '"'))


def test_members_who_pinned_each_other_are_charged_for_the_sums_and_report_both_guarantees(deploy):
    for name in deploy.names:
        trusting(deploy, name, [other for other in deploy.names if other != name])
    deploy.serve()
    for name in deploy.names:
        deploy.member(name, None, "--epsilon", EPSILON)
    assert deploy.end("server") == 0, deploy.log("server")
    for name in deploy.names:
        assert deploy.end(name) == 0, deploy.log(name)
        assert 'in the sums (trust = "aggregate" in policy.toml)' in deploy.log(name)
        [path] = (deploy.folder / "state" / name).glob("*/privacy.json")
        verified = verify(read_signed(path))
        sums = verified.report["sums"]
        assert verified.aggregate <= EPSILON < verified.epsilon
        assert [(roster["members"], roster["honest"], roster["pinned"]) for roster in sums["rosters"]] == [(3, 3, True)]
        assert sums["rosters"][0]["noise_multiplier"] >= sums["aggregate_noise_multiplier"]
        ledger = Ledger(deploy.home(name) / "state" / "fedlora" / "ledger.sqlite")
        [(dataset, run)] = {(charge.dataset, charge.run_id) for charge in ledger.charges()}
        assert [roster.digest for roster in ledger.rosters(dataset, run)] == [sums["rosters"][0]["digest"]]
        assert ledger.epsilon(dataset, run) <= EPSILON < ledger.terms(dataset, run).own().epsilon(2)
        ledger.close()
    assert set(deploy.check().values()) == {tuple(deploy.names)}


def test_a_member_who_is_not_pinned_is_refused_by_name_before_anything_is_charged(deploy):
    first, *_, last = deploy.names
    trusting(deploy, first, [name for name in deploy.names if name != last])
    text = (deploy.home(first) / "config" / "fedlora" / "policy.toml")
    text.write_text(text.read_text().replace("members = [", f'members = ["{"0" * 64}", '))
    deploy.serve()
    for name in deploy.names:
        deploy.member(name, None, "--epsilon", EPSILON)
    assert deploy.end(first) == 4, deploy.log(first)
    assert f"'{last}' is in the roster and is none of the members that this site's policy" in deploy.log(first)
    assert deploy.charges(first) == [] and deploy.end("server") == 1
    for name in deploy.names[1:]:
        assert deploy.end(name) in (0, 1), deploy.log(name)
        assert deploy.charges(name) == [], "a roster that a member refused is trained under by nobody"
