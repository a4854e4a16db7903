"""fedlora-client enroll: make this client's key, and the request that the coordinator answers with a certificate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedlora.config import Parser, faults_in_words


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(
        prog="fedlora-client enroll", description="Make this client's private key, which stays here, and a request for "
        "a certificate, which goes to the coordinator. A key that is there already is kept.")
    made.add_argument("--name", required=True, metavar="NAME", help="this client's name at the server")
    made.add_argument("--tls", type=Path, required=True, metavar="DIR", help="the folder of key and certificate")
    return made


@faults_in_words("fedlora-client enroll")
def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code: 0 done, 2 wrong input."""
    options = parser().parse_args(argv)

    from fedlora.identity.folder import AUTHORITY, CERTIFICATE, REQUEST

    digits = enroll(options.tls, options.name)
    print(f"1. Send {options.tls / REQUEST} to the coordinator. It holds no secret.\n"
          f"2. Tell the coordinator this fingerprint by another way, by telephone say:\n     {digits}\n"
          f"3. Put the two files that come back into {options.tls}, as {CERTIFICATE} and {AUTHORITY}.\n"
          f"4. Start the client with --tls {options.tls}.")
    return 0


def enroll(folder: Path, name: str) -> str:
    """Make a key, if the folder has none, and a request for a certificate.

    Args:
        folder: the folder of key and certificate.
        name: this client's name at the server.

    Returns:
        The key's fingerprint, in groups of four digits.

    Raises:
        ValueError: the name cannot be a client's, or the key that is there cannot be used.
        OSError: the folder cannot be written.
    """
    from fedlora import wire
    from fedlora.identity import fingerprint, make_request
    from fedlora.identity.certificates import grouped
    from fedlora.identity.folder import KEY, load_key

    wire.check_name(name)
    make_request(folder, name)
    return grouped(fingerprint(load_key(folder / KEY).public_key()))
