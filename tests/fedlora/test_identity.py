"""Keys, certificates, the coordinator's authority and the list of allowed clients."""

import ssl
import stat
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from fedlora.identity import make_request, read_identity
from fedlora.identity.certificates import comes_from, names_host, parse_certificate, utc_now
from fedlora.identity.folder import AUTHORITY, CERTIFICATE, KEY, REQUEST
from fedlora_server.cli import main as server
from fedlora_server.pki.allow_list import AllowList
from fedlora_server.pki.authority import SERVER_NAME, Authority


@pytest.fixture
def authority(tmp_path):
    return Authority.create(tmp_path / "pki", ["127.0.0.1", "fl.example.org"])


def enrolled(authority, folder, name, **options):
    """Make a client's key and request in a folder, have it signed, and put what comes back beside it."""
    issued = authority.sign(make_request(folder, name), **options)
    (folder / CERTIFICATE).write_bytes(issued.pem)
    (folder / AUTHORITY).write_bytes((authority.folder / AUTHORITY).read_bytes())
    return folder


def test_an_enrolled_client_has_a_certificate_for_its_own_key_and_name(authority, tmp_path):
    identity = read_identity(enrolled(authority, tmp_path / "north", "north"))
    assert identity.certificate.name == "north"
    assert authority.listed() == {"north": identity.certificate.fingerprint}


def test_private_keys_are_readable_by_their_owner_alone(authority, tmp_path):
    enrolled(authority, tmp_path / "north", "north")
    for key in (authority.folder / "ca-key.pem", authority.folder / KEY, tmp_path / "north" / KEY):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600, key


def test_a_request_holds_no_private_key(tmp_path):
    assert b"PRIVATE" not in make_request(tmp_path, "north")


def test_the_server_has_an_identity_that_names_its_hosts(authority):
    assert read_identity(authority.folder).certificate.name == SERVER_NAME


def test_renewing_keeps_the_key_and_so_the_fingerprint(authority, tmp_path):
    before = read_identity(enrolled(authority, tmp_path / "north", "north", days=3)).certificate
    for name, old in (("north", before), (SERVER_NAME, authority.issued()[SERVER_NAME])):
        new = authority.renew(name, days=900)
        assert new.fingerprint == old.fingerprint and new.not_after > old.not_after + timedelta(days=300)
    assert authority.listed() == {"north": before.fingerprint}


def test_a_new_key_under_a_listed_name_needs_the_old_one_revoked_first(authority, tmp_path):
    enrolled(authority, tmp_path / "north", "north")
    with pytest.raises(ValueError, match="listed with another key"):
        authority.sign(make_request(tmp_path / "thief", "north"))
    authority.revoke("north")
    enrolled(authority, tmp_path / "anew", "north")
    assert authority.listed()["north"] == read_identity(tmp_path / "anew").certificate.fingerprint


def test_who_was_revoked_is_not_renewed(authority, tmp_path):
    enrolled(authority, tmp_path / "north", "north")
    authority.revoke("north")
    with pytest.raises(ValueError, match="north was revoked"):
        authority.renew("north")


def test_a_second_authority_in_the_same_folder_is_refused(authority):
    with pytest.raises(ValueError, match="holds an authority already"):
        Authority.create(authority.folder, ["127.0.0.1"])


@pytest.mark.parametrize("host", ["fl.example.org:9092", "a b", "", "-x"])
def test_a_host_that_is_none_is_refused(host, tmp_path):
    with pytest.raises(ValueError, match="neither a host name nor an IP address"):
        Authority.create(tmp_path / "pki", [host])


@pytest.mark.parametrize("name", ["north", "St. Mary's, ward 3", "Zürich", "../../x", ".hidden", "a/b\"c\\d"])
def test_any_name_that_a_client_may_have_can_be_enrolled_listed_and_renewed(authority, tmp_path, name):
    enrolled(authority, tmp_path / "client", name)
    assert list(authority.listed()) == [name]
    assert authority.file_of(name).parent == authority.folder / "issued"
    assert authority.renew(name).name == name


@pytest.mark.parametrize(("spoil", "says"), [
    (lambda f, a: (f / KEY).chmod(0o644), "chmod 600"),
    (lambda f, a: (f / KEY).unlink(), "cannot be read"),
    (lambda f, a: (f / KEY).write_bytes(b"nonsense"), "not a private key"),
    (lambda f, a: (f / CERTIFICATE).write_bytes(b"nonsense"), "certificate.pem holds no whole certificate"),
    (lambda f, a: (f / AUTHORITY).write_bytes((f / AUTHORITY).read_bytes()[:-40]), "ca.pem holds no whole certificate"),
    (lambda f, a: (f / CERTIFICATE).write_bytes((a.folder / CERTIFICATE).read_bytes()), "was not issued for the key"),
    (lambda f, a: (f / CERTIFICATE).write_bytes(a.renew("north", now=utc_now() - timedelta(days=900)).pem), "expired"),
    (lambda f, a: (f / CERTIFICATE).write_bytes(a.renew("north", now=utc_now() + timedelta(days=9)).pem), "clock"),
], ids=["open key", "no key", "no key in it", "no certificate", "half an authority",
        "another's certificate", "expired", "not yet valid"])
def test_an_identity_that_cannot_be_used_says_what_to_do(authority, tmp_path, spoil, says):
    folder = enrolled(authority, tmp_path / "client", "north")
    spoil(folder, authority)
    with pytest.raises(ValueError, match=says):
        read_identity(folder)


def test_an_expiry_is_told_thirty_days_ahead(authority, tmp_path):
    certificate = read_identity(enrolled(authority, tmp_path / "north", "north", days=40)).certificate
    assert certificate.expiry_warning(utc_now()) is None
    assert "in 2 days" in (certificate.expiry_warning(utc_now() + timedelta(days=37, hours=1)) or "")


def test_the_list_is_read_again_when_it_changes_and_a_slip_of_the_hand_changes_nothing(authority, tmp_path, caplog):
    certificate = read_identity(enrolled(authority, tmp_path / "north", "north")).certificate
    allowed = AllowList(authority.folder)
    assert allowed.allows("north", certificate.fingerprint)
    assert not allowed.allows("south", certificate.fingerprint)
    allowed.path.write_text('north = "not a fingerprint"\n')
    assert allowed.allows("north", certificate.fingerprint) and "stays in force" in caplog.text
    authority.folder.joinpath("clients.toml").write_text("")
    assert not allowed.allows("north", certificate.fingerprint)


def run(capsys, *words):
    code = server(["pki", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_the_commands_lead_from_nothing_to_a_client_that_may_take_part_and_back(tmp_path, capsys):
    pki, home = tmp_path / "pki", tmp_path / "north"
    assert run(capsys, "init", "--pki", pki, "--host", "127.0.0.1")[0] == 0
    make_request(home, "north")
    code, said = run(capsys, "sign", home / REQUEST, "--pki", pki)
    assert code == 0 and "north may take part" in said
    code, said = run(capsys, "invite", "south", "--pki", pki, "--out", tmp_path / "south")
    assert code == 0 and read_identity(tmp_path / "south").certificate.name == "south"
    assert run(capsys, "renew", "north", "--pki", pki, "--days", 20)[0] == 0
    assert run(capsys, "revoke", "south", "--pki", pki)[0] == 0
    code, said = run(capsys, "list", "--pki", pki)
    lines = {line.split()[0]: line for line in said.splitlines()}
    assert code == 0 and "yes" in lines["north"] and "(soon)" in lines["north"] and " no " in lines["south"]


@pytest.mark.parametrize(("words", "says"), [
    (["sign", "nothing.csr"], "pki init"), (["list"], "fedlora-server pki init"), (["revoke", "x"], "pki init"),
    (["renew", "x"], "pki init"), (["init", "--host", "a:1"], "leave out the port")])
def test_what_cannot_be_done_is_said_in_a_line(tmp_path, capsys, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    code, said = run(capsys, *words)
    assert code == 2 and says in said and "Traceback" not in said and len(said.splitlines()) == 1


def test_a_server_s_certificate_names_its_hosts_and_no_others(authority):
    pem = authority.issued()[SERVER_NAME].pem
    assert all(names_host(pem, host) for host in ("127.0.0.1", "fl.example.org", "FL.example.org"))
    assert not any(names_host(pem, host) for host in ("127.0.0.2", "example.org", "x.fl.example.org", "::1", ""))
    assert not names_host((authority.folder / AUTHORITY).read_bytes(), "127.0.0.1"), "it has no names at all"


def issued_by(subject, issuer, issuer_key, key, names=()):
    name = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)]) for text in (subject, issuer)]
    builder = x509.CertificateBuilder(name[1], name[0], key.public_key(), 1 + len(subject), utc_now(),
                                      utc_now() + timedelta(days=1))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(one) for one in names]), False)
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(Encoding.PEM)


def test_a_wildcard_stands_for_one_part_of_a_name():
    key = generate_private_key(SECP256R1())
    pem = issued_by("server", "server", key, key, names=["*.example.org"])
    assert names_host(pem, "fl.example.org")
    assert not any(names_host(pem, host) for host in ("example.org", "a.b.example.org", "fl.example.com"))


def test_a_certificate_comes_from_its_authority_also_over_one_in_between(authority, tmp_path):
    trusted = (authority.folder / AUTHORITY).read_bytes()
    other = Authority.create(tmp_path / "other", ["127.0.0.1"])
    chain = read_identity(enrolled(authority, tmp_path / "north", "north")).chain_pem
    assert comes_from(chain, trusted) and comes_from(trusted, trusted)
    assert not comes_from(chain, (other.folder / AUTHORITY).read_bytes())
    assert comes_from(chain, (other.folder / AUTHORITY).read_bytes() + trusted), "one of several"
    root, between, leaf = (generate_private_key(SECP256R1()) for _ in range(3))
    top, middle = issued_by("root", "root", root, root), issued_by("between", "root", root, between)
    own = issued_by("north", "between", between, leaf)
    assert comes_from(own + middle, top) and comes_from(own, middle)
    assert not comes_from(own, top), "what is between is missing"
    assert not comes_from(issued_by("north", "between", leaf, leaf) + middle, top), "signed by another key of that name"


def test_a_key_of_a_kind_that_nobody_here_knows_is_refused_in_words():
    """Change the object identifier of an EC key, 1.2.840.10045.2.1, into one that stands for nothing."""
    key = generate_private_key(SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "north")])
    made = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
            .serial_number(1).not_valid_before(utc_now()).not_valid_after(utc_now() + timedelta(days=1))
            .sign(key, hashes.SHA256())).public_bytes(Encoding.DER)
    known = bytes.fromhex("2a8648ce3d0201")
    assert made.count(known) == 1
    pem = ssl.DER_cert_to_PEM_cert(made.replace(known, bytes.fromhex("2a8648ce3d0209"))).encode()
    with pytest.raises(ValueError, match="certificate of north has a key that is not ECDSA on P-256"):
        parse_certificate(pem)
