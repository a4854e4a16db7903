"""Connections that carry no client take a bounded number of places, for a bounded time."""

import resource
import socket
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.plan import Proposal
from fedlora_client.connection import Connection
from fedlora_server import connections
from fedlora_server.connections import GRACE_S, STRANGER_S, STRANGERS_OF_A_PEER, Peer, Room, peer_of, surplus
from fedlora_server.grpc_engine import GrpcEngine
from tests.federation import plan_of
from tests.processes import PATIENCE

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
NOW, MOST = 1000.0, 512

ages = st.lists(st.tuples(st.sampled_from(["192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"]),
                          st.floats(0, 2 * STRANGER_S)), max_size=600)


@given(ages)
def test_what_is_left_of_strangers_is_bounded_in_age_in_all_and_of_each_peer_once_it_is_old_enough(found):
    since = {Peer(host, port): NOW - age for port, (host, age) in enumerate(found)}
    gone = surplus(since, MOST, NOW)
    left = since.keys() - set(gone)
    assert len(left) + len(gone) == len(since) and len(left) <= MOST // 2
    assert all(NOW - since[peer] <= STRANGER_S for peer in left)
    for group in {peer.group for peer in left}:
        own = [peer for peer in left if peer.group == group]
        assert len(own) <= STRANGERS_OF_A_PEER or all(NOW - since[peer] <= GRACE_S for peer in own)
        assert all(since[peer] >= since[ended] for peer in own for ended in gone if ended.group == group)


def test_a_peer_with_few_connections_keeps_them_while_another_one_has_too_many():
    crowd = {Peer("192.0.2.1", port): NOW for port in range(MOST)}
    few = {Peer("192.0.2.2", port): NOW - GRACE_S for port in range(10)}
    assert not few.keys() & set(surplus(crowd | few, MOST, NOW))


@pytest.mark.parametrize(("name", "peer", "group"), [
    ("ipv4:192.0.2.1:4711", Peer("192.0.2.1", 4711), "192.0.2.1"),
    ("ipv6:%5B2001:db8:0:1:2::3%5D:4711", Peer("2001:db8:0:1:2::3", 4711), "2001:db8:0:1::/64"),
    ("ipv6:[::ffff:192.0.2.1]:4711", Peer("192.0.2.1", 4711), "192.0.2.1")])
def test_a_peer_is_one_address_of_ipv4_or_one_network_of_ipv6(name, peer, group):
    assert peer_of(name) == peer and peer.group == group


@pytest.fixture
def engine(tmp_path):
    engine = GrpcEngine("127.0.0.1:0", Proposal(plan_of("ffa-lora")), tmp_path / "uploads", max_clients=8)
    yield engine
    engine.close("the test is over")


def ended(sockets):
    """Return how many of these sockets the other side has closed."""
    count = 0
    for one in sockets:
        one.setblocking(False)
        try:
            while one.recv(1 << 16):
                pass
            count += 1
        except BlockingIOError:
            pass
        except OSError:
            count += 1
    return count


@pytest.mark.parametrize("said", [b"", PREFACE], ids=["nothing", "the preface alone"])
def test_a_client_joins_and_stays_while_a_thousand_connections_are_opened_that_say_nothing(engine, said):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 3000:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 3000) if hard != resource.RLIM_INFINITY else 3000, hard))
    north = Connection(engine.address, "north", private=False)
    north.join()
    north.ready()
    host, _, port = engine.address.rpartition(":")
    idle = []
    try:
        for _ in range(1000):
            idle.append(socket.create_connection((host, int(port)), timeout=5))
            idle[-1].sendall(said)
        south = Connection(engine.address, "south", private=False)
        south.join()
        south.ready()
        deadline = time.monotonic() + 5 * PATIENCE
        while len(idle) - ended(idle) > STRANGERS_OF_A_PEER or len(engine.get_node_ids()) < 2:
            assert time.monotonic() < deadline, f"{len(idle) - ended(idle)} are left"
            time.sleep(0.1)
        assert [member.name for member in engine.members() if member.connected] == ["north", "south"]
        south.leave()
    finally:
        for one in idle:
            one.close()
        north.leave()


def test_many_clients_of_one_address_are_not_strangers(engine, monkeypatch):
    """A client that has been connected for longer than a stranger may be is no stranger either."""
    monkeypatch.setattr(connections, "STRANGERS_OF_A_PEER", 2)
    monkeypatch.setattr(connections, "STRANGER_S", 0.2)
    monkeypatch.setattr(connections, "GRACE_S", 0.0)
    clients = [Connection(engine.address, f"client {number}", private=False) for number in range(8)]
    for client in clients:
        client.join()
    streams = set(engine._sessions)
    time.sleep(2.0)
    assert set(engine._sessions) == streams and len(streams) == 8, "nobody had to come back"
    for client in clients:
        client.leave()


LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard}))
from fedlora_server.connections import Room
room = Room.of(512)
print(room.clients, room.strangers, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize("hard", [400, 1024, 1792])
def test_limits_on_connections_fit_the_systems_limit_on_open_files_and_that_is_said(hard):
    done = subprocess.run([sys.executable, "-c", LIMITED.format(hard=hard)], capture_output=True, text=True, check=True)
    clients, strangers, allowed = map(int, done.stdout.split())
    assert allowed <= hard and min(clients, strangers) >= 16
    assert 2 * clients + strangers + connections.RESERVED_FILES <= allowed
    assert (clients, strangers) == (512, connections.STRANGERS) or "ulimit -n" in done.stderr
    assert (clients == 512) == (hard == 1792)


def test_a_room_has_as_many_connections_as_clients_and_strangers():
    assert dict(Room(8, 16).options)["grpc.max_allowed_incoming_connections"] == Room(8, 16).connections == 24
