"""Batch invariance: no bit of a record's gradient may depend on the other records of its batch, or on its place.

A matrix product may be rounded differently for 15 rows than for 16. A malicious server can send tensors that magnify
this difference until the presence of one record moves the clipped sum by many clip norms. Bounds on the tensors would
only make that harder. Therefore:

- Every private micro-batch of one padded length has the same shape. Rows that the drawn records leave free are filled
  with constant rows, whose gradients are dropped. So the number of records has no influence.
- Before the first charge, made-up records are computed beside different companions and at different places, and their
  gradients are compared bit for bit: on the machine and with the model, precision and settings that will train. Where
  a bit differs, half as many rows are tried, down to one record at a time.
- Models whose inner shapes follow the content (mixtures of experts, quantised products) always run one record at a
  time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedlora import registry
from fedlora.files import replace_file
from fedlora.plan import FOUND, RunPlan
from fedlora.tasks import Records, Task
from fedlora.training.gradient_buffer import row_norms
from fedlora.versions import environment

log = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "opacus", "numpy")
"""The packages whose versions can change the rounding."""

MOST_KEPT = 100
"""The most findings kept in a file; the newest are kept."""

SETTINGS = ("ATEN_", "BLIS_", "CUBLAS_", "CUDA_", "DNNL_", "GOTO_", "KMP_", "MKL_", "NVIDIA_", "OMP_", "ONEDNN_",
            "OPENBLAS_", "PYTORCH_", "TORCH")
"""Prefixes of the environment variables that can change how these libraries compute."""

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")


@dataclass(frozen=True)
class Shapes:
    """The shapes of private micro-batches on one machine, shown to be batch-invariant there.

    Attributes:
        rows: Padded length → number of rows, the same whatever is drawn.
        one_at_a_time: The reason why every micro-batch must have a single record, or "" if there is none.
    """

    rows: Mapping[int, int]
    one_at_a_time: str = ""


Gradients = Callable[[Records, np.ndarray, int, int], tuple[torch.Tensor, torch.Tensor]]
"""A function (records, indices, padded length, rows) → ([rows, values] gradients, [rows] losses).

It computes a micro-batch of these records, with filler rows after them, as in training."""


def show_shapes(gradients: Gradients, records: Records, first: Mapping[int, int], one_at_a_time: str) -> Shapes:
    """Find, for each padded length, the largest micro-batch in which no record changes another one's gradient.

    Args:
        gradients: Computes a micro-batch as in training.
        records: Made-up records from `made_up_records`. Those of the i-th length have the indices 2·i and 2·i + 1.
        first: Padded length → number of rows to try first. Halves of it are tried next.
        one_at_a_time: The reason why every micro-batch must have a single record, or "".

    Raises:
        ValueError: Even one record alone does not have the same gradient twice.
    """
    rows = {}
    for place, (length, most) in enumerate(first.items()):
        rows[length] = next((count for count in _halves(most)
                             if _is_invariant(gradients, records, 2 * place, length, count)), 0)
        if not rows[length]:
            raise ValueError(f"this machine does not compute the same gradient twice, even for one record of {length} "
                             "tokens alone, so that no clipping could protect it. Choose another --device or "
                             "--precision, or another --model")
        if rows[length] < most:
            log.warning("Records of %d tokens are trained %d at a time in place of %d: in larger micro-batches, this "
                        "machine's rounding of a record's gradient depends on its position or on the other records.",
                        length, rows[length], most)
    return Shapes(rows, one_at_a_time)


def _halves(rows: int) -> Iterator[int]:
    while rows:
        yield rows
        rows //= 2


def _is_invariant(gradients: Gradients, records: Records, looked_at: int, length: int, rows: int) -> bool:
    """Check that a record has the same gradient, norm and loss bits at every place and beside different companions.

    The companions are copies of the record, another record, and filler rows.

    Args:
        gradients: Computes a micro-batch as in training.
        records: The made-up records.
        looked_at: The record's index. The record after it is its companion.
        length: The padded length.
        rows: The number of rows of the micro-batch.
    """
    count = max(1, rows - rows // 4)
    copies = np.full(rows, looked_at)
    mixed = np.where(np.arange(count) % 2, looked_at + 1, looked_at)
    expected: torch.Tensor | None = None
    for indices, every in ((copies, 1), (mixed, 2)):
        found = _results(gradients, records, indices, length, rows)[:len(indices):every]
        expected = found[:1].clone() if expected is None else expected
        if not torch.equal(found, expected.expand_as(found)):
            return False
    return True


def _results(gradients: Gradients, records: Records, indices: np.ndarray, length: int, rows: int) -> torch.Tensor:
    """Return the bit patterns of a micro-batch's results: [rows, values + 2] gradients, then the norm and the loss."""
    found, losses = gradients(records, indices, length, rows)
    norms = row_norms(found).to(found)
    return torch.cat([found, norms[:, None], losses.float()[:, None]], dim=1).view(torch.int32)


def made_up_records(task: Task, embeddings: int, lengths: Sequence[int], *, seed: int = 0) -> Records:
    """Make two records of random ordinary tokens for each length: one token less than full, and two thirds full.

    Args:
        task: The task, with its tokenizer.
        embeddings: The number of tokens that the model knows.
        lengths: The padded lengths.
        seed: The seed of the random choice.
    """
    random, tokenizer = np.random.default_rng(seed), task.tokenizer
    words = np.setdiff1d(np.arange(min(len(tokenizer), embeddings)), tokenizer.all_special_ids)
    sizes = [max(min(2, length), size) for length in lengths for size in (length - 1, length * 2 // 3)]
    tokens = [random.choice(words, size).tolist() for size in sizes]
    return task.made_up(tokens)


def content_dependent(model: nn.Module) -> str:
    """Return why the model's inner shapes depend on the content of a micro-batch, or "" if no reason is known."""
    config = getattr(model, "config", None)
    experts = next((name for name in _EXPERTS if (getattr(config, name, None) or 0) > 1), None)
    if experts:
        return f"the model is a mixture of experts ({experts} = {getattr(config, experts)})"
    if getattr(config, "quantization_config", None) is not None:
        return "the model is quantised, and scales can follow the content of a micro-batch"
    if any("quantized.dynamic" in type(module).__module__ for module in model.modules()):
        return "the model is quantised dynamically, and scales follow the content of a micro-batch"
    return ""


@dataclass
class Findings:
    """A memory of the shapes that were shown to be batch-invariant, each under a key from `key_of`.

    Args:
        file: The file that keeps them between processes; None keeps them in memory only. If the file cannot be read or
            written, the check is done again; nothing else is lost.
        writes: Whether what is found is written to the file.
    """

    file: Path | None = None
    writes: bool = True
    _known: dict[str, Shapes] = field(default_factory=dict)

    def get(self, key: str) -> Shapes | None:
        """Return the shapes found under a key, or None."""
        if self.file is not None and key not in self._known:
            self._known |= self._read()
        return self._known.get(key)

    def put(self, key: str, shapes: Shapes) -> None:
        """Remember shapes under a key."""
        self._known[key] = shapes
        if self.file is None or not self.writes:
            return
        kept = {name: asdict(one) for name, one in list((self._read() | {key: shapes}).items())[-MOST_KEPT:]}
        try:
            replace_file(self.file, json.dumps(kept, indent=1).encode())
        except OSError as error:
            log.warning("%s could not be written (%s): the check for batch invariance will be done again next time.",
                        self.file, error.strerror)

    def _read(self) -> dict[str, Shapes]:
        assert self.file is not None
        try:
            table = json.loads(self.file.read_text(encoding="utf-8"))
            found = {key: Shapes({int(length): int(rows) for length, rows in one["rows"].items()},
                                 str(one["one_at_a_time"])) for key, one in table.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}
        return {key: one for key, one in found.items() if all(rows >= 1 for rows in one.rows.values())}


IN_MEMORY = Findings()
"""The findings of this process, used where no file is named."""


def key_of(run: RunPlan, model: nn.Module, shapes: Mapping[int, int], *, device: torch.device, precision: str,
           compiled: bool, trained: Sequence[str] = (), ranks: Mapping[str, int] | None = None) -> str:
    """Return a SHA-256 over everything that the rounding of a pass can depend on.

    Args:
        run: The run's plan.
        model: The model with its adapters.
        shapes: Padded length → number of rows to try first.
        device: The device to train on.
        precision: "fp32" or "bf16".
        compiled: Whether the model's blocks are compiled.
        trained: The names of the tensors that train.
        ranks: Module → its rank in the round, for those of which only the first ranks train.
    """
    config = {name: value for name, value in model.config.to_dict().items()  # type: ignore[union-attr, operator]
              if name != "_name_or_path"}
    about = {
        "model": asdict(run.model), "config": config, "class": type(model).__name__,
        "attention": model.config._attn_implementation,  # type: ignore[union-attr]
        "task": run.task, "labels": len(run.labels), "family": run.family,
        "sources": [registry.source_sha256(FOUND[name], getattr(run, name)) for name in ("family", "task")],
        "rank": run.rank,
        "options": run.family_options, "ranks": run.ranks, "trained": sorted(trained),
        "head": run.train_head, "shapes": {str(n): rows for n, rows in shapes.items()},
        "precision": precision, "compiled": compiled, "device": _device(device), "versions": environment(PACKAGES),
        "threads": torch.get_num_threads(), "build": torch.__config__.show(),
        "switches": [torch.backends.mkldnn.enabled, torch.get_float32_matmul_precision(),
                     torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32,
                     torch.are_deterministic_algorithms_enabled(), torch.is_inference_mode_enabled()],
        "settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)}}
    if ranks:
        about["prefixes"] = dict(ranks)
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def _device(device: torch.device) -> list[str]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return ["cuda", properties.name, f"{properties.major}.{properties.minor}", str(torch.version.cuda)]
    return [device.type, platform.machine(), torch.backends.cpu.get_cpu_capability(), _processor()]


def _processor() -> str:
    """Return the processor's name and instruction sets, as far as the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "; ".join(next((line for line in lines if line.startswith(name)), "") for name in ("model name", "flags"))
