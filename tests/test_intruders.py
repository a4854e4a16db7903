"""Whom mutual TLS keeps out, over real sockets, and the lines that each side shows: the table of docs/certificates.md.

What fails in the handshake itself has no stream, and only gRPC can speak of it: a server shows that with
GRPC_VERBOSITY=INFO. For whatever comes later the server has lines of its own.
"""

import contextlib
import os
import socket
import ssl
import threading
import time
from datetime import timedelta

import grpc
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedlora import wire
from fedlora.config import ClientConfig
from fedlora.identity.certificates import utc_now
from fedlora.identity.folder import AUTHORITY, CERTIFICATE, KEY, load_key
from fedlora.plan import Proposal, RoundPlan, Upload
from fedlora.wire import pb
from fedlora_client import cli
from fedlora_client.tls import Untrusted
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_server.pki.authority import Authority
from fedlora_server.tls import ServerTls
from fedlora_strategies.messages import read_reply, to_record, train_message
from tests.driven_server import RecordingEngine
from tests.federation import layout_of, plan_of, start_of
from tests.identities import channel_of, connected, enrolled, joined
from tests.processes import free_port, start

RUN = plan_of("ffa-lora", private=True)
LAYOUT = layout_of("frozen-a")
STATE = start_of(LAYOUT, seed=1)


@pytest.fixture
def authority(tmp_path):
    return Authority.create(tmp_path / "pki", ["127.0.0.1"])


@pytest.fixture
def engine(authority, tmp_path):
    engine = GrpcEngine("127.0.0.1:0", Proposal(RUN), tmp_path / "uploads", tls=ServerTls(authority.folder))
    yield engine
    engine.close("finished")


def other_authority(tmp_path):
    return Authority.create(tmp_path / "other", ["127.0.0.1"])


NOTHING = ""
INTRUDERS = {
    "from another authority": (
        lambda a, t: enrolled(other_authority(t), t / "x", trusts=a), {},
        r"does not take the certificate of north; it comes from another authority than the server's", NOTHING),
    "right authority, not listed": (
        lambda a, t: (enrolled(a, t / "x"), a.revoke("north"))[0], {},
        "refuses this client: the certificate of north is not on the server's list of clients",
        "A client that calls itself 'north' was turned away: the certificate of north is not on the server's list"),
    "under another's name": (
        lambda a, t: enrolled(a, t / "x", "south"), {},
        "refuses this client: the certificate is that of 'south'; join under this name",
        "A client that calls itself 'north' was turned away: the certificate is that of 'south'"),
    "server of another authority": (
        lambda a, t: enrolled(a, t / "x", trusts=other_authority(t)), {},
        "does not come from the authority in ca.pem", NOTHING),
    "server of another key": (
        lambda a, t: enrolled(a, t / "x"), {"servers": ("0" * 64,)},
        r"is not one that the policy allows \(server-fingerprints\)", NOTHING),
}


@pytest.mark.parametrize("intruder", INTRUDERS)
def test_an_intruder_is_told_why_it_may_not_take_part(engine, authority, tmp_path, caplog, intruder):
    make, options, to_client, at_server = INTRUDERS[intruder]
    folder = make(authority, tmp_path)
    with pytest.raises(Untrusted, match=to_client):
        joined(engine, folder, **options)
    assert not engine.members()
    assert at_server in caplog.text and bool(caplog.text) == bool(at_server)


def test_the_command_says_so_in_one_line_and_ends_with_4(monkeypatch, capsys):
    def refused(*arguments, **named):
        raise Untrusted("fl.example.org:9092 refuses this client: its certificate is not on the list")

    monkeypatch.setattr("fedlora_client.app.take_part", refused)
    assert cli._run(ClientConfig(), frozenset()) == 4
    assert capsys.readouterr().err == ("fedlora-client: fl.example.org:9092 refuses this client: its certificate is "
                                       "not on the list\n")


def test_a_certificate_that_has_ended_is_refused_by_its_own_client(engine, authority, tmp_path):
    folder = enrolled(authority, tmp_path / "north")
    old = authority.renew("north", days=1, now=utc_now() - timedelta(days=9))
    (folder / CERTIFICATE).write_bytes(old.pem)
    with pytest.raises(ValueError, match=r"the certificate of north expired on .*; have it renewed"):
        joined(engine, folder)
    with channel_of(engine.address, folder) as channel, pytest.raises(grpc.RpcError):  # a client that does not look
        next(channel.stream_stream(wire.SERVICE)(iter([])))


def test_a_client_that_is_revoked_while_connected_is_disconnected_within_seconds(engine, authority, tmp_path, caplog):
    connection = connected(engine, enrolled(authority, tmp_path / "north"))
    connection.join()
    connection.ready()
    began = time.monotonic()
    authority.revoke("north")
    with pytest.raises(Untrusted, match="refuses this client: the certificate of north is not on the server's list"):
        connection.next_request()
    assert time.monotonic() - began < 5
    assert "Client 'north' was disconnected: the certificate of north is not on the server's list" in caplog.text


def test_a_server_without_tls_is_named_as_such(authority, tmp_path):
    plain = GrpcEngine("127.0.0.1:0", Proposal(RUN), tmp_path / "plain")
    try:
        with pytest.raises(Untrusted, match="does not speak TLS; it may be a server that was started without --tls"):
            joined(plain, enrolled(authority, tmp_path / "north"))
    finally:
        plain.close("finished")


def test_a_host_that_the_certificate_does_not_name_is_told_as_such(authority, tmp_path):
    elsewhere = Authority.create(tmp_path / "elsewhere", ["fl.example.org"])
    engine = GrpcEngine("127.0.0.1:0", Proposal(RUN), tmp_path / "u", tls=ServerTls(elsewhere.folder))
    try:
        with pytest.raises(Untrusted, match=r"is not for 127\.0\.0\.1"):
            joined(engine, enrolled(elsewhere, tmp_path / "north"))
    finally:
        engine.close("finished")


def test_a_server_certificate_without_a_san_is_refused_though_its_common_name_fits(authority, tmp_path):
    """As made by hand with `openssl req -x509 -subj /CN=localhost`."""
    north = enrolled(authority, tmp_path / "north")
    authority._issue("localhost", load_key(authority.folder / KEY).public_key(), ExtendedKeyUsageOID.SERVER_AUTH,
                     authority.folder / CERTIFICATE, 365, None)
    engine = GrpcEngine("localhost:0", Proposal(RUN), tmp_path / "u", tls=ServerTls(authority.folder))
    try:
        with pytest.raises(Untrusted, match=r"is not for localhost\. Name the server as its certificate does"):
            joined(engine, north)
    finally:
        engine.close("finished")


def test_frames_of_an_earlier_run_are_refused_and_nothing_of_them_is_averaged(authority, tmp_path, caplog):
    """All that north sent in run A reaches run B, from north's own identity."""
    north, tls = enrolled(authority, tmp_path / "north"), ServerTls(authority.folder)
    earlier = RecordingEngine("127.0.0.1:0", Proposal(RUN), tmp_path / "a", tls=tls)
    ask(earlier, RUN, connected(earlier, north), value=7.0)
    earlier.close("finished")
    [recorded] = earlier.streams
    assert [pb.ClientFrame.FromString(frame).WhichOneof("kind") for frame in recorded] == [
        "join", "ready", "upload", "leave"]

    run, told = plan_of("ffa-lora", private=True, run_id="f" * 16), []
    engine = GrpcEngine("127.0.0.1:0", Proposal(run), tmp_path / "b", tls=tls, notify=told.append)
    try:
        with channel_of(engine.address, north, wire.CHANNEL_OPTIONS) as channel:
            heard = [pb.ServerFrame.FromString(data)
                     for data in channel.stream_stream(wire.SERVICE)(iter(recorded), timeout=10)]
        [welcome, answer] = heard
        assert welcome.welcome.run.run_id == "f" * 16
        assert (answer.ack.refusal.code, answer.ack.refusal.detail) == ("too-late", "round 1, attempt 0")
        assert [(event.kind, event.name) for event in told] == [
            ("joined", "north"), ("ready", "north"), ("left", "north")]
        assert "Client 'north' sent an upload for round 1, attempt 0, which this server never asked" in caplog.text
        assert not list((tmp_path / "b").iterdir())
        assert ask(engine, run, connected(engine, north), value=1.0) == 1.0
    finally:
        engine.close("finished")


def ask(engine, run, connection, value):
    """Have a client do round 1 with uploads of this value, and leave. Return the value that the server gets."""
    engine.expect(LAYOUT)
    connection.join()
    connection.ready()
    while not engine.idle():
        engine.wait([], 0.05)
    order = RoundPlan(run, 1, 0, wire.tensors_digest({}))
    [sent] = engine.push_messages([train_message(order, to_record(STATE), engine.idle()[0])])
    plan, tensors = connection.next_request()
    trained = {spec.name: tensors[spec.name] * 0 + value for spec in LAYOUT.trained}
    assert connection.send(Upload(*plan.key, tensors=trained, steps=1, delta=1e-5, noise_multiplier=1.0)) is None
    connection.leave()
    while engine.wait([sent], 0.05).get(sent) != "uploaded":
        pass
    [reply] = engine.pull_messages([sent])
    [value] = {float(array.flat[0]) for array in read_reply(reply).tensors.values()}
    return value


def ssl_of(authority, folder=None, version=ssl.TLSVersion.TLSv1_3):
    """Return a context of this version that trusts a folder's authority and shows a folder's certificate, or none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = version
    context.load_verify_locations(authority / AUTHORITY)
    if folder is not None:
        context.load_cert_chain(folder / CERTIFICATE, folder / KEY)
    context.set_alpn_protocols(["h2"])
    return context


def address_of(text):
    host, _, port = text.rpartition(":")
    return host, int(port)


def is_let_in(address, context):
    """Return whether the server speaks HTTP/2 after a handshake."""
    try:
        with (socket.create_connection(address_of(address), 5) as plain,
              context.wrap_socket(plain, server_hostname="127.0.0.1") as channel):
            return bool(channel.recv(1))
    except (ssl.SSLError, ConnectionResetError):
        return False


def expired(authority, folder):
    enrolled(authority, folder, "late")
    (folder / CERTIFICATE).write_bytes(authority.renew("late", days=1, now=utc_now() - timedelta(days=9)).pem)
    return folder


def bytes_are_answered(address, data):
    """Send bytes, and return whether anything but the server's part of a TLS handshake comes before the end."""
    heard = b""
    with socket.create_connection(address_of(address), 5) as one, contextlib.suppress(ConnectionResetError):
        one.sendall(data)
        while more := one.recv(65536):
            heard += more
    return heard[:1] not in (b"", b"\x16")


def overheard(address, authority, folder):
    """Return what a client sends over TLS until it has been let in, as somebody on the way sees it."""
    with Tap(address) as tap:
        with (socket.create_connection(tap.address) as plain,
              ssl_of(authority, folder).wrap_socket(plain, server_hostname="127.0.0.1") as channel):
            channel.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            assert channel.recv(1)
        return bytes(tap.sent)


HANDSHAKES = {
    "no certificate": ("PEER_DID_NOT_RETURN_A_CERTIFICATE",
                       lambda address, a, t: is_let_in(address, ssl_of(a.folder))),
    "expired": ("certificate has expired",
                lambda address, a, t: is_let_in(address, ssl_of(a.folder, expired(a, t / "late")))),
    "from another authority": ("unable to get local issuer certificate", lambda address, a, t: is_let_in(
        address, ssl_of(a.folder, enrolled(other_authority(t), t / "other's")))),
    "TLS 1.2": ("NO_SHARED_CIPHER", lambda address, a, t: is_let_in(
        address, ssl_of(a.folder, t / "north", ssl.TLSVersion.TLSv1_2))),
    "plaintext": ("WRONG_VERSION_NUMBER", lambda address, a, t: bytes_are_answered(
        address, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")),
    "bytes that were sent before": ("BAD_DECRYPT", lambda address, a, t: bytes_are_answered(
        address, overheard(address, a.folder, t / "north"))),
    "garbage": ("WRONG_VERSION_NUMBER", lambda address, a, t: bytes_are_answered(address, os.urandom(300))),
}
"""Intruder → the reason in gRPC's own line at the server, and how it comes."""


def test_a_handshake_that_fails_shows_in_the_log_of_a_real_server_that_lets_grpc_speak(
        authority, tmp_path, monkeypatch):
    """A server process of its own: the cipher suites are set before gRPC is imported."""
    enrolled(authority, tmp_path / "north")
    address, log = f"127.0.0.1:{free_port()}", tmp_path / "server.log"
    monkeypatch.setenv("GRPC_VERBOSITY", "INFO")
    server = start("server", "--labels", "routine,urgent", "--address", address, "--tls", authority.folder,
                   "--out", tmp_path / "run", log=log, fresh=True)
    monkeypatch.undo()
    try:
        wait_for_port(address)
        assert is_let_in(address, ssl_of(authority.folder, tmp_path / "north"))
        assert "fingerprint" in log.read_text() and "Handshake failed" not in log.read_text()
        for name, (line, comes) in HANDSHAKES.items():
            before = len(log.read_text())
            assert not comes(address, authority, tmp_path), name
            within(5, lambda seen=before, line=line: line in log.read_text()[seen:], name)
        assert log.read_text().count("Handshake failed") == len(HANDSHAKES)
    finally:
        server.kill()
        server.wait()


def within(seconds, true, what):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def wait_for_port(address, patience_s=120):
    for _ in range(patience_s * 5):
        try:
            socket.create_connection(address_of(address), 1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(address)


class Tap:
    """Somebody on the way who passes everything on, and keeps what the client sends."""

    def __init__(self, target):
        self.sent = bytearray()
        self._target = address_of(target)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()

    def __enter__(self):
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self._listener.close()

    def _serve(self):
        client, _ = self._listener.accept()
        server = socket.create_connection(self._target)
        threading.Thread(target=self._pump, args=(server, client, bytearray()), daemon=True).start()
        self._pump(client, server, self.sent)

    @staticmethod
    def _pump(source, sink, kept):
        try:
            while data := source.recv(65536):
                kept += data
                sink.sendall(data)
        except OSError:
            pass
        sink.close()
