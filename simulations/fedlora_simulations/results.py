"""Results of runs as comparisons need them: of a simulation's cells, and of a server's runs.

They are read from a cell's `cell.json`, or from a server's `report.json`. So runs of several commands and machines can
be compared later.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedlora.config import options_of
from fedlora.config.server import ServerConfig
from fedlora.figures import MAJORITY, headline
from fedlora_server.checkpoint import ABOUT, REPORT
from fedlora_server.observer import RoundRecord

from .cells import FILE, NOT_PART, Kept, kept_cell
from .simulated_run import Simulated

MOST_CURVES = 50
"""Most clients of a run whose own curves are kept."""

LOWER_IS_BETTER = frozenset({"perplexity", "loss", "error", "rmse", "mse", "mae"})
"""Figures of which a lower value is better. Of any other figure, a higher one is."""


@dataclass(frozen=True)
class Round:
    """One finished round of a run; round 0 is the start.

    Attributes:
        round: its number.
        figures: the evaluation; empty if the round was not evaluated.
        bytes_up: bytes that all clients sent.
        bytes_down: bytes that all clients received.
        seconds: its duration.
        uploads: number of uploads.
        update_norm: L2 norm of the change of all trained tensors.
        train_loss: mean training loss; only without privacy.
    """

    round: int
    figures: Mapping[str, float]
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    uploads: int = 0
    update_norm: float | None = None
    train_loss: float | None = None


@dataclass(frozen=True)
class Result:
    """What one run measured.

    Attributes:
        id: the cell's id; for a server's run its run id.
        method: the method.
        seed: the seed.
        status: "finished", or how the run ended early.
        why: more about a run that ended early.
        metric: name of the task's figure; None if nothing was evaluated.
        rounds: the finished rounds.
        epsilon: largest ε of all clients, for their own noise; infinite without privacy; NaN for a server's run, which
            does not know it.
        delta: largest δ of all clients; None without privacy.
        sigma: lowest and highest noise multiplier of all clients; None without privacy.
        values_up: trained values that a client uploads in a round.
        bytes_up: bytes that all clients sent.
        bytes_down: bytes that all clients received.
        seconds: how long the run took.
        resumed: the rounds after which it was interrupted and continued.
        epsilon_of_sums: largest ε of all clients towards whoever sees the sums alone; None without secure aggregation,
            and for a server's run.
        clients: client → [(round, training loss)], for at most `MOST_CURVES` clients and without privacy.
        options: the options that shape the run, with the preset's values.
        given: names of the options that were given.
        swept: swept option → its value.
        tuned: option that --tune chose → its value.
        data: "rows", "held_out", "split" and "model" → hash; None where it is not known.
        folder: the run's folder.
    """

    id: str
    method: str
    seed: int
    status: str
    metric: str | None
    rounds: tuple[Round, ...]
    epsilon: float
    delta: float | None
    sigma: tuple[float, float] | None
    values_up: int
    bytes_up: int
    bytes_down: int
    seconds: float
    why: str = ""
    resumed: tuple[int, ...] = ()
    epsilon_of_sums: float | None = None
    clients: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    given: tuple[str, ...] = ()
    swept: Mapping[str, str] = field(default_factory=dict)
    tuned: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str | None] = field(default_factory=dict)
    folder: str = ""

    @property
    def evaluated(self) -> tuple[Round, ...]:
        """The rounds that were evaluated by the task's figure."""
        return tuple(one for one in self.rounds if self.metric in one.figures)

    @property
    def value(self) -> float:
        """The figure after the last round, never the best one; NaN if there is none."""
        return self.evaluated[-1].figures[self.metric or ""] if self.evaluated else math.nan

    @property
    def before(self) -> float:
        """The figure before the first round; NaN if there is none."""
        first = self.evaluated[:1]
        return first[0].figures[self.metric or ""] if first and not first[0].round else math.nan

    @property
    def figures(self) -> Mapping[str, float]:
        """All figures on the held-out rows after the last round; empty without an evaluation."""
        return self.rounds[-1].figures if self.rounds else {}

    @property
    def adapter(self) -> Path:
        """The folder of the adapter, in PEFT's format."""
        return Path(self.folder) / "adapter"

    @property
    def report(self) -> dict[str, Any]:
        """The content of report.json."""
        report: dict[str, Any] = json.loads((Path(self.folder) / REPORT).read_text(encoding="utf-8"))
        return report

    @property
    def majority(self) -> float | None:
        """Accuracy of the most frequent label alone; None for other tasks."""
        found = [one.figures[MAJORITY] for one in self.rounds if MAJORITY in one.figures]
        return found[-1] if found and self.metric == "accuracy" else None

    @property
    def last_round(self) -> int:
        """Number of the last finished round."""
        return self.rounds[-1].round if self.rounds else 0

    @property
    def uploads(self) -> int:
        """Number of uploads over all rounds."""
        return sum(one.uploads for one in self.rounds)

    @property
    def trained_rounds(self) -> tuple[Round, ...]:
        """The finished rounds without the start, whose releases may be as large as the model."""
        return tuple(one for one in self.rounds if one.round)


def of_run(done: Simulated) -> Result:
    """Return what a run measured."""
    records = done.result.records
    sigmas = [sigma for sigma in done.noise_multipliers.values() if sigma is not None]
    return Result(
        id="", method=str(done.method), seed=done.seed, status=done.result.ended,
        metric=_metric(done),
        rounds=tuple(map(_round, records)), epsilon=max(done.epsilons.values()), delta=done.delta,
        sigma=(min(sigmas), max(sigmas)) if sigmas else None, values_up=done.federation.strategy.traffic.up,
        bytes_up=done.bytes_up, bytes_down=done.bytes_down, seconds=done.seconds, why=done.result.why,
        resumed=done.result.resumed, epsilon_of_sums=max(done.aggregate_epsilons.values(), default=None),
        clients=_losses(records))


def _metric(done: Simulated) -> str | None:
    """Return the name of the figure that runs are compared by; None if nothing was evaluated."""
    metric = done.federation.task.metric
    return metric if any(metric in record.evaluation for record in done.result.records) else None


KEPT = ("metric", "rounds", "epsilon", "delta", "sigma", "values_up", "bytes_up", "bytes_down", "seconds", "why",
        "resumed", "epsilon_of_sums", "clients")
"""Fields of a result that cell.json holds under `result`. The others follow from the rest of the file."""


def kept_of(result: Result) -> dict[str, object]:
    """Return the fields of a result that its cell.json holds under `result`."""
    return {name: value for name, value in asdict(result).items() if name in KEPT}


def _round(record: RoundRecord) -> Round:
    return Round(record.round, dict(record.evaluation), record.bytes_up, record.bytes_down, record.seconds,
                 len(record.uploaded), record.update_norm, record.train_loss)


def _losses(records: tuple[RoundRecord, ...]) -> dict[str, tuple[tuple[int, float], ...]]:
    """Return each client's training losses, which uploads tell only without privacy."""
    names = sorted({name for record in records for name, said in record.disclosed.items() if "train_loss" in said})
    return {name: tuple((record.round, record.disclosed[name]["train_loss"]) for record in records
                        if "train_loss" in record.disclosed.get(name, {})) for name in names[:MOST_CURVES]}


def read_result(folder: Path) -> Result | None:
    """Return the result of the run in a folder; None if the run has not ended yet, or there is none.

    Raises:
        ValueError: its files are damaged, or of another version of FedLoRA.
    """
    if (kept := kept_cell(folder)) is not None:
        return from_cell(kept) if kept.ended else None
    if (folder / ABOUT).is_file() and (folder / REPORT).is_file():
        return _from_server(folder)
    return None


def from_cell(kept: Kept) -> Result:
    """Return the result of a cell that has ended.

    Raises:
        ValueError: its cell.json is damaged.
    """
    about = kept.about
    try:
        found, who = about["result"], about["identity"]
        sigma = found["sigma"]
        return Result(
            id=about["id"], method=who["method"], seed=who["seed"], status=about["status"], metric=found["metric"],
            rounds=tuple(_read_round(one) for one in found["rounds"]), epsilon=float(found["epsilon"]),
            delta=found["delta"], sigma=None if sigma is None else (float(sigma[0]), float(sigma[1])),
            values_up=found["values_up"], bytes_up=found["bytes_up"], bytes_down=found["bytes_down"],
            seconds=found["seconds"], why=found["why"], resumed=tuple(found["resumed"]),
            epsilon_of_sums=_number(found.get("epsilon_of_sums")),
            clients={name: tuple((at, float(loss)) for at, loss in curve) for name, curve in found["clients"].items()},
            options=who["options"], given=tuple(about["given"]), swept=about["values"], tuned=about["tuned"],
            data={"rows": who["rows_sha256"], "held_out": who["held_out_sha256"], "split": who["split_sha256"],
                  "model": who["model"]["weights_sha256"]}, folder=str(kept.folder))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{kept.folder / FILE} is damaged ({type(error).__name__}: {error}); remove the folder, and "
                         "its run is done again") from None


def _from_server(folder: Path) -> Result:
    """Return the result of a server's run, which knows neither ε nor the clients' rows."""
    try:
        about, report = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (ABOUT, REPORT))
        options, plan, rounds = report["options"], report["plan"], report["rounds"]
        measured = tuple(Round(one["round"], {name: float(value) for name, value in one["evaluation"].items()},
                               one["bytes_up"], one["bytes_down"], one["seconds"], len(one["uploaded"]),
                               _number(one["update_norm"]), _number(one["train_loss"])) for one in rounds)
        evaluated = next((one.figures for one in measured if one.figures), {})
        return Result(
            id=plan["run_id"], method=plan["strategy"], seed=options.get("seed", 0), status=report["ended"],
            metric=next(iter(headline(evaluated)), None), rounds=measured,
            epsilon=math.nan if plan["private"] else math.inf, delta=None, sigma=None,
            values_up=report["values_per_client"]["up"], bytes_up=report["bytes"]["up"],
            bytes_down=report["bytes"]["down"], seconds=report["seconds"],
            resumed=tuple(report["resumed_after_rounds"]),
            options={name: value for name, value in options.items() if name not in NOT_PART},
            given=tuple(name for name in about["options"] if name in options_of(ServerConfig)
                        and name not in NOT_PART | {"privacy", "seed", "address", "min_clients", "strategy"}),
            data={"rows": None, "held_out": None, "split": None, "model": plan.get("model_weights_sha256")},
            folder=str(folder))
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise ValueError(f"{folder} holds a run whose {REPORT} cannot be read ({type(error).__name__}: {error})"
                         ) from None


def _read_round(about: Mapping[str, Any]) -> Round:
    return Round(about["round"], {name: float(value) for name, value in about["figures"].items()}, about["bytes_up"],
                 about["bytes_down"], about["seconds"], about["uploads"], _number(about["update_norm"]),
                 _number(about["train_loss"]))


def _number(value: float | str | None) -> float | None:
    """Return a number that JSON holds as itself or, if it is not finite, as text."""
    return None if value is None else float(value)
