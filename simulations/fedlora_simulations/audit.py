"""The command fedlora-simulate audit: an empirical lower bound on ε beside the claimed upper bound.

One client trains on its rows and on about half of the canaries. The adversary (`adversary`) weighs everything that the
client released and guesses which canaries were in the data. `one_run` turns the number of right guesses into a lower
bound on ε with 95 % confidence. The audit then runs once more without privacy. A bound above the claimed ε means that
the mechanism is broken. A bound far below it is usual and proves nothing: other attacks may do better.

With --secure-aggregation the adversary sees the sums of --members clients alone, and the claim is the ε of sums.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from fedlora import data, style
from fedlora.adapters import start_of
from fedlora.config import Parser, SimulationConfig, build_parser, option, read_config, values
from fedlora.config.option import PRIVACY, RUN
from fedlora.console import messages, results
from fedlora.data import Rows
from fedlora.plan import Refused
from fedlora.privacy import Accountant, Budget, Ledger, RunStreams, nominal_size
from fedlora.secure_sum.guarantee import SumGuarantee
from fedlora.tasks import read
from fedlora_server.folders import claimed_folder
from fedlora_server.observer import jsonable
from fedlora_server.round_state import RoundOptions
from fedlora_server.rounds import Run, run_federation
from fedlora_server.run_setup import BaseModel, check_members, find_model, planned, prepare

from . import one_run
from .adversary import BACKGROUND, LEAST_REST, Others, Watched, record_losses
from .canaries import KINDS, CanaryTrainer, craft
from .in_process import InProcessEngine
from .one_run import Guesses, Membership, membership
from .population import Method
from .simulated_roster import aggregate_epsilon, simulated_roster
from .simulated_run import make_sessions

CONFIDENCE = 0.95
ROUNDS, LR = 10, 0.5
MOST_GRADIENT_BYTES = 8 * 2**30

FIXED = ("privacy", "task", "seeds", "clients", "partition", "eval_data", "local_steps", "optimizer", "lr_schedule",
         "clients_per_round", "min_replies", "max_participations", "dropout", "privacy_unit", "workers",
         "batch_clients", "engine", "ray_address", "dry_run", "sweep", "resume", "reference", "tune", "tune_budget",
         "one_step", "hold_out", "client_ranks")
"""Options of a simulation that an audit sets itself: it has one client, with one step of SGD in each round."""

MEMBERS = 3
"""Usual number of clients whose sum is audited."""


@dataclass(frozen=True, kw_only=True)
class AuditConfig(SimulationConfig):
    """Plant canaries in one client's data, attack what it releases, and report a lower bound on ε.

    Most options are those of a simulation.
    """

    forms: ClassVar[tuple[str, ...]] = ("fedlora-simulate audit --data DIR_OR_FILE [options]",)
    fixed: ClassVar[tuple[str, ...]] = FIXED

    canaries: str = option("text", "text: random words with a random label; gradient: a chosen gradient in place of a "
                           "record's own, the strongest canary", PRIVACY, choices=KINDS, place=1)
    count: int = option(1000, "number of canaries, of which about half are in the data; fewer than 1000 show little",
                        PRIVACY, values.number(int, 100), place=1)
    members: int | None = option(None, "with --secure-aggregation, number of clients whose sum is audited; all but one "
                                 "add nothing that the adversary does not know, except noise", PRIVACY, values.count,
                                 unset=f"{MEMBERS}", place=2)
    rows: int = option(500, "largest number of the client's own rows", RUN, values.count, place=1)
    seed: int = option(0, "seed of everything that is drawn", RUN, values.natural, place=1)
    json: bool = option(False, "print JSON instead of a table", RUN, None)


@dataclass(frozen=True)
class Audit:
    """The result of one audited run.

    Attributes:
        private: whether the run was private.
        claimed: ε by the accountant for the rounds that were done, at `delta`; infinite without privacy.
        delta: δ of the claim.
        noise_multiplier: the noise multiplier; None without privacy.
        sampling_rate: probability with which a record is drawn in a step.
        rounds: number of rounds, with one step each.
        clip_norm: L2 bound on one record's scaled gradient.
        family: the adapter family.
        canaries: number of canaries, in the data or not.
        white_box: the best guesses from all updates, with their lower bound on ε at 95 % confidence.
        final_model: the best guesses from each canary's loss on the final model alone, with their bound.
        loss_attack: usual figures of a membership-inference attack that uses the same losses.
        seconds: how long the run took.
        scores: [m] evidence for each canary.
        included: [m] bool, whether each canary was in the data.
        members: number of clients whose sum was audited; 0 if the client's own uploads were.
    """

    private: bool
    claimed: float
    delta: float
    noise_multiplier: float | None
    sampling_rate: float
    rounds: int
    clip_norm: float
    family: str
    canaries: int
    white_box: Guesses
    final_model: Guesses
    loss_attack: Membership
    seconds: float
    scores: np.ndarray
    included: np.ndarray
    members: int = 0

    @property
    def holds(self) -> bool:
        """Return whether the claim stands; False if a lower bound exceeds it."""
        return max(self.white_box.epsilon, self.final_model.epsilon) <= self.claimed

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON; an infinite ε becomes null."""
        return asdict(self) | {"claimed": None if math.isinf(self.claimed) else self.claimed, "holds": self.holds,
                               "scores": [round(float(s), 4) for s in self.scores],
                               "included": [bool(i) for i in self.included]}


def run_audit(options: AuditConfig, base: BaseModel, *, private: bool) -> Audit:
    """Train one client with canaries in its data, and attack what it releases.

    Args:
        options: the options of the audit.
        base: the base model.
        private: train under `options.epsilon`, or without privacy. All else is the same.

    Raises:
        ValueError: the options do not fit the model, the data or each other.
        Refused: the client's privacy limits do not allow the plan.
    """
    began = time.monotonic()
    method, seed = Method.parse(options.strategy[0]), options.seed
    own, labels = _client_rows(options)
    size = options.declared_size or nominal_size(len(own) + options.count // 2)  # must not depend on the coins
    options = _settled(options, method, size, private)
    run_id = hashlib.sha256(f"audit {method} {seed} {private}".encode()).hexdigest()[:16]
    if options.members and private and not options.secure_aggregation:
        raise ValueError(f"--members {options.members} is for --secure-aggregation; leave it out, or give both")
    members = (options.members or MEMBERS) if options.secure_aggregation else 0
    check_members(options, members, "--members")
    federation = prepare(options, method.strategy, base, labels, seed, run_id=run_id, members=members or None)
    plan, adapted, task = federation.plan, federation.adapted, federation.task
    values = adapted.layout.num_trained
    if 4 * options.count * values > MOST_GRADIENT_BYTES:
        raise ValueError(f"{options.count} gradients of {values} values do not fit into memory; lower --rank or "
                         "--count, or name fewer --targets")
    if values < options.count + BACKGROUND + LEAST_REST:
        raise ValueError(f"{values} values are trained, too few to tell {options.count} canaries and the other records "
                         "apart; raise --rank, name more --targets, or lower --count")
    canaries = craft(options.canaries, options.count, own, labels, task.tokenizer, values=values,
                     clip_norm=plan.clip_norm, seed=seed)
    inside = torch.from_numpy(canaries.included)
    trainer = CanaryTrainer(
        adapted, task, first=len(own), directions=None if canaries.directions is None else canaries.directions[inside],
        device=options.device, precision=options.precision, micro_batch=options.micro_batch, threads=options.threads,
        compiled=options.compile)
    training = task.encode(canaries.training_rows(own))
    ledger = Ledger(None, simulated=True)
    session = make_sessions(options, federation, trainer, {"audited": training}, seed, ledger)["audited"]
    roster = simulated_roster(plan, {f"client-{number}": session.terms for number in range(members)},
                              federation.strategy.summed)
    beside = None if roster is None else Others(roster, RunStreams("others", seed))
    watched = Watched(session, trainer, task.encode(canaries.rows), task.encode(own.take(range(BACKGROUND)[:len(own)])),
                      canaries.directions, len(own), min(1.0, plan.expected_batch / size), beside=beside)
    engine = InProcessEngine({"audited": watched}, run_id, adapted.layout, roster=roster)
    rounds = RoundOptions(seed=seed, min_clients=1, round_timeout_s=math.inf, wait_timeout_s=0.0)
    result = run_federation(engine, Run(federation.strategy, federation.state, rounds))
    engine.close("the audit is over")
    ledger.close()
    if result.ended != "finished":
        raise ValueError(f"the client trained only {watched.rounds} of {plan.rounds} rounds; its messages above say "
                         "why")
    adapted.write(result.state)
    if canaries.directions is None:
        losses = record_losses(trainer, watched.canaries)
    else:  # a gradient canary's gradient is the same everywhere, so its loss is linear
        losses = (canaries.directions.double() @ (watched.flat(result.state) - watched.flat(federation.state))).numpy()
    delta = watched.delta or Budget.declare(size, epsilon=1.0, delta=options.delta, declared_size=size).delta
    claimed, noise = math.inf, watched.noise_multiplier
    if roster is not None:
        claimed = aggregate_epsilon(roster, session.terms, watched.rounds)
        noise = SumGuarantee.of(roster, clip_norm=session.terms.clip_norm,
                                sampling_rate=session.terms.sampling_rate).noise_multiplier
    elif watched.noise_multiplier is not None:
        accountant = Accountant()
        accountant.add(watched.noise_multiplier, watched.sampling_rate, watched.rounds)
        claimed = accountant.epsilon(delta)
    significance = 1 - CONFIDENCE
    return Audit(
        private, claimed, delta, noise, watched.sampling_rate, watched.rounds,
        session.terms.clip_norm, plan.family, options.count,
        white_box=one_run.audit(watched.evidence, canaries.included, delta, significance),
        final_model=one_run.audit(-losses, canaries.included, delta, significance),
        loss_attack=membership(-losses, canaries.included), seconds=time.monotonic() - began,
        scores=watched.evidence, included=canaries.included, members=members)


def _client_rows(options: AuditConfig) -> tuple[Rows, tuple[str, ...]]:
    """Return the audited client's own labelled rows and the label set; the seed draws at most --rows rows."""
    assert options.data is not None, "checked when the options were read"
    rows = read(options.data, options.task, columns=options.column, allow_download=options.allow_download,
                declared=options.labels or (), options=options.read_options())
    labels = options.labels or data.label_names(rows)
    if len(labels) < 2:
        raise ValueError(f"--data {options.data} has {'one label' if labels else 'no label'}; an audit needs at least "
                         "two (--column label=NAME names another column)")
    data.check_labels(rows, labels)
    labelled = np.array([i for i, label in enumerate(rows.labels or ()) if label is not None])
    drawn = np.random.default_rng(options.seed).permutation(labelled)[:options.rows]
    return rows.take(drawn), labels


def _settled(options: AuditConfig, method: Method, size: int, private: bool) -> AuditConfig:
    """Return the options of one run.

    Both runs, with privacy and without, take the private preset for what is not given. The default batch is the largest
    that the budget allows, because then an update tells most.

    Raises:
        ValueError: the ranks would change between rounds.
    """
    if isinstance(options.ranks, str):
        raise ValueError(f"--ranks {options.ranks} changes what is uploaded from round to round, and an audit adds up "
                         "the same values of all rounds; leave it out. The ranks do not change σ or ε")
    options = replace(options, privacy="required", init=method.init or options.init)
    values = planned(options, method.strategy)
    most = Budget.declare(size, epsilon=1.0, declared_size=size, delta=options.delta)
    batch = options.batch_size or max(1, math.floor(most.max_sampling_rate * size))
    most.sampling_rate(batch)
    sums = options.secure_aggregation  # both runs have the server's optimizer, and one has sums
    options = options if private else replace(options, secure_aggregation=False, colluding=0, least_noise=0.0,
                                              trust="local")
    return replace(
        options, one_step=sums, privacy="required" if private else "off",
        epsilon=options.epsilon if private else math.inf, declared_size=size, rank=values.rank, alpha=values.alpha,
        init=values.init, targets=values.targets, clip_norm=values.clip_norm, head_scale=values.head_scale,
        batch_size=batch, rounds=options.rounds or ROUNDS, lr=options.lr or LR, local_steps=1, optimizer="sgd",
        lr_schedule="constant")


def show(audits: Sequence[Audit]) -> Table:
    """Return the table that shows the audits side by side."""
    first = audits[0]
    table = Table(box=None, pad_edge=False, caption_justify="left", caption=(
        f"{first.canaries} canaries, {first.rounds} rounds of one step, sampling rate {first.sampling_rate:.3g}, "
        f"δ = {first.delta:.4g}; the bounds hold with {CONFIDENCE:.0%} confidence" + (
            f". The private run's claim and bounds are for the sums of {first.members} clients" if first.members else
            "")))
    table.add_column("")
    for audit in audits:
        table.add_column("private" if audit.private else "not private", justify="right")

    def row(name: str, *values: str) -> None:
        table.add_row(name, *values)

    row("claimed ε (upper bound)", *("none" if math.isinf(a.claimed) else f"{a.claimed:.2f}" for a in audits))
    row(f"ε at least, from all {'sums' if first.members else 'updates'}",
        *(f"[bold]{a.white_box.epsilon:.2f}[/bold]" for a in audits))
    row("  guesses that are right", *(_right(a.white_box) for a in audits))
    row("ε at least, from the final model", *(f"{a.final_model.epsilon:.2f}" for a in audits))
    row("loss attack: AUC", *(f"{a.loss_attack.auc:.3f}" for a in audits))
    row("loss attack: TPR at 1 % FPR", *(f"{a.loss_attack.tpr_at_1_percent:.3f}" for a in audits))
    row("noise multiplier", *("none" if a.noise_multiplier is None else f"{a.noise_multiplier:.3f}" for a in audits))
    row("seconds", *(f"{a.seconds:.0f}" for a in audits))
    return table


def _right(guesses: Guesses) -> str:
    return f"{guesses.right} of {guesses.guessed_in + guesses.guessed_out}"


def plot(path: Path, audits: Sequence[Audit]) -> None:
    """Plot the scores of canaries that were in and out of the data, for each run, and the bounds beside the claims."""
    figure = Figure(figsize=(4.2 * (len(audits) + 1), 3.6), layout="constrained")
    axes = figure.subplots(1, len(audits) + 1)
    for axis, audit in zip(axes, audits, strict=False):
        edges = np.histogram_bin_edges(audit.scores, 40)
        for scores, colour, label in ((audit.scores[audit.included], style.BLUE, "in the data"),
                                      (audit.scores[~audit.included], style.VERMILION, "not in it")):
            axis.hist(scores, edges, color=colour, alpha=0.3)
            axis.hist(scores, edges, color=colour, histtype="step", lw=1.6, ls="-" if colour == style.BLUE else "--",
                      label=label)
        axis.set(xlabel="evidence (log-likelihood ratio)", ylabel="canaries",
                 title="private" if audit.private else "not private")
        style.explain(axis)
    bars, names = axes[-1], ["private" if audit.private else "not private" for audit in audits]
    for i, audit in enumerate(audits):
        bars.bar(i, audit.white_box.epsilon, 0.5, color=style.COLOURS[2 + i])
        bars.annotate(f"≥ {audit.white_box.epsilon:.2f}", (i, audit.white_box.epsilon), ha="center", va="bottom",
                      color=style.INK, fontsize=9)
        if math.isfinite(audit.claimed):
            bars.hlines(audit.claimed, i - 0.35, i + 0.35, color=style.INK)
            bars.annotate(f"claimed {audit.claimed:.2f}", (i, audit.claimed), ha="center", va="bottom",
                          color=style.INK, fontsize=9)
    bars.set_xticks(range(len(names)), names)
    bars.set(ylabel="ε", title=f"lower bound, {CONFIDENCE:.0%} confidence")
    bars.margins(y=0.15)
    for axis in axes:
        style.finish(axis)
    style.save(figure, path)


def parser() -> Parser:
    """Return the command's parser."""
    return build_parser(AuditConfig)


def read_audit_config(argv: Sequence[str]) -> AuditConfig:
    """Read the options of an audit; exit with code 2 if one is wrong."""
    options, plain = read_config(AuditConfig, argv), AuditConfig()
    parser = build_parser(AuditConfig)
    changed = [key for key in FIXED if getattr(options, key) != getattr(plain, key)]
    if changed:
        parser.error(f"--{changed[0].replace('_', '-')} is set by the audit itself: one client, one step of SGD a "
                     "round, with and without privacy. Leave it out" + (" (--seed S)" if changed[0] == "seeds" else ""))
    if options.data is None:
        parser.error("--data is missing: name a folder or file of the audited client's rows")
    if len(options.strategy) > 1:
        parser.error(f"--strategy names {len(options.strategy)} strategies; audit one at a time")
    init = Method.parse(options.strategy[0]).init or options.init
    if init and start_of(init)[0].reads.startswith("clients"):
        parser.error(f"--init {init} is a release of its own, which an audit does not attack; choose another start")
    if math.isinf(options.epsilon):
        parser.error("--epsilon inf has no claim to audit; give a finite ε (a run without privacy is done anyway)")
    return options


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code: 0 if the claim stands, 1 if it is refuted, 2 for wrong input."""
    options = read_audit_config(argv)
    try:
        base = find_model(options)
        with claimed_folder(options.out, "audit") as out:
            return _run(options, base, out, messages())
    except (ValueError, MemoryError) as error:
        print(f"fedlora-simulate audit: {error}", file=sys.stderr)
        return 2
    except Refused as refused:
        print(f"fedlora-simulate audit: the client refuses: {refused.__cause__ or refused}", file=sys.stderr)
        return 2


def _run(options: AuditConfig, base: BaseModel, out: Path, console: Console) -> int:
    audits = []
    for private in (True, False):
        audits.append(run_audit(options, base, private=private))
        console.print(f"{'private' if private else 'not private'}: {audits[-1].rounds} rounds in "
                      f"{audits[-1].seconds:.0f} s")
    whole = [audit.to_dict() for audit in audits]
    short = [{key: value for key, value in one.items() if key not in ("scores", "included")} for one in whole]
    result: dict[str, object] = {"options": jsonable(vars(options)), "confidence": CONFIDENCE}
    (out / "audit.json").write_text(json.dumps(result | {"audits": whole}, indent=1))
    plot(out / "audit.png", audits)
    if options.json:
        print(json.dumps(result | {"audits": short}, indent=1))
    else:
        results().print(show(audits))
    console.print(f"audit.json and audit.png are in {out}." + (
        "" if options.secure_aggregation else " fedlora-client attach-audit adds the bound to the report of a run with "
        "the same mechanism."), soft_wrap=True)
    if not audits[0].holds:
        console.print("The claim is refuted: this client lost more privacy than its accountant says.", style="bold red")
        return 1
    return 0
