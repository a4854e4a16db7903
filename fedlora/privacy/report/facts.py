"""What a privacy report states: facts of one client's part in one run, from which every figure follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import fedlora
from fedlora.privacy.ledger.lifetime_budget import FILTER_ORDERS


@dataclass(frozen=True)
class Mechanism:
    """What every step of the run does; it does not change while the run lasts.

    Attributes:
        noise_multiplier: sigma, noise standard deviation / clip_norm; None where privacy is off.
        sampling_rate: q; None where it would disclose the number of records (privacy off, no declared size).
        expected_batch: q times the declared size, the constant by which the noised sum is divided.
        local_steps, max_participations: their product is the most steps of the run.
        clip_norm: L2 bound of one unit's scaled gradient.
        scales: group of tensors → data-independent factor on its gradients before clipping.
        precision: "fp32" or "bf16".
        rows: padded length → rows of every micro-batch, shown to be batch-invariant
            (`fedlora.training.batch_invariance`); none where privacy is off.
        one_at_a_time: why micro-batches have a single record; "" where that is not so by rule.
    """

    noise_multiplier: float | None
    sampling_rate: float | None
    expected_batch: int
    local_steps: int
    max_participations: int
    clip_norm: float
    scales: Mapping[str, float]
    precision: str = "fp32"
    rows: Mapping[int, int] = field(default_factory=dict)
    one_at_a_time: str = ""


@dataclass(frozen=True)
class TrainingEntry:
    """A training that was begun, in the order of the ledger.

    Attributes:
        round, attempt: as the server ordered; round 0 is a private start.
        state: "reserved", "stored", "released", or "voided" (given back: nothing was read).
        steps: charged, whether or not they were finished.
        time: seconds since 1970 at which it was charged.
        noise_multiplier, sampling_rate: as in `Mechanism`, of this training.
        upload_bytes, upload_sha256: of what was stored or left, if there is one.
    """

    round: int
    attempt: int
    state: str
    steps: int
    time: float
    noise_multiplier: float | None
    sampling_rate: float | None
    upload_bytes: int | None = None
    upload_sha256: str | None = None


@dataclass(frozen=True)
class LifetimeCharge:
    """What one run charged to the lifetime, of this dataset or of one that overlaps with it.

    Attributes:
        noise_multiplier: None for a run without privacy: it spent everything.
    """

    dataset: str
    run_id: str
    noise_multiplier: float | None
    sampling_rate: float | None
    steps: int


@dataclass(frozen=True)
class LifetimeAccount:
    """The budget of the dataset over all runs, as the ledger has it.

    Attributes:
        epsilon: the limit; None or infinite if there is none.
        delta: at which the limit and what is spent are stated; None for the run's.
        charges: everything that counts: not voided, of the dataset and of the overlapping ones.
        spent, remaining: the ledger's own figures; None to state what the charges amount to.
        overlapping: other datasets that share a record with this one, and are counted.
        distinct: datasets that the owner declared distinct, and are not counted.
        closed_by: run whose admission used the whole budget; its planned maximum counts.
        new_ledger: the mark that an earlier ledger was given up ("ledger 3f2a…, 12 rows"); None if there is none.
        simulated: True for a ledger that cannot stand for real data.
        orders: of the RDP filter, fixed when the budget was made.
    """

    epsilon: float | None
    delta: float | None
    charges: Sequence[LifetimeCharge]
    spent: float | None = None
    remaining: float | None = None
    overlapping: Sequence[str] = ()
    distinct: Sequence[str] = ()
    closed_by: str | None = None
    ledger_id: str | None = None
    new_ledger: str | None = None
    simulated: bool = False
    orders: Sequence[float] = FILTER_ORDERS


@dataclass(frozen=True)
class Disclosure:
    """Something that left the client without noise. Numbers of records and losses are named, never repeated."""

    what: str
    value: str


def announced(*, client: str, private: bool, labels: Sequence[str] | None = None,
              protocol: int | None = None) -> tuple[Disclosure, ...]:
    """What a client says when it joins. `labels` is None where they were not announced."""
    said = [Disclosure("client name", client), Disclosure("FedLoRA version", fedlora.__version__),
            Disclosure("whether it trains under differential privacy", "yes" if private else "no")]
    if protocol is not None:
        said.append(Disclosure("protocol version", f"{protocol}, and the SHA-256 of its .proto"))
    if labels is not None:
        said.append(Disclosure("label names", ", ".join(labels)))
    return tuple(said)


@dataclass(frozen=True)
class ReportedRun:
    """What is known of one client's part in one run.

    Attributes:
        base_model: "name" and the hashes that the client checked.
        unit: whom one guarantee covers: "row", or "column:NAME" for all rows that share a value of that column.
        declared_size: the public number of units; None only where privacy is off and none was declared.
        delta: None only where privacy is off.
        disclosed: see `announced`; participation and what uploads carry are added by the report.
        rows_per_unit: most rows of one unit that a step uses, where units themselves are sampled.
        terms_announced: whether uploads state the noise multiplier and delta.
        anchored: whether uploads carry the ledger's sealed anchor.
        predictable: why whoever knows the seed can subtract the noise ("a simulation", the variable's name); None
            where randomness is the operating system's. If it is set, no epsilon is printed.
        refusals: (round, code) of each refusal sent; round None before the first.
    """

    dataset: str
    run_id: str
    client: str
    server: str
    plan_sha256: str
    strategy: str
    base_model: Mapping[str, str]
    unit: str
    declared_size: int | None
    delta: float | None
    mechanism: Mechanism
    trainings: Sequence[TrainingEntry]
    lifetime: LifetimeAccount | None
    disclosed: Sequence[Disclosure]
    rows_per_unit: int | None = None
    terms_announced: bool = True
    anchored: bool = False
    predictable: str | None = None
    refusals: Sequence[tuple[int | None, str]] = ()

    @property
    def private(self) -> bool:
        return self.mechanism.noise_multiplier is not None

    def rate(self, sampling_rate: float | None) -> float | None:
        """What may be said of it: expected batch / rate would be the number of records where none was declared."""
        return None if self.declared_size is None else sampling_rate
