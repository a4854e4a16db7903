"""Plans: what a server proposes once for a run (`RunPlan`), and sends in each round (`RoundPlan`)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from fedlora import registry
from fedlora.plan.found import FOUND, task_facts
from fedlora.plan.limits import (
    AGGREGATE,
    CONTINUED,
    LEAST_MEMBERS,
    LEAST_SCALE,
    LOCAL,
    LONGEST_NAME,
    LR_SCHEDULES,
    MOST_CLIP_NORM,
    MOST_HELD_OUT,
    MOST_LABELS,
    MOST_MEMBERS,
    MOST_RANK,
    MOST_SCALE,
    MOST_STEPS,
    PROTOCOL,
    WIRE_DTYPES,
    check_run_id,
    sum_threshold,
)


@dataclass(frozen=True)
class ModelRef:
    """The name of a base model and the hashes of its content.

    Attributes:
        name: an alias ("minilm"); a hub id with its commit ("org/model@<40 hex>"); or "local" for a folder, of which
            the client must have a copy and name it with --model PATH. A folder's path never leaves its machine.
        weights_sha256: SHA-256 of the safetensors file; if there are several, of the sorted lines "name sha256".
        config_sha256: SHA-256 of config.json.
        tokenizer_sha256: SHA-256 of the tokenizer's file, or of its files' sorted lines, like the weights.
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
        """The name to show to people. For a folder it has the first digits of the weights' hash in place of a path."""
        return self.name if self.name != "local" else f"local:{self.weights_sha256[:12]}"


@dataclass(frozen=True)
class RunPlan:
    """Everything the server proposes for one run. It does not change while the run lasts.

    Attributes:
        run_id: 16 hexadecimal digits, different for each run.
        fedlora_version: version of FedLoRA on the server.
        strategy: the server's name for how it combines uploads. It does not change what a client computes.
        family: key of the adapter family, which decides which tensors are frozen, trained and uploaded. This and the
            other keys are looked up among the modules installed on the client's machine (`FOUND`).
        private: whether every client must train under differential privacy.
        model: the base model.
        task: key of the task.
        labels: the label set in the order of the classifier's outputs; () if it is still open, to be fixed before the
            first round, and for tasks without labels.
        max_length: number of tokens kept of a record.
        rank: r, the rank of the adapters.
        alpha: the adapters' update is multiplied by alpha / rank.
        targets: the adapted linear layers, each a full module name or a suffix of one; () adapts none.
        train_head: whether the final linear layer of a classifier is trained and uploaded too.
        dropout: probability of dropout on the adapters' input, in [0, 1).
        rounds: number of rounds planned.
        max_participations: most rounds that one client may start in this run. Its noise is calibrated to exactly this
            number.
        local_steps: optimizer steps per round.
        expected_batch: expected number of records in a step, which are drawn by Poisson sampling.
        optimizer: key of the clients' optimizer.
        lr: learning rate of the clients in round 1.
        clip_norm: L2 norm to which each record's scaled gradient is clipped.
        adapter_scale: factor on the adapter's gradients before clipping; it does not depend on data.
        head_scale: factor on the head's gradients before clipping; it does not depend on data.
        weight_by_examples: weight uploads by number of records, which discloses that number. Only without privacy.
        lr_schedule: "constant", or "linear": of R rounds, round t trains with lr · (1 - (t - 1) / R).
        wire_dtype: number format of adapter tensors on the network, in both directions: "fp32", or "bf16"
            (`fedlora.wire.dtypes`).
        private_start: whether round 0 comes first, in which clients release their gradients for the adapters to start
            from (`fedlora.adapters.sketches`): noised if the run is private, else as they are. It is one participation
            on top of `max_participations`.
        whole_gradients: whether they release them whole, as large as the weights, and not as sketches. Only without
            privacy.
        family_options: (name, value) of the family's own options, sorted by name; they are the fields of its class.
        ranks: (module, rank) of the adapted modules whose rank is not `rank`, sorted by name.
        adjustment: key of the adjustment of noised gradients; "" for none.
        mechanism: key of the privacy mechanism: "dp-sgd", where each client's own noise protects its upload; or
            "distributed-gaussian", secure aggregation, where the server learns only sums, and each client adds its
            share of a sum's noise. A plan cannot have a mechanism that is not installed where the plan is read.
        least_members: fewest members of a roster of secure aggregation; 0 without it.
        colluding: t, how many members of a roster may tell the server all they know without a sum's promise changing.
        least_noise: least standard deviation of each client's noise under secure aggregation, in units of `clip_norm`;
            0 leaves it to the clients.
        hold_out: share of each client's units that no one trains on, whose scores are a part of the secure sum.
        protocol: version of the wire protocol with which the run began; one of `CONTINUED`.
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
    whole_gradients: bool = False
    family_options: tuple[tuple[str, float], ...] = ()
    ranks: tuple[tuple[str, int], ...] = ()
    adjustment: str = ""
    mechanism: str = LOCAL
    least_members: int = 0
    colluding: int = 0
    least_noise: float = 0.0
    hold_out: float = 0.0
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
        for name in ("strategy", "family", "task", "optimizer"):  # each client checks by itself that it knows the key
            require(getattr(self, name).isprintable() and 0 < len(getattr(self, name)) <= LONGEST_NAME, name,
                    f"it must be 1 to {LONGEST_NAME} printable characters")
        require(self.adjustment.isprintable() and len(self.adjustment) <= LONGEST_NAME, "adjustment",
                f"it must be at most {LONGEST_NAME} printable characters")
        require(self.lr_schedule in LR_SCHEDULES, "lr_schedule", f"choose one of {', '.join(LR_SCHEDULES)}")
        require(self.wire_dtype in WIRE_DTYPES, "wire_dtype", f"choose one of {', '.join(WIRE_DTYPES)}")
        for name in ("max_length", "rank", "rounds", "max_participations", "local_steps", "expected_batch"):
            require(getattr(self, name) >= 1, name, "it must be at least 1")
        require(self.rank <= MOST_RANK, "rank", f"it must be at most {MOST_RANK}")
        require(len(self.labels) <= MOST_LABELS, "labels", f"at most {MOST_LABELS} are allowed")
        require(self.most_trainings * self.local_steps <= MOST_STEPS, "local_steps",
                f"with {self.most_trainings} trainings a client would do more than {MOST_STEPS:,} steps in all")
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
                "with it, a plan can have neither family_options, nor ranks, nor an adjustment")
        require(self.protocol >= 8 or not self.whole_gradients, "protocol", "with it, a plan has no whole_gradients")
        self._check_mechanism(require)
        require(0 <= self.dropout < 1, "dropout", "it must be in [0, 1)")
        require(len(set(self.labels)) == len(self.labels), "labels", "a label is named twice")
        require(len(set(self.targets)) == len(self.targets), "targets", "a target is named twice")
        if self.task in registry.keys(FOUND["task"]):
            facts = task_facts(self.task)
            require(len(self.labels) != 1 or not facts.has_labels, "labels", f"{self.task} needs at least two labels")
            require(not self.labels or facts.has_labels, "labels", f"{facts.model_is} has no labels")
            require(facts.has_head or not self.train_head, "train_head", f"{facts.model_is} has no task head to train")
        require(not (self.private and self.weight_by_examples), "weight_by_examples",
                "weighting by example counts discloses them; under privacy the weights are uniform")
        require(not self.private_start or bool(self.targets), "private_start",
                "a start from the clients' gradients needs at least one target")
        require(not (self.private_start and self.ranks) or self.whole_gradients, "ranks",
                "a start from sketches of the clients' gradients needs the same rank in all layers; choose another "
                "start")
        require(not self.whole_gradients or (self.private_start and not self.private), "whole_gradients",
                "only a start from the clients' gradients has them, in a run without privacy")
        require(bool(self.targets) or self.train_head, "targets",
                "nothing would be trained: name targets or train the head")

    def _check_mechanism(self, require: Callable[[bool, str, str], None]) -> None:
        """Check that the mechanism is installed, and that the other values fit secure aggregation or its absence."""
        known = registry.keys(FOUND["mechanism"])
        require(self.mechanism in known, "mechanism", f"choose one of {', '.join(known)}")
        require(self.protocol >= 8 or self.mechanism == LOCAL, "protocol", f"with it, a plan has the mechanism {LOCAL}")
        require(math.isfinite(self.least_noise) and self.least_noise >= 0, "least_noise", "it must be at least 0")
        if not self.secure_aggregation:
            for name in ("least_members", "colluding", "least_noise", "hold_out"):
                require(not getattr(self, name), name, "only secure aggregation has it")
            return
        require(0 <= self.hold_out <= MOST_HELD_OUT, "hold_out", f"it must be from 0 to {MOST_HELD_OUT:g}")
        because = "for secure aggregation it must be"
        require(self.private, "private", f"{because} True: clients share the noise of a sum")
        require(LEAST_MEMBERS <= self.least_members <= MOST_MEMBERS, "least_members",
                f"it must be {LEAST_MEMBERS} to {MOST_MEMBERS}")
        spare = self.least_members - sum_threshold(self.least_members)
        require(0 <= self.colluding <= spare, "colluding", f"with {self.least_members} members it must be 0 to {spare}")
        require(self.local_steps == 1, "local_steps", f"{because} 1: a later step would have only its own share of the "
                                                      "noise")
        require(self.optimizer == "sgd", "optimizer", f"{because} sgd, which is linear; choose a server optimizer")
        require(not self.adjustment, "adjustment", f"{because} empty: gradients are noised only in the sum")
        require(not self.private_start, "private_start", f"{because} False; choose another start")

    @property
    def secure_aggregation(self) -> bool:
        """Whether the server learns only sums of the clients' uploads."""
        return self.mechanism == AGGREGATE

    @property
    def counted(self) -> int:
        """The number of values in a secure sum beside those of the trained tensors: the scores of a hold-out."""
        return 2 if self.hold_out else 0

    @property
    def labels_open(self) -> bool:
        """Whether the task has labels and the label set is not fixed yet."""
        return self.task in registry.keys(FOUND["task"]) and task_facts(self.task).has_labels and not self.labels

    def with_open_labels(self) -> RunPlan:
        """Return the plan as it was before its label set was fixed."""
        return replace(self, labels=())

    @property
    def most_trainings(self) -> int:
        """Most trainings that one client may start: its rounds, and the release before them if there is one."""
        return self.max_participations + self.private_start

    @property
    def scaling(self) -> float:
        """The factor on the low-rank update, s = alpha / rank."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class RoundPlan:
    """One order to train, sent to each client of a round's cohort.

    Attributes:
        run: plan of the run.
        round: number of the round, counted from 1; 0 for the release of a private start.
        attempt: 0 for the round's first cohort; 1, 2, … for later cohorts of idle clients that replace lost ones.
        frozen_sha256: digest (`fedlora.wire.tensors_digest`) of the tensors that are frozen during the round. They are
            not sent again to a client that already holds them.
        active: names of the trained tensors that train in this round and are uploaded; () for all. The others are sent
            to clients and stay unchanged.
        prefixes: (module, rank) of the adapted modules of which only the first ranks (columns of B, rows of A) take
            part in this round, sorted by name. Trained tensors travel in both directions without the others, which
            stay unchanged at the server. The factor on the update is that of the whole rank.
        until: deadline for the answer, on this process's monotonic clock in seconds. The number of seconds left is sent
            in its place. Two plans that differ only in the deadline are equal.
    """

    run: RunPlan
    round: int
    attempt: int
    frozen_sha256: str
    active: tuple[str, ...] = ()
    prefixes: tuple[tuple[str, int], ...] = ()
    until: float = field(default=math.inf, compare=False)

    def __post_init__(self) -> None:
        if math.isnan(self.until):
            raise ValueError("the deadline is not a number")
        if self.run.labels_open:
            raise ValueError("the labels are open; a round needs a fixed label set")
        if self.round < 0 or self.attempt < 0:
            raise ValueError(f"the round is {self.round} and the attempt {self.attempt}; both must be at least 0")
        if len(self.frozen_sha256) != 64 or set(self.frozen_sha256) - set("0123456789abcdef"):
            # checked because a client uses it as a file name
            raise ValueError("frozen_sha256 must be 64 lower-case hexadecimal digits")
        names = [name for name, _ in self.prefixes]
        if names != sorted(set(names)) or not all(1 <= rank <= MOST_RANK for _, rank in self.prefixes):
            raise ValueError(f"prefixes must name each module once, in order, with a rank from 1 to {MOST_RANK}")

    @property
    def lr(self) -> float:
        """The learning rate of this round. Rounds beyond the planned number keep that of the last planned round."""
        if self.run.lr_schedule == "constant":
            return self.run.lr
        return self.run.lr * (1 - (min(self.round, self.run.rounds) - 1) / self.run.rounds)

    @property
    def left_s(self) -> float:
        """Seconds left until the deadline; 0 if it has passed."""
        return max(0.0, self.until - time.monotonic())

    @property
    def is_late(self) -> bool:
        """Whether the deadline for the answer has passed."""
        return self.left_s <= 0

    @property
    def key(self) -> tuple[str, int, int]:
        """The order's identity, (run id, round, attempt). A client never trains twice for the same key."""
        return self.run.run_id, self.round, self.attempt
