"""Federated evaluation: records that no one trains on, whose noised sum tells how the model does.

A public function of a record's own content decides whether it is held out; a unit of several records is held out as a
whole. In each round held-out units are drawn with the same probability q as units are for training. In place of its
gradient, a drawn unit adds

    C / √2 · (2 s − 1, 1),    s from 0 to 1: how well the model does on the unit's drawn records (`Task.score`)

to two further coordinates of the client's clipped sum. Its L2 norm is at most C, the bound on a gradient, and no unit
adds to both. So the noise of the sum covers these two values too, and the round costs the same ε with or without them.

The server sees the two in the sum of all clients alone. Half of 1 + their ratio is the mean score, over a sample of
about q times the held-out units, with noise whose size is public (`mean_score`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedlora.adapters import AdaptedModel
from fedlora.tasks import Records, Task
from fedlora.training.job import TrainingJob
from fedlora.training.sampling import Sampler

_WHOLE = 2**64


def parted(records: Records, share: float) -> tuple[Records, Records]:
    """Return the records to train on, and those held out.

    Whether a unit is held out depends on this unit's tokens and labels alone. So no other unit changes it, and later
    runs with the same share or a larger one hold it out too, if they make the same tokens of it.

    Args:
        records: All records.
        share: The probability with which a unit is held out.
    """
    if not share:
        return records, take(records, np.zeros(0, np.int64))
    units = np.arange(len(records)) if records.units is None else records.units
    digests: list[list[bytes]] = [[] for _ in range(records.units_count)]
    for record, unit in enumerate(units):
        digests[unit].append(_content(records, record))
    held = np.array([_number(sorted(of_unit)) < share * _WHOLE for of_unit in digests], bool)
    chosen = held[units]
    return take(records, np.flatnonzero(~chosen)), take(records, np.flatnonzero(chosen))


def _content(records: Records, record: int) -> bytes:
    inside = slice(*records.offsets[record:record + 2])
    parts = [array[inside] for array in (records.tokens, records.segments, records.answers) if array is not None]
    label = b"" if records.labels is None else records.labels[record].tobytes()
    return hashlib.sha256(b"".join([np.int64(len(part)).tobytes() + part.tobytes() for part in parts] + [label])
                          ).digest()


def _number(digests: Sequence[bytes]) -> int:
    hashed = hashlib.sha256(b"fedlora hold-out 1\0" + b"".join(digests)).digest()
    return int.from_bytes(hashed[:8])


def take(records: Records, indices: np.ndarray) -> Records:
    """Return some of the records, in the order given. Their units are numbered anew, without gaps.

    Args:
        records: The records.
        indices: [some] Which of them.
    """
    lengths = records.lengths[indices]
    source = np.repeat(records.offsets[indices] - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())

    def of_tokens(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values[source]

    units = None if records.units is None else np.unique(records.units[indices], return_inverse=True)[1]
    return replace(records, tokens=records.tokens[source], offsets=np.cumsum([0, *lengths], dtype=np.int64),
                   labels=None if records.labels is None else records.labels[indices],
                   segments=of_tokens(records.segments), answers=of_tokens(records.answers), units=units)


def scored(job: TrainingJob, adapted: AdaptedModel, task: Task, **computing: object) -> np.ndarray:
    """Return what a client's held-out records add to its sum in this round.

    Each record goes through the model by itself, so that no other record can change its score in any bit.

    Args:
        job: The training task, with its held-out records.
        adapted: The model, which holds the tensors that the round starts from.
        task: Scores the records.
        **computing: The device and the dtype, as `Task.measured` takes them.

    Returns:
        [2] float64, in units of the gradients' scaled space.
    """
    assert job.held_out is not None
    held = job.held_out
    sampler = Sampler(len(held), held.units, job.sampling_rate, job.rows_per_unit, job.stream("hold-out"))
    draw = sampler.draw()
    if not len(draw):
        return np.zeros(2)
    values = task.measured(adapted.model, take(held, draw.indices), micro_batch=1, **computing)  # type: ignore[arg-type]
    scores = np.nan_to_num(np.clip(task.score(values), 0.0, 1.0), nan=0.0)
    total = float(np.sum(draw.weights * (2 * scores - 1)))
    return job.clip_norm / math.sqrt(2) * np.array([total, float(len(draw))])


@dataclass(frozen=True)
class Score:
    """The mean score of held-out records over some rounds.

    Attributes:
        mean: The mean score, from 0 to 1.
        error: Its standard error: of the records drawn, and of the noise.
    """

    mean: float
    error: float


def mean_score(sums: Sequence[tuple[float, float, float]], clip_norm: float) -> Score | None:
    """Return the mean score from the opened sums of some rounds; None if too few records are in them to tell.

    Args:
        sums: The two values of each round's sum, and the standard deviation of the noise in either, in the gradients'
            scaled space.
        clip_norm: C of the plan.
    """
    unit = clip_norm / math.sqrt(2)
    total, count = (sum(one[part] for one in sums) / unit for part in (0, 1))
    noise = math.hypot(*(deviation for _, _, deviation in sums)) / unit
    if count < max(1.0, 4 * noise):
        return None
    ratio = min(1.0, max(-1.0, total / count))
    mean = (1 + ratio) / 2
    error = math.hypot(math.sqrt(mean * (1 - mean) / count), noise * math.hypot(1, ratio) / (2 * count))
    return Score(mean, error)
