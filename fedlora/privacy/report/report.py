"""A run's privacy report: what was promised, what was spent, what left without noise, and what nothing covers.

    report = sign(privacy_report(...), load_or_create_key(path))
    write_report(folder, report)        # privacy.json, and privacy.md for a person to read and sign
    verify(report)                      # anyone, anywhere: the signature, and every epsilon anew from the history

A report is plain JSON. It states facts (who, with which noise, how many steps) and what follows from them; a number
of records never appears, only the declared size. Where no guarantee holds (predictable noise, or none), it says why
and prints no epsilon at all.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import fedlora
from fedlora.files import replace_file
from fedlora.plan import ANCHOR_BYTES
from fedlora.privacy.ledger.lifetime_budget import FILTER_ORDERS
from fedlora.privacy.report.figures import (
    LABELS,
    RELATION,
    SCHEMA,
    VERSION,
    figures,
    lifetime_spent,
    planned_history,
    spent_history,
    stated,
    steps_of,
    why_no_guarantee,
)
from fedlora.privacy.report.page import markdown
from fedlora.privacy.report.verification import verify
from fedlora.privacy.rng import DRAWS
from fedlora.versions import environment

PACKAGES = ("torch", "opacus", "numpy", "scipy", "cryptography", "dp-accounting")

ADVERSARY = (
    "The server, and everyone who sees what leaves this client: the other institutions, the network, whoever receives "
    "the final model. Each may know everything about all other records and may choose what it asks for from what it "
    "saw before. Not covered: someone with access to this client's machine. The guarantee holds for this client alone, "
    "without trusting the server; nothing is claimed from who takes part in a round, since the server sees that.")

SAMPLER = "Poisson: each {unit} enters each step on its own with the sampling rate; an empty draw is noised as well"

BATCH_INVARIANCE = (
    "before the first training, on made-up records, on this machine and with this model: a record's gradient, norm and "
    "loss have the same bits at every place of a micro-batch and beside any others. Each padded length has one number "
    "of rows, filled with constant ones")

NOT_COVERED = (
    "Timing and availability: how long a round takes, whether and when this client answers; a machine that runs out of "
    "memory in a round; an owner who leaves after having read the data.",
    "Whether this client comes at all: it does not where its files cannot be read, have other columns than task and "
    "model need, or do not fit what their owner declares of them; nor where another data set of this machine that "
    "shares records has used up its budget.",
    "Floating point: noise is drawn as real numbers would be, and rounded; each value is a sum of several draws, which "
    "makes an attack on the rounding expensive, not impossible.",
    "Rounding: that no record's depends on others was seen on made-up records, bit for bit; a processor that computes "
    "otherwise from time to time is not covered.",
    "Edited rows: a record that was changed counts as another record; the dataset's name covers both, if it is kept.",
    "Someone with records at several institutions is protected by the sum of their budgets, not by each one.",
    "Another machine, user or ledger: what was released from the same data there is not counted here.",
    "Restored copies: ledger, policy, witness and key that are put back together to an earlier state are noticed by "
    "the newest anchor that a server has of this client, and not where that server is another one, a Flower SuperLink, "
    "or knows the client by another name, where it hands back an older anchor or none, or where the copy is from "
    "before the key was made.",
    "Tuning: if values were chosen by looking at results on this data, that choice is not counted.",
    "The arithmetic assumes that the software ran as published; this report cannot prove that noise was added.",
)


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


def privacy_report(*, dataset: str, run_id: str, client: str, server: str, plan_sha256: str, strategy: str,
                   base_model: Mapping[str, str], unit: str, declared_size: int | None, delta: float | None,
                   mechanism: Mechanism, trainings: Sequence[TrainingEntry], lifetime: LifetimeAccount | None,
                   disclosed: Sequence[Disclosure], rows_per_unit: int | None = None, terms_announced: bool = True,
                   anchored: bool = False, predictable: str | None = None,
                   refusals: Sequence[tuple[int | None, str]] = (), now: float | None = None) -> dict:
    """The report of one client about one run, unsigned.

    Args:
        base_model: "name" and the hashes that the client checked.
        unit: whom one guarantee covers: "row", or "column:NAME" for all rows that share a value of that column.
        declared_size: the public number of units; None only where privacy is off and none was declared.
        delta: None only where privacy is off.
        rows_per_unit: most rows of one unit that a step uses, where units themselves are sampled.
        terms_announced: whether uploads state the noise multiplier and delta.
        anchored: whether uploads carry the ledger's sealed anchor.
        predictable: why whoever knows the seed can subtract the noise ("a simulation", the variable's name); None
            where randomness is the operating system's. If it is set, no epsilon is printed.
        disclosed: see `announced`; participation and what uploads carry are added here.
        refusals: (round, code) of each refusal sent; round None before the first.
        now: seconds since 1970.
    Raises:
        ValueError: a value that no run can have, which `verify` would not accept either.
    """
    private = mechanism.noise_multiplier is not None
    hide_rate = declared_size is None  # expected batch / rate would be the number of records
    rows = [{"round": t.round, "attempt": t.attempt, "state": t.state, "time": _iso(t.time), "steps": t.steps,
             "noise_multiplier": t.noise_multiplier, "sampling_rate": None if hide_rate else t.sampling_rate,
             "upload": None if t.upload_sha256 is None else {"bytes": t.upload_bytes, "sha256": t.upload_sha256}}
            for t in trainings]
    report: dict = {
        "schema": SCHEMA,
        "version": VERSION,
        "made": _iso(time.time() if now is None else now),
        "run": {"id": run_id, "dataset": dataset, "client": client, "server": server, "plan_sha256": plan_sha256,
                "strategy": strategy, "base_model": dict(base_model)},
        "unit": {"name": unit, "rows_per_unit": rows_per_unit, "relation": RELATION,
                 "declared_size": declared_size},
        "adversary": ADVERSARY,
        "mechanism": {
            "name": "Poisson-sampled Gaussian" if private else "none: privacy is off",
            "sampler": SAMPLER.format(unit="row" if unit == "row" else "unit"),
            "noise_multiplier": mechanism.noise_multiplier,
            "sampling_rate": None if hide_rate else mechanism.sampling_rate,
            "expected_batch": mechanism.expected_batch,
            "local_steps": mechanism.local_steps,
            "max_participations": mechanism.max_participations,
            "clip_norm": mechanism.clip_norm,
            "scales": dict(mechanism.scales),
            "precision": mechanism.precision,
            "batch_invariance": {"shown": BATCH_INVARIANCE if mechanism.rows else "nothing: privacy is off",
                                 "rows": {str(length): rows for length, rows in sorted(mechanism.rows.items())},
                                 "one_at_a_time": mechanism.one_at_a_time or None}},
        "randomness": {"predictable": predictable is not None, "why": predictable, **_sources(predictable)},
        "trainings": rows,
        "lifetime": None if lifetime is None else _lifetime(lifetime, delta),
        "left_without_noise": [{"what": d.what, "value": d.value}
                               for d in (*disclosed, *_while_running(private, trainings, refusals, terms_announced,
                                                                     anchored))],
        "not_covered": list(NOT_COVERED),
        "versions": environment(PACKAGES),
    }
    reason = why_no_guarantee(report)
    if reason is None and delta is None:
        raise ValueError("delta is None; a private run has one")
    steps, at = steps_of(report), delta if reason is None else None
    report["privacy"] = {
        "no_guarantee": reason, "delta": delta,
        "guarantee": figures(LABELS["guarantee"], steps["guarantee"], planned_history(report), at),
        "spent": figures(LABELS["spent"], steps["spent"], spent_history(report), at)}
    if lifetime is not None:
        _fill_lifetime(report, lifetime)
    return report


def _fill_lifetime(report: dict, known: LifetimeAccount) -> None:
    """State what the lifetime has spent and left; nothing where this run prints no epsilon."""
    account = report["lifetime"]
    if report["privacy"]["no_guarantee"] is not None:
        account |= {"epsilon": None, "spent": None, "remaining": None}
        return
    spent = max(lifetime_spent(report), known.spent or 0.0)
    if account["epsilon"] is not None:
        left = 0.0 if account["closed_by"] else max(0.0, account["epsilon"] - spent)
        account["remaining"] = left if known.remaining is None else min(left, known.remaining)
    account["spent"] = stated(spent)


def _lifetime(account: LifetimeAccount, delta: float | None) -> dict:
    return {
        "epsilon": None if account.epsilon in (None, math.inf) else account.epsilon,
        "delta": delta if account.delta is None else account.delta,
        "spent": None, "remaining": None,
        "accountant": "RDP filter at fixed orders, or PRV for the only run where that closed the budget",
        "orders": list(account.orders),
        "charges": [{"dataset": c.dataset, "run": c.run_id, "noise_multiplier": c.noise_multiplier,
                     "sampling_rate": None if c.noise_multiplier is None else c.sampling_rate,  # it would tell n
                     "steps": c.steps} for c in account.charges],
        "overlapping": list(account.overlapping), "distinct": list(account.distinct), "closed_by": account.closed_by,
        "ledger": account.ledger_id, "new_ledger": account.new_ledger, "simulated": account.simulated}


def _sources(predictable: str | None) -> dict[str, str]:
    key = "SHA-256 of a seed: PREDICTABLE" if predictable else "256 bits of the operating system's entropy, each fresh"
    return {"generator": "AES-256 in counter mode (cryptography), one key for each purpose of each training",
            "key": key,
            "gaussian": f"Box-Muller in float64, each value a sum of {DRAWS} draws (arXiv:2107.10138)"}


def _while_running(private: bool, trainings: Sequence[TrainingEntry], refusals: Sequence[tuple[int | None, str]],
                   terms_announced: bool, anchored: bool) -> list[Disclosure]:
    sent = [t for t in trainings if t.state == "released"]
    said = [Disclosure("the fact and time of participation",
                       f"{len(sent)} uploads, the first at {_iso(sent[0].time)}, the last at {_iso(sent[-1].time)}; "
                       "each is listed under trainings" if sent else "no upload so far")]
    if sent and private and not terms_announced:
        said.append(Disclosure("in each upload: steps", "as listed here"))
    if sent and private and terms_announced:
        said.append(Disclosure("in each upload: steps, noise multiplier, delta", "as listed here; noise multiplier and "
                               "delta are computed from the declared size and this client's limits, and tell about "
                               "them"))
    if sent and not private:
        said.append(Disclosure("in each upload: steps, the exact number of records, the mean training loss, and the "
                               "tensors themselves", "not repeated here; privacy was off"))
    if sent and anchored:
        said.append(Disclosure(f"sealed anchor, {ANCHOR_BYTES} bytes in each upload", "how many rows this client's "
                               "ledger has and the hash of the last, encrypted with a key that only this client has; "
                               "the server hands the last one back when this client joins"))
    said += [Disclosure("refusal" if at is None else f"refusal in round {at}", code) for at, code in refusals]
    return said


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def write_report(folder: Path, report: Mapping) -> Path:
    """Write `privacy.json` and `privacy.md` into `folder`, each complete or not at all.

    Returns:
        The path of privacy.json.
    Raises:
        ValueError: the report is not signed, or `verify` would not accept it: then nothing is written.
    """
    verify(report)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("privacy.md", markdown(report)),
                       ("privacy.json", json.dumps(report, indent=1, allow_nan=False) + "\n")):
        replace_file(folder / name, text.encode(), mode=0o666)
    return folder / "privacy.json"
