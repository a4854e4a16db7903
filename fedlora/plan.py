"""The contract between a server and its clients: typed values, no code.

The server proposes a `RunPlan` once and a `RoundPlan` each round; the client answers with an `Upload` or a `Refusal`.
Everything here is a frozen value that is checked when it is made, on either side of the wire.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NewType

if TYPE_CHECKING:  # the commands' --help reads this module and needs no numpy
    import numpy as np

PROTOCOL = 5
"""Version of the wire protocol. Two sides with different numbers refuse each other. It rises with each change of the
.proto's messages, of a plan's meaning, or of what is answered to what."""
CONTINUED = (4, PROTOCOL)
"""Protocols under which a run may have been begun that this version takes up again: their plans mean the same."""

STRATEGIES = ("fedavg-lora", "ffa-lora", "fed-sb", "fedsvd")
TASKS = ("classification", "causal-lm")
OPTIMIZERS = ("sgd", "adamw")
LR_SCHEDULES = ("constant", "linear")
WIRE_DTYPES = ("fp32", "bf16")
ROW, COLUMN = "row", "column:"
"""Units of privacy: each row, or "column:NAME" for all rows of a client with one value in that column together."""

LEAST_SCALE, MOST_CLIP_NORM, MOST_SCALE = 1e-6, 1e6, 1e16
"""Of clip norms and of the factors on gradients: far outside of what trains, and well within what numbers can hold. The
start from noised gradients scales by 1e10 clip norms."""

MOST_RANK = 4096
"""Of an adapter: a plan may not have a client take memory without end."""

LONGEST_LABEL, MOST_ANNOUNCED, MOST_LABELS = 64, 1000, 5000
"""Characters of a label name that a client announces, names that it does, and names that a server may give."""

ANCHOR_BYTES = 68
"""Of a ledger's sealed anchor (`fedlora.privacy.ledger.anchor`), whatever it holds."""

MOST_STEPS = 100_000
"""Of one client in one run: what an accountant takes seconds for."""

Tensors = Mapping[str, "np.ndarray"]
"""Named float32 arrays in C order; names are those of `fedlora.adapters.AdapterLayout`."""

Released = NewType("Released", Tensors)
"""Tensors that have left a client; under privacy, through the noise. Server steps are given these and what the server
made itself, so that all they do is post-processing."""


def check_unit(unit: str) -> None:
    """Raises ValueError for anything but "row" or "column:NAME"."""
    if unit != ROW and not (unit.startswith(COLUMN) and len(unit) > len(COLUMN)):
        raise ValueError(f"the privacy unit is {unit!r}; it must be row or column:NAME, as in column:patient_id")


def unit_column(unit: str) -> str | None:
    """The column that tells the units, or None where each row is one."""
    return None if unit == ROW else unit.removeprefix(COLUMN)


def check_run_id(run_id: str) -> None:
    """Raises ValueError unless it can be a run's; it names a folder at the client."""
    if len(run_id) != 16 or set(run_id) - set("0123456789abcdef"):
        raise ValueError(f"run_id is {run_id!r}; it must be 16 lower-case hexadecimal digits")


@dataclass(frozen=True)
class ModelRef:
    """A base model, named and pinned by content.

    Attributes:
        name: an alias ("minilm"), a hub id with its commit ("org/model@<40 hex>"), or "local" for a folder that
            the client must have too and names with --model PATH.
        weights_sha256: of the safetensors file (of the sorted list of "name sha256" lines if there are several).
        config_sha256: of config.json.
        tokenizer_sha256: of the tokenizer's files, listed like the weights.
    """

    name: str
    weights_sha256: str
    config_sha256: str
    tokenizer_sha256: str

    def __post_init__(self) -> None:
        if not (self.name.isprintable() and 0 < len(self.name) <= 200):
            raise ValueError(f"the model's name is {self.name[:200]!r}; it must be 1 to 200 printable characters")
        for part in ("weights_sha256", "config_sha256", "tokenizer_sha256"):
            digest = getattr(self, part)
            if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
                raise ValueError(f"{part} is {digest!r}; it must be 64 lower-case hexadecimal digits")


@dataclass(frozen=True)
class RunPlan:
    """Everything the server proposes for one run. It does not change while the run lasts.

    Attributes:
        run_id: 16 hexadecimal digits, fresh for each run.
        fedlora_version: of the server.
        strategy: one of `STRATEGIES`.
        family: adapter family, see `fedlora.adapters.FAMILIES`: which tensors are frozen, trained and uploaded.
        private: True if every client must train under differential privacy.
        labels: the label set in the order of the classifier's outputs; () for causal language models.
        max_length: tokens kept of a record.
        rank, alpha: of the adapters; the update is scaled by alpha / rank.
        targets: names of the adapted linear layers, each a full module name or a suffix of one; () adapts none.
        train_head: whether the final linear layer of a classifier is trained (and uploaded) too.
        dropout: of the adapter's input, in [0, 1).
        rounds: how many rounds are planned.
        max_participations: most rounds that one client may start in this run; privacy is calibrated to exactly it.
        local_steps: optimiser steps per round.
        expected_batch: expected number of records of a Poisson-sampled step.
        lr_schedule: "constant", or "linear": of R rounds, round t trains with lr · (1 - (t - 1) / R).
        clip_norm: L2 bound of one record's scaled gradient.
        adapter_scale, head_scale: data-independent factors on the gradients of each group before clipping.
        weight_by_examples: weight uploads by number of records, which discloses them. Only without privacy.
        wire_dtype: what adapter tensors travel as, in both directions: "fp32", or "bf16" (`fedlora.wire.dtypes`).
        private_start: round 0 comes first, one participation beside `max_participations` in which clients release
            noised gradients for the adapters to start from (`fedlora.adapters.private`). Only with privacy.
        protocol: that was spoken when the run began; one of `CONTINUED`.
    """

    run_id: str
    fedlora_version: str
    strategy: str
    family: str
    private: bool
    model: ModelRef
    task: str
    labels: tuple[str, ...]
    max_length: int
    rank: int
    alpha: float
    targets: tuple[str, ...]
    train_head: bool
    dropout: float
    rounds: int
    max_participations: int
    local_steps: int
    expected_batch: int
    optimizer: str
    lr: float
    clip_norm: float
    adapter_scale: float
    head_scale: float
    weight_by_examples: bool
    lr_schedule: str = "constant"
    wire_dtype: str = "fp32"
    private_start: bool = False
    protocol: int = PROTOCOL

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, remedy: str) -> None:
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}; {remedy}")

        check_run_id(self.run_id)
        require(self.protocol in CONTINUED, "protocol", f"this version knows {', '.join(map(str, CONTINUED))}")
        require(self.fedlora_version.isprintable(), "fedlora_version", "it must be printable")
        for name in ("labels", "targets"):
            require(all(map(str.isprintable, getattr(self, name))), name, "each must be printable")
        require(self.strategy in STRATEGIES, "strategy", f"choose one of {', '.join(STRATEGIES)}")
        require(self.task in TASKS, "task", f"choose one of {', '.join(TASKS)}")
        require(self.optimizer in OPTIMIZERS, "optimizer", f"choose one of {', '.join(OPTIMIZERS)}")
        require(self.lr_schedule in LR_SCHEDULES, "lr_schedule", f"choose one of {', '.join(LR_SCHEDULES)}")
        require(self.wire_dtype in WIRE_DTYPES, "wire_dtype", f"choose one of {', '.join(WIRE_DTYPES)}")
        for name in ("max_length", "rank", "rounds", "max_participations", "local_steps", "expected_batch"):
            require(getattr(self, name) >= 1, name, "it must be at least 1")
        require(self.rank <= MOST_RANK, "rank", f"it must be at most {MOST_RANK}")
        require(len(self.labels) <= MOST_LABELS, "labels", f"at most {MOST_LABELS} can be told apart")
        require(self.most_trainings * self.local_steps <= MOST_STEPS, "local_steps",
                f"with {self.most_trainings} trainings of a client it would do more than {MOST_STEPS:,} steps")
        for name in ("alpha", "lr"):
            require(math.isfinite(getattr(self, name)) and getattr(self, name) > 0, name, "it must be positive")
        for name, most in (("clip_norm", MOST_CLIP_NORM), ("adapter_scale", MOST_SCALE), ("head_scale", MOST_SCALE)):
            require(LEAST_SCALE <= getattr(self, name) <= most, name, f"it must be from {LEAST_SCALE:g} to {most:g}")
        require(0 <= self.dropout < 1, "dropout", "it must be in [0, 1)")
        require(len(set(self.labels)) == len(self.labels), "labels", "a label is named twice")
        require(len(set(self.targets)) == len(self.targets), "targets", "a target is named twice")
        if self.task == "classification":
            require(len(self.labels) >= 2, "labels", "classification needs at least two labels")
        else:
            require(not self.labels, "labels", "a causal language model has none")
            require(not self.train_head, "train_head", "a causal language model has no task head to train")
        require(not (self.private and self.weight_by_examples), "weight_by_examples",
                "weighting by example counts discloses them; under privacy the weights are uniform")
        require(not self.private_start or (self.private and bool(self.targets)), "private_start",
                "a start from noised gradients needs privacy, and targets to start")
        require(bool(self.targets) or self.train_head, "targets",
                "nothing would be trained: name targets or train the head")

    @property
    def most_trainings(self) -> int:
        """What one client may begin at most: its rounds, and the release before them."""
        return self.max_participations + self.private_start

    @property
    def scaling(self) -> float:
        """Factor on the low-rank update: s = alpha / rank."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class RoundPlan:
    """One order to train.

    Attributes:
        run: the run it belongs to.
        round: counted from 1; 0 for the release of a private start.
        attempt: 0 for the round's first cohort, one more for each later draft of idle clients.
        shared_sha256: digest (`fedlora.wire.digest`) of the tensors that are frozen during the round, which a client
            that already holds them is not sent again.
    """

    run: RunPlan
    round: int
    attempt: int
    shared_sha256: str

    def __post_init__(self) -> None:
        if self.round < 0 or self.attempt < 0:
            raise ValueError(f"round {self.round}, attempt {self.attempt} cannot be; both are counted up from 0")
        if len(self.shared_sha256) != 64 or set(self.shared_sha256) - set("0123456789abcdef"):
            raise ValueError("shared_sha256 must be 64 lower-case hexadecimal digits")  # it names a file at the client

    @property
    def lr(self) -> float:
        """The learning rate of this round. Rounds beyond the planned ones keep the last one's."""
        if self.run.lr_schedule == "constant":
            return self.run.lr
        return self.run.lr * (1 - (min(self.round, self.run.rounds) - 1) / self.run.rounds)

    @property
    def key(self) -> tuple[str, int, int]:
        """(run, round, attempt): a client never trains twice for one key."""
        return self.run.run_id, self.round, self.attempt


@dataclass(frozen=True)
class Upload:
    """What one client sends for one round. Under privacy, everything in it has passed through the noise.

    In round 0 the tensors are by how much the release's steps moved them: its noised gradients.

    Attributes:
        tensors: the trained tensors after the round, float32, rounded to what the wire dtype can carry.
        steps: optimiser steps done.
        delta, noise_multiplier: of the client's guarantee; None without privacy.
        num_examples, train_loss: only without privacy, else None.
        anchor: of the client's ledger, sealed, for the server to keep; empty where it has no real one, or nobody keeps
            it. Made when the upload leaves, and not stored with it.
    """

    run_id: str
    round: int
    attempt: int
    tensors: Released
    steps: int
    delta: float | None = None
    noise_multiplier: float | None = None
    num_examples: int | None = None
    train_loss: float | None = None
    anchor: bytes = b""


REFUSALS: Mapping[str, str] = {
    "policy": "the client's policy does not allow this",
    "budget": "the client's privacy budget does not allow this",
    "unavailable": "the client cannot train now",
    "too-late": "the round was closed, or never asked this client",
    "missing-tensors": "the client does not hold the frozen tensors; send them again",
    "invalid-tensors": "the tensors received do not fit the plan",
    "model-mismatch": "the client's base model is not the plan's",
    "version-mismatch": "the two sides' versions do not fit each other",
    "privacy-mismatch": "the client's --epsilon contradicts the server's --privacy",
    "name-in-use": "another live client has this name",
    "labels": "the labels that the client declares do not fit the plan's label set, or it declares none",
}
"""Every code with which one side declines, and its fixed meaning. Under privacy none depends on a row's content;
without it "labels" can tell that some row has a label outside the plan's set."""


@dataclass(frozen=True)
class Refusal:
    """A typed no.

    Attributes:
        code: one of `REFUSALS`.
        detail: more for the other side, never anything from private data; empty for policy, budget and unavailable.
    """

    code: str
    detail: str = ""

    def __post_init__(self) -> None:
        if self.code not in REFUSALS:
            raise ValueError(f"{self.code!r} is not a refusal code; the codes are {', '.join(REFUSALS)}")

    def __str__(self) -> str:
        return f"{REFUSALS[self.code]}{': ' + self.detail if self.detail else ''} [{self.code}]"


class Refused(Exception):
    """Raised where a refusal ends what was being done."""

    def __init__(self, code: str, detail: str = "") -> None:
        self.refusal = Refusal(code, detail)
        super().__init__(str(self.refusal))


GOODBYES: Mapping[str, str] = {
    "finished": "the run is finished",
    "stopped": "the coordinator stopped the run",
    "wait-timeout": "too few clients were left",
    "labels": "the label names do not fit; the coordinator has to fix the label set with --labels",
    "failed": "the server failed",
}
"""How a run can end, and the words with which the server says goodbye then."""


def to_scalars(plan: RunPlan) -> dict[str, int | float | str | bool | list[str]]:
    """The plan as flat typed values: nested `model` becomes `model_name`, `model_weights_sha256`, ….

    Inverse of `from_scalars`. The Flower ConfigRecord and the gRPC message both have exactly these fields.
    """
    flat: dict[str, int | float | str | bool | list[str]] = {}
    for f in dataclasses.fields(plan):
        value = getattr(plan, f.name)
        if isinstance(value, ModelRef):
            flat |= {f"model_{k}": v for k, v in dataclasses.asdict(value).items()}
        else:
            flat[f.name] = list(value) if isinstance(value, tuple) else value
    return flat


def from_scalars(flat: Mapping[str, object]) -> RunPlan:
    """Build a plan from `to_scalars`' values.

    Raises:
        ValueError: a field is missing, unknown, of the wrong type or out of range.
    """
    model_names = {f"model_{f.name}": f.name for f in dataclasses.fields(ModelRef)}
    kinds = {f.name: str(f.type) for f in dataclasses.fields(RunPlan) if f.name != "model"}
    kinds |= dict.fromkeys(model_names, "str")
    if set(flat) != set(kinds):
        raise ValueError(f"the plan's fields differ: missing {sorted(set(kinds) - set(flat))}, "
                         f"unknown {sorted(set(flat) - set(kinds))}; both sides need the same FedLoRA version")
    fields: dict[str, object] = {}
    for name, value in flat.items():
        kind = kinds[name]
        if kind == "tuple[str, ...]":
            if isinstance(value, str) or not all(isinstance(v, str) for v in value):  # type: ignore[attr-defined]
                raise ValueError(f"{name} must be a list of strings")
            fields[name] = tuple(value)  # type: ignore[arg-type]
        else:
            expected: tuple[type, ...] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}[kind]
            if not isinstance(value, expected) or (kind != "bool" and isinstance(value, bool)):
                raise ValueError(f"{name} must be of type {kind}, not {type(value).__name__}")
            fields[name] = float(value) if kind == "float" else value  # type: ignore[arg-type]
    model = ModelRef(**{model_names[k]: fields.pop(k) for k in model_names})  # type: ignore[arg-type]
    return RunPlan(model=model, **fields)  # type: ignore[arg-type]


def round_to_scalars(plan: RoundPlan) -> dict[str, int | float | str | bool | list[str]]:
    """`to_scalars` of the run plus the round's own `round`, `attempt` and `shared_sha256`."""
    return to_scalars(plan.run) | {"round": plan.round, "attempt": plan.attempt, "shared_sha256": plan.shared_sha256}


def round_from_scalars(flat: Mapping[str, object]) -> RoundPlan:
    """Inverse of `round_to_scalars`; raises ValueError as `from_scalars` does."""
    own = {"round": int, "attempt": int, "shared_sha256": str}
    for name, kind in own.items():
        if not isinstance(flat.get(name), kind) or isinstance(flat[name], bool):
            raise ValueError(f"{name} is missing from the round's plan or is not of type {kind.__name__}")
    run = from_scalars({k: v for k, v in flat.items() if k not in own})
    return RoundPlan(run=run, **{k: flat[k] for k in own})  # type: ignore[arg-type]


UPLOAD_METRICS = ("steps", "delta", "noise_multiplier", "num_examples", "train_loss")
"""The only scalars that may leave a client beside its tensors; those that are None are left out. The anchor is none."""


def upload_metrics(upload: Upload) -> dict[str, int | float]:
    """The upload's scalars that are not None, by name, in the order of `UPLOAD_METRICS`."""
    values = ((name, getattr(upload, name)) for name in UPLOAD_METRICS)
    return {name: value for name, value in values if value is not None}
