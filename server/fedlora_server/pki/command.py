"""fedlora-server pki: make certificates for the server and its clients, and say which clients may take part."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedlora.config import Parser, faults_in_words

FOLDER = Path("pki")


@faults_in_words("fedlora-server pki")
def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code: 0 done, 2 wrong input."""
    options = parser().parse_args(argv)
    return _ACTIONS[options.action](options)


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(
        prog="fedlora-server pki", description="Certificates for mutual TLS: an authority in a folder, the server's "
        "certificate, those of clients, and the list of clients that may take part.")
    actions = made.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str, *, days: bool = False) -> argparse.ArgumentParser:
        part = actions.add_parser(name, help=text, description=text)
        part.add_argument("--pki", type=Path, default=FOLDER, metavar="DIR", help="the authority's folder [pki]")
        if days:
            part.add_argument("--days", type=_days, default=365, metavar="N", help="how long it is valid [365]")
        return part

    begun = action("init", "Make an authority, the server's certificate and an empty list of clients.")
    begun.add_argument("--host", action="append", required=True, metavar="HOST",
                       help="a name or address at which clients reach the server; may be given several times")
    signed = action("sign", "Sign the request of a client and put the client on the list.", days=True)
    signed.add_argument("request", type=Path, metavar="REQUEST.csr", help="what fedlora-client enroll made")
    signed.add_argument("--out", type=Path, metavar="FILE", help="where the certificate goes [pki/issued/NAME.pem]")
    invited = action("invite", "Make key and certificate for a client that accepts a key made by the coordinator.",
                     days=True)
    invited.add_argument("name", metavar="NAME", help="the client's name")
    invited.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder for its owner")
    renewed = action("renew", "Issue a new certificate for a key that has one; NAME server is the server's.", days=True)
    renewed.add_argument("name", metavar="NAME", help="the client's name, or server")
    revoked = action("revoke", "Take a client from the list: it is disconnected within seconds.")
    revoked.add_argument("name", metavar="NAME", help="the client's name")
    action("list", "Show the certificates, until when they are valid, and who may take part.")
    return made


def _days(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 3650:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days from 1 to 3650")
    return int(text)


def _init(options: argparse.Namespace) -> int:
    from fedlora.identity.certificates import grouped

    from .authority import SERVER_NAME, Authority

    authority = Authority.create(options.pki, options.host)
    print(f"Made an authority in {options.pki}. Its ca-key.pem signs for all: keep it where only you can read it.\n"
          f"Start the server with --tls {options.pki}. Its fingerprint, for the clients' policies:\n"
          f"  {grouped(authority.issued()[SERVER_NAME].fingerprint)}")
    return 0


def _sign(options: argparse.Namespace) -> int:
    from fedlora.files import replace_file
    from fedlora.identity.certificates import day, grouped

    from .authority import Authority

    authority = Authority.open(options.pki)
    issued = authority.sign(options.request.read_bytes(), days=options.days)
    if options.out is not None:
        replace_file(options.out, issued.pem, mode=0o644)
    print(f"{issued.name} may take part, until {day(issued.not_after)}. Compare the fingerprint with its owner:\n"
          f"  {grouped(issued.fingerprint)}\n"
          f"Send {options.out or authority.file_of(issued.name)} and {options.pki / 'ca.pem'} back.")
    return 0


def _invite(options: argparse.Namespace) -> int:
    from fedlora.files import replace_file
    from fedlora.identity.folder import AUTHORITY, CERTIFICATE, make_request

    from .authority import Authority

    authority = Authority.open(options.pki)
    if options.out.exists():
        raise ValueError(f"--out {options.out} exists already; name a new folder")
    issued = authority.sign(make_request(options.out, options.name), days=options.days)
    replace_file(options.out / CERTIFICATE, issued.pem, mode=0o644)
    replace_file(options.out / AUTHORITY, (options.pki / AUTHORITY).read_bytes(), mode=0o644)
    print(f"{options.out} is the identity of {issued.name}, its key included. Hand it over by a way that nobody else "
          "can read, and delete it here.")
    return 0


def _renew(options: argparse.Namespace) -> int:
    from fedlora.identity.certificates import day

    from .authority import SERVER_NAME, Authority

    authority = Authority.open(options.pki)
    name = SERVER_NAME if options.name == "server" else options.name
    issued = authority.renew(name, days=options.days)
    where = "a running server takes it up" if name == SERVER_NAME else (
        f"send {authority.file_of(name)} to its owner, who puts it in place of certificate.pem")
    print(f"The certificate of {options.name} is valid until {day(issued.not_after)}; {where}.")
    return 0


def _revoke(options: argparse.Namespace) -> int:
    from .authority import Authority

    Authority.open(options.pki).revoke(options.name)
    print(f"{options.name} may no longer take part; a running server disconnects it within seconds.")
    return 0


def _list(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from fedlora.identity.certificates import day, utc_now

    from .authority import SERVER_NAME, Authority

    authority, now = Authority.open(options.pki), utc_now()
    listed, issued = authority.listed(), authority.issued()
    table = Table("name", "may take part", "valid until", "fingerprint", box=None, pad_edge=False)
    for name in sorted({*listed, *issued}):
        certificate = issued.get(name)
        until = day(certificate.not_after) if certificate else "another authority's"
        if certificate and certificate.why_invalid(now):
            until += " (expired)"
        elif certificate and certificate.expiry_warning(now):
            until += " (soon)"
        allowed = "server" if name == SERVER_NAME else "yes" if name in listed else "no"
        digits = listed.get(name) or (certificate.fingerprint if certificate else "")
        table.add_row(name, allowed, until, digits)
    Console().print(table, highlight=False, soft_wrap=True)
    return 0


_ACTIONS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "init": _init, "sign": _sign, "invite": _invite, "renew": _renew, "revoke": _revoke, "list": _list}
