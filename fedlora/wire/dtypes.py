"""What adapter tensors travel as: float32, or bfloat16 for half of the bytes.

In memory every tensor is float32, on either side. In a bf16 run what travels is first rounded to the nearest value of
bfloat16 (ties to even), so that both sides hold the same values; `packed` then keeps the upper half of each, as a
uint16, since numpy and Flower's ArrayRecord have no bfloat16. Rounding comes after a client's noise: it is
post-processing, and the privacy guarantee stands.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedlora.plan import Tensors

ARRAY_DTYPES: Mapping[str, np.dtype] = {"fp32": np.dtype("<f4"), "bf16": np.dtype("<u2")}
"""Of the arrays that travel, by the names of `fedlora.plan.WIRE_DTYPES`."""

_EXPONENT = np.uint16(0x7F80)
_NAN = np.uint16(0x7FC0)


def packed(tensors: Tensors, wire_dtype: str) -> Tensors:
    """The arrays that travel: the tensors themselves, or the bits of each value's nearest bfloat16.

    Raises:
        ValueError: a tensor to be rounded is not float32.
    """
    if wire_dtype == "fp32":
        return tensors
    for name, array in tensors.items():
        if array.dtype != ARRAY_DTYPES["fp32"]:
            raise ValueError(f"tensor {name} is {array.dtype}; only float32 is rounded to bf16, convert it first")
    return {name: _to_bfloat16(array) for name, array in tensors.items()}


def unpacked(arrays: Tensors, wire_dtype: str) -> Tensors:
    """Float32 tensors from arrays that travelled; `unpacked(packed(x))` is `rounded(x)`.

    Raises:
        ValueError: an array is not of the run's wire dtype.
    """
    expected = ARRAY_DTYPES[wire_dtype]
    for name, array in arrays.items():
        if array.dtype != expected:
            raise ValueError(f"array {name} is {array.dtype}; in this run ({wire_dtype}) only {expected.name} travels")
    if wire_dtype == "fp32":
        return arrays
    return {name: (array.astype("<u4") << 16).view("<f4") for name, array in arrays.items()}


def rounded(tensors: Tensors, wire_dtype: str) -> Tensors:
    """The float32 values that arrive on the other side: the tensors themselves, or each value's nearest bfloat16."""
    return unpacked(packed(tensors, wire_dtype), wire_dtype)


def is_finite(values: np.ndarray) -> np.ndarray:
    """Elementwise, for arrays that travel: neither infinite nor NaN."""
    if values.dtype == ARRAY_DTYPES["bf16"]:
        return (values & _EXPONENT) != _EXPONENT
    return np.isfinite(values)


def _to_bfloat16(array: np.ndarray) -> np.ndarray:
    """The upper 16 bits after rounding to nearest, ties to even. NaN stays NaN; what is too large becomes infinite."""
    bits = np.asarray(array, order="C").view("<u4")
    upper = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    return np.where(np.isnan(array), _NAN, upper)
