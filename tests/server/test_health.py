"""The gRPC health protocol on the server's port, as probes speak it, and what strangers can do with it."""

import threading
import time

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from fedlora import wire
from fedlora.identity import make_request
from fedlora.identity.folder import AUTHORITY
from fedlora.plan import Proposal
from fedlora_client.connection import Connection
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_server.health import MOST_PROBES, SERVICE
from fedlora_server.pki.authority import Authority
from fedlora_server.tls import ServerTls
from tests.federation import plan_of

RUN = plan_of("ffa-lora")
SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING


@pytest.fixture
def engine(tmp_path):
    engine = GrpcEngine("127.0.0.1:0", Proposal(RUN), tmp_path / "uploads")
    yield engine
    engine.close("finished")


def probe(channel, service=""):
    return HealthStub(channel).Check(HealthCheckRequest(service=service), timeout=10).status


def join(engine, name="north"):
    connection = Connection(engine.address, name, private=False, connect_timeout_s=10)
    connection.join()
    connection.leave()


@pytest.mark.parametrize("service", ["", "fedlora.Federation"])
def test_a_probe_is_told_that_the_server_takes_clients(engine, service):
    with grpc.insecure_channel(engine.address) as channel:
        assert probe(channel, service) == SERVING
        assert probe(channel, service) == SERVING, "on the same connection"


def test_an_unknown_service_is_not_found_and_watch_is_not_implemented(engine):
    with grpc.insecure_channel(engine.address) as channel:
        with pytest.raises(grpc.RpcError) as unknown:
            probe(channel, "flower.Fleet")
        with pytest.raises(grpc.RpcError) as watch:
            next(HealthStub(channel).Watch(HealthCheckRequest(), timeout=10))
    assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
    assert watch.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_server_that_is_closing_says_so(engine):
    stays = Connection(engine.address, "north", private=False, connect_timeout_s=10)
    stays.join()
    with grpc.insecure_channel(engine.address) as channel:
        assert probe(channel) == SERVING
        engine._closed.set()  # as `close` does first, before it tells clients
        assert probe(channel) == NOT_SERVING
        engine._closed.clear()
    stays.leave()


def test_many_probes_in_a_row_leave_nothing_behind(engine):
    for _ in range(100):
        with grpc.insecure_channel(engine.address, options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
            assert probe(channel) == SERVING
    before = threading.active_count()
    for _ in range(200):
        with grpc.insecure_channel(engine.address, options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
            assert probe(channel) == SERVING
    assert threading.active_count() <= before + 8, "gRPC keeps the threads of a few streams"
    join(engine)


def test_probes_that_never_send_their_request_are_cut_off_by_later_ones(engine):
    """Each of them would hold one of the threads that clients' streams need."""
    done, ended = threading.Event(), []

    def hang():
        def nothing():
            done.wait(30)
            yield from ()

        with grpc.insecure_channel(engine.address, options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
            check = channel.stream_unary(f"/{SERVICE}/Check", request_serializer=HealthCheckRequest.SerializeToString,
                                         response_deserializer=HealthCheckResponse.FromString)
            try:
                check(nothing(), timeout=30)
            except grpc.RpcError as error:
                ended.append(error.code())

    hanging = [threading.Thread(target=hang) for _ in range(3 * MOST_PROBES)]
    for thread in hanging:
        thread.start()
    deadline = time.monotonic() + 20
    while len(ended) < 2 * MOST_PROBES:
        assert time.monotonic() < deadline, ended
        time.sleep(0.05)
    with grpc.insecure_channel(engine.address) as channel:
        assert probe(channel) == SERVING
    join(engine)
    done.set()
    for thread in hanging:
        thread.join(20)
    assert set(ended[:2 * MOST_PROBES]) == {grpc.StatusCode.CANCELLED}


def test_under_mutual_tls_a_probe_needs_a_certificate_of_the_authority(tmp_path):
    authority = Authority.create(tmp_path / "pki", ["127.0.0.1"])
    engine = GrpcEngine("127.0.0.1:0", Proposal(RUN), tmp_path / "uploads", tls=ServerTls(authority.folder))
    roots = (authority.folder / AUTHORITY).read_bytes()
    issued = authority.sign(make_request(tmp_path / "probe", "probe"))
    try:
        for key, chain, expected in (((tmp_path / "probe" / "key.pem").read_bytes(), issued.pem, SERVING),
                                     (None, None, grpc.StatusCode.UNAVAILABLE)):
            credentials = grpc.ssl_channel_credentials(roots, key, chain)
            with grpc.secure_channel(engine.address, credentials) as channel:
                if expected == SERVING:
                    assert probe(channel, wire.SERVICE.strip("/").partition("/")[0]) == SERVING
                else:
                    with pytest.raises(grpc.RpcError) as refused:
                        probe(channel)
                    assert refused.value.code() == expected
        assert not engine.members()
    finally:
        engine.close("finished")
