"""One step of DP-SGD on the flat gradient buffer (Abadi et al. 2016, arXiv:1607.00133).

    g_i  <- gradient of a unit of privacy, each group times its data-independent scale: that of a record, or the mean
            over the drawn records of a patient, say
    S    =  sum_i g_i · min(1, C / |g_i|)        clipped once, as one concatenated vector
    step =  (S + N(0, sigma^2 C^2)) / b          b is public and constant, never the drawn size
    each group of the step is divided by its scale: after the noise, so the guarantee is untouched

Norms, sums and noise are in float32 or better, whatever precision the model computes in. Opacus' `DPOptimizer` is kept
for its step, its queue of skipped steps (micro-batches of one draw) and its pass-through to the wrapped optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from opacus.optimizers import DPOptimizer
from torch.optim import Optimizer

from fedlora.privacy.rng import RandomStream
from fedlora.training.gradient_buffer import GradientBuffer, row_norms
from fedlora.training.graphs import without_waiting
from fedlora.training.runtime_checks import NoisePool, StepChecks

CLIP_MARGIN = 1e-5
"""A clipped record is left this much below the clip norm, relatively: more than its norm and its factor can be off."""


_DRAWING = ThreadPoolExecutor(thread_name_prefix="noise")
"""Draws noise while a GPU computes: of a hundred thousand values it takes milliseconds, as a whole step may."""


class PerRecordOptimizer(DPOptimizer):
    """Clips and sums what the buffer holds; at the end of a draw adds noise and steps.

    Units of several records are opened before their micro-batches; each then adds to the units' gradients (`gather`),
    and the next step clips those instead of the buffer's rows.

    Args:
        optimizer: over exactly the buffer's parameters.
        scales: for each group of the buffer, the factor on its gradients before clipping.
        clip_norm: C, the L2 bound of one unit's scaled gradient.
        noise_multiplier: sigma, in units of clip_norm.
        expected_batch_size: b.
        noise: where the Gaussians come from.
        pool: of the run's noise, for the runtime check; None for a new one.
        adjust: done to the noised gradients before each step, once they were measured for the check.
    On CUDA the host waits for the GPU where it is asked for `clipped`, `nonfinite` and `check`, and nowhere else.

    Attributes:
        draws_ahead: whether a step's noise is drawn while its gradients are computed.
        refused: [] `nonfinite`, where it is counted. Private.
    """

    def __init__(self, optimizer: Optimizer, buffer: GradientBuffer, *, scales: Mapping[str, float], clip_norm: float,
                 noise_multiplier: float, expected_batch_size: float, noise: RandomStream,
                 pool: NoisePool | None = None, adjust: Callable[[], None] | None = None) -> None:
        super().__init__(optimizer, noise_multiplier=noise_multiplier, max_grad_norm=clip_norm,
                         expected_batch_size=expected_batch_size)  # type: ignore[arg-type]
        owned = [slot.parameter for slot in buffer.slots]
        if sorted(map(id, owned)) != sorted(map(id, self.params)):
            raise RuntimeError("the optimizer does not hold the tensors whose gradients are recorded, as happens when "
                               "a model is moved or copied after it was wrapped; training would release noise alone")
        self.buffer = buffer
        self.noise = noise
        self._adjust = adjust
        self._groups = _spans(buffer, scales)
        device = owned[0].device
        self._sum = torch.zeros(buffer.values, device=device,
                                dtype=torch.float32 if device.type == "mps" else torch.float64)
        self._units: torch.Tensor | None = None
        self._drawn_noise: torch.Tensor | None = None
        self.draws_ahead = device.type != "cpu"
        self._coming_noise: Future[torch.Tensor] | None = None
        self._clipped, self.refused = torch.zeros(2, dtype=torch.int64, device=device)
        self._checks = StepChecks(buffer, scales=scales, clip_norm=clip_norm, noise_multiplier=noise_multiplier,
                                        expected_batch_size=expected_batch_size, pool=pool or NoisePool())

    @property
    def clipped(self) -> int:
        """Units that were longer than C, counted since the start. Private."""
        return int(self._clipped)

    @property
    def nonfinite(self) -> int:
        """Records whose gradient was not finite and counted as zero. Private, too."""
        return int(self.refused)

    @property
    def clipped_sum(self) -> torch.Tensor:
        """[values] sum of the clipped, scaled gradients of the current draw, before noise. Private."""
        return self._sum

    @property
    def grad_samples(self) -> list[torch.Tensor]:
        return [self.buffer.rows] if self.buffer.armed else [self._sum]

    @property
    def accumulated_iterations(self) -> int:
        return 1

    def open_units(self, units: int) -> None:
        """Before the micro-batches of this many units of several records each; the next step closes them."""
        assert self._units is None, "units are open already"
        self._units = torch.zeros(units, self.buffer.values, device=self._sum.device)

    def gather(self, owners: np.ndarray, weights: np.ndarray) -> None:
        """Add the armed buffer's records to the gradients of their units, and release the buffer.

        Args:
            owners: [records] which of the open units each belongs to, ascending.
            weights: [records] its factor in that unit's gradient.
        """
        assert self._units is not None, "no units are open"
        self.buffer.check_complete()
        rows = self.buffer.rows
        self._refuse(rows, torch.linalg.vector_norm(rows, dim=1).isfinite())
        rows *= without_waiting(torch.from_numpy(weights).float(), rows.device)[:, None]
        _, first, counts = np.unique(owners, return_index=True, return_counts=True)
        turn_of = np.arange(len(owners)) - np.repeat(first, counts)
        # one record of each unit at a time: the order of a unit's additions is fixed, on a GPU too, and its own
        for turn in range(counts.max()):
            chosen = np.flatnonzero(turn_of == turn)
            mine, theirs = (without_waiting(torch.from_numpy(which), rows.device) for which in (chosen, owners[chosen]))
            self._units.index_add_(0, theirs, rows[mine])
        self.buffer.disarm()

    def clip_and_accumulate(self) -> None:
        """Add the open units or else the armed buffer's records to the sum; nothing after an empty draw."""
        if self._units is not None:
            rows, self._units = self._units, None
        elif self.buffer.armed:
            self.buffer.check_complete()
            rows = self.buffer.computed  # norms are taken in the shape of the micro-batch, whatever fills it
        else:
            return
        norms = torch.stack([scale * row_norms(rows[:, span]) for span, scale in self._groups]).norm(dim=0)
        if self.buffer.armed:
            rows = self.buffer.rows
            norms = norms[:len(rows)]
        finite = norms.isfinite()
        self._refuse(rows, finite)
        norms = norms.where(finite, 0.0)
        bound = self.max_grad_norm * (1 - CLIP_MARGIN)
        factors = bound / norms.clamp(min=bound)
        for span, scale in self._groups:
            _add_weighted(self._sum[span], factors * scale, rows[:, span])
        self._checks.note_shares(rows, factors)
        self._clipped += (norms > bound).sum().to(self._clipped.device)

    def _refuse(self, rows: torch.Tensor, finite: torch.Tensor) -> None:
        """Take rows that are not finite for zero, and count them."""
        finite = finite.to(rows.device)
        if rows.device.type == "cuda" or not bool(finite.all()):  # to write them all costs less than to wait
            rows.masked_fill_(~finite[:, None], 0)  # 0 · inf is not 0
            self.refused += (~finite).sum()

    def expect_noise(self) -> None:
        """At the beginning of a step, or of a part of it."""
        if self.draws_ahead and self._coming_noise is None:
            self._coming_noise = _DRAWING.submit(self._draw_noise)

    def _draw_noise(self) -> torch.Tensor:
        """[values] of the standard normal distribution, in the processor's memory; pinned, if it goes to CUDA: then
        the copy need not be waited for.
        """
        noise = torch.from_numpy(self.noise.gaussian(self.buffer.values))
        return noise.pin_memory() if self._sum.device.type == "cuda" else noise

    def add_noise(self) -> None:
        """Noise on every coordinate in the scaled space, then back to the parameters' own scale."""
        coming, self._coming_noise = self._coming_noise, None
        noise = self._draw_noise() if coming is None else coming.result()
        self._drawn_noise = self.noise_multiplier * self.max_grad_norm * noise.to(
            self._sum.device, self._sum.dtype, non_blocking=noise.is_pinned())
        noised = self._sum + self._drawn_noise
        for span, scale in self._groups:
            noised[span] /= scale
        noised = noised.float()
        for slot in self.buffer.slots:
            slot.parameter.grad = noised[slot.columns].view_as(slot.parameter)

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """As Opacus': clip, and unless this step is to be skipped, add noise, measure what the noise went into and
        adjust it. Returns whether the wrapped optimizer is to step.
        """
        ready = bool(super().pre_step(closure))
        if ready:
            self._checks.note_applied(self._sum, self._drawn_noise)
            self._drawn_noise = None
            if self._adjust is not None:
                self._adjust()
        return ready

    def check(self) -> None:
        """After the last step: the runtime checks of all. Raises RuntimeError."""
        self._checks.check()

    def scale_grad(self) -> None:
        torch._foreach_div_([slot.parameter.grad for slot in self.buffer.slots],  # type: ignore[misc]
                            self.expected_batch_size)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the finished draw; between micro-batches of one draw only the buffer is released."""
        self.buffer.disarm()
        if not self._is_last_step_skipped:
            self._sum.zero_()
        self.original_optimizer.zero_grad(set_to_none)


def _add_weighted(total: torch.Tensor, factors: torch.Tensor, rows: torch.Tensor) -> None:
    """total [values] += factors [records] @ rows [records, values], in total's precision.

    In float32 the sum of a micro-batch would be rounded by which records it has.
    """
    if rows.device.type == "cpu":  # a product would first widen all rows, which takes ten times as long
        for factor, row in zip(factors.tolist(), rows, strict=True):
            total.add_(row, alpha=factor)
    else:
        total += factors.to(total) @ rows.to(total.dtype)


def _spans(buffer: GradientBuffer, scales: Mapping[str, float]) -> list[tuple[slice, float]]:
    """(columns, scale) of each group; groups are contiguous in the buffer."""
    spans = []
    for group in dict.fromkeys(slot.group for slot in buffer.slots):
        slots = [slot for slot in buffer.slots if slot.group == group]
        spans.append((slice(slots[0].columns.start, slots[-1].columns.stop), float(scales[group])))
    return spans
