"""The adversary of an audit: it sees every model sent to one client and every update that the client releases.

The adversary knows the plan, the client's other records, and what each canary would add. It does not know the coins
that decide which canaries are in the data, the records that were drawn, or the noise. In an audit a round is one step
of SGD, so that an update shows the step's noised sum

    s  =  Σ_i z_i g_i  +  other records' gradients  +  N(0, σ²C²),      z_i = 1 if canary i is in and was drawn

The evidence for a canary is the log-likelihood ratio of "in" (drawn with probability q) against "out", where everything
else in s is taken as Gaussian. Evidence adds up over rounds. The covariance comes from the gradients of all canaries
and of a sample of the other records, so that a component that many records share is not mistaken for one canary. The
noise is measured in the directions that none of these gradients reach; it is not taken from the claim.

With secure aggregation the adversary sees the sum of several clients alone. It knows all that the others train on and
takes it off; what is left of them is the noise of the honest ones (`Others`).

    Symbol   Here         Shape
    g        canaries     [m, values], clipped and scaled as in the step
             background   [h, values], of other records
    s        step         [values]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch

from fedlora.plan import Refusal, Released, RoundPlan, Tensors, Upload
from fedlora.privacy import RunStreams
from fedlora.secure_sum.packages import SUM
from fedlora.secure_sum.roster import Roster
from fedlora.secure_sum.rounding import rounded_noise
from fedlora.tasks import Records
from fedlora.training import Trainer
from fedlora.wire import shapes_of
from fedlora.wire.tensors import split
from fedlora_client.flower_app import Session
from fedlora_client.session import ClientSession
from fedlora_client.sum_part import SumPart

BACKGROUND = 256
"""Number of other records whose gradients the adversary computes each round."""

LEAST_REST = 100
"""Least number of trained values beyond the number of known gradients; the noise is measured in the surplus."""

_BLOCK = 8192


@dataclass(frozen=True)
class Others:
    """The other clients of a secure sum, as far as an adversary does not know them: the noise of the honest ones.

    Attributes:
        roster: the roster.
        streams: the source of their noise.
    """

    roster: Roster
    streams: RunStreams

    def added_to(self, vector: np.ndarray, plan: RoundPlan) -> np.ndarray:
        """Return a client's vector with the least noise that others add to it in a sum that can be opened.

        Args:
            vector: [values] unsigned integers of the ring.
            plan: the order that it answers.
        """
        roster, stream = self.roster, self.streams.stream(plan.round, "noise", plan.attempt)
        for _ in range(roster.honest - 1):
            vector = vector + roster.grid.wrapped(rounded_noise(stream, roster.noise, len(vector)))
        return vector


@dataclass
class Watched:
    """A client's session with an adversary between it and the server. The adversary changes nothing.

    With secure aggregation it stands between the sum and the server: the upload that it passes on is the sum.

    Attributes:
        session: the client's session.
        trainer: the session's trainer; the adversary writes to its model.
        canaries: records of all canaries, in the data or not.
        background: a sample of the client's other records.
        directions: [m, values] the gradients of gradient canaries; None for text canaries.
        others: number of the client's other records.
        sampling_rate: q, which is public.
        evidence: [m] the evidence for each canary over the rounds so far.
        noise_multiplier: the noise multiplier that the last upload stated; None without privacy.
        delta: δ that the last upload stated; None without privacy.
        rounds: number of uploads seen.
        beside: the other clients of a secure sum; None without secure aggregation.
    """

    session: Session
    trainer: Trainer
    canaries: Records
    background: Records
    directions: torch.Tensor | None
    others: int
    sampling_rate: float
    evidence: np.ndarray = field(init=False)
    noise_multiplier: float | None = None
    delta: float | None = None
    rounds: int = 0
    beside: Others | None = None

    def __post_init__(self) -> None:
        self.evidence = np.zeros(len(self.canaries))
        self._state: dict[str, np.ndarray] = {}

    def run_round(self, plan: RoundPlan, tensors: Tensors, part: SumPart | None = None) -> Upload | Refusal:
        """Compute what each record would add, let the client train, and add up the evidence in its upload."""
        run = plan.run
        self._state |= tensors
        self.trainer.adapted.write(self._state)
        scales = {"adapter": run.adapter_scale, "head": run.head_scale} if run.private else {}
        canaries = self.directions
        if canaries is None:
            canaries = record_gradients(self.trainer, self.canaries)
        background = record_gradients(self.trainer, self.background)
        clip_norm = run.clip_norm if run.private else float("inf")
        added, others = (_clipped(rows, self._scale(scales), clip_norm) for rows in (canaries, background))
        if part is None:
            answer = self.session.run_round(plan, tensors)
        else:
            answer = cast(ClientSession, self.session).run_round(plan, tensors, part=part)
        if isinstance(answer, Upload):
            if self.beside is None:
                step = (self.flat(tensors) - self.flat(answer.tensors)) * (run.expected_batch / plan.lr)
                step *= self._scale(scales)
            else:
                answer = replace(answer, tensors=Released({
                    SUM: self.beside.added_to(answer.tensors[SUM], plan)}))
                trained = {spec.name: tensors[spec.name] for spec in self.trainer.adapted.layout.trained}
                step = self.flat(split(shapes_of(trained), self.beside.roster.grid.decode(answer.tensors[SUM])))
            self.noise_multiplier, self.delta = answer.noise_multiplier, answer.delta
            self.rounds += 1
            assert self.canaries.labels is not None and self.background.labels is not None
            groups = np.concatenate([self.canaries.labels, -1 - self.background.labels])
            self.evidence += evidence(
                step, added, others, groups, sampling_rate=self.sampling_rate,
                others=self.others)
        return answer

    def flat(self, tensors: Tensors) -> torch.Tensor:
        """Return the trained tensors as one vector, [values] float64, in the order of the gradient buffer."""
        adapted = self.trainer.adapted
        names = {id(parameter): spec.name for spec, parameter in adapted.trained_parameters()}
        return torch.cat([torch.from_numpy(np.array(tensors[names[id(slot.parameter)]], dtype=np.float64)).flatten()
                          for slot in self.trainer.buffer.slots])

    def _scale(self, scales: Mapping[str, float]) -> torch.Tensor:
        return torch.cat([torch.full((slot.parameter.numel(),), scales.get(slot.group, 1.0))
                          for slot in self.trainer.buffer.slots])


def record_gradients(trainer: Trainer, records: Records) -> torch.Tensor:
    """Return each record's gradient at the model's present tensors, [records, values] float32, on the CPU."""
    rows = torch.empty(len(records), trainer.buffer.values)
    for length, part in trainer.micro_batches(records, np.arange(len(records))):
        trainer.fill_buffer(records, part, length)
        rows[torch.from_numpy(part)] = trainer.buffer.rows.cpu()
        trainer.buffer.disarm()
    return rows


@torch.no_grad()
def record_losses(trainer: Trainer, records: Records) -> np.ndarray:
    """Return the loss of each record at the model's present tensors, [records]."""
    losses = np.empty(len(records))
    for length, part in trainer.micro_batches(records, np.arange(len(records))):
        with trainer.autocast():
            batch = trainer.task.collate(records, part, length, trainer.device)
            losses[part] = trainer.task.per_record_loss(trainer.adapted.model, batch).cpu().numpy()
    return losses


def _clipped(rows: torch.Tensor, scale: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """Scale and clip gradients as the step does; one that is not finite counts as zero."""
    scaled = rows * scale
    scaled[~scaled.isfinite().all(dim=1)] = 0
    lengths: torch.Tensor = scaled.norm(dim=1, keepdim=True)
    return scaled * (clip_norm / lengths.clamp(min=1e-30)).clamp(max=1.0)


def evidence(step: torch.Tensor, canaries: torch.Tensor, background: torch.Tensor, groups: np.ndarray, *,
             sampling_rate: float, others: int) -> np.ndarray:
    """Return the log-likelihood ratio of each canary being in the data against not being in it, [m].

    Args:
        step: [values] float64, s.
        canaries: [m, values] what each canary adds if it is drawn.
        background: [h, values] what each known other record adds if it is drawn.
        groups: [m + h] the group of each record. Records of one group may share an unknown mean, which is not taken as
            evidence for any of them.
        sampling_rate: q.
        others: number of records that the background stands for.
    """
    m, h, q = len(canaries), len(background), sampling_rate
    rows = torch.cat([canaries, background])
    assert rows.shape[1] > m + h, "there are more coordinates than known gradients"
    gram, seen = _products(rows, step)
    weights = torch.cat([torch.full((m,), q / 2), torch.full((h,), q * others / h)]).double()
    variance = max(_unexplained(step, gram, seen), 1e-12 * float(gram.diagonal().mean()), 1e-300)
    # covariance of s: variance·I + rowsᵀ·common·rows
    common = torch.diag(weights)
    for group in np.unique(groups):
        member = weights * torch.from_numpy(groups == group)
        common += torch.outer(member, member)
    solved = torch.linalg.solve(variance * torch.eye(m + h, dtype=torch.float64) + gram @ common,
                                torch.cat([seen, gram[:, :m]], dim=1))[:m]
    match, energy = solved[:, 0], solved[:, 1:].diagonal()
    own = (1 - weights[:m] * energy).clamp(min=1e-9)  # a canary's own part of the covariance is not noise to itself
    ratio = (match - energy / 2) / own
    return torch.logaddexp(torch.full_like(ratio, np.log1p(-q)), np.log(q) + ratio).numpy()


def _products(rows: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows·rowsᵀ and rows·s in float64, block by block: similar records' gradients differ in the last digits."""
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    seen = torch.zeros(len(rows), 1, dtype=torch.float64)
    for start in range(0, rows.shape[1], _BLOCK):
        block = rows[:, start:start + _BLOCK].double()
        gram += block @ block.T
        seen += block @ step[start:start + _BLOCK, None].double()
    return gram, seen


def _unexplained(step: torch.Tensor, gram: torch.Tensor, seen: torch.Tensor) -> float:
    """Return the variance per coordinate of the part of s that no known gradient reaches.

    That part is the noise, and what the gradients of unknown records add there.
    """
    known = len(gram)
    ridge = 1e-9 * gram.diagonal().mean() * torch.eye(known, dtype=gram.dtype)
    inside = float(seen[:, 0] @ torch.linalg.solve(gram + ridge, seen)[:, 0])
    return max(0.0, float(step.square().sum()) - inside) / (len(step) - known)
