"""Mutual TLS between real servers and clients, and those whom it keeps out, over real sockets."""

import json
import shutil
import socket
import ssl
import threading
import time
from datetime import timedelta

import grpc
import pytest

from fedlora import wire
from fedlora.identity import make_request, read_identity
from fedlora.identity.certificates import utc_now
from fedlora.identity.folder import AUTHORITY, CERTIFICATE
from fedlora.plan import Proposal
from fedlora_client.connection import Connection
from fedlora_client.tls import Tls, Unreachable, Untrusted
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_server.pki.allow_list import FILE
from fedlora_server.pki.authority import SERVER_NAME, Authority
from fedlora_server.tls import ServerTls
from tests.federation import plan_of
from tests.processes import free_port, start, write_rows

RUN = plan_of("ffa-lora")


@pytest.fixture
def authority(tmp_path):
    return Authority.create(tmp_path / "pki", ["127.0.0.1"])


def enrolled(authority, folder, name="north", trusts=None, **options):
    """Return the folder of a client that the authority has signed, which trusts the same or another one."""
    issued = authority.sign(make_request(folder, name), **options)
    (folder / CERTIFICATE).write_bytes(issued.pem)
    shutil.copy((trusts or authority).folder / AUTHORITY, folder / AUTHORITY)
    return folder


@pytest.fixture
def engine(authority, tmp_path):
    engine = GrpcEngine("127.0.0.1:0", Proposal(RUN), tmp_path / "uploads", tls=ServerTls(authority.folder))
    yield engine
    engine.close("finished")


def connected(engine, folder, name="north", **options):
    return Connection(engine.address, name, private=True, tls=Tls(folder, **options), connect_timeout_s=3)


def joined(engine, folder, name="north", **options):
    """Join and leave; return the plan that the server told."""
    connection = connected(engine, folder, name, **options)
    try:
        return connection.join().plan
    finally:
        connection.leave()


def test_a_listed_client_joins_and_its_server_is_the_pinned_one(engine, authority, tmp_path):
    server = authority.issued()[SERVER_NAME].fingerprint
    assert joined(engine, enrolled(authority, tmp_path / "north"), servers=(server,)) == RUN


def test_a_client_joins_through_a_proxy(engine, authority, tmp_path):
    with HttpProxy() as proxy:
        assert joined(engine, enrolled(authority, tmp_path / "north"), proxy=proxy.address) == RUN
        assert proxy.asked == {engine.address}


def test_a_name_whose_certificate_is_shown_needs_no_secret(engine, authority, tmp_path):
    folder = enrolled(authority, tmp_path / "north")
    first = connected(engine, folder)
    first.join()
    first.ready()
    first.leave()
    assert joined(engine, folder) == RUN  # another process, without the state folder that holds the secret


def test_a_policy_that_names_keys_allows_no_server_without_tls(tmp_path):
    policy = tmp_path / "policy.toml"
    policy.write_text(f'server-fingerprints = ["{"ab12 " * 16}"]\n')
    data = write_rows(tmp_path / "rows.jsonl", 1)
    client = start("client", "--data", data, "--policy", policy, "--yes", "--declared-size", 120,
                   log=tmp_path / "client.log", home=tmp_path / "home")
    assert client.wait(240) == 2 and "only --tls DIR shows" in (tmp_path / "client.log").read_text()


def other_authority(tmp_path):
    return Authority.create(tmp_path / "other", ["127.0.0.1"])


INTRUDERS = {
    "from another authority": (lambda a, t: enrolled(other_authority(t), t / "x", trusts=a), {}, "another authority"),
    "right authority, not listed": (lambda a, t: (enrolled(a, t / "x"), a.revoke("north"))[0], {}, "not on the "),
    "under another's name": (lambda a, t: enrolled(a, t / "x", "south"), {}, "certificate is that of 'south'"),
    "server of another authority": (lambda a, t: enrolled(a, t / "x", trusts=other_authority(t)), {}, "ca.pem"),
    "server of another key": (lambda a, t: enrolled(a, t / "x"), {"servers": ("0" * 64,)}, "server-fingerprints"),
}


@pytest.mark.parametrize("intruder", INTRUDERS)
def test_an_intruder_is_told_why_it_may_not_take_part(engine, authority, tmp_path, intruder):
    make, options, says = INTRUDERS[intruder]
    folder = make(authority, tmp_path)
    with pytest.raises(Untrusted, match=says):
        joined(engine, folder, **options)
    assert not engine.members()


def test_news_of_a_client_carry_its_fingerprint_also_where_it_is_turned_away(authority, tmp_path):
    events = []
    engine = GrpcEngine("127.0.0.1:0", Proposal(RUN), tmp_path / "uploads", tls=ServerTls(authority.folder),
                        notify=events.append)
    try:
        folder = enrolled(authority, tmp_path / "north")
        joined(engine, folder)
        with pytest.raises(Untrusted):
            joined(engine, enrolled(authority, tmp_path / "x", "south"))
    finally:
        engine.close("finished")
    assert [(event.kind, event.name, event.code) for event in events] == [
        ("joined", "north", ""), ("left", "north", ""), ("turned-away", "north", "certificate")]
    north, south = read_identity(folder).certificate, read_identity(tmp_path / "x").certificate
    assert [event.fingerprint for event in events] == [north.fingerprint] * 2 + [south.fingerprint]


def test_a_certificate_that_has_ended_is_refused_on_both_sides(engine, authority, tmp_path):
    folder = enrolled(authority, tmp_path / "north")
    old = authority.renew("north", days=1, now=utc_now() - timedelta(days=9))
    (folder / CERTIFICATE).write_bytes(old.pem)
    with pytest.raises(ValueError, match="expired"):
        joined(engine, folder)
    identity = read_identity(folder, now=old.not_before)  # a client that does not look
    with pytest.raises(grpc.RpcError), secure(engine.address, authority, identity.key_pem, old.pem) as channel:
        next(channel.stream_stream(wire.SERVICE)(iter([])))


def secure(address, authority, key=None, chain=None):
    roots = (authority.folder / AUTHORITY).read_bytes()
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(roots, key, chain))


def test_a_peer_without_a_certificate_gets_no_stream(engine, authority):
    with secure(engine.address, authority) as channel, pytest.raises(grpc.RpcError) as error:
        next(channel.stream_stream(wire.SERVICE)(iter([])))
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE


def test_a_client_told_by_plaintext_to_a_tls_server_gets_nothing(engine):
    with grpc.insecure_channel(engine.address) as channel, pytest.raises(grpc.RpcError):
        next(channel.stream_stream(wire.SERVICE)(iter([]), timeout=5))


def test_a_server_without_tls_is_named_as_such(authority, tmp_path):
    plain = GrpcEngine("127.0.0.1:0", Proposal(RUN), tmp_path / "plain")
    try:
        with pytest.raises(Untrusted, match="does not speak TLS"):
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


def test_nobody_at_the_address_may_be_tried_again(authority, tmp_path):
    with pytest.raises(Unreachable):
        Tls(enrolled(authority, tmp_path / "north")).credentials(f"127.0.0.1:{free_port()}")


def test_a_client_that_is_revoked_while_connected_is_disconnected_within_seconds(engine, authority, tmp_path):
    connection = connected(engine, enrolled(authority, tmp_path / "north"))
    connection.join()
    connection.ready()
    began = time.monotonic()
    authority.revoke("north")
    with pytest.raises(Untrusted, match="not on the server's list"):
        connection.next_request()
    assert time.monotonic() - began < 5


def test_renewed_certificates_are_taken_up_without_a_restart(engine, authority, tmp_path):
    folder = enrolled(authority, tmp_path / "north")
    seen = []
    for days in (40, 80):
        authority.renew(SERVER_NAME, days=days)
        (folder / CERTIFICATE).write_bytes(authority.renew("north", days=days).pem)
        seen.append(Tls(folder).credentials(engine.address)[1].not_after)
        assert joined(engine, folder) == RUN
    assert seen[1] - seen[0] > timedelta(days=39)


def test_a_client_whose_certificate_ends_while_it_is_connected_goes_on_with_the_renewed_one(
        engine, authority, tmp_path):
    folder = enrolled(authority, tmp_path / "north")
    ends_soon = authority.renew("north", days=1, now=utc_now() - timedelta(days=1) + timedelta(seconds=4))
    (folder / CERTIFICATE).write_bytes(ends_soon.pem)
    connection = connected(engine, folder)
    connection.join()
    connection.ready()
    (folder / CERTIFICATE).write_bytes(authority.renew("north").pem)
    while utc_now() < ends_soon.not_after + timedelta(seconds=3):
        time.sleep(0.1)
    assert [member.name for member in engine.members() if member.connected] == ["north"]
    assert connection.join().plan == RUN
    connection.leave()


def test_a_renewal_that_went_wrong_leaves_the_server_on_its_old_certificate(engine, authority, tmp_path, caplog):
    folder = enrolled(authority, tmp_path / "north")
    (authority.folder / CERTIFICATE).write_bytes(b"half a certif")
    assert joined(engine, folder) == RUN
    assert "stays in use" in caplog.text


def test_the_list_can_be_emptied_and_filled_while_the_server_runs(engine, authority, tmp_path):
    folder, listed = enrolled(authority, tmp_path / "north"), authority.folder / FILE
    before = listed.read_text()
    listed.write_text("")
    with pytest.raises(Untrusted):
        joined(engine, folder)
    listed.write_text(before)
    assert joined(engine, folder) == RUN


def test_tls_1_2_is_refused_by_a_real_server_and_1_3_is_not(authority, tmp_path):
    """A server process of its own: the suites are set before gRPC is imported."""
    enrolled(authority, tmp_path / "north")
    address = f"127.0.0.1:{free_port()}"
    server = start("server", "--labels", "routine,urgent", "--address", address, "--tls", authority.folder,
                   "--out", tmp_path / "run", log=tmp_path / "server.log", fresh=True)
    try:
        wait_for_port(address)
        assert handshake(address, authority, tmp_path / "north", ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
        with pytest.raises(OSError):
            handshake(address, authority, tmp_path / "north", ssl.TLSVersion.TLSv1_2)
        assert "fingerprint" in (tmp_path / "server.log").read_text()
    finally:
        server.kill()
        server.wait()


def handshake(address, authority, folder, version):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = version
    context.load_verify_locations(authority.folder / AUTHORITY)
    context.load_cert_chain(folder / CERTIFICATE, folder / "key.pem")
    context.set_alpn_protocols(["h2"])
    host, port = address.split(":")
    with (socket.create_connection((host, int(port)), 5) as plain,
          context.wrap_socket(plain, server_hostname=host) as channel):
        return channel.version()


def wait_for_port(address, patience_s=120):
    host, port = address.split(":")
    for _ in range(patience_s * 5):
        try:
            socket.create_connection((host, int(port)), 1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(address)


def test_a_federation_over_tls_ends_with_the_bits_of_one_in_plaintext(deploy, tmp_path, authority):
    """Real processes on both sides, once with and once without TLS."""
    adapters = []
    for way in ("plain", "encrypted"):
        run = deploy(way)
        tls = ("--tls", authority.folder) if way == "encrypted" else ()
        run.server("--rounds", 2, "--strategy", "ffa-lora", "--labels", "routine,urgent", "--local-steps", 2,
                   "--batch-size", 8, *tls)
        for seed, name in enumerate(("north", "south")):
            own = ("--tls", enrolled(authority, tmp_path / name, name, days=20)) if tls else ()
            run.client(name, write_rows(tmp_path / way / f"{name}.jsonl", seed), *own, seed=seed)
        assert [run.end(name) for name in ("north", "south", "server")] == [0, 0, 0], run.log("north")
        adapters.append(run.adapter())
    assert adapters[0] == adapters[1]
    assert "have it renewed" in run.log("north") and "is valid until" in run.log("server")
    lines = [json.loads(line) for line in (run.out / "audit.jsonl").read_text().splitlines()]
    assert lines[0]["fingerprint"] == authority.issued()[SERVER_NAME].fingerprint
    for name in ("north", "south"):
        own = read_identity(tmp_path / name).certificate.fingerprint
        assert {line["fingerprint"] for line in lines if line["client"] == name} == {own}


class HttpProxy:
    """A proxy that understands CONNECT alone."""

    def __init__(self):
        self.asked = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self):
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self._listener.close()

    def _serve(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._tunnel, args=(client,), daemon=True).start()

    def _tunnel(self, client):
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += client.recv(1)
        target = head.split()[1].decode()
        self.asked.add(target)
        host, port = target.rsplit(":", 1)
        server = socket.create_connection((host, int(port)))
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for one, other in ((client, server), (server, client)):
            threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    @staticmethod
    def _pump(source, sink):
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            end.close()
