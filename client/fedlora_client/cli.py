"""The command fedlora-client: train on this machine's records and send noised adapter matrices, nothing else.

`fedlora-client join KIT.toml` begins with all that the coordinator's file says. `fedlora-client budget` shows what was
spent, `fedlora-client verify privacy.json` checks a report, and `fedlora-client attach-audit` adds an audit to it. None
of the three opens a connection.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from fedlora.config import ClientConfig, Parser, Subcommand, build_parser, listed, read_config, run_subcommand
from fedlora.config.client import JoinConfig
from fedlora.config.parser import given_options

SUBCOMMANDS = {
    "init": Subcommand("fedlora_client.init", "writes a TOML file with every option for --config"),
    "check": Subcommand("fedlora_client.check_command", "checks data, policy, model and machine, and calls nobody"),
    "join": Subcommand("fedlora_client.cli:read_join", "takes part with a coordinator's kit"),
    "enroll": Subcommand("fedlora_client.enroll", "makes a key for --tls"),
    "budget": Subcommand("fedlora_client.budget_command", "shows what was spent and what is left"),
    "verify": Subcommand("fedlora_client.verify_command", "checks a privacy.json"),
    "attach-audit": Subcommand("fedlora_client.attach_command", "adds an audit to a run's privacy.json")}

EPILOG = ("exit codes: 0 the run was finished, or its coordinator stopped it; 1 it ended early: try again; 2 wrong "
          "input: correct it; 3 no server answered: try again; 4 this client or the server refused: the log says why; "
          "5 a round failed on this machine and stays charged: the log says why, fix that first; 130 interrupted. "
          + listed("fedlora-client", SUBCOMMANDS))


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process with its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options: ClientConfig
    if arguments[:1] == ["join"]:
        options, given = read_join(arguments[1:])
    elif (ended := run_subcommand(arguments, "fedlora-client", SUBCOMMANDS)) is not None:
        sys.exit(ended)
    else:
        options = read_config(ClientConfig, arguments, epilog=EPILOG, subcommands=SUBCOMMANDS)
        given = frozenset()
    set_environment(allow_download=options.allow_download)
    from fedlora.console import log_to_stderr, say_why, stderr_that_never_blocks

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with stderr_that_never_blocks(options.log_format):
        log_to_stderr()
        try:
            code = _run(options, given)
        except KeyboardInterrupt:
            say_why("fedlora-client: interrupted; the ledger has what was spent, and --state has the last upload")
            code = 130
    # End at once: everything that matters is on the disk, and gRPC's threads sometimes keep an interpreter alive.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def set_environment(*, allow_download: bool) -> None:
    """Turn off telemetry, and access to the hub unless it is allowed.

    Call this before the Hugging Face libraries and gRPC are imported, because they read the environment then.

    Args:
        allow_download: False lets the Hugging Face libraries use only what is on this machine.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # our own messages say more
    if not allow_download:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def read_join_parser() -> Parser:
    """Return the parser of `fedlora-client join`."""
    return build_parser(JoinConfig, epilog=EPILOG)


def read_join(arguments: Sequence[str]) -> tuple[JoinConfig, frozenset[str]]:
    """Read the command line of `fedlora-client join`: the options, and the names of those that are given."""
    if arguments and not arguments[0].startswith("-"):
        arguments = [f"--kit={arguments[0]}", *arguments[1:]]
    given = given_options(JoinConfig, arguments, epilog=EPILOG)
    if "kit" not in given:
        build_parser(JoinConfig).error("name the coordinator's kit, as in fedlora-client join kit.toml")
    return JoinConfig(**given), frozenset(given)


def _run(options: ClientConfig, given: frozenset[str]) -> int:
    from fedlora.console import messages, say_why
    from fedlora.files import PASSING
    from fedlora.plan import Refused
    from fedlora.wire import WireError

    from .app import EndedEarly, RoundFailed, take_part, take_part_with_kit
    from .connection import ServerUnreachable
    from .steps import Awaiting
    from .tls import Untrusted

    console = messages()
    try:
        if isinstance(options, JoinConfig):
            take_part_with_kit(options, given, console)
        else:
            take_part(options, console)
    except Awaiting as awaits:
        say_why(f"fedlora-client: {awaits}")
        return 1
    except Untrusted as error:
        say_why(f"fedlora-client: {error}")
        return 4
    except (ValueError, MemoryError, WireError) as error:
        say_why(f"fedlora-client: {error}")
        return 2
    except ServerUnreachable as error:
        say_why(f"fedlora-client: {error}")
        return 3
    except RoundFailed as failed:
        say_why(f"fedlora-client: {failed}")
        return 5
    except EndedEarly as early:
        say_why(f"fedlora-client: {early}")
        return 1
    except Refused as refused:
        say_why(f"fedlora-client: {refused}")
        return 4
    except OSError as error:
        say_why(f"fedlora-client: {error.filename or 'a file'}: {error.strerror or error}")
        return 1 if error.errno in PASSING else 2
    return 0


if __name__ == "__main__":
    main()
