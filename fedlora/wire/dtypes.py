"""Data types of tensors on the wire: float32, or bfloat16 for half of the bytes.

In memory every tensor is float32, on both sides. In a bf16 run, each value is rounded to the nearest bfloat16 (ties to
even) before it travels, so that both sides hold the same values. `packed` then keeps the upper 16 bits of each value,
as a uint16, since numpy and Flower's ArrayRecord have no bfloat16. A client rounds after it has added its noise.
Rounding is post-processing, so the privacy guarantee is unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedlora.plan import Tensors

ARRAY_DTYPES: Mapping[str, np.dtype] = {"fp32": np.dtype("<f4"), "bf16": np.dtype("<u2"), "u32": np.dtype("<u4"),
                                        "u64": np.dtype("<u8")}
"""Name of a wire dtype → numpy dtype of the arrays that travel.

A plan has one of `fedlora.plan.WIRE_DTYPES`. The masked vectors of secure aggregation travel as integers of their ring,
unchanged."""

RINGS: Mapping[np.dtype, str] = {ARRAY_DTYPES[name]: name for name in ("u32", "u64")}
"""numpy dtype of a masked vector → its wire dtype."""

_EXPONENT = np.uint16(0x7F80)
_NAN = np.uint16(0x7FC0)


def packed(tensors: Tensors, wire_dtype: str) -> Tensors:
    """Return the arrays that travel: the tensors themselves, or the bits of each value's nearest bfloat16.

    Args:
        tensors: name → float32 array.
        wire_dtype: "fp32" or "bf16".

    Returns:
        Name → float32 array, or name → uint16 array of the same shape.

    Raises:
        ValueError: a tensor to be rounded is not float32.
    """
    if wire_dtype != "bf16":
        return tensors
    for name, array in tensors.items():
        if array.dtype != ARRAY_DTYPES["fp32"]:
            raise ValueError(f"tensor {name} is {array.dtype}; only float32 is rounded to bf16, convert it first")
    return {name: _to_bfloat16(array) for name, array in tensors.items()}


def unpacked(arrays: Tensors, wire_dtype: str) -> Tensors:
    """Return float32 tensors from arrays that travelled. `unpacked(packed(x))` equals `rounded(x)`.

    Args:
        arrays: name → array, as `packed` returns them.
        wire_dtype: "fp32" or "bf16".

    Raises:
        ValueError: an array is not of the wire dtype.
    """
    expected = ARRAY_DTYPES[wire_dtype]
    for name, array in arrays.items():
        if array.dtype != expected:
            raise ValueError(f"array {name} is {array.dtype}; in this run ({wire_dtype}) it must be {expected.name}")
    if wire_dtype != "bf16":
        return arrays
    return {name: (array.astype("<u4") << 16).view("<f4") for name, array in arrays.items()}


def rounded(tensors: Tensors, wire_dtype: str) -> Tensors:
    """Return the float32 values that the other side receives: unchanged, or each value's nearest bfloat16."""
    return unpacked(packed(tensors, wire_dtype), wire_dtype)


def is_finite(values: np.ndarray) -> np.ndarray:
    """Return for each value of an array that travels whether it is finite: neither infinite nor NaN."""
    if values.dtype == ARRAY_DTYPES["bf16"]:
        finite: np.ndarray = (values & _EXPONENT) != _EXPONENT
    elif values.dtype in RINGS:
        finite = np.ones(values.shape, bool)
    else:
        finite = np.isfinite(values)
    return finite


def _to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Return the upper 16 bits of each float32 after rounding to nearest, ties to even.

    NaN stays NaN. A value that is too large for bfloat16 becomes infinite.
    """
    bits = np.asarray(array, order="C").view("<u4")
    upper = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    return np.where(np.isnan(array), _NAN, upper)
