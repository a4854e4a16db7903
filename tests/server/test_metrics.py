"""/metrics as Prometheus reads it, over real HTTP, and docs/coordinator.md's table of metrics."""

import http.client
import io
import re
import socket
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client", reason="the extra is not installed: pip install '.[metrics]'")

from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as parsed
from rich.console import Console

from fedlora.config import ServerConfig, read_config
from fedlora.plan import REFUSALS, Proposal
from fedlora_client.connection import Connection
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_server.observer import ClientEvent, RoundRecord
from fedlora_server.operations import endpoint
from fedlora_server.operations.assembly import Operations
from fedlora_server.operations.metrics import TURNED_AWAY
from fedlora_server.phases import PHASES
from fedlora_server.pki.authority import Authority
from fedlora_server.stopping import Stopping
from fedlora_server.tls import ServerTls
from fedlora_server.trackers import Trackers, Watched
from tests.federation import plan_of

RUN = plan_of("ffa-lora", rounds=5)
DOCS = Path(__file__).parents[2] / "docs" / "coordinator.md"


class Server:
    """An engine that is watched, without a round loop."""

    def __init__(self, folder, *arguments, tls=None):
        self.console = Console(file=io.StringIO(), width=200)
        run = Watched("a run", folder, self.console, {"strategy": "ffa-lora"}, RUN.run_id)
        self.stopping = Stopping(self.console)
        options = read_config(ServerConfig, arguments)
        self.operations = Operations(options, run, self.stopping, tls)
        self.trackers = Trackers([], run, self.operations.trackers)
        self.engine = GrpcEngine("127.0.0.1:0", Proposal(RUN), folder / "uploads", notify=self.trackers.client)
        self.operations.attend(self.engine)
        self.url = re.search(r"http://\S+", self.console.file.getvalue()).group()

    def get(self, path="/metrics", **headers):
        request = urllib.request.Request(self.url.removesuffix("/metrics") + path, headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()

    def samples(self):
        """Return (name, labels as they are written) → value."""
        return {(sample.name, ",".join(sample.labels.values())): sample.value
                for family in parsed(self.get()[2]) for sample in family.samples}

    def end(self):
        self.engine.close("finished")
        self.operations.close()


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path, "--metrics", "0")
    yield server
    server.end()


def test_a_run_is_read_off_its_metrics(server):
    server.trackers.begin(RUN, (RoundRecord(1, seconds=3.0),))
    server.trackers.asked(2, 0, ("north",))
    connection = Connection(server.engine.address, "north", private=False, connect_timeout_s=10)
    connection.join()
    connection.ready()
    deadline = time.monotonic() + 20
    while not server.engine.idle() and time.monotonic() < deadline:
        server.engine.wait([], 0.1)
    for kind, code in (("refused", "budget"), ("turned-away", "certificate"), ("lost", ""), ("uploaded", ""),
                       ("disconnected", "certificate")):
        server.trackers.client(ClientEvent(kind, "north", "text", code))
    server.trackers.evaluated(2, {"accuracy": 0.75, "loss": float("nan"), "count": 40})
    server.trackers.finished(RoundRecord(2, rejected={"a": "long", "b": "long"}, seconds=7.0))
    server.trackers.finished(RoundRecord(3, seconds=90.0))
    found = server.samples()
    connection.leave()
    expected = {
        ("fedlora_rounds_planned", ""): 5, ("fedlora_rounds_finished", ""): 3, ("fedlora_current_round", ""): 4,
        ("fedlora_clients", "connected"): 0, ("fedlora_clients", "ready"): 1, ("fedlora_clients", "working"): 0,
        ("fedlora_refusals_total", "budget"): 1, ("fedlora_refusals_total", "policy"): 0,
        ("fedlora_turned_away_total", "certificate"): 1, ("fedlora_clients_lost_total", ""): 1,
        ("fedlora_clients_disconnected_total", ""): 1, ("fedlora_uploads_total", ""): 1,
        ("fedlora_uploads_rejected_total", ""): 2, ("fedlora_evaluation", "accuracy"): 0.75,
        ("fedlora_phase", "waiting"): 1, ("fedlora_phase", "training"): 0,
        ("fedlora_round_seconds_count", ""): 2, ("fedlora_round_seconds_sum", ""): 97.0,
        ("fedlora_round_seconds_bucket", "5.0"): 0, ("fedlora_round_seconds_bucket", "10.0"): 1,
        ("fedlora_round_seconds_bucket", "120.0"): 2, ("fedlora_round_seconds_bucket", "+Inf"): 2}
    assert expected.items() <= found.items()
    assert found["fedlora_received_bytes_total", ""] > 0 < found["fedlora_sent_bytes_total", ""]
    assert time.time() - found["fedlora_last_round_finished_timestamp_seconds", ""] < 60


def test_a_run_that_is_held_up_shows_it(server):
    server.trackers.begin(RUN, ())
    server.trackers.held_up("the disk is full")
    assert server.samples()["fedlora_phase", "held-up"] == 1
    server.trackers.combining(1, 2)
    assert {phase: server.samples()["fedlora_phase", phase] for phase in PHASES} == {
        **dict.fromkeys(PHASES, 0), "aggregating": 1}


def test_no_peer_adds_a_series(server):
    before = server.samples().keys()
    for number in range(300):
        for kind in ("joined", "lost", "turned-away", "left", "uploaded", "refused"):
            server.trackers.client(ClientEvent(kind, f"made-up-{number}", "", f"made-up-{number}"))
    assert server.samples().keys() == before
    assert {label for name, label in before if name == "fedlora_refusals_total"} == set(REFUSALS)
    assert {label for name, label in before if name == "fedlora_turned_away_total"} == set(TURNED_AWAY)


def test_scrapers_get_the_format_that_they_ask_for(server):
    _, kind, text = server.get(Accept="application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text") and list(openmetrics(text))
    _, kind, text = server.get()
    assert kind.startswith("text/plain") and list(parsed(text))


def test_the_servers_certificate_shows_when_it_ends(tmp_path):
    authority = Authority.create(tmp_path / "pki", ["127.0.0.1"])
    tls = ServerTls(authority.folder)
    server = Server(tmp_path, "--metrics", "0", tls=tls)
    shown = server.samples()["fedlora_certificate_expiry_timestamp_seconds", ""]
    server.end()
    assert shown == tls.certificate.not_after.timestamp()


def test_healthz_tells_a_server_that_takes_clients_from_one_that_ends(server):
    assert server.get("/healthz")[::2] == (200, "ok\n")
    server.stopping.ask(goes_on=True)
    with pytest.raises(urllib.error.HTTPError) as ending:
        server.get("/healthz")
    assert ending.value.code == 503
    with pytest.raises(urllib.error.HTTPError) as elsewhere:
        server.get("/")
    assert elsewhere.value.code == 404


def test_connections_that_are_held_open_keep_nobody_out(server):
    host, port = server.url.split("/")[2].split(":")
    held = [socket.create_connection((host, int(port)), 10) for _ in range(3 * endpoint.MOST_AT_ONCE)]
    assert server.samples()
    assert len(server.operations._endpoint._open) <= endpoint.MOST_AT_ONCE
    for connection in held:
        connection.close()


def test_garbage_in_a_request_ends_that_connection_alone(server, caplog, capsys):
    host, port = server.url.split("/")[2].split(":")
    for sent in (b"\x16\x03\x01" + b"\x00" * 200 + b"\r\n\r\n", b"GET /" + b"a" * 70_000,
                 b"POST /metrics HTTP/1.1\r\n\r\n", b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 500 + b"\r\n"):
        with socket.create_connection((host, int(port)), 10) as stranger:
            stranger.sendall(sent)
            answer = http.client.HTTPResponse(stranger)
            try:
                answer.begin()
                assert answer.status >= 400
            except (http.client.HTTPException, OSError):
                pass
    assert server.samples()
    assert not caplog.text and not capsys.readouterr().err


def test_where_others_can_read_is_said_and_a_taken_port_is_an_error(tmp_path):
    open_to_all = Server(tmp_path / "a", "--metrics", "0.0.0.0:0")
    assert "Other machines can read them" in open_to_all.console.file.getvalue()
    port = open_to_all.url.rpartition(":")[2].removesuffix("/metrics")
    with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port} for --metrics"):
        Server(tmp_path / "b", "--metrics", port)
    open_to_all.end()
    with socket.create_server(("127.0.0.1", int(port))):
        pass  # the port is free again


def test_without_prometheus_client_the_way_to_install_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ValueError, match=re.escape("pip install 'fedlora[metrics]'")):
        Server(tmp_path, "--metrics", "0")


@pytest.mark.parametrize("given", ["", "x", "70000", "localhost:", "a b:1 ", "-1"])
def test_an_endpoint_that_is_none_is_refused(given, capsys):
    with pytest.raises(SystemExit):
        read_config(ServerConfig, [f"--metrics={given}"])
    assert "is not a port" in capsys.readouterr().err


def test_the_documentations_table_is_the_servers_metrics(server, tmp_path):
    """Names, types and labels; the certificate's metric is there only with TLS."""
    server.trackers.begin(replace(RUN, rounds=2), ())
    server.trackers.evaluated(1, {"accuracy": 0.5})
    server.trackers.finished(RoundRecord(1))
    found = {("fedlora_certificate_expiry_timestamp_seconds", "gauge", "")}
    for family in parsed(server.get()[2]):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        found.add((name, family.type, ", ".join(labels)))
    rows = re.findall(r"^\| `(fedlora_\w+)` \| (\w+) \|([^|]*)\|", DOCS.read_text("utf-8"), flags=re.MULTILINE)
    documented = {(name, kind, ", ".join(sorted(re.findall(r"`(\w+)`", labels)))) for name, kind, labels in rows}
    assert documented == found


def test_the_documentations_alerts_name_metrics_that_exist():
    text = DOCS.read_text("utf-8")
    [rules] = re.findall(r"```yaml\n(groups:.*?)```", text, flags=re.DOTALL)
    table = set(re.findall(r"^\| `(fedlora_\w+)` \|", text, flags=re.MULTILINE))
    named = set(re.findall(r"fedlora_\w+", "\n".join(re.findall(r"expr: (.*)", rules))))
    assert len(re.findall(r"alert:", rules)) == 3 and named and named <= table
    assert {f'phase="{phase}"' for phase in re.findall(r'phase="([\w-]+)"', rules)} <= {
        f'phase="{phase}"' for phase in PHASES}
