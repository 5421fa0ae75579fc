"""weighted_sum against NumPy, bit for bit, with every instruction set that this machine has."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvd_backup import _core_testing as core
from tests.arithmetic import (
    DTYPES,
    FLOATS,
    Array,
    bits,
    from_numbers,
    random_elements,
    reference_sum,
    storage,
    widened,
)

INSTRUCTION_SETS = core.instruction_sets()
each_set = pytest.mark.parametrize("isa", INSTRUCTION_SETS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def misaligned(array: Array, offset: int) -> Array:
    """A copy that begins `offset` bytes after a cache line."""
    memory = np.empty(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    copy = memory[start : start + array.nbytes].view(array.dtype)
    copy[:] = array
    return copy


def weighted_sum(
    dtype: str, sources: Sequence[Array], weights: Sequence[float], scale: float = 1.0, isa: str = "", offset: int = 0
) -> Array:
    """Runs the kernel into fresh memory, and checks that nothing beside it was written."""
    count = len(sources[0])
    frame = misaligned(np.full(count + 8, 77, storage(dtype)), offset)
    result = frame[4 : 4 + count]
    core.weighted_sum(
        dtype, result.ctypes.data, [source.ctypes.data for source in sources], list(weights), scale, count, isa
    )
    assert (frame[:4] == 77).all() and (frame[4 + count :] == 77).all(), "written outside of the destination"
    return result


def test_the_widest_set_is_chosen() -> None:
    assert INSTRUCTION_SETS[0] == "baseline"
    assert core.kernel_instruction_set() == INSTRUCTION_SETS[-1]


@each_set
@given(
    dtype=st.sampled_from(DTYPES),
    source_count=st.integers(1, 40),
    count=st.integers(0, 400),
    offsets=st.lists(st.integers(0, 63), min_size=41, max_size=41),
    unit=st.booleans(),
    special=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_equals_the_sum_in_order(
    isa: str, dtype: str, source_count: int, count: int, offsets: list[int], unit: bool, special: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    unit = unit or dtype not in FLOATS
    weights = [1.0] * source_count if unit else [float(w) for w in rng.choice([1.0, 0.0, 0.3, -2.5], source_count)]
    scale = 1.0 if unit else float(rng.choice([1.0, 1 / 3, 1e-3]))
    step = storage(dtype).itemsize
    sources = [
        misaligned(random_elements(dtype, count, rng, special=special), offset // step * step)
        for offset in offsets[:source_count]
    ]
    result = weighted_sum(dtype, sources, weights, scale, isa, offsets[-1] // step * step)
    np.testing.assert_array_equal(bits(result), bits(reference_sum(dtype, sources, weights, scale)))


@each_set
@each_dtype
@pytest.mark.parametrize("source_count", [1, 2, 15, 16, 17, 32, 33, 300])
def test_any_number_of_sources(isa: str, dtype: str, source_count: int) -> None:
    rng = np.random.default_rng(source_count)
    sources = [random_elements(dtype, 5001, rng) for _ in range(source_count)]
    weights = [1.0] * source_count if dtype not in FLOATS else [float(w) for w in rng.uniform(0, 2, source_count)]
    expected = reference_sum(dtype, sources, weights)
    np.testing.assert_array_equal(bits(weighted_sum(dtype, sources, weights, isa=isa)), bits(expected))


@each_set
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_half_precision_number_survives(isa: str, dtype: str) -> None:
    everything = np.arange(65536, dtype=np.uint16).view(storage(dtype))
    result = weighted_sum(dtype, [everything], [1.0], isa=isa)
    wide = widened(dtype, everything)
    assert (bits(result) == bits(everything))[~np.isnan(wide)].all()
    assert np.isnan(widened(dtype, result))[np.isnan(wide)].all()


@each_set
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "factor", [2.0**-1, 2.0**-7, 2.0**-14, 2.0**-24, 2.0**-130, 1 + 2.0**-8, 1 + 2.0**-11, 1.9999, 2.0]
)
def test_half_precision_is_rounded_to_nearest_even(isa: str, dtype: str, factor: float) -> None:
    """Every number times a factor, which gives ties, subnormals, underflow and overflow."""
    everything = np.arange(65536, dtype=np.uint16).view(storage(dtype))
    result = weighted_sum(dtype, [everything], [factor], isa=isa)
    np.testing.assert_array_equal(bits(result), bits(reference_sum(dtype, [everything], [factor])))


@pytest.mark.parametrize("dtype", FLOATS)
def test_denormal_numbers_count_wherever_the_thread_takes_them_for_zero(dtype: str) -> None:
    """Two of them may make one that is not. A training thread sums, too, while it waits."""
    smallest = from_numbers(dtype, np.array([2.0 ** {"float16": -14, "float64": -1022}.get(dtype, -126)]))
    tiny = (bits(smallest) // 4 * 3).repeat(33).view(storage(dtype))
    torch.set_flush_denormal(True)
    try:
        result = weighted_sum(dtype, [tiny, tiny], [1.0, 1.0])
        flushes = torch.tensor(5e-324, dtype=torch.float64).item() == 0
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(bits(result), bits(reference_sum(dtype, [tiny, tiny], [1.0, 1.0])))
    assert (bits(result) > bits(smallest)).all()
    assert flushes, "the thread's choice is left as it was"


@each_set
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_infinity_and_signed_zero(isa: str, dtype: str) -> None:
    inf, nan = np.inf, np.nan
    first = from_numbers(dtype, np.array([inf, inf, -inf, nan, 1.0, -0.0, 0.0] * 9))
    second = from_numbers(dtype, np.array([1.0, -inf, -inf, 1.0, nan, -0.0, -0.0] * 9))
    result = widened(dtype, weighted_sum(dtype, [first, second], [1.0, 1.0], isa=isa))
    np.testing.assert_array_equal(result, np.array([inf, nan, -inf, nan, nan, 0.0, 0.0] * 9))
    np.testing.assert_array_equal(np.signbit(result[5::7]), True)
    np.testing.assert_array_equal(np.signbit(result[6::7]), False)


@each_set
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_nan_has_the_same_bits_wherever_it_comes_from(isa: str, dtype: str) -> None:
    width = storage(dtype).itemsize * 8
    exponent = {"float16": 5, "bfloat16": 8, "float32": 8, "float64": 11}[dtype]
    infinity = ((1 << exponent) - 1) << (width - 1 - exponent)
    payloads = np.array([infinity + 1, infinity + 5, infinity * 2 + 3, (1 << width) - 1] * 11, f"u{width // 8}")
    nans = payloads.view(storage(dtype))
    results = [weighted_sum(dtype, [nans, nans[::-1].copy()], [1.0, w], isa=isa) for w in (1.0, 2.0)]
    quiet = bits(reference_sum(dtype, [nans], [1.0]))[0]
    assert all((bits(result) == quiet).all() for result in results)


@each_set
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_integers_wrap_around(isa: str, dtype: str) -> None:
    limits = np.iinfo(dtype)
    one = np.array([limits.max, limits.min, -1, 2**30 + 1] * 13, dtype)
    two = np.array([1, -1, limits.min, 2**30 + 1] * 13, dtype)
    result = weighted_sum(dtype, [one, two], [1.0, 1.0], isa=isa)
    wrapped = (1 << 31) + 2 if dtype == "int64" else (1 << 31) + 2 - (1 << 32)
    np.testing.assert_array_equal(result, np.array([limits.min, limits.max, limits.max, wrapped] * 13, dtype))


@each_set
@each_dtype
@pytest.mark.parametrize("source_count", [3, 40])
def test_the_destination_may_be_any_of_the_sources(isa: str, dtype: str, source_count: int) -> None:
    rng = np.random.default_rng(5)
    originals = [random_elements(dtype, 4999, rng) for _ in range(source_count)]
    expected = reference_sum(dtype, originals, [1.0] * source_count)
    for into in (0, source_count // 2, source_count - 1):
        sources = [source.copy() for source in originals]
        pointers = [source.ctypes.data for source in sources]
        core.weighted_sum(dtype, pointers[into], pointers, [1.0] * source_count, 1.0, 4999, isa)
        np.testing.assert_array_equal(bits(sources[into]), bits(expected))


@given(dtype=st.sampled_from(DTYPES), count=st.integers(1, 200), cut=st.integers(0, 200), seed=st.integers(0, 2**32))
def test_the_bits_do_not_depend_on_how_a_buffer_is_cut(dtype: str, count: int, cut: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sources = [random_elements(dtype, count, rng, special=True) for _ in range(3)]
    whole = weighted_sum(dtype, sources, [1.0] * 3)
    parts = [
        weighted_sum(dtype, [source[part].copy() for source in sources], [1.0] * 3)
        for part in (slice(0, min(cut, count)), slice(min(cut, count), count))
    ]
    np.testing.assert_array_equal(bits(np.concatenate(parts)), bits(whole))


def test_wrong_arguments_are_refused() -> None:
    data = np.ones(4, np.int32)
    at = data.ctypes.data
    with pytest.raises(core.UsageError, match="no sources"):
        core.weighted_sum("float32", at, [], [], 1.0, 4)
    with pytest.raises(core.UsageError, match="2 weights for 1 sources"):
        core.weighted_sum("float32", at, [at], [1.0, 1.0], 1.0, 4)
    with pytest.raises(core.UsageError, match=r"weight 1 is 0\.5"):
        core.weighted_sum("int32", at, [at, at], [1.0, 0.5], 1.0, 4)
    with pytest.raises(core.UsageError, match=r"scale is 0\.5"):
        core.weighted_sum("int64", at, [at], [1.0], 0.5, 2)


@each_set
@given(
    dtype=st.sampled_from(FLOATS),
    source_count=st.integers(1, 40),
    count=st.integers(0, 5000),
    scale=st.sampled_from([1.0, 0.25, 1 / 3]),
    seed=st.integers(0, 100),
)
def test_squared_norms_come_from_the_same_pass(
    isa: str, dtype: str, source_count: int, count: int, scale: float, seed: int
) -> None:
    """The sum is the same bit for bit, and the norms are those of what is in memory."""
    generator = np.random.default_rng(seed)
    sources = [from_numbers(dtype, generator.normal(size=count)) for _ in range(source_count)]
    weights = [1.0] * source_count if seed % 2 else list(generator.uniform(0.5, 2, source_count))
    plain = weighted_sum(dtype, sources, weights, scale, isa)
    result = np.zeros(count, storage(dtype))
    of_sources, of_result = core.measured_sum(
        dtype, result.ctypes.data, [source.ctypes.data for source in sources], weights, scale, count, isa
    )
    np.testing.assert_array_equal(bits(result), bits(plain))
    expected = sum(float(np.sum(widened(dtype, source).astype(np.float64) ** 2)) for source in sources)
    assert of_sources == pytest.approx(expected, rel=1e-4)
    stored = float(np.sum(widened(dtype, result).astype(np.float64) ** 2))
    assert of_result == pytest.approx(stored, rel=3e-2 if dtype == "bfloat16" else 1e-2 if dtype == "float16" else 1e-4)


def test_there_are_no_squared_norms_of_integers() -> None:
    one = np.ones(4, np.int32)
    with pytest.raises(RuntimeError, match="no squared norms of integers"):
        core.measured_sum("int32", np.zeros(4, np.int32).ctypes.data, [one.ctypes.data], [1.0], 1.0, 4, "")


# --- is it finite? ------------------------------------------------------------------------------------------------


def all_finite(array: Array, dtype: str) -> bool:
    return bool(core.all_finite(dtype, array.ctypes.data, len(array)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("count", [1, 7, 64, 20_001])  # the last: more than one block, in every type
def test_one_number_that_is_not_finite_is_found_wherever_it_is(dtype: str, value: float, count: int) -> None:
    for place in {0, 1, count // 2, count - 1} - {count}:
        array = misaligned(from_numbers(dtype, np.ones(count)), place % 3 * storage(dtype).itemsize)
        assert all_finite(array, dtype)
        array[place : place + 1] = from_numbers(dtype, np.array([value]))
        assert not all_finite(array, dtype)
        assert all_finite(array[:place], dtype), "beside it nothing is looked at"
        assert all_finite(array[place + 1 :], dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@given(data=st.data())
def test_any_bits_are_judged_as_by_numpy(dtype: str, data: st.DataObject) -> None:
    size = storage(dtype).itemsize
    patterns = data.draw(st.lists(st.integers(0, 256**size - 1), max_size=40))
    array = np.array(patterns, f"u{size}").view(storage(dtype))
    assert all_finite(array, dtype) == bool(np.isfinite(widened(dtype, array)).all())


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_integers_are_always_finite(dtype: str) -> None:
    assert all_finite(np.full(9, -1, dtype), dtype)
