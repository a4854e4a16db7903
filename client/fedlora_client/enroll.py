"""fedlora-client enroll: make this client's key, and the request that the coordinator answers with a certificate."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code: 0 done, 2 wrong input."""
    parser = argparse.ArgumentParser(
        prog="fedlora-client enroll", description="Make this client's private key, which stays here, and a request for "
        "a certificate, which goes to the coordinator. A key that is there already is kept.")
    parser.add_argument("--name", required=True, metavar="NAME", help="this client's name at the server")
    parser.add_argument("--tls", type=Path, required=True, metavar="DIR", help="the folder of key and certificate")
    options = parser.parse_args(argv)

    from fedlora import wire
    from fedlora.identity import fingerprint, make_request
    from fedlora.identity.certificates import grouped
    from fedlora.identity.folder import AUTHORITY, CERTIFICATE, KEY, REQUEST, load_key

    try:
        wire.check_name(options.name)
        make_request(options.tls, options.name)
        digits = fingerprint(load_key(options.tls / KEY).public_key())
    except ValueError as error:
        print(f"fedlora-client enroll: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"fedlora-client enroll: {error.filename or options.tls}: {error.strerror or error}", file=sys.stderr)
        return 2
    print(f"1. Send {options.tls / REQUEST} to the coordinator. It holds no secret.\n"
          f"2. Tell the coordinator this fingerprint by another way, by telephone say:\n     {grouped(digits)}\n"
          f"3. Put the two files that come back into {options.tls}, as {CERTIFICATE} and {AUTHORITY}.\n"
          f"4. Start the client with --tls {options.tls}.")
    return 0
