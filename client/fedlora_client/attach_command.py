"""The command fedlora-client attach-audit: add an audit's lower bound on ε to a run's privacy report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedlora.config import Parser, faults_in_words


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(
        prog="fedlora-client attach-audit", description="Add an audit's lower bound on ε to the privacy report of a "
        "finished run, and sign it anew with this machine's key. The audit must have been run with the same noise "
        "multiplier, sampling rate, number of steps, clip norm, adapter family and δ; if it was not, the options for "
        "another audit are shown.")
    made.add_argument("report", type=Path, help="path of the run's privacy.json")
    made.add_argument("audit", type=Path, help="path of the audit.json that fedlora-simulate audit wrote")
    return made


@faults_in_words("fedlora-client attach-audit")
def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code: 0 done, 2 wrong input."""
    options = parser().parse_args(argv)
    path = attach(options.report, options.audit)
    print(f"{path.with_suffix('.md')} states the audit's lower bound. The report was signed anew.")
    return 0


def attach(report: Path, audit: Path) -> Path:
    """Add an audit to a report, and write the report, its signature and its page anew.

    Args:
        report: the report, as `fedlora.privacy.report.read_signed` reads it.
        audit: the audit.json.

    Returns:
        The path of privacy.json.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the report does not verify or is not this machine's, or the audit does not fit it.
    """
    from fedlora.privacy.report import (
        attached,
        load_or_create_key,
        public_key,
        read_audit,
        read_signed,
        sign,
        verify,
        write_report,
    )
    from fedlora.privacy.report.figures import VERSION

    from . import paths

    verified = verify(read_signed(report))
    if verified.report["version"] != VERSION:
        raise ValueError(f"{report} has version {verified.report['version']}, which has no place for an audit; only "
                         f"reports of version {VERSION} have")
    if not paths.signing_key().exists() or public_key(key := load_or_create_key(paths.signing_key())) != (
            verified.public_key):
        raise ValueError(f"{report} was signed by {verified.public_key}, which is not this machine's key; run the "
                         "command as the user, and on the machine, that took part in the run")
    return write_report(report.parent, sign(attached(verified.report, read_audit(audit)), key))
