"""The command fedlora-server kit: writes the file from which an institution takes part in the run to come."""

from __future__ import annotations

import ipaddress
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.config import Parser, build_parser, faults_in_words, read_config
from fedlora.config.server import KitConfig

if TYPE_CHECKING:  # imported late, so that --help is quick
    from fedlora.kit import Kit
    from fedlora.plan import RunPlan


def parser() -> Parser:
    """Return the command's parser."""
    return build_parser(KitConfig)


@faults_in_words("fedlora-server kit")
def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code: 0 done, 2 wrong input."""
    typed = parser().parse_args(argv)
    options = read_config(KitConfig, argv)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not options.allow_download:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if "out" not in typed:  # in a file, `out` is the run's folder
        raise ValueError("--out is missing: name the file to write the kit to, as in --out kit.toml")
    _make(options, typed.out)
    return 0


def _make(options: KitConfig, out: Path) -> None:
    """Make the kit, write it, and say what the coordinator has to do with it.

    Raises:
        ValueError: the server would refuse the options, clients cannot reach the address, or `out` is another file.
        OSError: a file cannot be read or written.
    """
    if options.dry_run:
        raise ValueError("--dry-run shows a run of fedlora-server itself; leave it out to write the kit")
    if options.resume is not None:
        raise ValueError(f"--resume {options.resume}: a kit is made from the options of a run; give those, or the "
                         "--config file that it was started with")
    authority, fingerprint = _identity(options)
    _check_not_taken(out)

    from rich.console import Console

    from fedlora.kit import Kit

    from .run_setup import fewest_uploads, planned
    from .settings import settings

    fewest_uploads(options, options.strategy, options.min_clients, "--min-clients")
    kit = Kit(options.address, _plan_of(options), options.column, authority, fingerprint)
    kit.write(out)
    console = Console(highlight=False)
    console.print(settings(options, options.strategy, planned(options, options.strategy)))
    console.print(f"\nWrote {out}. Its fingerprint, to be read aloud to each institution by telephone:\n"
                  f"  {kit.fingerprint}\n{_what_is_next(kit, out)}", markup=False, soft_wrap=True)


def _plan_of(options: KitConfig) -> RunPlan:
    """Return the plan that the server will propose if it is started with these options."""
    from fedlora.kit import NO_RUN
    from fedlora.tasks import task_named

    from .run_setup import ANY_LABELS, find_model, prepare

    announced = task_named(options.task).has_labels and not options.labels
    federation = prepare(options, options.strategy, find_model(options),
                         ANY_LABELS if announced else options.labels or (), options.seed, run_id=NO_RUN)
    return federation.plan.with_open_labels() if announced else federation.plan


def _identity(options: KitConfig) -> tuple[str, str]:
    """Return the authority's certificates and the fingerprint of the server's key; "" for both without --tls.

    Raises:
        ValueError: clients cannot call the address, or would not trust the server there.
    """
    from fedlora.identity import read_identity
    from fedlora.identity.certificates import names_host
    from fedlora.wire import is_loopback

    host, _, port = options.address.rpartition(":")
    host = host.strip("[]")
    local = is_loopback(options.address)  # raises where it is not host:port
    if _is_unspecified(host) or port == "0":
        raise ValueError(f"{options.address} is an address to listen on, and no client can call it. Give the one at "
                         "which clients reach the server: --address fl.example.org:9092")
    if options.tls is None:
        if not (local or options.insecure):
            raise ValueError(f"clients would call {options.address} without encryption; give --tls DIR (fedlora-server "
                             "pki init makes the folder), or accept that with --insecure")
        return "", ""
    identity = read_identity(options.tls)
    if not names_host(identity.certificate.pem, host):
        raise ValueError(f"the certificate in {options.tls} is not for {host}, so that no client would trust the "
                         f"server there. Give an address that it names, or have one made with --host {host}")
    return identity.authority_pem.decode("ascii", "replace"), identity.certificate.fingerprint


def _is_unspecified(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return not host


def _check_not_taken(out: Path) -> None:
    """Raise ValueError if something other than a kit is at `out`."""
    from fedlora.kit import is_kit

    if out.exists() and not is_kit(out):
        raise ValueError(f"--out {out} exists and is not a kit; name another file")


def _what_is_next(kit: Kit, out: Path) -> str:
    """Return what the coordinator has to tell and to send."""
    from fedlora.privacy import MOST_SAMPLING_RATE
    from fedlora.wire import is_loopback

    plan = kit.plan
    lines = [f"Send {out.name} to each institution, which starts: fedlora-client join {out.name}"]
    if plan.model.name == "local":
        lines.append("Send the base model's folder too: it is on this machine alone.")
    if plan.private:
        least = math.ceil(plan.expected_batch / MOST_SAMPLING_RATE)
        lines.append(f"Each needs {least:,} records or more, unless its policy has a higher max-sampling-rate.")
    if not plan.labels and plan.labels_open:
        lines.append("The kit names no labels, so each institution has to declare its own. --labels names them.")
    if is_loopback(kit.address):
        lines.append(f"{kit.address} is this machine: clients elsewhere cannot use this kit. --address names another.")
    return "\n".join(lines)
