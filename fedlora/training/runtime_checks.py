"""Checks that run in every round, on this machine, on what was really computed rather than on what was meant to be.

                what is compared                                          fires when, for example
shares          each unit's weighted gradient, and C                      clipping is wrong or left out
applied noise   (gradient as applied · b · scale) - clipped sum, and      the noise is lost, scaled or added twice
                the noise that was drawn
pooled noise    its standard deviation over the run, and σ·C              the noise is too small or too large
gradients       the clipped sum of each trained tensor, and 0             an adapter is cut off from the loss
frozen          frozen tensors after the round, and before it             an optimizer or a wrapper moves them
owners          the tensors that train, and the model's                   the model was copied after it was wrapped

They see private values, tell nobody, and can only stop a round: RuntimeError. The gradients, which depend on the
records' content even where nothing is wrong, are told in the local log alone: a server chooses the tensors that a round
starts from, and could read an answer that fails to come. `Trainer.rehearse` looks for the same faults on made-up
records. None of it can show that no fault of another kind exists.
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

log = logging.getLogger(__name__)

STANDARD_ERRORS = 5.0
"""By so much may the pooled deviation of the noise be off: by chance less than once in a million rounds."""

_ROUNDING = 1e-5
"""Relative; the applied gradient is float32 and was scaled twice."""

_LEAST_NOISE = 1e-3
"""Noise below this share of the sum's root mean square is lost in float32, and no privacy: it is not measured."""

_SAMPLE = 64
"""Values of each of the base model's tensors that are compared; of the adapter's, all are."""


def alarm(found: str) -> RuntimeError:
    """What is raised; `found` says what was seen, without any private value."""
    return RuntimeError(f"{found}. Nothing of this round was released. Please report this with the model's type, the "
                        "targets, and the versions of torch, transformers and opacus")


def tell_finite(drawn: int, nonfinite: int) -> None:
    """Of a round's records: in the local log."""
    if drawn and nonfinite == drawn:
        log.error("None of the drawn records has a finite gradient: what is released is noise alone.")


class NoisePool:
    """Sum of squares of the noise of a run, in units of its intended standard deviation."""

    def __init__(self) -> None:
        self.values, self.squares = 0, 0.0

    def add(self, values: int, norm: float, deviation: float) -> None:
        """Of noise of so many values: its norm, and the standard deviation that it should have."""
        self.values += values
        self.squares += norm**2 / deviation**2

    def check(self) -> None:
        """Raises RuntimeError if the deviation is not the intended one."""
        if self.values:
            ratio = math.sqrt(self.squares / self.values)
            error = 1 / math.sqrt(2 * self.values)
            if not abs(ratio - 1) <= STANDARD_ERRORS * error:
                raise alarm(f"the noise that was added in this run has {ratio:.6g} times its intended standard "
                            f"deviation, which is {abs(ratio - 1) / error:.3g} standard errors off")


class StepChecks:
    """Shares and noise of a private step. Given the values that were promised, and nothing that the optimizer holds.

    Args:
        buffer: names the tensors and their columns.
        scales, clip_norm, noise_multiplier, expected_batch_size: as promised.
        pool: of the run.
    """

    def __init__(self, buffer: GradientBuffer, *, scales: Mapping[str, float], clip_norm: float,
                 noise_multiplier: float, expected_batch_size: float, pool: NoisePool) -> None:
        self._slots = buffer.slots
        self._values = buffer.values
        self._clip_norm, self._divisor = float(clip_norm), float(expected_batch_size)
        self._deviation = float(noise_multiplier) * float(clip_norm)
        self._pool = pool
        self._longest: list[torch.Tensor] = []  # share of each part of a step, squared
        self._applied: list[torch.Tensor] = []  # of each step: largest error; norms of the sum and of the noise
        self._spans: list[tuple[int, int, float]] = []  # columns of one scale
        for slot in buffer.slots:
            start, scale = slot.columns.start, float(scales[slot.group])
            if self._spans and self._spans[-1][1:] == (start, scale):
                start = self._spans.pop()[0]
            self._spans.append((start, slot.columns.stop, scale))

    def note_shares(self, rows: torch.Tensor, factors: torch.Tensor) -> None:
        """Measure the units' shares of the sum, factor · scale · row, for `check`.

        Args:
            rows, factors: [units, values] and [units], as they were multiplied.
        """
        shares = torch.zeros_like(factors)
        for start, stop, scale in self._spans:
            shares += (row_norms(rows[:, start:stop]) * (factors * scale)).square()
        self._longest.append(shares.max())

    def note_applied(self, clipped_sum: torch.Tensor, noise: torch.Tensor | None) -> None:
        """Measure for `check` whether the gradients that the optimizer was just given are (sum + noise) / b, unscaled.

        Args:
            clipped_sum, noise: [values], in the scaled space.
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

    def check(self) -> None:
        """What was noted of the steps so far.

        Raises:
            RuntimeError: a share is longer than the clip norm, or a step was another than that of the drawn noise.
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
    """Over a round, the clipped sum is not zero for any tensor that should have a gradient.

    Some rightly have none. With ΔW = s·B·R·A a factor has none while another one of the module is zero, as A in a first
    round of lora, when B is. No adapter has one while a weight of the head is zero, nor has the head's own weight while
    another is. And a draw may tell nothing: it is empty, its loss is next to 0, a gradient is not finite, or no text in
    it has anything to attend to.

    Args:
        layout: names the tensors.
        parameters: name → what holds the tensor's present value, for all of `layout.state`.
        buffer: says where their sums are.

    Attributes:
        reads_late: whether what was noted is read at the round's end: the host would have to wait for a GPU.
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
        """Whether some tensor is not known to have had a gradient."""
        return bool(self._waiting)

    def note(self, clipped_sum: torch.Tensor, refused: torch.Tensor, *, telling: Callable[[], bool]) -> None:
        """After a draw, before the step: the tensors hold what the gradients were taken at.

        Args:
            clipped_sum: [values]
            refused: [] how many records' gradients were not finite, in the round so far.
            telling: `tells` of this draw; asked once its sum is known, if it matters.
        """
        seen = [torch.cumsum(clipped_sum != 0, 0)[self._ends], refused.view(1)]
        if self._blocking:
            seen.append(torch.stack(torch._foreach_norm(list(self._blocking.values()), ord=math.inf)) != 0)
        self._notes.append((torch.cat(seen), telling))
        if not self.reads_late:
            self._read()

    def _read(self) -> None:
        """Take in what was noted."""
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
        """At the round's end, in the local log."""
        self._read()
        missed = sorted(self._missed & self._waiting)
        if missed:
            log.error("The drawn records have a loss but no gradient for %d of %d trained tensors (%s%s): these were "
                      "trained on noise alone. Please report this with the model's type and the targets.",
                      len(missed), len(self._trained), ", ".join(missed[:3]), ", …" if len(missed) > 3 else "")


def tells(records: Records, indices: np.ndarray, losses: float | torch.Tensor) -> bool:
    """Whether a draw's gradients should reach every tensor: a loss, and a text with two tokens to attend to.

    A last token of a language model's text is attended to by none; like tokens may be attended to in any way.

    Args:
        losses: the sum over the drawn records.
    """
    if not losses > 0.01 * len(indices):
        return False
    starts, ends = records.offsets[indices], records.offsets[indices + 1] - 1
    return any((records.tokens[start:end] != records.tokens[start]).any()
               for start, end in zip(starts, ends, strict=True) if end > start)


def check_owners(adapted: AdaptedModel, trained: Sequence[nn.Parameter]) -> None:
    """Raises RuntimeError unless these are the model's trained tensors, in order."""
    if [id(parameter) for _, parameter in adapted.trained_parameters()] != [id(parameter) for parameter in trained]:
        raise alarm("the tensors that would be trained are not the model's: it was copied or changed after it was "
                    "prepared")


class FrozenCheck:
    """Frozen tensors are after a round what they were before it. Made before the round.

    Of the adapter's frozen tensors every bit counts in a checksum. The base model is too large for that: of each tensor
    the address, PyTorch's count of writes, and the first values are compared.
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
        """At the round's end."""
        if self._seen() != self._before:
            raise alarm("frozen tensors of the model were changed during the round")


def _checksum(values: torch.Tensor) -> torch.Tensor:
    """Sum of the bit patterns, so that not-a-number equals itself."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return values.contiguous().view(bits).sum(dtype=torch.int64)
