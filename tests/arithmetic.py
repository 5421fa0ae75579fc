"""The sum that the core promises, in NumPy: term by term in the given order, each step rounded as IEEE 754 says.

Slow, and written without a look at the kernels. bfloat16, which NumPy does not know, is held in uint16.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

FLOATS = ("float16", "bfloat16", "float32", "float64")
DTYPES = (*FLOATS, "int32", "int64")


def storage(dtype: str) -> np.dtype[Any]:
    """The NumPy dtype in which elements of `dtype` are held."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def widened(dtype: str, stored: Array) -> Array:
    """Stored elements in the type in which they are summed: float32, float64, or the integer itself."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32) if dtype == "float16" else stored


def narrowed(dtype: str, values: Array) -> Array:
    """Sums rounded to `dtype`, to nearest even, each NaN the positive quiet one without payload."""
    with np.errstate(over="ignore"):
        stored = nearest_bfloat16(values) if dtype == "bfloat16" else values.astype(storage(dtype))
    if dtype in FLOATS:
        quiet = np.uint16(0x7FC0) if dtype == "bfloat16" else np.array(np.nan, storage(dtype))
        stored = np.where(np.isnan(values), quiet, stored)
    return stored


def nearest_bfloat16(values: Array) -> Array:
    """float32 to bfloat16 by comparing distances to the two neighbours, in float64. NaNs come out undefined."""
    below = (values.view(np.uint32) >> 16).astype(np.uint16)  # towards zero
    above = below + np.uint16(1)

    def magnitude(stored: Array) -> Array:
        wide = np.abs(widened("bfloat16", stored)).astype(np.float64)
        return np.where(np.isinf(wide), 2.0**128, wide)  # the next value, if the exponent went on

    with np.errstate(invalid="ignore"):
        exact = np.abs(values).astype(np.float64)
        to_below, to_above = exact - magnitude(below), magnitude(above) - exact
    upwards = (to_above < to_below) | ((to_above == to_below) & (below % 2 == 1))
    return np.where(np.isinf(values), below, np.where(upwards, above, below))


def reference_sum(dtype: str, sources: Sequence[Array], weights: Sequence[float], scale: float = 1.0) -> Array:
    """scale * sum_i weights[i] * sources[i], as stored elements; sources are stored elements of equal length."""
    with np.errstate(all="ignore"):
        terms = [widened(dtype, source) for source in sources]
        lane = terms[0].dtype.type
        if dtype in FLOATS:
            terms = [term * lane(weight) for term, weight in zip(terms, weights, strict=True)]
        total = terms[0].copy()
        for term in terms[1:]:
            total = total + term
        if dtype in FLOATS:
            total = total * lane(scale)
    return narrowed(dtype, total)


def from_numbers(dtype: str, numbers: Array) -> Array:
    """Numbers, given in any type, as stored elements of `dtype`."""
    lane = np.float32 if dtype in ("float16", "bfloat16") else storage(dtype)
    return narrowed(dtype, numbers.astype(lane))


def random_elements(dtype: str, count: int, rng: np.random.Generator, *, special: bool = False) -> Array:
    """Random stored elements of mixed magnitude. special: any bit pattern (NaN, infinities, subnormals, extremes)."""
    kind = storage(dtype)
    if special or dtype not in FLOATS:
        return np.frombuffer(rng.bytes(count * kind.itemsize), kind).copy()
    return from_numbers(dtype, rng.standard_normal(count) * 2.0 ** rng.integers(-6, 7, count))


def bits(array: Array) -> Array:
    """The elements as unsigned integers, so that NaN equals NaN and -0 differs from 0."""
    return array.view(f"u{array.dtype.itemsize}")
