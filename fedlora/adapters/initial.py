"""The values that an adapter starts from, drawn once by the server and sent to every client.

Each tensor has a random stream of its own, so that no two layers start alike. None of it depends on private data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch

from fedlora.adapters.attach import AdaptedModel
from fedlora.algebra import leading_factors, orthonormal_rows

INITS = ("kaiming", "orthonormal", "weight")
"""How A (and B, in the bra family) start.

kaiming      A uniform in ±1/√d_in, as PEFT's default: rows of norm ≈ 1/√3. Not for bra.
orthonormal  A with orthonormal rows; in bra, B with orthonormal columns.
weight       A (in bra, B too) from the leading singular vectors of the frozen weight (arXiv:2404.02948 takes the same).

What trains starts such that the update is 0: B in lora and frozen-a, R in bra. A start from a public file's gradients,
"public", is made by `fedlora.adapters.public`, one from noised gradients of the clients by `fedlora.adapters.private`.
"""


def initial_tensors(adapted: AdaptedModel, *, init: str, seed: int,
                    gradients: Mapping[str, torch.Tensor] | None = None) -> dict[str, np.ndarray]:
    """Draw the full state of an adapter.

    A head or other parameter that is missing from the checkpoint is drawn as transformers does for nearly every
    model: matrices from N(0, initializer_range²), biases 0, norms 1. One that is in the checkpoint keeps its value.

    Args:
        adapted: as `attach` made it, nothing written to it yet; it stays so.
        init: one of `INITS`, or "public" with gradients.
        seed: of all draws.
        gradients: module → (d_out, d_in), of a loss on public rows with respect to its frozen weight.
    Returns:
        float32 tensors, one for each of `adapted.layout.state`, in its order.
    Raises:
        ValueError: an unknown init, one that the family cannot start from, or a rank above a layer's smaller side.
    """
    layout = adapted.layout
    if init not in INITS and gradients is None:
        raise ValueError(f"init is {init!r}; choose one of {', '.join(INITS)}, public:FILE")
    if layout.family.name == "bra" and init == "kaiming":
        raise ValueError("init is 'kaiming'; with B and A both frozen choose orthonormal or weight, or public:FILE")
    tensors = adapted.read("state")
    for module in layout.modules:
        (_, d_in), (d_out, _) = tensors[f"{module}.A"].shape, tensors[f"{module}.B"].shape
        if init != "kaiming" and layout.rank > min(d_in, d_out):
            raise ValueError(f"rank {layout.rank} exceeds the smaller side of {module} ({d_out} × {d_in}); choose a "
                             f"smaller --rank, or --init kaiming where the strategy allows it")
        if gradients is not None:
            leading = leading_factors(gradients[module].cpu(), layout.rank)
            A, B = leading.A, leading.B
        elif init == "weight":
            leading = leading_factors(adapted.base_weight(module), layout.rank)
            A, B = leading.A, leading.B
        elif init == "orthonormal":
            A = orthonormal_rows(gaussian(seed, f"{module}.A", (layout.rank, d_in)))
            B = orthonormal_rows(gaussian(seed, f"{module}.B", (layout.rank, d_out))).T
        else:
            A = torch.from_numpy(_stream(seed, f"{module}.A").uniform(-1, 1, (layout.rank, d_in)) / d_in**0.5)
        tensors[f"{module}.A"] = float32(A)
        if layout.family.name == "bra":
            tensors[f"{module}.B"] = float32(B)
            tensors[f"{module}.R"] = np.zeros((layout.rank, layout.rank), np.float32)
        else:
            tensors[f"{module}.B"] = np.zeros((d_out, layout.rank), np.float32)
    spread = getattr(adapted.model.config, "initializer_range", 0.02)
    for name in (f"head.{missing}" for missing in adapted.missing):
        shape = tensors[name].shape
        if len(shape) >= 2:
            tensors[name] = float32(spread * gaussian(seed, name, shape))
        else:
            tensors[name] = np.full(shape, 0 if name.endswith("bias") else 1, np.float32)
    return tensors


def _stream(seed: int, name: str) -> np.random.Generator:
    """A stream of its own for each seed and tensor."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()))


def gaussian(seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal float64 values from the stream of one seed and name."""
    return torch.from_numpy(_stream(seed, name).standard_normal(shape))


def float32(values: torch.Tensor) -> np.ndarray:
    """As it travels."""
    return np.ascontiguousarray(values.cpu().numpy(), dtype=np.float32)
