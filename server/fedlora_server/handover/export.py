"""The command fedlora-server export: writes a run's adapter, or the model with the adapter merged into its weights."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.config import Parser, faults_in_words
from fedlora.config import values as parse

from .arguments import add_model, offline_unless

if TYPE_CHECKING:  # imported late, so that --help is quick
    from fedlora.adapters import Provenance

    from .stored_run import StoredRun

DTYPES = ("float32", "bfloat16", "float16")


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(
        prog="fedlora-server export", usage="fedlora-server export RUN [--out DIR] [--merged DIR] [options]",
        description="Write the adapter of a run after its last finished round, also of a run that was killed or still "
        "lasts; or the base model with the adapter merged into its weights, which transformers loads without PEFT. "
        "Folders are written completely or not at all. Only a folder that an earlier export of this run wrote is "
        "replaced.",
        epilog="exit codes: 0 written; 2 wrong input, or a file cannot be read or written")
    made.add_argument("run", type=parse.path, metavar="RUN", help="the run's folder")
    made.add_argument("--out", type=parse.path, metavar="DIR", help="folder for the adapter [RUN/adapter; none with "
                      "--merged]")
    made.add_argument("--merged", type=parse.path, metavar="DIR", help="folder for the merged model")
    made.add_argument("--dtype", choices=DTYPES, default="float32", help="number format of the merged model's weights; "
                      "float32, in which the run computed, keeps its predictions [float32]")
    add_model(made)
    card = made.add_argument_group("model card")
    card.add_argument("--data-description", type=parse.words, metavar="TEXT|@FILE", help="what the data were, in your "
                      "words, or in those of a file [that of the run]")
    card.add_argument("--statements", type=parse.path, nargs="+", action="extend", default=[],
                      metavar="privacy.dsse.json", help="privacy reports that clients signed and handed over: the "
                      "card then says their ε")
    card.add_argument("--public-key", type=_key, action="append", default=[], metavar="CLIENT=HEX", help="the key with "
                      "which a client must have signed its statement; get it from the institution. Give it once for "
                      "each client")
    card.add_argument("--name-clients", action="store_true", help="name the clients in the card, which otherwise "
                      "states their number alone")
    return made


def _key(given: str) -> tuple[str, str]:
    """Parse a client's name and its public key."""
    name, _, key = given.rpartition("=")
    if not name or not re.fullmatch(r"[0-9a-f]{64}", key.strip().lower()):
        raise argparse.ArgumentTypeError(f"{given!r} is not of the form CLIENT=HEX, with 64 hexadecimal digits")
    return name.strip(), key.strip().lower()


@faults_in_words("fedlora-server export")
def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code: 0 written, 2 wrong input."""
    options = parser().parse_args(argv)
    offline_unless(options.allow_download)
    from .folder import check_replaceable
    from .stored_run import stored_run

    if options.merged is None and options.dtype != "float32":
        raise ValueError(f"--dtype {options.dtype} is for --merged DIR: an adapter is always float32. Leave it out")
    run = stored_run(options.run)
    own = run.folder / "adapter"
    out: Path | None = options.out or (own if options.merged is None else None)
    for place in filter(None, (out, options.merged)):
        check_replaceable(place, run.plan.run_id, own=place.absolute() == own.absolute())
    if out is not None and options.merged is not None and out.absolute() == options.merged.absolute():
        raise ValueError(f"--out and --merged name the same folder, {out}; give each a folder of its own")
    _write(run, _provenance(run, options), out, options)
    return 0


def _provenance(run: StoredRun, options: argparse.Namespace) -> Provenance:
    """Return the facts for the model card, and warn about statements whose key nobody confirmed."""
    from .facts import provenance
    from .statements import read_statements

    keys: Mapping[str, str] = dict(options.public_key)
    if len(keys) < len(options.public_key):
        raise ValueError("--public-key gives two keys of one client; give the one that signed its statement")
    statements = read_statements(options.statements, run, keys, name_clients=options.name_clients)
    return provenance(run.plan, run.records, run.options, run.step, statements=statements,
                      data=options.data_description, name_clients=options.name_clients, simulated=run.simulated)


def _write(run: StoredRun, facts: Provenance, out: Path | None, options: argparse.Namespace) -> None:
    """Write what was asked for, and say where it is and what its card still lacks."""
    import torch

    from fedlora import adapters, models
    from fedlora_strategies.step import kept_ranks

    from .folder import whole_folder

    base, adapted = models.base_name(run.plan.model), run.adapted(options.model, allow_download=options.allow_download)
    rounds = f"after round {run.round} of {run.plan.rounds}"
    if out is not None:
        with whole_folder(out, run.plan, run.round) as folder:
            adapters.hand_on(adapted, run.state, folder, base, max_length=run.plan.max_length, run=facts,
                             prefixes=kept_ranks(adapted.layout, run.memory))
        print(f"The adapter {rounds} is in {out}." + (
            "" if (out / "adapter_config.json").exists() else
            f" PEFT cannot hold an adapter of the family {run.plan.family}: its README.md says how FedLoRA loads it."))
    if options.merged is not None:
        stored = _stored_dtype(adapted.base_path)
        with whole_folder(options.merged, run.plan, run.round) as folder:
            adapters.merge(adapted, run.state, folder, base, max_length=run.plan.max_length, run=facts,
                           dtype=getattr(torch, options.dtype))
        print(f"The merged model {rounds} is in {options.merged}. Its weights are {options.dtype}"
              f"{_about_dtype(options.dtype, stored)}.")
    if not facts.data:
        print("Its README.md does not say what the data were: --data-description TEXT does.")
    unconfirmed = sum(not one.pinned for one in facts.statements)
    if unconfirmed:
        print(f"Keys that nobody confirmed: {unconfirmed} of {len(facts.statements)}. Ask the institutions for theirs, "
              "and give them with --public-key CLIENT=HEX.")


def _stored_dtype(base: Path) -> str:
    """Return the dtype that the base model's config.json names; "" if it names none."""
    from fedlora.models.reading import config_of

    config = config_of(base)
    return str(config.get("dtype") or config.get("torch_dtype") or "")


def _about_dtype(dtype: str, stored: str) -> str:
    if dtype != "float32":
        return ": what it predicts differs from the run's by their rounding"
    if stored and stored != "float32":
        return (f", in which the run computed; the base model's are {stored}. --dtype {stored} takes half the space "
                "and rounds what was learned")
    return ""
