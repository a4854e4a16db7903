"""Mutual TLS between real servers and clients, over real sockets. Those whom it keeps out: `test_intruders`."""

import json
import socket
import ssl
import threading
import time
from datetime import timedelta

import pytest

from fedlora.identity import read_identity
from fedlora.identity.certificates import day, utc_now
from fedlora.identity.folder import CERTIFICATE, KEY
from fedlora.plan import Proposal
from fedlora.privacy.report import read_signed, verify
from fedlora_client.connection import Connection
from fedlora_client.tls import Tls, Unreachable, Untrusted
from fedlora_server.audit.compare import compare
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_server.pki.allow_list import FILE
from fedlora_server.pki.authority import SERVER_NAME, Authority
from fedlora_server.tls import ServerTls
from tests.federation import plan_of
from tests.identities import connected, enrolled, joined
from tests.processes import free_port, start, write_rows

RUN = plan_of("ffa-lora")


@pytest.fixture
def authority(tmp_path):
    return Authority.create(tmp_path / "pki", ["127.0.0.1"])


@pytest.fixture
def engine(authority, tmp_path):
    engine = GrpcEngine("127.0.0.1:0", Proposal(RUN), tmp_path / "uploads", tls=ServerTls(authority.folder))
    yield engine
    engine.close("finished")


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


def test_nobody_at_the_address_may_be_tried_again(authority, tmp_path):
    with pytest.raises(Unreachable):
        Tls(enrolled(authority, tmp_path / "north")).credentials(f"127.0.0.1:{free_port()}")


def test_a_server_that_is_stopped_in_the_handshake_is_not_taken_for_one_that_refuses(authority, tmp_path):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.folder / CERTIFICATE, authority.folder / KEY)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"

        def stops() -> None:
            plain, _ = listener.accept()
            listener.close()
            context.wrap_socket(plain, server_side=True).close()

        threading.Thread(target=stops, daemon=True).start()
        with pytest.raises(Unreachable):
            Tls(enrolled(authority, tmp_path / "north")).credentials(address)


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
        engine, authority, tmp_path, caplog):
    folder, told = enrolled(authority, tmp_path / "north"), []
    ends_soon = authority.renew("north", days=1, now=utc_now() - timedelta(days=1) + timedelta(seconds=4))
    (folder / CERTIFICATE).write_bytes(ends_soon.pem)
    connection = connected(engine, folder, report=told.append)
    connection.join()
    connection.ready()
    (folder / CERTIFICATE).write_bytes(authority.renew("north").pem)
    while utc_now() < ends_soon.not_after + timedelta(seconds=3):
        time.sleep(0.1)
    assert [member.name for member in engine.members() if member.connected] == ["north"]
    assert connection.join().plan == RUN
    why = f"the certificate of north expired on {day(ends_soon.not_after)}; have it renewed"
    assert f"Client 'north' was disconnected: {why}" in caplog.text
    assert any(f"was lost ({why})" in line for line in told), told
    connection.leave()


def test_a_client_whose_certificate_has_ended_waits_for_the_renewed_one(engine, authority, tmp_path):
    folder = enrolled(authority, tmp_path / "north")
    ends_soon = authority.renew("north", days=1, now=utc_now() - timedelta(days=1) + timedelta(seconds=2))
    (folder / CERTIFICATE).write_bytes(ends_soon.pem)
    told = []
    connection = Connection(engine.address, "north", private=True, tls=Tls(folder), connect_timeout_s=60,
                            report=told.append)
    connection.join()
    connection.ready()
    wait_until(lambda: not engine.idle() and told)
    time.sleep(0.5)  # attempts with the ended one
    (folder / CERTIFICATE).write_bytes(authority.renew("north").pem)
    wait_until(engine.idle)
    assert connection.join().plan == RUN and "have it renewed" in told[0]
    connection.leave()


def wait_until(true, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


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
    [report] = (run.folder / "state" / "north").glob("*/privacy.json")
    [connection] = verify(read_signed(report)).connections
    assert all(authority.issued()[name].fingerprint in connection for name in ("north", SERVER_NAME))
    [plain] = (run.folder.parent / "plain" / "state" / "north").glob("*/privacy.json")
    assert not verify(read_signed(plain)).connections
    assert "have it renewed" in run.log("north") and "is valid until" in run.log("server")
    lines = [json.loads(line) for line in (run.out / "audit.jsonl").read_text().splitlines()]
    assert lines[0]["fingerprint"] == authority.issued()[SERVER_NAME].fingerprint
    for name in ("north", "south"):
        own = read_identity(tmp_path / name).certificate.fingerprint
        assert {line["fingerprint"] for line in lines if line["client"] == name} == {own}
    statement = verify(read_signed(report))
    assert not compare(lines, statement).wrong
    others = [line | {"fingerprint": "0" * 64} if line["client"] == "north" else line for line in lines]
    assert all("which the report does not state" in why for why in compare(others, statement).wrong)
    assert len(compare(others, statement).wrong) == 2, "one for each upload"


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
