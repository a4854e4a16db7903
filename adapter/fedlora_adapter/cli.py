"""The command fedlora-adapter: look at finished LoRA adapters, and make new ones of them.

It reads folders that PEFT wrote, whoever trained them, and opens no connection.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from fedlora.config import Parser, Subcommand, listed, run_subcommand
from fedlora.config.completion import add_completion

SUBCOMMANDS = {
    "inspect": Subcommand("fedlora_adapter.inspect_command", "measures an adapter, also against its base and others"),
    "resize": Subcommand("fedlora_adapter.resize_command", "writes an adapter at a smaller rank"),
    "combine": Subcommand("fedlora_adapter.combine_command", "makes one adapter of several"),
    "route": Subcommand("fedlora_adapter.route_command", "puts adapters together, of which each token takes some"),
    "transfer": Subcommand("fedlora_adapter.transfer_command", "teaches another base model what an adapter does"),
    "prune-base": Subcommand("fedlora_adapter.prune_command", "writes a smaller base model to train adapters on"),
    "recover": Subcommand("fedlora_adapter.recover_command", "makes an adapter of a pruned base one of the full model")}

EXIT_CODES = "exit codes: 0 done; 2 wrong input: correct it; 130 interrupted. "


def parser() -> Parser:
    """Return the command's parser, which knows --help, --version and --print-completion alone."""
    made = Parser(prog="fedlora-adapter", usage=f"fedlora-adapter {{{','.join(SUBCOMMANDS)}}} ADAPTER … [options]",
                  description="Look at finished LoRA adapters, and make new ones of them. An adapter is a folder as "
                  "PEFT writes it, with adapter_config.json and adapter_model.safetensors.",
                  epilog=EXIT_CODES + listed("fedlora-adapter", SUBCOMMANDS), subcommands=SUBCOMMANDS)
    add_completion(made, None, SUBCOMMANDS)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 when done, 2 for wrong input, 130 if interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if (ended := run_subcommand(argv, "fedlora-adapter", SUBCOMMANDS)) is not None:
            return ended
        made = parser()
        made.parse_args(argv)
        made.error(f"name a sub-command first: {', '.join(SUBCOMMANDS)}; --help says what they do")
    except KeyboardInterrupt:
        print("fedlora-adapter: interrupted; nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
