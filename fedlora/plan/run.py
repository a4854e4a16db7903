"""What a server proposes: a `RunPlan` once, a `RoundPlan` each round. Frozen values, checked when they are made."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace

from fedlora import registry
from fedlora.plan.found import FOUND, task_facts
from fedlora.plan.limits import (
    CONTINUED,
    LEAST_SCALE,
    LONGEST_NAME,
    LR_SCHEDULES,
    MOST_CLIP_NORM,
    MOST_LABELS,
    MOST_RANK,
    MOST_SCALE,
    MOST_STEPS,
    PROTOCOL,
    WIRE_DTYPES,
    check_run_id,
)


@dataclass(frozen=True)
class ModelRef:
    """A base model, named and pinned by content.

    Attributes:
        name: an alias ("minilm"), a hub id with its commit ("org/model@<40 hex>"), or "local" for a folder that
            the client must have too and names with --model PATH. No folder's own name leaves its machine.
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

    @property
    def title(self) -> str:
        """As people read it. A folder's own name stays on its machine; its weights tell it from others."""
        return self.name if self.name != "local" else f"local:{self.weights_sha256[:12]}"


@dataclass(frozen=True)
class RunPlan:
    """Everything the server proposes for one run. It does not change while the run lasts.

    Attributes:
        run_id: 16 hexadecimal digits, fresh for each run.
        fedlora_version: of the server.
        strategy: the server's name for how it combines uploads; a client makes nothing of it.
        family, task, optimizer, adjustment: keys in the packages that `FOUND` names, which a client looks up among its
            own; no adjustment is "". The family says which tensors are frozen, trained and uploaded.
        private: True if every client must train under differential privacy.
        labels: the label set in the order of the classifier's outputs; () where they are open, to be fixed before the
            first round, and for tasks that have none.
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
        family_options: numbers of the family's own, by name, in order of the names; see its `Options`.
        ranks: (module, rank) of the adapted modules whose rank is not `rank`, in order of the names.
        private_start: round 0 comes first, one participation beside `max_participations` in which clients release
            noised gradients for the adapters to start from (`fedlora.adapters.sketches`). Only with privacy.
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
    family_options: tuple[tuple[str, float], ...] = ()
    ranks: tuple[tuple[str, int], ...] = ()
    adjustment: str = ""
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
        for name in ("strategy", "family", "task", "optimizer"):  # whether a client knows a key is for it to find out
            require(getattr(self, name).isprintable() and 0 < len(getattr(self, name)) <= LONGEST_NAME, name,
                    f"it must be 1 to {LONGEST_NAME} printable characters")
        require(self.adjustment.isprintable() and len(self.adjustment) <= LONGEST_NAME, "adjustment",
                f"it must be at most {LONGEST_NAME} printable characters")
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
        for name in ("family_options", "ranks"):
            names = [key for key, _ in getattr(self, name)]
            require(names == sorted(set(names)), name, "each name must be there once, in order")
            require(all(key.isprintable() for key in names), name, "each name must be printable")
        require(all(math.isfinite(value) for _, value in self.family_options), "family_options", "each must be finite")
        require(all(1 <= rank <= MOST_RANK for _, rank in self.ranks), "ranks", f"each must be from 1 to {MOST_RANK}")
        require(self.protocol >= 6 or not (self.family_options or self.ranks or self.adjustment), "protocol",
                "runs begun with it know neither options of a family, nor ranks by module, nor adjustments")
        require(0 <= self.dropout < 1, "dropout", "it must be in [0, 1)")
        require(len(set(self.labels)) == len(self.labels), "labels", "a label is named twice")
        require(len(set(self.targets)) == len(self.targets), "targets", "a target is named twice")
        if self.task in registry.keys(FOUND["task"]):
            facts = task_facts(self.task)
            require(len(self.labels) != 1 or not facts.has_labels, "labels", f"{self.task} needs at least two labels")
            require(not self.labels or facts.has_labels, "labels", f"{facts.model_is} has none")
            require(facts.has_head or not self.train_head, "train_head", f"{facts.model_is} has no task head to train")
        require(not (self.private and self.weight_by_examples), "weight_by_examples",
                "weighting by example counts discloses them; under privacy the weights are uniform")
        require(not self.private_start or (self.private and bool(self.targets)), "private_start",
                "a start from noised gradients needs privacy, and targets to start")
        require(not (self.private_start and self.ranks), "ranks",
                "a start from noised gradients has sketches of one rank; choose another start")
        require(bool(self.targets) or self.train_head, "targets",
                "nothing would be trained: name targets or train the head")

    @property
    def labels_open(self) -> bool:
        """Whether the label set is yet to be fixed."""
        return self.task in registry.keys(FOUND["task"]) and task_facts(self.task).has_labels and not self.labels

    def with_open_labels(self) -> RunPlan:
        """The same plan before its label set is fixed."""
        return replace(self, labels=())

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
        attempt: 0 for the round's first cohort, one more for each later attempt at idle clients, as backups.
        frozen_sha256: digest (`fedlora.wire.tensors_digest`) of the tensors that are frozen during the round, which a
            client that already holds them is not sent again.
        active: names of the trained tensors that train in this round and are uploaded; the others are sent to clients
            and stay as they are. () for all of them.
        until: when the answer is waited for no longer, by this process's monotonic clock. What travels is the seconds
            that are left then. It is no part of what the order is.
    """

    run: RunPlan
    round: int
    attempt: int
    frozen_sha256: str
    active: tuple[str, ...] = ()
    until: float = field(default=math.inf, compare=False)

    def __post_init__(self) -> None:
        if math.isnan(self.until):
            raise ValueError("the deadline is not a number")
        if self.run.labels_open:
            raise ValueError("the labels are open; a round needs a label set")
        if self.round < 0 or self.attempt < 0:
            raise ValueError(f"round {self.round}, attempt {self.attempt} cannot be; both are counted up from 0")
        if len(self.frozen_sha256) != 64 or set(self.frozen_sha256) - set("0123456789abcdef"):
            raise ValueError("frozen_sha256 must be 64 lower-case hexadecimal digits")  # it names a file at the client

    @property
    def lr(self) -> float:
        """The learning rate of this round. Rounds beyond the planned ones keep the last one's."""
        if self.run.lr_schedule == "constant":
            return self.run.lr
        return self.run.lr * (1 - (min(self.round, self.run.rounds) - 1) / self.run.rounds)

    @property
    def left_s(self) -> float:
        """Seconds until nobody waits for the answer any more; not negative."""
        return max(0.0, self.until - time.monotonic())

    @property
    def is_late(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self.left_s <= 0

    @property
    def key(self) -> tuple[str, int, int]:
        """(run, round, attempt): a client never trains twice for one key."""
        return self.run.run_id, self.round, self.attempt
