"""The files that a run ends with: the adapter, in PEFT's format where PEFT can hold it, and report.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedlora import adapters, models
from fedlora.files import replace_file
from fedlora.plan import RunPlan, to_scalars
from fedlora.versions import environment
from fedlora_strategies import FederatedLoRA
from fedlora_strategies.step import kept_ranks

from .checkpoint import REPORT
from .handover.facts import provenance
from .handover.folder import whole_folder
from .observer import RoundRecord, jsonable
from .rounds import FederationResult
from .run_setup import Federation

PACKAGES = ("flwr", "grpcio", "numpy", "opacus", "peft", "torch", "transformers")


def write_report(out: Path, federation: Federation, result: FederationResult, *,
                 options: Mapping[str, object] | None = None,
                 joined: Mapping[str, Mapping[str, object]] | None = None, audit_head: str | None = None) -> None:
    """Write `adapter/` and `report.json`, also for a run that ended early.

    If no round was finished, no adapter is written.

    Args:
        out: the run's folder.
        federation: the run as it was prepared.
        result: the run's outcome.
        options: the command's options, with the preset's values (`run_setup.resolved`).
        joined: client name → what the client disclosed when it joined.
        audit_head: last hash of the run's audit log; None for a simulation, which has none.
    """
    if result.rounds:
        plan, given = federation.plan, options or {}
        facts = provenance(plan, result.records, given, federation.strategy.described, simulated="partition" in given)
        with whole_folder(out / "adapter", plan, result.rounds) as folder:
            adapters.hand_on(federation.adapted, result.state, folder, models.base_name(plan.model),
                             max_length=plan.max_length, run=facts,
                             prefixes=kept_ranks(federation.adapted.layout, federation.strategy.memory))
    report = describe(federation.plan, federation.strategy, result, options or {}, joined or {})
    if audit_head is not None:
        report["audit_head"] = audit_head
    text = json.dumps(jsonable(report), indent=1, allow_nan=False)
    replace_file(out / REPORT, f"{text}\n".encode(), 0o666)


def describe(plan: RunPlan, strategy: FederatedLoRA, result: FederationResult, options: Mapping[str, object],
             joined: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """Return the content of report.json: all that is needed to understand the run and to repeat it.

    It holds no ε, because each client accounts for its own and does not tell the server.

    Args:
        plan: the run's plan.
        strategy: its strategy.
        result: the run's outcome.
        options: the command's options, with the preset's values.
        joined: client name → what the client disclosed when it joined.
    """
    evaluated = [record for record in result.records if record.evaluation]
    return {
        "ended": result.ended,
        "why": result.why,
        "finished_rounds": result.rounds,
        "resumed_after_rounds": list(result.resumed),
        "evaluation": {"before": None if evaluated[0].round else evaluated[0].evaluation,
                       "after": evaluated[-1].evaluation, "after_round": evaluated[-1].round} if evaluated else None,
        "plan": to_scalars(plan),
        "strategy": {"exact": strategy.exact, "linear": strategy.linear, **strategy.described},
        "options": dict(options),
        "versions": environment(PACKAGES),
        "values_per_client": asdict(strategy.traffic),
        "bytes": {"up": sum(r.bytes_up for r in result.records), "down": sum(r.bytes_down for r in result.records)},
        "seconds": sum(r.seconds for r in result.records),
        "disclosed": disclosures(result.records, joined),
        "rounds": [asdict(record) for record in result.records],
    }


def disclosures(records: Sequence[RoundRecord], joined: Mapping[str, Mapping[str, object]]
                ) -> dict[str, dict[str, dict[str, Any]]]:
    """Return all that each client told the server beside its tensors: when it joined, and in each round."""
    said: dict[str, dict[str, dict[str, Any]]] = {name: {"joined_with": dict(about)} for name, about in joined.items()}
    for record in records:
        for name, scalars in record.disclosed.items():
            said.setdefault(name, {}).setdefault("rounds", {})[str(record.round)] = dict(scalars)
    return dict(sorted(said.items()))
