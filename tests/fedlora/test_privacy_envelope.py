"""Tests of a report's envelope: by the DSSE specification alone, as a pair of files, and beside older signatures."""

import base64
import json
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedlora.identity import fingerprint
from fedlora.privacy.report import public_key, read_signed, sign, verify, write_report
from fedlora.privacy.report.dsse import pre_authentication_encoding

from .test_privacy_report import KEY, changed, made

SECOND, THIRD = (Path(__file__).parents[1] / "fixtures" / f"report-{version}" for version in (2, 3))


def pae(kind, body):
    """Return the specification's pre-authentication encoding, written down anew."""
    return b" ".join([b"DSSEv1", str(len(kind)).encode(), kind.encode(), str(len(body)).encode(), body])


def test_the_encoding_is_that_of_the_specifications_test_vector():
    expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pre_authentication_encoding("http://example.com/HelloWorld", b"hello world") == expected
    assert pae("http://example.com/HelloWorld", b"hello world") == expected


def test_an_envelope_verifies_with_nothing_but_the_specification_and_a_public_key(tmp_path):
    path = write_report(tmp_path, sign(made(), KEY))
    envelope = json.loads((tmp_path / "privacy.dsse.json").read_text())
    assert set(envelope) == {"payload", "payloadType", "signatures"}
    assert envelope["payloadType"] == "application/vnd.fedlora.privacy+json"
    [signature] = envelope["signatures"]
    body = base64.b64decode(envelope["payload"], validate=True)
    assert body == path.read_bytes()
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key(KEY)))
    key.verify(base64.b64decode(signature["sig"], validate=True), pae(envelope["payloadType"], body))
    with pytest.raises(InvalidSignature):
        key.verify(base64.b64decode(signature["sig"]), pae("application/json", body))
    assert signature["keyid"] == fingerprint(key)
    assert len(key.public_bytes(Encoding.Raw, PublicFormat.Raw)) == 32


def test_an_envelope_may_have_other_fields_alphabets_and_signatures_as_the_specification_allows():
    envelope = sign(made(), KEY)
    other = sign(made(), Ed25519PrivateKey.generate())
    both = {**envelope, "signatures": [{**other["signatures"][0], "more": 1}, *envelope["signatures"]], "more": 1}
    assert verify(both).public_key == public_key(KEY)
    safe = json.loads(json.dumps(envelope).replace("+json", "@").replace("+", "-").replace("@", "+json"))
    slashes = {**safe, "payload": safe["payload"].replace("/", "_")}
    assert verify(slashes).public_key == public_key(KEY)
    for keyid in ({}, {"keyid": ""}, {"keyid": "another"}):
        hint = {**envelope, "signatures": [{"sig": envelope["signatures"][0]["sig"], **keyid}]}
        assert verify(hint).public_key == public_key(KEY)
    for wrong in ([], other["signatures"], [{}], [1], None, [{"sig": ""}], [{"sig": "####"}]):
        with pytest.raises(ValueError, match="does not fit"):
            verify({**envelope, "signatures": wrong})


def test_one_authors_report_cannot_be_passed_off_as_signed_by_another():
    mallory = Ed25519PrivateKey.generate()
    ours, theirs = sign(made(), KEY), sign(made(), mallory)
    with pytest.raises(ValueError, match="does not fit"):
        verify({**ours, "signatures": theirs["signatures"]})
    with pytest.raises(ValueError, match="not by"):
        verify(theirs, public_key(KEY))


def test_a_pair_of_files_is_read_by_either_name_and_a_changed_one_is_noticed(tmp_path):
    path = write_report(tmp_path, sign(made(), KEY))
    assert read_signed(path) == read_signed(tmp_path / "privacy.dsse.json") == sign(made(), KEY)
    written = path.read_text()
    path.write_text(written.replace('"client": "north"', '"client": "south"'))
    with pytest.raises(ValueError, match=r"not the report that privacy\.dsse\.json beside it holds"):
        read_signed(path)
    path.write_text(written)
    path.with_suffix(".dsse.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match=r"carries no signature. It stands in privacy\.dsse\.json"):
        read_signed(path)
    assert verify(read_signed(tmp_path / "elsewhere.json")).guarantee
    (tmp_path / "privacy.dsse.json").write_text("{}")
    with pytest.raises(ValueError, match="not the report that"):
        read_signed(path)


@pytest.mark.parametrize("name", ["private", "seeded"])
def test_a_report_of_version_2_with_its_signature_inside_still_verifies(name):
    document = read_signed(SECOND / f"{name}.json")
    assert document["version"] == 2 and "signature" in document
    verified = verify(document, public_key(KEY))
    assert verified.guarantee == (name == "private") and verified.report["run"]["dataset"] == "ward-7"
    with pytest.raises(ValueError, match="does not fit"):
        verify(changed(document, ("mechanism", "clip_norm"), 0.1))


@pytest.mark.parametrize("name", ["private", "not-private"])
def test_a_report_of_version_3_still_verifies(name):
    envelope = read_signed(THIRD / f"{name}.dsse.json")
    verified = verify(envelope, public_key(KEY))
    assert verified.report["version"] == 3 and verified.guarantee == (name == "private")
    assert "sums" not in verified.report and verified.aggregate is None


def test_an_old_signature_is_no_way_around_the_envelope():
    second = read_signed(SECOND / "private.json")
    with pytest.raises(ValueError, match="does not fit"):
        verify({**second, "version": 3})
    with pytest.raises(ValueError, match="lacks the fields"):
        verify(sign(second, KEY))
