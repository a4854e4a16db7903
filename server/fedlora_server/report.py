"""What a run leaves behind: the adapter in PEFT format, and report.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from fedlora import adapters, models
from fedlora.files import replace_file
from fedlora.plan import RunPlan, to_scalars
from fedlora.versions import environment
from fedlora_strategies import FederatedLoRA

from .checkpoint import REPORT
from .observer import RoundRecord, jsonable
from .rounds import FederationResult
from .run_setup import Federation

PACKAGES = ("flwr", "grpcio", "numpy", "opacus", "peft", "torch", "transformers")


def write_report(out: Path, federation: Federation, result: FederationResult, *,
                 options: Mapping[str, object] | None = None,
                 joined: Mapping[str, Mapping[str, object]] | None = None) -> None:
    """Write `adapter/` and `report.json`; also for a run that ended early, but for the adapter where no round was
    finished.

    Args:
        options: of the command, with the preset's values (`run_setup.resolved`).
        joined: client name → what it disclosed when it joined.
    """
    if result.rounds:
        adapters.export(federation.adapted, result.state, out / "adapter",
                        models.base_name(federation.plan.model), max_length=federation.plan.max_length)
    report = describe(federation.plan, federation.strategy, result, options or {}, joined or {})
    text = json.dumps(jsonable(report), indent=1, allow_nan=False)
    replace_file(out / REPORT, f"{text}\n".encode(), 0o666)


def describe(plan: RunPlan, strategy: FederatedLoRA, result: FederationResult, options: Mapping[str, object],
             joined: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """All that is needed to read and to repeat the run. ε is each client's own business and not known here."""
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


def disclosures(records: Sequence[RoundRecord], joined: Mapping[str, Mapping[str, object]]) -> dict[str, dict]:
    """Per client everything that it told the server beside its tensors, and in which rounds it took part."""
    said: dict[str, dict] = {name: {"joined_with": dict(about)} for name, about in joined.items()}
    for record in records:
        for name, scalars in record.disclosed.items():
            said.setdefault(name, {}).setdefault("rounds", {})[str(record.round)] = dict(scalars)
    return dict(sorted(said.items()))
