"""The DP-SGD step: clip each unit's gradient, sum, add noise (Abadi et al. 2016, arXiv:1607.00133).

    g_i  <- gradient of a unit of privacy: of a record, or for example the mean over the drawn records of a patient.
            Each group of tensors (adapter, head) is multiplied by a scale that does not depend on the data.
    S    =  sum_i g_i · min(1, C / |g_i|)        all tensors are clipped together, as one concatenated vector
    step =  (S + N(0, sigma^2 C^2)) / b          b is public and constant, never the number of drawn units
    Each group of the step is divided by its scale. This comes after the noise, so the guarantee is untouched.

In a secure sum there is no step: a client gives S on the grid of the run, with rounded noise, and the server steps with
the sum over the clients (`PerRecordOptimizer.encode`).

Norms, sums and noise are in float32 or better, whatever precision the model computes in. Opacus' `DPOptimizer` provides
the step itself, the queue of skipped steps (one for each micro-batch of a draw) and the wrapping of the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from opacus.optimizers import DPOptimizer
from torch.optim import Optimizer

from fedlora.privacy.rng import RandomStream
from fedlora.secure_sum.rounding import rounded_noise
from fedlora.training.gradient_buffer import GradientBuffer, row_norms
from fedlora.training.graphs import without_waiting
from fedlora.training.job import Encoding
from fedlora.training.runtime_checks import NoisePool, StepChecks

CLIP_MARGIN = 1e-5
"""Relative margin by which clipped gradients stay below the clip norm: more than rounding can add to their norm."""

_DRAWING = ThreadPoolExecutor(thread_name_prefix="noise")
"""Draws noise while a GPU computes: a hundred thousand values take milliseconds, which can be as long as a step."""


class PerRecordOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus has no types
    """The DP-SGD optimizer over the gradient buffer: it clips and sums, and at the end of a draw adds noise and steps.

    If each record is a unit, each step clips the buffer's rows. If units have several records, `open_units` comes
    before their micro-batches, each micro-batch is added to the units' gradients (`gather`), and the next step clips
    those.

    On CUDA, the host waits for the GPU only in `clipped`, `nonfinite` and `check`.

    Args:
        optimizer: The wrapped optimizer, over exactly the buffer's parameters.
        buffer: The gradient buffer.
        scales: Group of the buffer → the factor on its gradients before clipping.
        clip_norm: C, the bound on the L2 norm of one unit's scaled gradient.
        noise_multiplier: sigma, in units of `clip_norm`.
        expected_batch_size: b, the public number of units that the noised sum is divided by.
        noise: The source of Gaussian noise.
        pool: The noise of the run so far, for the runtime check; None for a new pool.
        adjust: Changes the noised gradients before each step, after the runtime check has measured them.

    Attributes:
        draws_ahead: Whether a step's noise is drawn while its gradients are computed.
        refused: [] The count behind `nonfinite`, on the device. Private.

    Raises:
        RuntimeError: The optimizer does not hold the buffer's parameters.
    """

    def __init__(self, optimizer: Optimizer, buffer: GradientBuffer, *, scales: Mapping[str, float], clip_norm: float,
                 noise_multiplier: float, expected_batch_size: float, noise: RandomStream,
                 pool: NoisePool | None = None, adjust: Callable[[], None] | None = None) -> None:
        super().__init__(optimizer, noise_multiplier=noise_multiplier, max_grad_norm=clip_norm,
                         expected_batch_size=expected_batch_size)
        owned = [slot.parameter for slot in buffer.slots]
        if sorted(map(id, owned)) != sorted(map(id, self.params)):
            raise RuntimeError("the optimizer does not hold the tensors whose gradients are recorded, so that training "
                               "would release noise alone. This happens when a model is moved or copied after it was "
                               "wrapped; move it first")
        self.buffer = buffer
        self.noise = noise
        self._adjust = adjust
        self._draw_goes_on = False  # whether the last step was skipped, so that the sum is still growing
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
        """The number of units so far whose gradient was longer than C. Private: it must not leave the machine."""
        return int(self._clipped)

    @property
    def nonfinite(self) -> int:
        """The number of records so far whose gradient was not finite and counted as zero. Private, like `clipped`."""
        return int(self.refused)

    @property
    def clipped_sum(self) -> torch.Tensor:
        """[values] The sum of the clipped, scaled gradients of the current draw, before noise. Private."""
        return self._sum

    @property
    def grad_samples(self) -> list[torch.Tensor]:
        """A list that tells Opacus that there is something to step with. Opacus does not read the values here."""
        return [self.buffer.rows] if self.buffer.armed else [self._sum]

    @property
    def accumulated_iterations(self) -> int:
        """The number of parts of a draw that Opacus divides by: 1, as `expected_batch_size` is for the whole draw."""
        return 1

    def open_units(self, units: int) -> None:
        """Begin a group of units with several records each; the next step clips and sums their gradients.

        Args:
            units: The number of units.
        """
        assert self._units is None, "units are open already"
        self._units = torch.zeros(units, self.buffer.values, device=self._sum.device)

    def gather(self, owners: np.ndarray, weights: np.ndarray) -> None:
        """Add the armed buffer's records to the gradients of their units, and release the buffer.

        Args:
            owners: [records] For each record, the number of its unit among the open ones; ascending.
            weights: [records] Each record's factor in its unit's gradient.
        """
        assert self._units is not None, "no units are open"
        self.buffer.check_complete()
        rows = self.buffer.rows
        self._refuse(rows, torch.linalg.vector_norm(rows, dim=1).isfinite())
        rows *= without_waiting(torch.from_numpy(weights).float(), rows.device)[:, None]
        _, first, counts = np.unique(owners, return_index=True, return_counts=True)
        turn_of = np.arange(len(owners)) - np.repeat(first, counts)
        # One record of each unit at a time: so the order in which a unit's records are added is fixed, also on a GPU,
        # and depends on that unit alone.
        for turn in range(counts.max()):
            chosen = np.flatnonzero(turn_of == turn)
            mine, theirs = (without_waiting(torch.from_numpy(which), rows.device) for which in (chosen, owners[chosen]))
            self._units.index_add_(0, theirs, rows[mine])
        self.buffer.disarm()

    def clip_and_accumulate(self) -> None:
        """Clip the open units, or else the armed buffer's records, and add them to the sum.

        An empty draw adds nothing.
        """
        if self._units is not None:
            rows, self._units = self._units, None
        elif self.buffer.armed:
            self.buffer.check_complete()
            rows = self.buffer.computed  # norms are computed with the fillers, so that the shape is always the same
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
        """Set the rows that are not finite to zero, and count them."""
        finite = finite.to(rows.device)
        if rows.device.type == "cuda" or not bool(finite.all()):  # on CUDA, writing costs less than waiting for `all`
            rows.masked_fill_(~finite[:, None], 0)  # 0 · inf is not 0
            self.refused += (~finite).sum()

    def expect_noise(self) -> None:
        """Start to draw the step's noise in another thread, at the beginning of a step or of a part of it."""
        if self.draws_ahead and self._coming_noise is None:
            self._coming_noise = _DRAWING.submit(self._draw_noise)

    def _draw_noise(self) -> torch.Tensor:
        """Draw [values] from the standard normal distribution, in the processor's memory.

        The memory is pinned if the noise goes to CUDA, so that the host need not wait for the copy.
        """
        noise = torch.from_numpy(self.noise.gaussian(self.buffer.values))
        return noise.pin_memory() if self._sum.device.type == "cuda" else noise

    def add_noise(self) -> None:
        """Add noise to every coordinate in the scaled space, divide the scales out, and set the parameters' `grad`."""
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
        """Clip and sum; unless this step is to be skipped, add noise, measure the noised gradients and adjust them.

        Args:
            closure: Passed on to Opacus.

        Returns:
            Whether the wrapped optimizer shall step.
        """
        ready = bool(super().pre_step(closure))
        self._draw_goes_on = not ready
        if ready:
            self._checks.note_applied(self._sum, self._drawn_noise)
            self._drawn_noise = None
            if self._adjust is not None:
                self._adjust()
        return ready

    def encode(self, encoding: Encoding, order: np.ndarray, further: np.ndarray) -> np.ndarray:
        """Return the draw's sum as integers of a secure sum, with noise, and forget it. The parameters do not move.

        Args:
            encoding: The integers and the noise.
            order: [values] The columns of the buffer in the order of the released vector.
            further: [k] Values that follow in the vector, of other units than those of the gradients.

        Returns:
            [values + k] int64.
        """
        clipped_sum = np.concatenate([self._sum.cpu().double().numpy()[order], further])
        noise = rounded_noise(self.noise, encoding.deviation, len(clipped_sum))
        integers: np.ndarray = encoding.grid.encode(clipped_sum) + noise
        self._checks.note_encoded(clipped_sum, integers, noise, encoding)
        self._draw_goes_on = False
        self.zero_grad()
        return integers

    def check(self) -> None:
        """Evaluate the runtime checks of all steps, after the last one.

        Raises:
            RuntimeError: A runtime check found a fault in a step.
        """
        self._checks.check()

    def scale_grad(self) -> None:
        """Divide the noised gradients by the expected batch size."""
        torch._foreach_div_([slot.parameter.grad for slot in self.buffer.slots],  # type: ignore[misc]
                            self.expected_batch_size)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Release the buffer, and after the last micro-batch of a draw forget the draw's sum."""
        self.buffer.disarm()
        if not self._draw_goes_on:
            self._sum.zero_()
        self.original_optimizer.zero_grad(set_to_none)


def _add_weighted(total: torch.Tensor, factors: torch.Tensor, rows: torch.Tensor) -> None:
    """Add factors [records] @ rows [records, values] to total [values], in the precision of `total`.

    A sum in float32 would be rounded differently depending on which other records the micro-batch has.
    """
    if rows.device.type == "cpu":  # a product would first convert all rows to float64, which takes ten times as long
        for factor, row in zip(factors.tolist(), rows, strict=True):
            total.add_(row, alpha=factor)
    else:
        total += factors.to(total) @ rows.to(total.dtype)


def _spans(buffer: GradientBuffer, scales: Mapping[str, float]) -> list[tuple[slice, float]]:
    """Return (columns, scale) of each group. Each group's columns are contiguous in the buffer."""
    spans = []
    for group in dict.fromkeys(slot.group for slot in buffer.slots):
        slots = [slot for slot in buffer.slots if slot.group == group]
        spans.append((slice(slots[0].columns.start, slots[-1].columns.stop), float(scales[group])))
    return spans
