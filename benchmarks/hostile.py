"""Tensors of a hostile server that let the presence of one record change the other records' gradients by rounding.

A processor may round a batch of n records differently from one of n - 1, which moves an activation in its last bits.
`threshold_head` turns that into a decision. It puts the boundary of a very steep classifier between the two roundings
of one feature: on one side a record's loss is zero, on the other its gradient is at least as long as the clip norm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlora.plan import Tensors
from fedlora.privacy import RandomStream
from fedlora.tasks import Records
from fedlora.training.optimizer import PerRecordOptimizer

from .subjects import Subject

STEEP = 2.0**34
"""Slope of the head, about 1.7e10. A power of two, so that multiplying by it does not round."""

_ASCENTS, _STEP = 2, 0.5
"""Number of gradient ascent steps, and the length of each as a share of a tensor's norm."""

_VISIBLE = 1e-3
"""Root mean square to which a rounding difference is scaled up while its effect is differentiated."""

_NOISE = itertools.count()

Row = tuple[torch.Tensor, torch.Tensor]
"""The token ids of a record in a pass [length], and the values seen for it."""

Note = Callable[[str], Callable[[torch.Tensor], None]]
"""Returns, for a name, a function that notes values of all records under that name."""

Watch = Callable[[Note], list[Any]]
"""Registers hooks that note values, and returns their handles."""


@dataclass(frozen=True)
class Summed:
    """The sums of one step of `Trainer.train` right before the noise is added.

    Attributes:
        clipped: [values] float64, the sum of the clipped gradients.
        gradients: number of records with each gradient, by a hash of the gradient's bits.
    """

    clipped: torch.Tensor
    gradients: Counter[int]


@contextlib.contextmanager
def sums() -> Iterator[list[Summed]]:
    """Record the sums that noise is added to, for each private step within this context. Training is not changed."""
    clip, add = PerRecordOptimizer.clip_and_accumulate, PerRecordOptimizer.add_noise
    seen: list[Summed] = []
    gradients: Counter[int] = Counter()

    def clipping(self: PerRecordOptimizer) -> None:
        if self.buffer.armed:
            gradients.update(hash(row.tobytes()) for row in self.buffer.rows.cpu().numpy())
        clip(self)

    def noising(self: PerRecordOptimizer) -> None:
        seen.append(Summed(self.clipped_sum.cpu().clone(), Counter(gradients)))
        gradients.clear()
        add(self)

    PerRecordOptimizer.clip_and_accumulate, PerRecordOptimizer.add_noise = clipping, noising  # type: ignore
    try:
        yield seen
    finally:
        PerRecordOptimizer.clip_and_accumulate, PerRecordOptimizer.add_noise = clip, add  # type: ignore


def train(subject: Subject, records: Records, state: Tensors) -> Summed:
    """Train one private step on all records from these tensors, as a client does; return the sums before the noise.

    A runtime check may end the round afterwards. That does not matter here: the sum has been formed, and a client would
    release nothing.
    """
    subject.adapted.write(state)
    logging.disable(logging.ERROR)  # warnings about the hostile tensors are expected
    try:
        with sums() as seen, contextlib.suppress(RuntimeError):
            dataclasses.replace(subject, records=records).step({
                "sampling": RandomStream.derived(0, "hostile", 0, "sampling"),
                "noise": RandomStream.derived(0, "hostile", next(_NOISE), "noise")})
    finally:
        logging.disable(logging.NOTSET)
    assert len(seen) == 1, "a plan of one step has one sum"
    return seen[0]


@contextlib.contextmanager
def _watched(subject: Subject, watch: Watch) -> Iterator[dict[str, list[Row]]]:
    """Collect what hooks see of each record, by name, within this context.

    Args:
        subject: its model is watched. CUDA graphs are switched off, because they call no hooks.
        watch: registers the hooks.
    """
    seen: dict[str, list[Row]] = {}
    ids: list[torch.Tensor] = []

    def note(name: str) -> Callable[[torch.Tensor], None]:
        def take(values: torch.Tensor) -> None:
            if len(ids) and len(values) >= len(ids[0]):
                seen.setdefault(name, []).extend(zip(ids[0], values.detach().float().cpu(), strict=False))
        return take

    def begin(module: nn.Module, arguments: Any, named: Mapping[str, Any]) -> None:
        ids[:] = [named["input_ids"].cpu()]

    trainer: Any = subject.trainer
    graphed, trainer._graphed = trainer._graphed, None
    hooks = [subject.adapted.model.register_forward_pre_hook(begin, with_kwargs=True), *watch(note)]
    try:
        yield seen
    finally:
        trainer._graphed = graphed
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def rounding_otherwise(subject: Subject, rows: Callable[[int], bool]) -> Iterator[None]:
    """Emulate a processor that rounds differently for some batch sizes; some do for 16 rows and more.

    Within this context, linear layers with one output row for each record round up by one unit in the last place.

    Args:
        subject: all linear layers of its model but the head round differently.
        rows: returns whether a batch of so many rows is rounded differently.
    """
    def hook(module: nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
        if output.dim() != 2 or not rows(len(output)):
            return output
        return output + (torch.nextafter(output, torch.full_like(output, torch.inf)) - output).detach()

    hooks = [module.register_forward_hook(hook) for name, module in subject.adapted.model.named_modules()
             if isinstance(module, nn.Linear) and name != subject.adapted.head]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def head_inputs(subject: Subject, records: Records, state: Tensors, text: np.ndarray) -> torch.Tensor:
    """Return the inputs of the classifier's last layer for each record that is this text, [rows, d]."""
    assert subject.adapted.head is not None
    head = subject.adapted.model.get_submodule(subject.adapted.head)
    pad = records.pad_id

    def watch(note: Note) -> list[Any]:
        take = note("head")
        return [head.register_forward_pre_hook(lambda _, given: take(given[0]))]

    with _watched(subject, watch) as seen:
        train(subject, records, state)
    found = [values if values.dim() == 1 else values[len(text) - 1] for ids, values in seen.get("head", ())
             if _is(ids, text, pad)]
    return torch.stack(found) if found else torch.zeros(0, int(head.weight.shape[1]))  # type: ignore


def _is(ids: torch.Tensor, text: np.ndarray, pad: int) -> bool:
    return len(ids) >= len(text) and ids[:len(text)].tolist() == text.tolist() and bool((ids[len(text):] == pad).all())


def threshold_head(subject: Subject, present: torch.Tensor, absent: torch.Tensor,
                   scale: float = STEEP) -> tuple[dict[str, np.ndarray], int]:
    """Return a head whose decision tells whether a further record is present, from the rounding of one feature.

    Args:
        subject: names the head and the shapes of its tensors.
        present: [rows, d] inputs of the head with the record present, from `head_inputs`.
        absent: [rows, d] the same without it; empty if there is no other record.
        scale: slope of the head.

    Returns:
        The head's tensors, and a label that is wrong for all records if the record is present and right if it is not.
    """
    absent = absent if len(absent) else present
    one, other = present.median(0).values, absent.median(0).values
    up = one > other
    apart = torch.where(up, present > other, present < other).float().mean(0)
    apart += torch.where(up, absent < one, absent > one).float().mean(0)
    gap = (one - other).abs() / one.abs().clamp(min=1e-6)
    feature = int((apart + gap.clamp(max=0.5)).argmax())
    low, high = sorted((float(one[feature]), float(other[feature])))
    shapes = {spec.name: spec.shape for spec in subject.adapted.layout.state}
    weight = np.zeros(shapes[f"head.{subject.adapted.head}.weight"], np.float32)
    weight[:2, feature] = scale, -scale
    tensors = {f"head.{subject.adapted.head}.weight": weight}
    edges = np.array([-scale * low, scale * high])
    if (bias := f"head.{subject.adapted.head}.bias") in shapes:
        tensors[bias] = np.resize(edges, shapes[bias]).astype(np.float32)
    else:  # a feature that is equal in both takes its place
        alike = torch.where(one == other, one.abs(), 0.0)
        alike[feature] = 0.0
        constant = int(alike.argmax())
        if float(alike[constant]):
            weight[:2, constant] = edges / float(one[constant])
    return tensors, int(float(one[feature]) > float(other[feature]))


def most_different_layer(subject: Subject, with_it: Records, without: Records, state: Tensors,
                         text: np.ndarray) -> tuple[str | None, torch.Tensor | None]:
    """Find the linear layer whose output for this text changes most when one record is left out.

    Args:
        subject: its model is searched; the head is left out.
        with_it: the records.
        without: the records without one.
        state: tensors to train from.
        text: token ids of the text.

    Returns:
        Name of the layer with the largest share of values that differ, and the difference of its outputs; (None, None)
        if no layer's output differs.
    """
    layers = {name: module for name, module in subject.adapted.model.named_modules()
              if isinstance(module, nn.Linear) and name != subject.adapted.head}

    def watch(note: Note) -> list[Any]:
        def hook(name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
            take = note(name)
            return lambda _, given, output: take(output)

        return [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]

    outputs = []
    for records in (with_it, without):
        with _watched(subject, watch) as seen:
            train(subject, records, state)
        outputs.append({name: values for name, rows in seen.items()
                        for ids, values in reversed(rows) if _is(ids, text, records.pad_id)})
    both = outputs[0].keys() & outputs[1].keys()
    share = {name: float((outputs[0][name] != outputs[1][name]).float().mean()) for name in sorted(both)}
    if not share or not any(share.values()):
        return None, None
    name = max(share, key=lambda one: share[one])
    return name, outputs[0][name] - outputs[1][name]


def magnified(subject: Subject, state: Tensors, text: np.ndarray, pad: int, layer: str,
              difference: torch.Tensor) -> dict[str, np.ndarray]:
    """Return tensors that amplify a rounding difference, found by a few steps of gradient ascent.

    The ascent maximises how far the difference in one layer moves the head's input.

    Args:
        subject: its model is differentiated.
        state: tensors to start from.
        text: token ids of the text to look at.
        pad: token id of padding.
        layer: name of the layer with the difference.
        difference: difference of the layer's outputs, as from `most_different_layer`.
    """
    adapted, model = subject.adapted, subject.adapted.model
    module, head = model.get_submodule(layer), model.get_submodule(adapted.head or "")
    device = subject.trainer.device
    length = difference.shape[0] if difference.dim() == 2 else len(text)
    ids = torch.full((1, length), pad)
    ids[0, :len(text)] = torch.from_numpy(text.astype(np.int64))
    attended = (torch.arange(length) < len(text)).long()[None]
    shift = (difference * (_VISIBLE / float(difference.square().mean().sqrt()))).to(device)
    moved = dict(state)
    for _ in range(_ASCENTS):
        adapted.write(moved)
        given: list[torch.Tensor] = []
        seeing = head.register_forward_pre_hook(lambda _, inputs, given=given: given.append(inputs[0]))
        try:
            for shifted in (False, True):
                hook = module.register_forward_hook(lambda _, inputs, output: output + shift.to(output.dtype))
                if not shifted:
                    hook.remove()
                with subject.trainer.autocast():
                    model(input_ids=ids.to(device), attention_mask=attended.to(device))
                hook.remove()
        finally:
            seeing.remove()
        trained = [(spec.name, one) for spec, one in adapted.trained_parameters() if spec.group == "adapter"]
        effect = (given[1].float() - given[0].float()).norm()
        if not effect.requires_grad or not bool(effect.isfinite()):
            return moved
        slopes = torch.autograd.grad(effect, [parameter for _, parameter in trained], allow_unused=True)
        for (name, parameter), slope in zip(trained, slopes, strict=True):
            if slope is not None and bool(slope.isfinite().all()) and float(slope.norm()):
                size = float(parameter.detach().norm()) or 1.0
                moved[name] = (parameter.detach() + _STEP * size * slope / slope.norm()).float().cpu().numpy()
    return moved


def adapters(subject: Subject, scale: float, seed: int) -> dict[str, np.ndarray]:
    """Return all tensors of a state: random adapters of this scale (zeros if it is 0) and a head of zeros."""
    random = np.random.default_rng(seed)
    return {spec.name: (scale * random.standard_normal(spec.shape) if spec.group == "adapter" else
                        np.zeros(spec.shape)).astype(np.float32) for spec in subject.adapted.layout.state}


def structured(shape: tuple[int, ...], kind: str, exponent: int, seed: int) -> np.ndarray:
    """Return float32 values of about 10^exponent with the structure of one of `KINDS`."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(shape)
    if kind == "zeros":
        values = np.zeros(shape)
    elif kind == "equal":
        values = np.ones(shape)
    elif kind == "sparse":
        values *= random.random(shape) < 0.02
    elif kind == "cancelling":  # neighbours that differ by a few units in the last place, with opposite signs
        flat = values.reshape(-1)
        flat[1::2] = -flat[:-1:2][:len(flat[1::2])] * (1 + 2.0**-23 * random.integers(-4, 5, len(flat[1::2])))
    return (values * 10.0**exponent).clip(-1e17, 1e17).astype(np.float32)


KINDS = ("random", "zeros", "equal", "sparse", "cancelling")
