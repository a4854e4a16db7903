"""The facts that a privacy report states about one client's part in one run. Every figure follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import fedlora
from fedlora.identity.certificates import Certificate, day
from fedlora.plan.limits import LOCAL
from fedlora.privacy.about import NOTHING, About
from fedlora.privacy.ledger.lifetime_budget import FILTER_ORDERS
from fedlora.privacy.ledger.rosters import RosterFacts


@dataclass(frozen=True)
class Mechanism:
    """The mechanism of every step of the run. It does not change while the run lasts.

    Attributes:
        noise_multiplier: sigma, the noise's standard deviation / clip_norm; None if privacy is off.
        sampling_rate: q, the probability with which each unit enters a step; None if it would disclose the number of
            records (privacy is off and no size was declared).
        expected_batch: q times the declared size, a constant: the noised sum is divided by it.
        local_steps: steps of one training.
        max_participations: the most trainings of the run. Times local_steps, this is the most steps of the run.
        clip_norm: L2 bound on one unit's scaled gradient.
        scales: group of tensors → data-independent factor on its gradients before clipping.
        precision: "fp32" or "bf16".
        rows: padded length in tokens → rows of every micro-batch of that length, for which batch invariance was shown
            (`fedlora.training.batch_invariance`); empty if privacy is off.
        one_at_a_time: why micro-batches have a single record; "" if there is no such rule.
        family: the adapter family, which decides what is trained and sent.
        key: key of the privacy mechanism (`fedlora.privacy.mechanisms`).
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
    family: str = ""
    key: str = LOCAL


@dataclass(frozen=True)
class Sums:
    """The secure sums of a run.

    Attributes:
        aggregate_noise_multiplier: the noise of the sums that the budget is charged for; None if it is charged for this
            client's own noise.
        least_members: the fewest members of a roster that this client takes part with.
        colluding: t, how many members may tell the server what they know.
        rosters: the rosters under which trainings were begun, in their order.
        revealed: (round, attempt) of each upload whose sum this client helped to open. Other members may have opened
            sums of its other uploads.
        hold_out: share of the units that are scored in the sums in place of being trained on.
    """

    aggregate_noise_multiplier: float | None
    least_members: int
    colluding: int
    rosters: Sequence[RosterFacts]
    revealed: Sequence[tuple[int, int]] = ()
    hold_out: float = 0.0


@dataclass(frozen=True)
class TrainingEntry:
    """One training that was charged.

    Attributes:
        round: round of the run, as the server ordered it; 0 is a private start.
        attempt: attempt at this round.
        state: "reserved", "stored", "released", or "voided" (the charge was taken back, since nothing was read).
        steps: steps charged, whether or not they were finished.
        time: when it was charged, in seconds since 1970.
        noise_multiplier: this training's, as in `Mechanism`.
        sampling_rate: this training's, as in `Mechanism`.
        upload_bytes: size of the stored update; None if there is none.
        upload_sha256: hash of the stored update, 64 hexadecimal digits; None if there is none.
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
    """Steps of one run as its mechanism charges them to the lifetime budget.

    Attributes:
        dataset: the data set of that run: this report's or one that overlaps it.
        run_id: the run.
        noise_multiplier: the charged noise, as standard deviation / clip norm; None for a run without noise, whose
            epsilon is infinite.
        sampling_rate: the charged probability with which each unit entered a step; None if it is withheld.
        steps: steps that count as spent.
        sums: whether the charged noise is that of secure sums.
    """

    dataset: str
    run_id: str
    noise_multiplier: float | None
    sampling_rate: float | None
    steps: int
    sums: bool = False


@dataclass(frozen=True)
class LifetimeAccount:
    """The data set's lifetime budget, over all runs, as the ledger has it.

    Attributes:
        epsilon: the limit; None or infinite if there is none.
        delta: the delta at which limit and spending are stated; None for the run's own.
        charges: everything that counts: charges not voided, of this data set and of those that overlap it.
        spent: the ledger's own figure for what is spent; None to compute it from the charges.
        remaining: the ledger's own figure for what is left; None to compute it from the charges.
        overlapping: other data sets that share a record with this one, and are counted.
        distinct: data sets that the owner declared distinct, and are not counted.
        closed_by: the run that closed the budget, so that its planned maximum counts; None if there is none.
        ledger_id: id of the ledger.
        new_ledger: the mark that an earlier ledger was given up ("ledger 3f2a…, 12 rows"); None if there is none.
        simulated: whether the ledger is a simulation's and stands for no real data.
        orders: Rényi orders of the filter, fixed when the budget was created.
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
    """Something that left the client without noise. A number of records or a loss is named without its value.

    Attributes:
        what: the kind of information.
        value: its value, or a remark.
    """

    what: str
    value: str


def announced(*, client: str, private: bool, labels: Sequence[str] | None = None,
              protocol: int | None = None) -> tuple[Disclosure, ...]:
    """Return what a client tells the server when it joins.

    Args:
        client: the client's name.
        private: whether it trains under differential privacy.
        labels: the label names that it announced; None if it announced none.
        protocol: the protocol version; None if it told none.
    """
    said = [Disclosure("client name", client), Disclosure("FedLoRA version", fedlora.__version__),
            Disclosure("whether it trains under differential privacy", "yes" if private else "no")]
    if protocol is not None:
        said.append(Disclosure("protocol version", f"{protocol}, and the SHA-256 of its .proto"))
    if labels is not None:
        said.append(Disclosure("label names", ", ".join(labels)))
    return tuple(said)


CERTIFICATE = "certificate of this client, over mutual TLS 1.3"
"""The kind of disclosure that names the keys at both ends of the run's connections; there is none without TLS."""


def encrypted(own: Certificate, server: Certificate) -> Disclosure:
    """Return what a client shows of itself over TLS, and to whom.

    Args:
        own: this client's certificate.
        server: the server's certificate.
    """
    return Disclosure(CERTIFICATE, f"public key {own.fingerprint}, valid until {day(own.not_after)}; shown to the "
                                   f"server with the public key {server.fingerprint}, whose certificate is valid until "
                                   f"{day(server.not_after)}")


@dataclass(frozen=True)
class ReportedRun:
    """All facts of a report: one client's part in one run.

    Attributes:
        dataset: the owner's id of the data set.
        run_id: the run.
        client: the client's name.
        server: the server's address.
        plan_sha256: digest of the run's plan.
        strategy: the way of combining uploads, as the server names it.
        base_model: "name" and the hashes that the client checked.
        unit: the unit of privacy: "row", or "column:NAME" for all rows that share a value of that column.
        declared_size: the public number of units; None only if privacy is off and none was declared.
        delta: the delta of the run's guarantee; None only if privacy is off.
        mechanism: the mechanism of every step.
        trainings: every training that was charged, in the order of the ledger.
        lifetime: the data set's lifetime budget; None if there is no ledger.
        disclosed: what the client told when it joined (`announced`). The report adds participation and what uploads
            carry.
        rows_per_unit: the most rows of one unit that a step uses, if units are sampled; None if rows are.
        terms_announced: whether uploads state the noise multiplier and delta.
        anchored: whether uploads carry the ledger's sealed anchor.
        predictable: why sampling and noise are predictable ("a simulation", the variable's name); None if the keys come
            from the operating system. If it is set, no epsilon is printed.
        refusals: (round, code) of each refusal that was sent; round None before the first round.
        about: what the owner states in policy.toml about the data's use.
        sums: the run's secure sums; None without them.
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
    about: About = NOTHING
    sums: Sums | None = None

    @property
    def private(self) -> bool:
        """True if the run adds noise."""
        return self.mechanism.noise_multiplier is not None

    def rate(self, sampling_rate: float | None) -> float | None:
        """Return the sampling rate as the report may state it: None if no size was declared.

        Without a declared size, expected batch / sampling rate would be the exact number of records.
        """
        return None if self.declared_size is None else sampling_rate
