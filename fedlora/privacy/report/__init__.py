"""The privacy report of a client's run: built from facts, signed, shown on one page, and verified by anyone."""

from fedlora.privacy.report.audited import attached, read_audit
from fedlora.privacy.report.dsse import read_signed, sign
from fedlora.privacy.report.facts import (
    Disclosure,
    LifetimeAccount,
    LifetimeCharge,
    Mechanism,
    ReportedRun,
    Sums,
    TrainingEntry,
    announced,
    encrypted,
)
from fedlora.privacy.report.page import markdown
from fedlora.privacy.report.printed import verify_file
from fedlora.privacy.report.report import privacy_report, write_report
from fedlora.privacy.report.signing import canonical, load_or_create_key, public_key
from fedlora.privacy.report.verification import Verified, connections, verify

__all__ = ["Disclosure", "LifetimeAccount", "LifetimeCharge", "Mechanism", "ReportedRun", "Sums", "TrainingEntry",
           "Verified", "announced", "attached", "canonical", "connections", "encrypted", "load_or_create_key",
           "markdown", "privacy_report", "public_key", "read_audit", "read_signed", "sign", "verify", "verify_file",
           "write_report"]
