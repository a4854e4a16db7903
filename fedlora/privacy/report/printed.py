"""The verification of a report in a file, as a terminal shows it: its figures, what they prove, and who signed it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedlora.privacy.accounting import four_digits, short
from fedlora.privacy.report.dsse import read_signed
from fedlora.privacy.report.facts import CERTIFICATE
from fedlora.privacy.report.sums import several_clients
from fedlora.privacy.report.verification import Verified, verify

VERIFIED, NOT_VERIFIED, WHOSE = 0, 2, 3
"""Exit codes: consistent and signed by a known key; not so; consistent, and signed by a key that nobody vouches for."""


def verify_file(path: Path, console: Console, public_key: str | None = None, *, known: Mapping[str, str] | None = None,
                any_key: bool = False, clients: int | None = None) -> int:
    """Verify the report in a file, and print its figures and what they prove.

    Args:
        path: a privacy.json or privacy.dsse.json.
        console: where to print.
        public_key: the author's, 64 hexadecimal digits; None accepts any author and prints the key.
        known: public key → whose it is, of further keys that are known here.
        any_key: whether a valid signature is enough, whoever made it.
        clients: a number of clients that may hold one person's records, to print what the sums cost that person.

    Returns:
        0 if the report is consistent and signed by `public_key` or a known key (or `any_key` is set); 3 if it is signed
        by another one; else 2, also if there is no figure for `clients`.
    """
    try:
        verified = verify(read_signed(path), public_key)
    except OSError as error:
        console.print(f"[bold red]Not verified.[/] {escape(str(path))}: {escape(str(error.strerror))}")
        return NOT_VERIFIED
    except ValueError as error:
        console.print(f"[bold red]Not verified.[/] {escape(str(path))}: {escape(str(error))}.", soft_wrap=True)
        return NOT_VERIFIED
    _show(verified, console)
    if clients is not None:
        try:
            epsilon = four_digits(several_clients(verified.report, clients))
        except ValueError as error:
            console.print(f"[bold red]The report has no ε for {clients} clients.[/] {escape(str(error))}.",
                          soft_wrap=True)
            return NOT_VERIFIED
        console.print(f"One person's records at {clients} clients: ε = {epsilon} in the sums at the run's maximum, if "
                      "the others sample as this one does and clip to the plan's clip norm or less.", soft_wrap=True)
    if public_key is not None:
        console.print(f"Signed by {verified.public_key}, the key that you named.", soft_wrap=True)
        return VERIFIED
    if whose := (known or {}).get(verified.public_key):
        console.print(f"Signed by {verified.public_key}, {whose}.", soft_wrap=True)
        return VERIFIED
    if any_key:
        console.print(f"Signed by {verified.public_key}; nobody has said whose key that is.", soft_wrap=True)
        return VERIFIED
    console.print(f"[bold yellow]The signature is valid, but by whom?[/] Signed by {verified.public_key}. Compare it "
                  "with the key that the author gave you, and pass that one as --public-key (--any-key accepts any).",
                  soft_wrap=True)
    return WHOSE


def _show(verified: Verified, console: Console) -> None:
    if verified.guarantee:
        table = Table("figure", "accountant", "stated", "recomputed",
                      title=f"ε at δ = {short(verified.delta or 0.0, up=True)}")
        for check in verified.checks:
            here = "not computed" if check.recomputed is None else four_digits(check.recomputed)
            table.add_row(check.label, check.accountant,
                          "not stated" if check.stated is None else four_digits(check.stated), here)
        console.print(table)
    console.print(escape(verified.text), soft_wrap=True)
    for connection in verified.connections:
        console.print(f"C{CERTIFICATE[1:]}: {escape(connection)}.", soft_wrap=True, highlight=False)
    if audit := verified.report.get("audit"):
        console.print(f"An audit is attached: ε is at least {four_digits(audit['epsilon'], down=True)}, with "
                      f"{audit['confidence']:.0%} confidence, measured in a run of the same mechanism. It is the "
                      "author's statement and is not recomputed here.", soft_wrap=True)
