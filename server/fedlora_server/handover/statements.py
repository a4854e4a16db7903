"""The clients' signed privacy statements that a model card cites: each verified, and of this run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedlora.adapters import Statement
from fedlora.plan import plan_digest
from fedlora.privacy.report import Verified
from fedlora.privacy.report.figures import whom
from fedlora_server.audit.chain import FILE, read
from fedlora_server.audit.compare import compare, read_report

from .facts import participants
from .stored_run import StoredRun


def read_statements(paths: Sequence[Path], run: StoredRun, keys: Mapping[str, str], *,
                    name_clients: bool = False) -> tuple[Statement, ...]:
    """Read, verify and sort the statements, so that the card's order tells nothing.

    Args:
        paths: of each client a privacy.json with its signature beside it, or a privacy.dsse.json.
        run: the run.
        keys: client name → its public key, for the clients whose key the coordinator knows.
        name_clients: keep the clients' names.

    Raises:
        OSError: a file cannot be read.
        ValueError: a statement is not signed and consistent, is signed by another key than the client's, belongs to
            another run or to a client without a part in it, contradicts the run's audit log, or is given twice; or a
            key is given of a client without a statement.
    """
    known = set(participants(run.records))
    found: dict[str, Statement] = {}
    for path in paths:
        verified = read_report(path, "--statements")
        client = verified.report["run"]["client"]
        _check_run(path, verified, run)
        if client not in known:
            raise ValueError(f"--statements {path} is by {client!r}, and no update of that client is in this adapter. "
                             f"The clients are {', '.join(sorted(known))}")
        if client in found:
            raise ValueError(f"--statements names two statements of {client}; give the later one alone")
        if client in keys and keys[client] != verified.public_key:
            raise ValueError(f"--statements {path} is signed by {verified.public_key}, and --public-key says that the "
                             f"key of {client} is {keys[client]}. Ask the institution which is right")
        found[client] = _stated(verified, client in keys, client if name_clients else "")
    if lost := sorted(keys.keys() - found.keys()):
        raise ValueError(f"--public-key gives a key of {lost[0]}, and there is no statement of that client; give it "
                         "with --statements, or correct the name")
    return tuple(sorted(found.values(), key=lambda one: (one.client, one.public_key)))


def _check_run(path: Path, verified: Verified, run: StoredRun) -> None:
    """Check that a statement is about this run, by its id, its plan, and the uploads in the audit log if there is one.

    Raises:
        ValueError: it is not.
    """
    about = verified.report["run"]
    if about["id"] != run.plan.run_id:
        raise ValueError(f"--statements {path} is about run {about['id']}, and this is run {run.plan.run_id}; ask the "
                         "client for the statement of this run")
    if about["plan_sha256"] != (own := plan_digest(run.plan)):
        raise ValueError(f"--statements {path} is about a plan with the digest {about['plan_sha256']}, and this run's "
                         f"has {own}: they are not the same run")
    log = run.folder / FILE
    if not log.is_file():
        return
    chain = read(log)
    if chain.lines and not chain.wrong and (wrong := compare(chain.lines, verified).wrong):
        raise ValueError(f"--statements {path} does not fit the run's audit log: {wrong[0]}. fedlora-server audit-log "
                         "verify --report says more")


def _stated(verified: Verified, pinned: bool, client: str) -> Statement:
    report = verified.report
    mechanism, privacy = report["mechanism"], report["privacy"]
    return Statement(
        epsilon=verified.epsilon, delta=verified.delta, unit=whom(report["unit"]),
        noise_multiplier=mechanism["noise_multiplier"], sampling_rate=mechanism["sampling_rate"],
        steps=privacy["guarantee"]["steps"], why_not=privacy["no_guarantee"] or "", public_key=verified.public_key,
        pinned=pinned, client=client, epsilon_in_sums=verified.aggregate)
