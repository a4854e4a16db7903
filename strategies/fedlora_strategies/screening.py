r"""Screening: leave out uploads that no honest training can have made, before they are averaged.

A single upload, multiplied by a million, would decide the average of all. Therefore, before the average, the norm of
each upload's change is compared with

    the reach of training   ‖u − sent‖ ≤ reach, which follows from the plan; for some optimizers there is no such bound
    the other uploads       ‖u − sent‖ ≤ k · median: the lower median of this round's norms, or with fewer than three
                            uploads, the lower median of earlier rounds' usual norms

As long as more than half of the uploads are honest, the lower median is at most the norm of some honest client. So a
dishonest upload goes at most k times as far as an honest one. If one of n uploads goes in the opposite direction, the
mean is at least (n − 1 − k) / n times an honest change. Honest clients' norms differ little: in 8 steps of AdamW, a
client whose gradients all agree goes √8 ≈ 2.8 times as far as one whose gradients are pure noise. Without privacy, k is
`PLAIN`.

With privacy, the norms follow from the noise. A data holder with a small lifetime budget raises the noise, to at most
ten times what the run asks for, or lowers the clip norm, which shortens the update. k is `PRIVATE`: for any n, an
upload with ten times the usual noise makes the mean noisier than leaving it out does, (n + 99) / n² against 1 / (n − 1)
of a usual client's variance.

    Symbol   Here             Meaning
    b        expected_batch   the public number that the sum of a step is divided by
    C        clip_norm        the plan's clip norm; a client's own is at most that
    σ        noise            the upload's noise multiplier (see below)
    s_g      scales           the scale of group g, which has d_g values
    T, η     steps, lr        the round's number of steps and learning rate

σ is the noise multiplier that the upload announces, but at most `PRIVATE` times the lower median of those that the
round's uploads announce. An upload that announces none gets this limit.

The reach of AdamW is η √d R(T), where R(T), slightly above T, bounds each value whatever the gradients are. No honest
upload exceeds it. The reach of SGD with privacy is the sum of the gradients and of the noise, each over all steps:

    η T C (2 b + 6 √(2 b)) / (b min s_g)  +  η √T σ C / b · sqrt(Σ_g ((√d_g + 6) / s_g)²)

It allows for a client that draws twice as many records as expected, because it declared a size below its own, plus six
standard deviations by chance. The norm of d standard Gaussians is below √d + 6, except with probability
e^-18 ≈ 1.5e-8.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from fedlora import registry
from fedlora.adapters import AdapterLayout
from fedlora.plan import FOUND, RunPlan

PLAIN, PRIVATE = 5.0, 10.0
"""The limit k, without privacy and with it."""

EXAMPLES = 10.0
"""An upload counts for at most this many times the lower median of the round's numbers of examples.

The numbers are the clients' claims, and honest ones differ."""

COMPARED = 3
"""The fewest uploads of a round that are compared with each other. Fewer do not show what is usual."""

OVERDRAWN, DEVIATIONS = 2.0, 6.0
"""The bounds for honest clients: the mean batch in units of the expected one, and random values in standard deviations
from their mean."""

ROUNDED = {"fp32": 2.0**-20, "bf16": 2.0**-8}
"""Wire dtype → the relative change that rounding can make to a tensor, in the steps and when it is sent."""


@dataclass(frozen=True)
class Measured:
    """The measurements of an upload that screening uses.

    Attributes:
        norm: The L2 norm of its change of the tensors.
        noise: The noise multiplier that it announces, if any.
        examples: The number of examples that it claims, if any.
        longer: How much longer it would usually be with the ranks that other clients of the round train.
    """

    norm: float
    noise: float | None = None
    examples: int | None = None
    longer: float = 1.0

    @property
    def comparable(self) -> float:
        """The norm to compare with those of other clients."""
        return self.norm * self.longer


@dataclass(frozen=True)
class Reach:
    """The largest distance that a round's training can move the tensors: `fixed + noise · per_noise`.

    Attributes:
        fixed: The part that does not depend on the noise.
        per_noise: The part for each unit of noise multiplier.
        why: The cause of the bound in words, for the message about an upload that is left out.
    """

    fixed: float = math.inf
    per_noise: float = 0.0
    why: str = ""

    @property
    def bounded(self) -> bool:
        """Whether there is a bound at all."""
        return self.fixed < math.inf


def reach_of(run: RunPlan, layout: AdapterLayout, lr: float, start_norm: float) -> Reach:
    """Return the reach of one round.

    Args:
        run: The plan that clients train by.
        layout: The layout of the tensors that train in the round.
        lr: The round's learning rate.
        start_norm: The L2 norm of the tensors that the round starts from; their rounding adds to the reach.
    """
    optimizer, steps = registry.load(FOUND["optimizer"], run.optimizer), run.local_steps
    told = f"{steps} steps of {run.optimizer} with --lr {lr:.3g}"
    slack = ROUNDED[run.wire_dtype] * start_norm
    if (most := getattr(optimizer, "REACH", None)) is not None:
        return Reach(1.01 * lr * math.sqrt(layout.num_trained) * most(steps) + slack, 0.0, told)
    if not getattr(optimizer, "LINEAR", False) or run.adjustment or not run.private:
        return Reach()
    sizes = {group: sum(spec.size for spec in layout.trained if spec.group == group)
             for group in {spec.group for spec in layout.trained}}
    scales = {"adapter": run.adapter_scale, "head": run.head_scale}
    b, C = run.expected_batch, run.clip_norm
    drawn = OVERDRAWN + DEVIATIONS * math.sqrt(OVERDRAWN / b)
    noise = math.hypot(*((math.sqrt(size) + DEVIATIONS) / scales[group] for group, size in sizes.items()))
    return Reach(1.01 * lr * steps * C * drawn / min(scales[group] for group in sizes) + slack,
                 1.01 * lr * math.sqrt(steps) * C / b * noise, f"{told} and clip norm {C:g}")


def lower_median(values: Collection[float]) -> float | None:
    """Return the lower median (of the two middle values, the lower one), or None if there are no values."""
    return sorted(values)[(len(values) - 1) // 2] if values else None


def usual_norm(norms: Collection[float]) -> float | None:
    """Return the lower median of the norms above 0."""
    return lower_median([norm for norm in norms if norm > 0])


def left_out(measured: Mapping[int, Measured], k: float, earlier: Sequence[float], reach: Reach, *,
             among_few: bool = False) -> dict[int, str]:
    """Find the uploads to leave out.

    Args:
        measured: Node id → the measurements of its upload.
        k: The limit, in units of the usual norm; infinite leaves nothing out.
        earlier: The usual norms of earlier rounds.
        reach: The reach of the round's training.
        among_few: Whether to compare uploads with each other even if there are fewer than `COMPARED`.

    Returns:
        Node id → the reason, for each upload to leave out.
    """
    if math.isinf(k):
        return {}
    noise = lower_median([one.noise for one in measured.values() if one.noise is not None])
    usual, of_what = _usual([one.comparable for one in measured.values()], earlier, among_few)
    found = {}
    for node, one in measured.items():
        most = reach.fixed
        if reach.per_noise:
            most = math.inf if noise is None else reach.fixed + reach.per_noise * min(
                one.noise or math.inf, PRIVATE * noise)
        if one.norm > most:
            found[node] = f"it moves the adapter by {one.norm:.3g}, and {reach.why} go no further than {most:.3g}"
        elif usual is not None and one.comparable > k * usual:
            found[node] = f"it moves the adapter by {one.comparable:.3g}, more than {k:g} times {of_what}, {usual:.3g}"
    return found


def _usual(norms: Collection[float], earlier: Sequence[float], among_few: bool) -> tuple[float | None, str]:
    """Return the norm to compare with and its name for messages; None if there is nothing to compare with.

    With two uploads and earlier rounds, the norm is at least that of the shorter upload. So if two honest clients go
    further than in earlier rounds, at least one of them is kept.

    Args:
        norms: The norms of the round's uploads.
        earlier: The usual norms of earlier rounds.
        among_few: Whether to compare uploads with each other even if there are fewer than `COMPARED`.
    """
    here, before = usual_norm(norms), lower_median(earlier)
    if len(norms) >= COMPARED or (among_few and before is None):
        return here, "the lower median of the round's uploads"
    if before is None:
        return None, ""
    several = here if len(norms) > 1 and here is not None else 0.0
    return max(before, several), "what was usual in earlier rounds"


def most_examples(measured: Mapping[int, Measured]) -> float:
    """Return the most examples that an upload may count for."""
    usual = lower_median([one.examples for one in measured.values() if one.examples is not None])
    return math.inf if usual is None else EXAMPLES * usual
