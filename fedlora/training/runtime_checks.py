"""Runtime checks of every round, which compare the values that were really computed with the privacy promise.

    check           compares                                        with                       fires, for example, if
    shares          each unit's weighted gradient                   C                          clipping is wrong
    applied noise   applied gradient · b · scale - clipped sum      the noise that was drawn   noise is added twice
    encoded noise   integers - clipped sum, in units of the grid    the noise that was drawn   a value is not noised
    pooled noise    the standard deviation of the run's noise       σ·C, or the grid's         noise is too small
    gradients       the clipped sum of each trained tensor          0                          an adapter is cut off
    frozen          the frozen tensors after the round              those before it            an optimizer moves them
    owners          the tensors that train                          the model's                the model was copied

The checks see private values and reveal none. All they can do is stop a round, with a RuntimeError. The exception is
the check of gradients, whose outcome depends on the records' content even where nothing is wrong: it only writes to the
local log. A server chooses the tensors that a round starts from, and could otherwise learn something from a missing
answer. `Trainer.rehearse` looks for the same faults on made-up records.

Passing the checks does not prove that no fault of another kind exists.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from fedlora.adapters import AdaptedModel, AdapterLayout
from fedlora.tasks import Records
from fedlora.training.gradient_buffer import GradientBuffer, row_norms
from fedlora.training.job import Encoding

log = logging.getLogger(__name__)

STANDARD_ERRORS = 5.0
"""Allowed error of the pooled noise's deviation, in standard errors: exceeded by chance less than once in a million
rounds."""

_ROUNDING = 1e-5
"""Allowed relative error of the applied gradient, which is float32 and was scaled twice."""

_LEAST_NOISE = 1e-3
"""Noise below this share of the sum's root mean square is not measured: float32 loses it, and it gives no privacy."""

_LEAST_DEVIATION = 1.0
"""Noise on a grid below this standard deviation is not measured: rounding changes it, and it gives no privacy."""

_SAMPLE = 64
"""The number of values to compare in each tensor of the base model. The adapter's frozen tensors are compared whole."""


def alarm(found: str) -> RuntimeError:
    """Return the error to raise when a check fails.

    Args:
        found: The fault, as a clause that begins the message. It must not contain a private value.
    """
    return RuntimeError(f"{found}. Nothing of this round was released. Please report this with the model's type, the "
                        "targets, and the versions of torch, transformers and opacus")


def tell_finite(drawn: int, nonfinite: int) -> None:
    """Log an error on this machine if no drawn record of the round had a finite gradient.

    Args:
        drawn: The number of drawn records.
        nonfinite: The number of those whose gradient was not finite.
    """
    if drawn and nonfinite == drawn:
        log.error("None of the drawn records has a finite gradient: this round releases noise alone.")


class NoisePool:
    """The noise of a run so far: its sum of squares, in units of the intended standard deviation."""

    def __init__(self) -> None:
        self.values, self.squares = 0, 0.0

    def add(self, values: int, norm: float, deviation: float) -> None:
        """Add noise to the pool.

        Args:
            values: Its number of values.
            norm: Its L2 norm.
            deviation: The standard deviation that it should have.
        """
        self.values += values
        self.squares += norm**2 / deviation**2

    def check(self) -> None:
        """Check that the noise so far has the intended standard deviation.

        Raises:
            RuntimeError: It is off by more than `STANDARD_ERRORS` standard errors.
        """
        if self.values:
            ratio = math.sqrt(self.squares / self.values)
            error = 1 / math.sqrt(2 * self.values)
            if not abs(ratio - 1) <= STANDARD_ERRORS * error:
                raise alarm(f"the noise that was added in this run has {ratio:.6g} times its intended standard "
                            f"deviation, which is {abs(ratio - 1) / error:.3g} standard errors off")


class StepChecks:
    """The checks of the clipped shares and of the noise in one round's private steps.

    They take the promised values from the caller, and not from the optimizer that they check.

    Args:
        buffer: Names the tensors and their columns.
        scales: Group → the promised factor on its gradients.
        clip_norm: C, as promised.
        noise_multiplier: σ, as promised.
        expected_batch_size: b, as promised.
        pool: The run's noise so far.
    """

    def __init__(self, buffer: GradientBuffer, *, scales: Mapping[str, float], clip_norm: float,
                 noise_multiplier: float, expected_batch_size: float, pool: NoisePool) -> None:
        self._slots = buffer.slots
        self._values = buffer.values
        self._clip_norm, self._divisor = float(clip_norm), float(expected_batch_size)
        self._deviation = float(noise_multiplier) * float(clip_norm)
        self._pool = pool
        self._longest: list[torch.Tensor] = []  # for each part of a step: the largest squared norm of a share
        self._applied: list[torch.Tensor] = []  # for each step: the largest error, the norms of the sum and the noise
        self._spans: list[tuple[int, int, float]] = []  # (first column, end, scale) of neighbours with one scale
        for slot in buffer.slots:
            start, scale = slot.columns.start, float(scales[slot.group])
            if self._spans and self._spans[-1][1:] == (start, scale):
                start = self._spans.pop()[0]
            self._spans.append((start, slot.columns.stop, scale))

    def note_shares(self, rows: torch.Tensor, factors: torch.Tensor) -> None:
        """Measure the units' shares of the sum, factor · scale · row; `check` evaluates them.

        Args:
            rows: [units, values] The gradients that went into the sum.
            factors: [units] The clip factors that they were multiplied by.
        """
        shares = torch.zeros_like(factors)
        for start, stop, scale in self._spans:
            shares += (row_norms(rows[:, start:stop]) * (factors * scale)).square()
        self._longest.append(shares.max())

    def note_applied(self, clipped_sum: torch.Tensor, noise: torch.Tensor | None) -> None:
        """Compare the gradients that the optimizer is about to apply with (sum + noise) / (b · scale).

        `check` evaluates the result.

        Args:
            clipped_sum: [values] The sum, in the scaled space.
            noise: [values] The noise that was drawn, in the scaled space; None if there was none.

        Raises:
            RuntimeError: There was no noise, or a trained tensor has no gradient.
        """
        if noise is None:
            raise alarm("a step was made without noise")
        if any(slot.parameter.grad is None for slot in self._slots):
            raise alarm("a trained tensor was given no gradient in a step")
        added = torch.cat([slot.parameter.grad.flatten() for slot in self._slots]).to(clipped_sum)  # type: ignore
        for start, stop, scale in self._spans:
            added[start:stop] *= scale * self._divisor
        added -= clipped_sum
        error = (added - noise).abs_()
        error -= _ROUNDING * clipped_sum.abs()
        error -= _ROUNDING * noise.abs()
        norm = torch.linalg.vector_norm
        self._applied.append(torch.stack([error.max(), norm(clipped_sum), norm(added)]))

    def note_encoded(self, clipped_sum: np.ndarray, integers: np.ndarray, noise: np.ndarray,
                     encoding: Encoding) -> None:
        """Compare the integers that are about to be released with the sum on the grid and the noise.

        Args:
            clipped_sum: [values] The sum, in the scaled space.
            integers: [values] What is released.
            noise: [values] The noise that was drawn, in units of the grid.
            encoding: The grid and the standard deviation of the noise, as promised.

        Raises:
            RuntimeError: The integers are not the sum with the drawn noise, or the promised noise is below σ·C.
        """
        grid = encoding.grid
        if not encoding.deviation * grid.step >= self._deviation:
            raise alarm("the noise of a secure sum is below the client's own noise multiplier")
        added = integers - np.rint(np.clip(clipped_sum / grid.step, -grid.most, grid.most))
        if not np.array_equal(added, noise):
            raise alarm("the integers of a secure sum are not the clipped sum with the drawn noise")
        if encoding.deviation >= _LEAST_DEVIATION:
            self._pool.add(len(added), float(np.linalg.norm(added)), math.sqrt(encoding.deviation**2 + 1 / 12))

    def check(self) -> None:
        """Evaluate what was measured in the steps so far.

        Raises:
            RuntimeError: A share is longer than the clip norm, or an applied gradient is not the clipped sum with the
                drawn noise.
        """
        longest, self._longest = self._longest, []
        if longest and not float(torch.stack(longest).max().sqrt()) <= self._clip_norm:
            raise alarm("a record's share of the sum is longer than the clip norm")
        applied, self._applied = self._applied, []
        for largest, length, noise_length in torch.stack(applied).tolist() if applied else ():
            if not largest <= 0:
                raise alarm("the applied gradient is not the clipped sum with the drawn noise")
            if self._deviation > _LEAST_NOISE * length / math.sqrt(self._values):
                self._pool.add(self._values, noise_length, self._deviation)


class GradientCheck:
    """The check that the clipped sum of each tensor that should have a gradient is not zero throughout a round.

    Some tensors rightly have none. With ΔW = s·B·R·A, a factor has no gradient while another factor of the same module
    is zero, as A has none in the first round of lora, where B is zero. No adapter has one while a weight of the head is
    zero, and no weight of the head has one while another is zero. Some draws show nothing: empty ones, those whose loss
    is close to 0, those with a gradient that is not finite, and those in which no text has anything to attend to.

    Args:
        layout: Names the tensors.
        parameters: Tensor name → the parameter with its present value, for the whole of `layout.state`.
        buffer: Names the columns of their sums.

    Attributes:
        reads_late: Whether the measurements are read only at the end of the round, so that the host does not wait for a
            GPU in every step.
    """

    def __init__(self, layout: AdapterLayout, parameters: Mapping[str, torch.Tensor], buffer: GradientBuffer) -> None:
        names = {id(parameters[spec.name]): spec.name for spec in layout.trained}
        self._trained = [names[id(slot.parameter)] for slot in buffer.slots]
        self._ends = torch.tensor([slot.columns.stop - 1 for slot in buffer.slots],
                                  device=buffer.slots[0].parameter.device)
        state = layout.state
        weights = {spec.name for spec in state if spec.group == "head" and spec.name.endswith(".weight")}
        self._blockers: dict[str, set[str]] = {}
        for spec in layout.trained:
            others = weights if spec.group == "adapter" or spec.name in weights else set()
            if spec.group == "adapter":
                others = others | {other.name for other in state if {*other.sites} & {*spec.sites}}
            self._blockers[spec.name] = others - {spec.name}
        self._blocking = {name: parameters[name].detach() for name in sorted(set().union(*self._blockers.values()))}
        self._waiting, self._missed = set(self._trained), set[str]()
        self._notes: list[tuple[torch.Tensor, Callable[[], bool]]] = []
        self._refused = 0
        self.reads_late = self._ends.is_cuda

    @property
    def waiting(self) -> bool:
        """Whether some tensor is not yet known to have had a gradient."""
        return bool(self._waiting)

    def note(self, clipped_sum: torch.Tensor, refused: torch.Tensor, *, telling: Callable[[], bool]) -> None:
        """Measure a draw's sum. Call it before the step, while the parameters still have the values of the draw.

        Args:
            clipped_sum: [values] The draw's clipped sum.
            refused: [] The number of records of the round so far whose gradient was not finite.
            telling: Returns whether the draw's gradients should reach every tensor (`tells`). It is called only if the
                answer matters, and maybe later.
        """
        seen = [torch.cumsum(clipped_sum != 0, 0)[self._ends], refused.view(1)]
        if self._blocking:
            seen.append(torch.stack(torch._foreach_norm(list(self._blocking.values()), ord=math.inf)) != 0)
        self._notes.append((torch.cat(seen), telling))
        if not self.reads_late:
            self._read()

    def _read(self) -> None:
        """Evaluate the measurements that were not read yet."""
        notes, self._notes = self._notes, []
        for seen, telling in notes:
            nonzero, (refused, *has_values) = np.split(seen.cpu().numpy(), [len(self._ends)])
            finite, self._refused = refused == self._refused, refused
            reached = {name for name, more in zip(self._trained, np.diff(nonzero, prepend=0), strict=True) if more}
            at_zero = {name for name, has in zip(self._blocking, has_values, strict=True) if not has}
            self._waiting -= reached
            missed = {name for name in self._waiting if not self._blockers[name] & at_zero}
            if missed and finite and telling():
                self._missed |= missed

    def tell(self) -> None:
        """Log an error on this machine, at the end of the round, if a tensor had no gradient that should have had."""
        self._read()
        missed = sorted(self._missed & self._waiting)
        if missed:
            log.error("The drawn records have a loss but no gradient for %d of %d trained tensors (%s%s): these were "
                      "trained on noise alone. Please report this with the model's type and the targets.",
                      len(missed), len(self._trained), ", ".join(missed[:3]), ", …" if len(missed) > 3 else "")


def tells(records: Records, indices: np.ndarray, losses: float | torch.Tensor) -> bool:
    """Return whether a draw's gradients should reach every tensor.

    They should if the draw has a loss, and if one of its texts has two different tokens to attend to. The last token of
    a text does not count, as no token of a language model attends to it. Nor do equal tokens: how attention is split
    between them makes no difference.

    Args:
        records: The client's records.
        indices: The drawn records.
        losses: The sum of the drawn records' losses.
    """
    if not losses > 0.01 * len(indices):
        return False
    starts, ends = records.offsets[indices], records.offsets[indices + 1] - 1
    return any((records.tokens[start:end] != records.tokens[start]).any()
               for start, end in zip(starts, ends, strict=True) if end > start)


def check_owners(adapted: AdaptedModel, trained: Sequence[nn.Parameter]) -> None:
    """Check that the tensors to be trained are the model's trained tensors, in the same order.

    Raises:
        RuntimeError: The tensors are not the model's.
    """
    if [id(parameter) for _, parameter in adapted.trained_parameters()] != [id(parameter) for parameter in trained]:
        raise alarm("the tensors that would be trained are not the model's: it was copied or changed after it was "
                    "prepared")


class FrozenCheck:
    """The check that a round leaves the frozen tensors unchanged. Make it before the round, and call `check` after it.

    The adapter's frozen tensors are compared by a checksum over every bit. The base model is too large for that: for
    each of its tensors, the address, PyTorch's count of writes and the first values are compared.

    Args:
        adapted: The model with its adapters.
        trained: The parameters that will train.

    Raises:
        RuntimeError: They are not the model's trained tensors.
    """

    def __init__(self, adapted: AdaptedModel, trained: Sequence[nn.Parameter]) -> None:
        check_owners(adapted, trained)
        self._frozen = [adapted.parameter(spec.name) for spec in adapted.layout.frozen]
        skip = {id(parameter) for parameter in (*trained, *self._frozen)}
        self._base = [parameter for parameter in adapted.model.parameters() if id(parameter) not in skip]
        self._first = [parameter.detach().flatten()[:_SAMPLE] for parameter in self._base]
        self._before = self._seen()

    def _seen(self) -> tuple[object, ...]:
        writes = [(parameter.data_ptr(), parameter._version) for parameter in (*self._base, *self._frozen)]
        sampled = [torch.cat(self._first).float()] if self._first else []
        sums = [_checksum(values) for values in (*sampled, *(parameter.detach() for parameter in self._frozen))]
        return writes, torch.stack(sums).tolist() if sums else []

    def check(self) -> None:
        """Compare the frozen tensors with those before the round.

        Raises:
            RuntimeError: One was changed.
        """
        if self._seen() != self._before:
            raise alarm("frozen tensors of the model were changed during the round")


def _checksum(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of the values' bit patterns; so a NaN equals itself."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return values.contiguous().view(bits).sum(dtype=torch.int64)
