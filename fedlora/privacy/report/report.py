"""The privacy report of a run: the guarantee, what was spent, what left without noise, and what is not covered.

    envelope = sign(privacy_report(ReportedRun(...)), load_or_create_key(path))
    write_report(folder, envelope)      # privacy.json, its signature privacy.dsse.json, and privacy.md for a person
    verify(envelope)                    # anyone, anywhere: checks the signature and recomputes every epsilon

A report is plain JSON. It states facts (who took part, with which noise, for how many steps) and the figures that
follow from them. The exact number of records never appears, only the declared size. If no guarantee holds, because the
noise was predictable or there was none, the report says why and states no epsilon at all.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from fedlora.files import replace_file
from fedlora.plan import ANCHOR_BYTES
from fedlora.privacy.about import KEYS
from fedlora.privacy.report.dsse import ENDING, payload_of, spelled
from fedlora.privacy.report.facts import Disclosure, LifetimeAccount, ReportedRun, TrainingEntry
from fedlora.privacy.report.figures import (
    LABELS,
    RELATION,
    SCHEMA,
    VERSION,
    best_attack,
    event_of,
    figures,
    lifetime_spent,
    planned_history,
    spent_history,
    stated,
    steps_delta,
    steps_of,
    why_no_guarantee,
)
from fedlora.privacy.report.page import markdown
from fedlora.privacy.report.signing import Document
from fedlora.privacy.report.sums import sums_part
from fedlora.privacy.report.verification import verify
from fedlora.privacy.rng import DRAWS
from fedlora.versions import environment

PACKAGES = ("torch", "opacus", "numpy", "scipy", "cryptography", "dp-accounting")
"""Packages whose versions the report lists."""

ADVERSARY = (
    "The server, and everyone who sees what leaves this client: the other institutions, the network, whoever receives "
    "the final model. Each of them may know everything about all other records, and may choose what to ask for from "
    "what it has seen before. Not covered: someone with access to this client's machine. The guarantee holds for this "
    "client alone and needs no trust in the server. It takes no credit for which clients take part in a round, since "
    "the server sees that.")

SAMPLER = "Poisson: each {unit} enters each step independently, with the sampling rate; an empty draw is noised as well"

BATCH_INVARIANCE = (
    "before the first training, on made-up records, on this machine and with this model: a record's gradient, norm and "
    "loss have the same bits at every place of a micro-batch and beside any other records. Every micro-batch of one "
    "padded length has the same number of rows; places that are left over are filled with constant rows")

NOT_COVERED = (
    "Timing and availability: how long a round takes, whether and when this client answers, a machine that runs out of "
    "memory in a round, and an owner who leaves after the data were read.",
    "Whether this client takes part at all: it does not if its files cannot be read, lack the columns that task and "
    "model need, or contradict what their owner declared; nor if another data set of this machine that shares records "
    "with them has used up its budget.",
    "Floating point: noise is computed with rounded numbers, not with real ones. Each value is a sum of several draws, "
    "which makes an attack on the rounding expensive, not impossible.",
    "Rounding: that no record's arithmetic depends on another record was shown on made-up records, bit for bit. A "
    "processor that computes differently from time to time is not covered.",
    "Edited rows: a record that was changed counts as another record. One budget covers both only if the data keep "
    "their dataset name.",
    "Several institutions: someone with records at more than one of them is protected by the sum of their budgets, not "
    "by each single one; in secure aggregation, by the epsilon that is stated for several clients.",
    "Other machines, users and ledgers: what was released from the same data there is not counted here.",
    "Restored copies: if ledger, policy, witness and key are put back together to an earlier state, only the newest "
    "anchor that a server keeps of this client reveals it. Nothing reveals it if that server is another one or a "
    "Flower SuperLink, if it knows this client by another name, if it hands back an older anchor or none, or if the "
    "copy is from before the key was made.",
    "Running machines: whoever copies this one's memory while the client runs has its records, keys and masks.",
    "Tuning: if settings were chosen by looking at results on this data, that choice is not counted.",
    "The software: the arithmetic assumes that it ran as published; this report cannot prove that noise was added.",
)


def privacy_report(run: ReportedRun, now: float | None = None) -> dict[str, Any]:
    """Return the unsigned report of one client about one run.

    Args:
        run: the facts.
        now: the time that the report states, in seconds since 1970; default the present.

    Raises:
        ValueError: the facts contradict each other in a way that `verify` would not accept either.
    """
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "version": VERSION,
        "made": _iso(time.time() if now is None else now),
        "run": {"id": run.run_id, "dataset": run.dataset, "client": run.client, "server": run.server,
                "plan_sha256": run.plan_sha256, "strategy": run.strategy, "base_model": dict(run.base_model)},
        "unit": {"name": run.unit, "rows_per_unit": run.rows_per_unit, "relation": RELATION,
                 "declared_size": run.declared_size},
        "about": {field: getattr(run.about, field) for field in KEYS.values()},
        "adversary": ADVERSARY,
        "mechanism": _mechanism(run),
        "sums": None,
        "randomness": {"predictable": run.predictable is not None, "why": run.predictable,
                       **_sources(run.predictable)},
        "trainings": [_training(entry, run) for entry in run.trainings],
        "lifetime": None if run.lifetime is None else _lifetime(run.lifetime, run.delta),
        "left_without_noise": [{"what": d.what, "value": d.value} for d in (*run.disclosed, *_while_running(run))],
        "not_covered": list(NOT_COVERED),
        "audit": None,
        "versions": environment(PACKAGES),
    }
    reason = why_no_guarantee(report)
    if reason is None and run.delta is None:
        raise ValueError("delta is None; a private run has one")
    steps, at = steps_of(report), None if reason or run.delta is None else steps_delta(report, run.delta)
    most, spent = (planned_history(report), spent_history(report)) if at is not None else ((), ())
    report["privacy"] = {
        "no_guarantee": reason, "delta": run.delta,
        "guarantee": figures(LABELS["guarantee"], steps["guarantee"], most, at),
        "spent": figures(LABELS["spent"], steps["spent"], spent, at),
        "attack": {"guarantee": None if at is None else best_attack(most),
                   "spent": None if at is None else best_attack(spent)}}
    report["mechanism"]["event"] = event_of(report)
    if run.sums is not None:
        report["sums"] = sums_part(report, run.sums)
    if run.lifetime is not None:
        _fill_lifetime(report, run.lifetime)
    return report


def _mechanism(run: ReportedRun) -> dict[str, Any]:
    done = run.mechanism
    return {
        "key": done.key, "event": None,
        "name": "Poisson-sampled Gaussian" if run.private else "none: privacy is off",
        "family": done.family,
        "sampler": SAMPLER.format(unit="row" if run.unit == "row" else "unit"),
        "noise_multiplier": done.noise_multiplier,
        "sampling_rate": run.rate(done.sampling_rate),
        "expected_batch": done.expected_batch,
        "local_steps": done.local_steps,
        "max_participations": done.max_participations,
        "clip_norm": done.clip_norm,
        "scales": dict(done.scales),
        "precision": done.precision,
        "batch_invariance": {"shown": BATCH_INVARIANCE if done.rows else "nothing: privacy is off",
                             "rows": {str(length): rows for length, rows in sorted(done.rows.items())},
                             "one_at_a_time": done.one_at_a_time or None}}


def _training(entry: TrainingEntry, run: ReportedRun) -> dict[str, Any]:
    return {"round": entry.round, "attempt": entry.attempt, "state": entry.state, "time": _iso(entry.time),
            "steps": entry.steps, "noise_multiplier": entry.noise_multiplier,
            "sampling_rate": run.rate(entry.sampling_rate),
            "upload": None if entry.upload_sha256 is None else {"bytes": entry.upload_bytes,
                                                                "sha256": entry.upload_sha256}}


def _fill_lifetime(report: dict[str, Any], known: LifetimeAccount) -> None:
    """Fill in the lifetime budget's spent and remaining epsilon; None if this run may state no epsilon.

    The report states the less favourable of two figures: the ledger's and the one recomputed here.
    """
    account = report["lifetime"]
    if report["privacy"]["no_guarantee"] is not None:
        account |= {"epsilon": None, "spent": None, "remaining": None}
        return
    spent = max(lifetime_spent(report), known.spent or 0.0)
    if account["epsilon"] is not None:
        left = 0.0 if account["closed_by"] else max(0.0, account["epsilon"] - spent)
        account["remaining"] = left if known.remaining is None else min(left, known.remaining)
    account["spent"] = stated(spent)


def _lifetime(account: LifetimeAccount, delta: float | None) -> dict[str, Any]:
    return {
        "epsilon": None if account.epsilon in (None, math.inf) else account.epsilon,
        "delta": delta if account.delta is None else account.delta,
        "spent": None, "remaining": None,
        "accountant": "RDP filter at fixed orders, or PRV for a sole run that closed the budget",
        "orders": list(account.orders),
        "charges": [{"dataset": c.dataset, "run": c.run_id, "noise_multiplier": c.noise_multiplier,
                     "sampling_rate": None if c.noise_multiplier is None else c.sampling_rate,  # reveals the size
                     "steps": c.steps, "sums": c.sums} for c in account.charges],
        "overlapping": list(account.overlapping), "distinct": list(account.distinct), "closed_by": account.closed_by,
        "ledger": account.ledger_id, "new_ledger": account.new_ledger, "simulated": account.simulated}


def _sources(predictable: str | None) -> dict[str, str]:
    key = "SHA-256 of a seed: PREDICTABLE" if predictable else "256 bits of the operating system's entropy, each fresh"
    return {"generator": "AES-256 in counter mode (cryptography), one key for each purpose of each training",
            "key": key,
            "gaussian": f"Box-Muller in float64, each value a sum of {DRAWS} draws (arXiv:2107.10138)"}


def _while_running(run: ReportedRun) -> list[Disclosure]:
    sent = [t for t in run.trainings if t.state == "released"]
    said = [Disclosure("the fact and time of participation",
                       f"{len(sent)} uploads, the first at {_iso(sent[0].time)}, the last at {_iso(sent[-1].time)}; "
                       "each is listed under trainings" if sent else "no upload so far")]
    if sent and run.private and not run.terms_announced:
        said.append(Disclosure("in each upload: steps", "as listed here"))
    if sent and run.private and run.terms_announced:
        said.append(Disclosure("in each upload: steps, noise multiplier, delta", "as listed here; noise multiplier and "
                               "delta are computed from the declared size and this client's limits, and tell about "
                               "them"))
    if sent and not run.private:
        said.append(Disclosure("in each upload: steps, the exact number of records, the mean training loss, and the "
                               "tensors themselves", "not repeated here; privacy was off"))
    if sent and run.anchored:
        said.append(Disclosure(f"sealed anchor, {ANCHOR_BYTES} bytes in each upload", "how many rows this client's "
                               "ledger has and the hash of the last, encrypted with a key that only this client has; "
                               "the server hands the last one back when this client joins"))
    if run.sums is not None and run.sums.rosters:
        said += [Disclosure("membership in secure sums", "this client's name, its certificate, a public key and a "
                            "signature, shown to the server and, in each roster, to all its members" + (
                                "; and the noise that it adds, of which a roster tells the least of all members"
                                if run.terms_announced else "")),
                 Disclosure("keys and shares of secure sums", "for each attempt a public key, signatures, and shares "
                            "of two random secrets, sealed for each other member; for uploads that are said to be "
                            "revealed the shares that open the sum. None is computed from records")]
    said += [Disclosure("refusal" if at is None else f"refusal in round {at}", code) for at, code in run.refusals]
    return said


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def write_report(folder: Path, envelope: Document) -> Path:
    """Write `privacy.dsse.json`, `privacy.json` and `privacy.md` into a folder, each completely or not at all.

    The envelope comes first: it holds all that the others say. If the process ends in between, the others are older.

    Args:
        folder: created if it does not exist.
        envelope: a signed report (`dsse.sign`).

    Returns:
        The path of privacy.json.

    Raises:
        ValueError: the report is not signed, or `verify` does not accept it. Then nothing is written.
    """
    page = markdown(verify(envelope).report)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "privacy.json"
    for place, content in ((path.with_suffix(ENDING), spelled(envelope)), (path, payload_of(envelope)),
                           (path.with_suffix(".md"), page.encode())):
        replace_file(place, content, mode=0o666)
    return path
