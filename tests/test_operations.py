"""A real server that is watched, suspended, resumed and stopped by the commands for that, and not by signals."""

import json
import re
import sys
import urllib.request

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from fedlora_server.cli import main
from fedlora_server.operations.control import FILE
from tests.processes import write_rows

RECORD = "import json, sys; open(sys.argv[1], 'a').write(json.dumps(json.load(sys.stdin)) + '\\n')"


def test_a_server_is_watched_suspended_resumed_and_stopped_by_commands(deploy, tmp_path, capsys):
    deployment, events = deploy("run"), tmp_path / "events"
    deployment.server("--labels", "routine,urgent", "--min-clients", 1, "--rounds", 500, "--rank", 2,
                      "--local-steps", 2, "--batch-size", 8, "--max-length", 16, "--metrics", "0",
                      "--on-event", f'{sys.executable} -c "{RECORD}" {events}')
    deployment.client("north", write_rows(tmp_path / "north.jsonl", 0), "--epsilon", 200, seed=5)
    deployment.wait_for("north", "round 2/500: sent")

    assert main(["status", str(deployment.out), "--json"]) == 0
    now = json.loads(capsys.readouterr().out)
    assert now["rounds"]["planned"] == 500 and now["rounds"]["finished"] >= 1 and now["run_left_s"] != 0
    assert [client["name"] for client in now["clients"]] == ["north"] and now["address"] == deployment.address
    url = re.search(r"Metrics are at (\S+)", deployment.log("server")).group(1)
    with urllib.request.urlopen(url, timeout=20) as metrics:
        assert "fedlora_rounds_planned 500.0" in metrics.read().decode()
    with grpc.insecure_channel(deployment.address) as channel:
        assert HealthStub(channel).Check(HealthCheckRequest(), timeout=20).status == HealthCheckResponse.SERVING

    assert main(["stop", str(deployment.out), "--suspend"]) == 0
    assert f"--resume {deployment.out} goes on" in capsys.readouterr().out
    assert deployment.end("server") == 143 and not (deployment.out / FILE).exists()
    deployment.wait_for("north", "its run goes on when it is back")
    assert main(["status", str(deployment.out)]) == 1

    deployment.resume()
    deployment.wait_for("server", "Listening on")
    assert "goes on after round" in deployment.log("server")
    resumed = json.loads((deployment.out / "run.json").read_text())["resumed"][-1]
    deployment.wait_for("north", f"round {resumed + 2}/500: sent")
    assert main(["stop", str(deployment.out)]) == 0
    assert deployment.end("server") == 130 and deployment.end("north") == 0, deployment.log("north")
    told = [json.loads(line) for line in events.read_text().splitlines()]
    assert [event["reason"] for event in told if event["event"] == "run-ended"] == ["suspended", "stopped"]
    begun = [event["finished"] for event in told if event["event"] == "run-begun"]
    assert begun == [0, resumed]
    assert "Traceback" not in deployment.log("server") + deployment.log("north")
