r"""Screening: which uploads of a round are left out of its average, for no training can have made them so.

One finite upload, times a million, is the average of all. Before the first average each upload is held against

    what training can do   ‖u − sent‖ ≤ reach, which follows from the plan. It is without use where nothing bounds it.
    the others             ‖u − sent‖ ≤ k · median, the lower median of this round's norms, or, with fewer than three
                           uploads, of the medians of earlier rounds

The lower median is a norm of an honest client as long as more than half of the uploads are honest, so that what is
taken of the others is at most k times as far as an honest client goes: one of n in the opposite direction takes k / n
away and leaves (n − 1) / n. Honest clients' norms differ little: in 8 steps of AdamW one whose gradients all agree goes
√8 ≈ 2.8 times as far as one whose gradients are noise alone. Without privacy k is `PLAIN`.

With privacy, norms follow from the noise, and an owner whose lifetime budget is small raises it, to at most ten times
what the run asks for, or lowers the clip norm, which shortens the update. k is `PRIVATE`: an upload with ten times the
usual noise makes the mean noisier than leaving it out does, (n + 99) / n² against 1 / (n − 1) of a usual client's
variance, whatever n.

Symbol   Here             Meaning
b        expected_batch   by which the sum of a step is divided, public
C        clip_norm        the plan's; a client's own is at most that
σ        noise            announced, at most `PRIVATE` times the lower median of what the round's clients announce;
                          that in place of what is not announced
s_g      scales           of group g, which has d_g values
T, η     steps, lr        of the round

Reach of AdamW: η √d R(T), where R(T), slightly above T, bounds each value whatever the gradients are. It is certain.
Reach of SGD with privacy: the gradients' sums and their noise, each over all steps,

    η T C (2 b + 6 √(2 b)) / (b min s_g)  +  η √T σ C / b · sqrt(Σ_g ((√d_g + 6) / s_g)²)

where a client may draw twice as many records as expected, if it declared a size below its own, and by chance six
deviations more; and the norm of d standard Gaussians is below √d + 6 but for e^-18 ≈ 1.5e-8.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from fedlora import registry
from fedlora.adapters import AdapterLayout
from fedlora.plan import FOUND, RunPlan

PLAIN, PRIVATE = 5.0, 10.0
"""k, without privacy and with it."""

EXAMPLES = 10.0
"""An upload counts for at most so many times the lower median of the round's numbers of examples: they are a claim, and
honest ones do differ."""

COMPARED = 3
"""With fewer uploads none of them tells what is usual."""

OVERDRAWN, DEVIATIONS = 2.0, 6.0
"""How many times the expected batch a step may have on average, and how many deviations more what is random."""

ROUNDED = {"fp32": 2.0**-20, "bf16": 2.0**-8}
"""How much rounding can move a tensor, relatively: in each step, and where it travels."""


@dataclass(frozen=True)
class Measured:
    """What screening knows of an upload.

    Attributes:
        norm: L2 norm of what it moves.
        noise: the noise multiplier that it announces.
        examples: the number of examples that it claims.
    """

    norm: float
    noise: float | None = None
    examples: int | None = None


@dataclass(frozen=True)
class Reach:
    """How far the round's training can go: at most `fixed + noise · per_noise`.

    Attributes:
        why: in words, for whoever reads that an upload was left out.
    """

    fixed: float = math.inf
    per_noise: float = 0.0
    why: str = ""

    @property
    def bounded(self) -> bool:
        return self.fixed < math.inf


def reach_of(run: RunPlan, layout: AdapterLayout, lr: float, start_norm: float) -> Reach:
    """The reach of one round.

    Args:
        run: the plan that clients train by.
        layout: of the tensors that train in the round.
        lr: of the round.
        start_norm: L2 norm of the tensors that it starts from, whose rounding counts.
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
    """The largest value that at least half of the others are not below; None of none."""
    return sorted(values)[(len(values) - 1) // 2] if values else None


def usual_norm(norms: Collection[float]) -> float | None:
    """The lower median of those that move anything at all."""
    return lower_median([norm for norm in norms if norm > 0])


def left_out(measured: Mapping[int, Measured], k: float, earlier: Sequence[float], reach: Reach, *,
             among_few: bool = False) -> dict[int, str]:
    """Which uploads do not count, and why.

    Args:
        measured: of each node.
        k: how many times as far as is usual an upload may go.
        earlier: what was usual in earlier rounds.
        reach: of the round.
        among_few: fewer than `COMPARED` uploads are held against each other too.
    """
    if math.isinf(k):
        return {}
    noise = lower_median([one.noise for one in measured.values() if one.noise is not None])
    usual, of_what = _usual([one.norm for one in measured.values()], earlier, among_few)
    found = {}
    for node, one in measured.items():
        most = reach.fixed
        if reach.per_noise:
            most = math.inf if noise is None else reach.fixed + reach.per_noise * min(
                one.noise or math.inf, PRIVATE * noise)
        if one.norm > most:
            found[node] = f"it moves the adapter by {one.norm:.3g}, and {reach.why} go no further than {most:.3g}"
        elif usual is not None and one.norm > k * usual:
            found[node] = f"it moves the adapter by {one.norm:.3g}, more than {k:g} times {of_what}, {usual:.3g}"
    return found


def _usual(norms: Collection[float], earlier: Sequence[float], among_few: bool) -> tuple[float | None, str]:
    """The norm that others are held against, and what it is; None where there is nothing to compare with.

    With two uploads and earlier rounds it is no less than the shorter one's: of two honest clients that go further
    than before, one stays.
    """
    here, before = usual_norm(norms), lower_median(earlier)
    if len(norms) >= COMPARED or (among_few and before is None):
        return here, "the lower median of the round's uploads"
    if before is None:
        return None, ""
    several = here if len(norms) > 1 and here is not None else 0.0
    return max(before, several), "what was usual in earlier rounds"


def most_examples(measured: Mapping[int, Measured]) -> float:
    """The number of examples that an upload counts for at most."""
    usual = lower_median([one.examples for one in measured.values() if one.examples is not None])
    return math.inf if usual is None else EXAMPLES * usual
