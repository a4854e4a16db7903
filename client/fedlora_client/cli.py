"""fedlora-client: trains on this machine's records, sends noised adapter matrices, nothing else.

`fedlora-client budget` shows what was spent, `fedlora-client verify privacy.json` checks a report; neither connects.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fedlora.config import ClientConfig, read_config
from fedlora.config.values import count

EPILOG = ("exit codes: 0 the run was finished or its coordinator stopped it; to try again: 1 it ended early, 3 no "
          "server; to mend first: 2 wrong input, 4 one side refused, 5 a round failed here, for the reason in the log, "
          "and stays charged; 130 interrupted. Also: `fedlora-client budget` "
          "shows what was spent and what is left; `fedlora-client verify privacy.json` checks a report.")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process with its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] in (["budget"], ["verify"]):
        sys.exit((_budget if arguments[0] == "budget" else _verify)(arguments[1:]))
    options = read_config(ClientConfig, arguments, epilog=EPILOG)
    set_environment(allow_download=options.allow_download)
    from fedlora.console import stderr_that_never_blocks

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with stderr_that_never_blocks():
        logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
        try:
            code = _run(options)
        except KeyboardInterrupt:
            print("fedlora-client: left; what was spent is in the ledger, what was sent in --state", file=sys.stderr)
            code = 130
    # Everything that matters is on the disk; gRPC's threads, rarely, keep an interpreter from ending by itself.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def set_environment(*, allow_download: bool) -> None:
    """Before the libraries that read it are imported: no telemetry, and no hub without --allow-download."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # our own messages say more
    if not allow_download:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _budget(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="fedlora-client budget", description="What was spent on which data set, when "
                                     "and by which run, and what is left.")
    parser.add_argument("--policy", type=Path, metavar="FILE.toml", help="[policy.toml in the user's configuration]")
    parser.add_argument("--simulated-ledger", type=Path, metavar="DIR", help="show the ledger of a demo or simulation")
    parser.add_argument("--rounds", type=count, metavar="N", help="what N more rounds would cost [1, 5 and 20]")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON instead of tables")
    options = vars(parser.parse_args(arguments))
    from .budget import show_budget

    return show_budget(**options)


def _verify(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="fedlora-client verify", description="Recompute a privacy report's ε from "
                                     "its signed history, and check the signature.")
    parser.add_argument("report", type=Path, help="privacy.json")
    parser.add_argument("--public-key", metavar="HEX", help="the client's key, from a source that you trust")
    options = parser.parse_args(arguments)
    from rich.console import Console

    from fedlora.privacy.report import verify_file

    return verify_file(options.report, Console(), public_key=options.public_key)


def _run(options: ClientConfig) -> int:
    from fedlora.console import messages
    from fedlora.files import PASSING
    from fedlora.plan import Refused
    from fedlora.wire import WireError

    from .app import EndedEarly, RoundFailed, take_part
    from .connection import ServerUnreachable

    try:
        take_part(options, messages())
    except (ValueError, MemoryError, WireError) as error:
        print(f"fedlora-client: {error}", file=sys.stderr)
        return 2
    except ServerUnreachable as error:
        print(f"fedlora-client: {error}", file=sys.stderr)
        return 3
    except RoundFailed as failed:
        print(f"fedlora-client: {failed}", file=sys.stderr)
        return 5
    except EndedEarly as early:
        print(f"fedlora-client: {early}", file=sys.stderr)
        return 1
    except Refused as refused:
        print(f"fedlora-client: {refused}", file=sys.stderr)
        return 4
    except OSError as error:
        print(f"fedlora-client: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 1 if error.errno in PASSING else 2
    return 0


if __name__ == "__main__":
    main()
