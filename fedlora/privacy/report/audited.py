"""An audit's lower bound on epsilon, attached to the report of a run with the same mechanism.

`fedlora-simulate audit` trains on made-up records whose membership it draws, attacks what is released, and writes
audit.json. The bound is evidence about the software, measured in a run of its own. It proves nothing about attacks that
were not tried, so no figure of the report is made smaller by it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedlora.plan import ROW
from fedlora.privacy.report.dsse import parsed
from fedlora.privacy.report.signing import Document

SAME = {"noise_multiplier": "noise multiplier", "sampling_rate": "sampling rate", "steps": "number of steps",
        "clip_norm": "clip norm", "family": "adapter family", "delta": "δ"}
"""Field → its name, of what must be the same in audit and report."""


def read_audit(path: Path) -> dict[str, Any]:
    """Return an audit as a report holds it.

    Args:
        path: the audit.json that `fedlora-simulate audit` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no audit.json, is from a version that did not write all that must be compared, or has a value
            that makes no sense.
    """
    content = path.read_bytes()
    try:
        whole = parsed(content)
        [run] = [one for one in whole["audits"] if one["private"]]
        guesses = run["white_box"]
        audit = {"epsilon": guesses["epsilon"], "confidence": whole["confidence"], "canaries": run["canaries"],
                 "guesses": guesses["guessed_in"] + guesses["guessed_out"], "right": guesses["right"],
                 "noise_multiplier": run["noise_multiplier"], "sampling_rate": run["sampling_rate"],
                 "steps": run["rounds"], "clip_norm": run["clip_norm"], "family": run["family"],
                 "delta": run["delta"], "sha256": hashlib.sha256(content).hexdigest()}
        fine = (all(math.isfinite(audit[name]) for name in audit if name not in ("family", "sha256"))
                and isinstance(audit["family"], str) and audit["epsilon"] >= 0 and 0 < audit["confidence"] < 1)
    except (KeyError, TypeError, ValueError):
        fine = False
    if not fine:
        raise ValueError(f"{path} is no result of an audit by this version; name the audit.json that fedlora-simulate "
                         "audit wrote, or run the audit again")
    return audit


def attached(report: Document, audit: Document) -> dict[str, Any]:
    """Return a report with an audit's lower bound, which replaces one that it has.

    Args:
        report: the report, of the version that is written.
        audit: as `read_audit` returns it.

    Raises:
        ValueError: the audit is of another mechanism than the report's run, or refutes what the report guarantees.
    """
    check_audit(report, audit)
    return {**report, "audit": dict(audit)}


def check_audit(report: Document, audit: Document) -> None:
    """Check that an audit fits a report.

    Args:
        report: the report, of the version that is written.
        audit: as `read_audit` returns it.

    Raises:
        ValueError: the audit is of another mechanism than the report's run, or refutes what the report guarantees.
    """
    if report["privacy"]["no_guarantee"] is not None:
        raise ValueError("the report states no guarantee, so there is nothing that an audit could be held against")
    if report["unit"]["name"] != ROW:
        raise ValueError(f"an audit attacks single rows, and the report's run protected {report['unit']['name']}")
    if found := list(_differences(report, audit)):
        raise ValueError(f"the audit is of another mechanism than the report's run: {'; '.join(found)}. Run the audit "
                         f"again with {_options(report)}")
    claimed = report["privacy"]["guarantee"]["epsilon"]
    if audit["epsilon"] > (math.inf if claimed == "infinite" else claimed):
        raise ValueError(f"the audit refutes the report: it measured that epsilon is at least {audit['epsilon']:.4g}, "
                         f"and the report guarantees {claimed!r}. Do not rely on it, and report this as a fault")


def _differences(report: Document, audit: Document) -> Iterator[str]:
    mechanism = report["mechanism"]
    stated = {**mechanism, "steps": report["privacy"]["guarantee"]["steps"], "delta": report["privacy"]["delta"]}
    for name, words in SAME.items():
        ours, theirs = stated[name], audit[name]
        same = ours == theirs if isinstance(ours, str) else math.isclose(ours, theirs, rel_tol=1e-9)
        if not same:
            yield f"{words} {theirs!r} in the audit and {ours!r} in the report"


def _options(report: Document) -> str:
    """Return the options with which an audit has the mechanism of the report's run."""
    mechanism, privacy = report["mechanism"], report["privacy"]
    return (f"--strategy {report['run']['strategy']} --epsilon {privacy['guarantee']['epsilon']!r} "
            f"--delta {privacy['delta']!r} --declared-size {report['unit']['declared_size']} "
            f"--batch-size {mechanism['expected_batch']} --rounds {privacy['guarantee']['steps']} "
            f"--clip-norm {mechanism['clip_norm']!r}")
