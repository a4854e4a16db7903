"""A whole run of real processes: its JSON lines, and its audit log held against the clients' signed reports."""

import json

from fedlora.json_lines import FIELDS
from fedlora_server.audit import chain
from fedlora_server.cli import main
from tests.processes import write_rows

SMALL = ("--rank", 2, "--rounds", 2, "--local-steps", 2, "--batch-size", 8, "--max-length", 16)


def test_a_run_is_written_down_alike_by_the_server_and_by_its_clients(deploy, tmp_path, capsys):
    run = deploy("run")
    run.server("--min-clients", 2, "--log-format", "json", "--labels", "routine,urgent", *SMALL)
    data = [write_rows(tmp_path / name / f"{name}.jsonl", seed) for seed, name in enumerate(("north", "south"))]
    for file in data:
        run.client(file.stem, file, "--log-format", "json")
    assert run.end("server") == 0, run.log("server")
    assert [run.end(file.stem) for file in data] == [0, 0]

    texts = [json.loads(row)["text"] for file in data for row in file.read_text().splitlines()]
    events = {}
    for name in ("server", "north", "south"):
        lines = [json.loads(line) for line in run.log(name).splitlines()]
        assert all(list(line) == list(FIELDS) and line["message"] for line in lines)
        assert not [text for text in texts if text in run.log(name)]
        events[name] = [(line["event"], line["client"], line["round"]) for line in lines]
    assert {("joined", "north", None), ("uploaded", "south", 2), ("finished", None, 2)} <= set(events["server"])
    assert {("joined", "north", None), ("round", "north", 1), ("round", "north", 2)} <= set(events["north"])

    report = json.loads((run.out / "report.json").read_text())
    signed = sorted(run.folder.glob("state/*/*/privacy.json"))
    assert len(signed) == 2
    arguments = ["audit-log", "verify", str(run.out), "--head", report["audit_head"], "--report", *map(str, signed)]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert told.count("2 uploads are in the report and in the log") == 2 and "that of the last line" in told
    assert report["audit_head"] in run.log("server")

    file = run.out / chain.FILE
    whole = file.read_text().splitlines()
    for change, says in (({"sha256": "0" * 64}, "the upload has the digest 0000"),
                         ({"round": 7}, "the report knows nothing"),
                         ({"client": "west"}, "the report has an upload that the log has not"),
                         ({"event": "late"}, "it came too late, was refused")):
        lines, head = [], chain.NO_LINE
        for number, line in enumerate(map(json.loads, whole), start=1):
            hit = (line["event"], line["client"], line["round"]) == ("uploaded", "north", 1)
            lines.append(chain.sealed(line | change if hit else line, number, head))
            head = lines[-1]["hash"]
        file.write_bytes(b"".join(chain.spelled(line) + b"\n" for line in lines))
        code = main(["audit-log", "verify", str(run.out), "--report", *map(str, signed)])
        assert code == (0 if change == {"event": "late"} else 1)
        assert says in capsys.readouterr().out

    assert main(["audit-log", "verify", str(run.out), "--report", str(run.out / "report.json")]) == 2
    assert "is not verified: this is not a" in capsys.readouterr().err


def test_a_run_whose_audit_log_cannot_be_written_ends_and_its_clients_may_come_back(deploy, tmp_path):
    run = deploy("run")
    run.server("--min-clients", 1, "--labels", "routine,urgent", *SMALL, "--rounds", 500)
    run.client("north", write_rows(tmp_path / "north.jsonl", 0))
    run.wait_for("server", "round 1: 1 of 1 replied")
    (run.out / chain.FILE).rename(run.out / "moved")
    (run.out / chain.FILE).mkdir()
    assert run.end("server") == 2, run.log("server")
    assert run.log("server").count("cannot be written (Is a directory)") == 1
    assert f"fedlora-server: {run.out / chain.FILE}: Is a directory" in run.log("server")
    assert run.end("north") == 1 and "the server failed" in run.log("north")
    assert not chain.read(run.out / "moved").wrong
