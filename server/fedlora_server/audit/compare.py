"""The audit log held against a client's signed privacy report: do both tell of the same run and the same uploads?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlora.privacy.report import Verified, read_signed, verify

from .chain import Line

Order = tuple[int, int]
"""(round, attempt)."""


@dataclass(frozen=True)
class Compared:
    """The result of holding a log against a report.

    Attributes:
        client: the report's client.
        uploads: number of uploads that both have, with the same digest.
        fingerprints: the certificates' fingerprints under which the log has them.
        public_key: the key that signed the report.
        unanswered: sent by the report, and not used by the log: it came too late, was refused, or belongs to a round
            that the log has not closed, as where the server was stopped.
        wrong: every contradiction, in words.
    """

    client: str
    uploads: int
    fingerprints: tuple[str, ...]
    public_key: str
    unanswered: tuple[Order, ...]
    wrong: tuple[str, ...]


def read_report(path: Path, option: str = "--report") -> Verified:
    """Read and verify a client's privacy.json with its signature, or its privacy.dsse.json.

    Args:
        path: the file.
        option: the option that named it, for messages.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a signed, consistent privacy report.
    """
    try:
        return verify(read_signed(path))
    except ValueError as error:
        raise ValueError(f"{option} {path} is not verified: {error}") from None


def compare(lines: Sequence[Line], verified: Verified) -> Compared:
    """Hold the lines of an audit log against a verified privacy report.

    An upload of a closed round that the report calls released and that the log has neither as uploaded nor as late or
    refused is a contradiction too, though it may have been lost on its way: the log cannot tell that from an upload
    that it leaves out.

    Args:
        lines: the log's lines, whose chain was checked.
        verified: the report.
    """
    report = verified.report
    run, wrong = report["run"], []
    if lines[0]["run"] != run["id"]:
        wrong.append(f"the log is that of run {lines[0]['run']}, and the report is about run {run['id']}")
    plans = {line["plan_sha256"] for line in lines if line["plan_sha256"]}
    if plans != {run["plan_sha256"]}:
        wrong.append(f"the plan's digest is {', '.join(sorted(plans)) or 'missing'} in the log and "
                     f"{run['plan_sha256']} in the report")
    own = [line for line in lines if line["client"] == run["client"] and line["round"] is not None]
    stated = " ".join(verified.connections)
    wrong += [f"{_named((line['round'], line['attempt']))}: the client showed a certificate with the fingerprint "
              f"{line['fingerprint']} (line {line['number']}), which the report does not state"
              for line in own if line["event"] == "uploaded" and (line["fingerprint"] or "") not in stated]
    logged = [line for line in own if line["event"] == "uploaded"]
    sent = {(training["round"], training["attempt"]): training for training in report["trainings"]
            if training["upload"] is not None}
    for line in logged:
        order = line["round"], line["attempt"]
        if order not in sent:
            wrong.append(f"{_named(order)}: the log has an upload (line {line['number']}) of which the report knows "
                         "nothing")
        elif line["sha256"] != (known := sent[order]["upload"]["sha256"]):
            wrong.append(f"{_named(order)}: the upload has the digest {line['sha256']} in the log (line "
                         f"{line['number']}) and {known} in the report")
    arrived = {(line["round"], line["attempt"]) for line in logged}
    declined = {(line["round"], line["attempt"]) for line in own if line["event"] in ("late", "refused")}
    closed = {line["round"] for line in lines if line["event"] == "closed"}
    missing = [order for order, training in sent.items()
               if training["state"] == "released" and order not in arrived]
    unanswered = tuple(order for order in missing if order in declined or order[0] not in closed)
    wrong += [f"{_named(order)}: the report has an upload that the log has not. It was lost on its way, or the log "
              "leaves it out" for order in missing if order not in unanswered]
    return Compared(run["client"], len(arrived & sent.keys()),
                    tuple(sorted({line["fingerprint"] for line in logged if line["fingerprint"]})),
                    verified.public_key, unanswered, tuple(wrong))


def _named(order: Order) -> str:
    return f"round {order[0]}, attempt {order[1]}"
