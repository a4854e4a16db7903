"""The command fedlora-server: waits for clients, combines their updates, writes a PEFT adapter and a report."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from fedlora.config import ServerConfig, Subcommand, listed, read_config, run_subcommand
from fedlora.files import PASSING

SUBCOMMANDS = {
    "init": Subcommand("fedlora_server.init", "writes a TOML file with every option for --config"),
    "presets": Subcommand("fedlora_server.presets", "shows the strategies' values"),
    "pki": Subcommand("fedlora_server.pki.command", "makes certificates for --tls"),
    "kit": Subcommand("fedlora_server.kit", "writes the file with which institutions join"),
    "status": Subcommand("fedlora_server.operations.command:status", "shows what a running server does"),
    "stop": Subcommand("fedlora_server.operations.command:stop", "stops a running server"),
    "forget": Subcommand("fedlora_server.forget", "frees a client's name"),
    "audit-log": Subcommand("fedlora_server.audit.command", "checks and shows a run's audit log"),
    "export": Subcommand("fedlora_server.handover.export", "writes a run's adapter, or the merged model"),
    "predict": Subcommand("fedlora_server.handover.predict", "labels the rows of a file"),
    "generate": Subcommand("fedlora_server.handover.generate", "continues texts")}

EXIT_CODES = ("exit codes: 0 finished; 1 ended early, for lack of clients or by a fault of this machine (continue with "
              "--resume); 2 the command, a file or the clients' labels must be corrected first, or the training "
              "diverged; 130 stopped by Ctrl-C, 143 suspended by SIGTERM (continue with --resume or the same command). "
              + listed("fedlora-server", SUBCOMMANDS))

TLS_1_3_ALONE = "ECDHE-RSA-AES128-GCM-SHA256"
"""A server whose certificate is ECDSA cannot agree on TLS 1.2 where this is its only suite. TLS 1.3 has suites of its
own, which the setting does not touch."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if (ended := run_subcommand(argv, "fedlora-server", SUBCOMMANDS)) is not None:
        return ended
    options = read_config(ServerConfig, argv, epilog=EXIT_CODES, subcommands=SUBCOMMANDS, begun_with=begun_with)
    set_environment(allow_download=options.allow_download)

    from fedlora.console import log_to_stderr, say_why, stderr_that_never_blocks

    signal.signal(signal.SIGTERM, _terminate)  # until the run installs its own handler
    with stderr_that_never_blocks(options.log_format):
        log_to_stderr()
        try:
            return _run(options)
        except KeyboardInterrupt as stopped:
            say_why("fedlora-server: stopped before it listened for clients; nothing was changed")
            return 143 if isinstance(stopped, _Terminated) else 130
        except OSError as error:
            say_why(f"fedlora-server: {error.filename or 'a file'}: {error.strerror or error}")
            return 1 if error.errno in PASSING else 2


def set_environment(*, allow_download: bool) -> None:
    """Turn off telemetry, TLS before 1.3, and access to the hub unless it is allowed.

    Call this before Flower, gRPC and the Hugging Face libraries are imported, because they read the environment then.

    Args:
        allow_download: False lets the Hugging Face libraries use only what is on this machine.
    """
    os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", HF_HUB_DISABLE_TELEMETRY="1")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # FedLoRA's own messages say more
    os.environ["GRPC_SSL_CIPHER_SUITES"] = TLS_1_3_ALONE
    if not allow_download:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


class _Terminated(KeyboardInterrupt):
    """The exception that SIGTERM raises, as Ctrl-C raises KeyboardInterrupt."""


def _terminate(number: int, frame: object) -> None:
    raise _Terminated


def begun_with(folder: Path) -> dict[str, object]:
    """Return the options of the run in a folder, for `fedlora.config.read_config`."""
    from .checkpoint import options_of

    return options_of(folder)


def _run(options: ServerConfig) -> int:
    from fedlora.console import messages, say_why
    from fedlora.json_lines import JsonConsole

    from .app import serve
    from .checkpoint import REPORT
    from .dry_run import dry_run
    from .page import FILE
    from .summary import summary

    console = messages()
    try:
        if options.dry_run:
            dry_run(options, console)
            return 0
        served = serve(options, console)
    except (ValueError, MemoryError) as error:
        say_why(f"fedlora-server: {error}")
        return 2
    code = {"finished": 0, "wait-timeout": 1, "diverged": 2, "stopped": 130, "suspended": 143}[served.ended]
    result, out = served.result, served.out
    if result is None:
        console.print(f"Stopped before a round could begin; fedlora-server --resume {out} goes on.", soft_wrap=True)
        return code
    if not isinstance(console, JsonConsole):
        console.print(summary(json.loads((out / REPORT).read_text())))
    adapter = f"The adapter is {out / 'adapter'}, the" if result.rounds else "There is no adapter yet. The"
    console.print(f"{result.rounds} rounds finished. {adapter} report {out / REPORT}"
                  f"{f', for a browser {out / FILE}' if (out / FILE).exists() else ''}.", soft_wrap=True)
    if result.ended == "diverged":
        say_why(f"fedlora-server: {result.why}")
    elif result.ended != "finished":
        why = "Too few clients came within --wait-timeout" if result.ended == "wait-timeout" else "The run was stopped"
        console.print(f"{why}{f' ({result.why})' if result.why else ''}; fedlora-server --resume {out} goes on.",
                      soft_wrap=True, markup=False)
    return code


if __name__ == "__main__":
    sys.exit(main())
