"""The facts about a run that its model card states (`fedlora.adapters.Provenance`), from its plan and its records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import fedlora
from fedlora.adapters import Noise, Provenance, Statement
from fedlora.plan import RunPlan
from fedlora.versions import versions
from fedlora_server.observer import RoundRecord

PACKAGES = ("torch", "transformers", "peft", "opacus", "numpy")
"""Packages whose versions a model card lists after FedLoRA's."""


def participants(records: Iterable[RoundRecord]) -> tuple[str, ...]:
    """Return the names of the clients whose uploads a round took, sorted."""
    return tuple(sorted({name for record in records for name in record.uploaded if name not in record.rejected}))


def noise(records: Sequence[RoundRecord]) -> Noise | None:
    """Return the noise that the uploads of finished rounds stated; None if none stated any."""
    sigmas: list[float] = []
    deltas: list[float] = []
    steps: Counter[str] = Counter()
    for record in records:
        for name, said in record.disclosed.items():
            steps[name] += int(said.get("steps", 0))
            sigmas += [float(said["noise_multiplier"])] if "noise_multiplier" in said else []
            deltas += [float(said["delta"])] if "delta" in said else []
    if not (sigmas and deltas):
        return None
    return Noise((min(sigmas), max(sigmas)), (min(deltas), max(deltas)), max(steps.values()))


def provenance(plan: RunPlan, records: Sequence[RoundRecord], options: Mapping[str, Any], step: Mapping[str, Any], *,
               statements: Sequence[Statement] = (), data: str | None = None, name_clients: bool = False,
               simulated: bool = False) -> Provenance:
    """Return what a model card states about a run.

    Args:
        plan: the run's plan.
        records: one record for each finished round.
        options: the options of the command.
        step: the parts of the server step (`Recipe.described`).
        statements: the clients' verified privacy statements.
        data: what the data were, in the coordinator's words; None for what --data-description said.
        name_clients: name the clients; otherwise only their number is stated.
        simulated: whether one machine played all clients.
    """
    evaluated = [record for record in records if record.evaluation]
    names, seed = participants(records), options.get("seed")
    said = data if data is not None else str(options.get("data_description") or "")
    return Provenance(
        plan=plan, rounds=max((record.round for record in records), default=0), clients=len(names),
        names=names if name_clients else (), data=said, figures=evaluated[-1].evaluation if evaluated else {},
        evaluated_after=evaluated[-1].round if evaluated else 0, noise=noise(records), statements=statements,
        simulated=simulated, server_step=_in_words(step), seed=seed if isinstance(seed, int) else None,
        versions={"FedLoRA": fedlora.__version__, **versions(PACKAGES)})


def _in_words(step: Mapping[str, Any]) -> str:
    """Return the parts of a server step in words: "reduction mean, optimizer sgd"."""
    parts = []
    for part in ("reduction", "optimizer", "refactorization"):
        told = step.get(part)
        name = told.get("name") if isinstance(told, Mapping) else told
        if isinstance(name, str):
            parts.append(f"{part} {name}")
    return ", ".join(parts)
