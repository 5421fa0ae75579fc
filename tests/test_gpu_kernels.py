"""The GPU library's kernels against NumPy: on the CPU, thread by thread (csrc/bindings/testing_gpu.cpp)."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_backup import _core_testing as core
from tests.arithmetic import (
    FLOATS,
    Array,
    bits,
    from_numbers,
    narrowed,
    random_elements,
    reference_sum,
    storage,
    widened,
)

CASTS = [
    *((dtype, dtype) for dtype in FLOATS),
    *(("float32", "float16"), ("float32", "bfloat16"), ("float64", "float16"), ("float64", "float32")),
]
FRAME = 77  # what lies around a bucket and between gradients


def cast(gradient: str, wire: str, stored: Array, scale: float) -> Array:
    """What lies in the bucket: scaled as it is summed, rounded once more than that if it comes from float64."""
    lane = np.float64 if wire == "float64" else np.float32
    with np.errstate(all="ignore"):
        return narrowed(wire, widened(gradient, stored).astype(lane) * lane(scale))


class Bucket:
    """Gradients and the places for them, at addresses that the test decides about."""

    def __init__(self, gradient: str, wire: str, counts: list[int], rng: np.random.Generator, odd: int) -> None:
        """odd: every so many gradients one has an address, and one a place, that no vector fits."""
        self.gradient, self.wire, self.counts = gradient, wire, counts
        self.begins: list[int] = []
        self.gradients: list[Array] = []
        self.addresses: list[int] = []
        step = 16 // storage(wire).itemsize
        end = 0
        for number, count in enumerate(counts):
            begin = -(-end // step) * step + (1 if odd and number % odd == 1 else 0)
            memory = np.zeros(count + 64, storage(gradient))
            start = (-memory.ctypes.data % 64) // memory.itemsize + (1 if odd and number % odd == 2 else 0)
            stored = memory[start : start + count]
            stored[:] = random_elements(gradient, count, rng, special=number % 3 == 0)
            missing = number % 5 == 4
            self.gradients.append(np.zeros(count, storage(gradient)) if missing else stored)
            self.addresses.append(0 if missing else stored.ctypes.data)
            self.begins.append(begin)
            end = begin + count
        memory = np.full(end + 64, FRAME, storage(wire))
        start = (-memory.ctypes.data % 64) // memory.itemsize
        self.elements = memory[start : start + end]

    def places(self) -> list[Array]:
        return [self.elements[begin : begin + n] for begin, n in zip(self.begins, self.counts, strict=True)]

    def pack(self, scale: float, measured: bool = False) -> Any:
        address = self.elements.ctypes.data
        return core.gpu_pack(
            self.gradient, self.wire, self.addresses, self.begins, self.counts, address, scale, measured
        )

    def between(self) -> Array:
        """What belongs to no gradient."""
        mine = np.zeros(len(self.elements), bool)
        for begin, count in zip(self.begins, self.counts, strict=True):
            mine[begin : begin + count] = True
        return self.elements[~mine]


sizes = st.lists(
    st.one_of(st.integers(0, 40), st.integers(0, 5000), st.sampled_from([256, 4096, 8192, 16384])), max_size=12
)


@pytest.mark.parametrize(("gradient", "wire"), CASTS)
@settings(max_examples=25)
@given(counts=sizes, scale=st.sampled_from([1.0, 0.25, 1 / 3]), odd=st.sampled_from([0, 3, 4]), seed=st.integers(0, 99))
def test_gradients_are_packed_scaled_and_cast(
    gradient: str, wire: str, counts: list[int], scale: float, odd: int, seed: int
) -> None:
    bucket = Bucket(gradient, wire, counts, np.random.default_rng(seed), odd)
    launches, *_ = bucket.pack(scale)
    assert launches == 1 or sum(counts) == 0
    for stored, place in zip(bucket.gradients, bucket.places(), strict=True):
        np.testing.assert_array_equal(bits(place), bits(cast(gradient, wire, stored, scale)))
    assert (bucket.between() == FRAME).all()


@pytest.mark.parametrize(("gradient", "wire"), CASTS)
@settings(max_examples=25)
@given(counts=sizes, scale=st.sampled_from([1.0, 0.25, 1 / 3]), odd=st.sampled_from([0, 3, 4]), seed=st.integers(0, 99))
def test_gradients_are_unpacked_scaled_and_cast(
    gradient: str, wire: str, counts: list[int], scale: float, odd: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    bucket = Bucket(gradient, wire, counts, rng, odd)
    for place in bucket.places():
        place[:] = random_elements(wire, len(place), rng, special=True)
    before = bucket.elements.copy()
    core.gpu_unpack(gradient, wire, bucket.addresses, bucket.begins, counts, bucket.elements.ctypes.data, scale)
    np.testing.assert_array_equal(bits(bucket.elements), bits(before))
    lane = np.float64 if gradient == "float64" else np.float32
    for address, stored, place in zip(bucket.addresses, bucket.gradients, bucket.places(), strict=True):
        with np.errstate(all="ignore"):
            expected = narrowed(gradient, widened(wire, place).astype(lane) * lane(scale))
        np.testing.assert_array_equal(bits(stored), bits(expected if address else np.zeros_like(stored)))


def test_a_bucket_takes_one_launch_and_a_very_long_one_few() -> None:
    rng = np.random.default_rng(0)
    for tensors, launches in ((160, 1), (512, 1), (513, 2), (1100, 3)):
        bucket = Bucket("float32", "float32", [3] * tensors, rng, odd=0)
        assert bucket.pack(2.0)[0] == launches
        for stored, place in zip(bucket.gradients, bucket.places(), strict=True):
            np.testing.assert_array_equal(bits(place), bits(cast("float32", "float32", stored, 2.0)))


def test_a_gradient_that_lies_in_its_bucket_is_scaled_in_place() -> None:
    bucket = Bucket("float32", "float32", [5000, 7], np.random.default_rng(0), odd=0)
    for place in bucket.places():
        place[:] = 3.0
    bucket.addresses = [place.ctypes.data for place in bucket.places()]
    bucket.pack(0.5)
    assert all((place == 1.5).all() for place in bucket.places())


@pytest.mark.parametrize(("gradient", "wire"), CASTS)
@pytest.mark.parametrize("spoiled", [None, math.nan, math.inf, -math.inf, 1e30])
def test_what_is_sent_is_measured_on_the_way(gradient: str, wire: str, spoiled: float | None) -> None:
    """Also what only becomes infinite by the cast."""
    rng = np.random.default_rng(0)
    bucket = Bucket(gradient, wire, [3000, 50], rng, odd=0)
    for stored in bucket.gradients:
        stored[:] = from_numbers(gradient, rng.standard_normal(len(stored)))
    if spoiled is not None:
        bucket.gradients[1][20] = from_numbers(gradient, np.array([spoiled]))[0]
    _, squares, nonfinite = bucket.pack(0.5, measured=True)
    sent = np.concatenate([widened(wire, place) for place in bucket.places()]).astype(np.float64)
    assert nonfinite == (not np.isfinite(sent).all())
    if not nonfinite:
        assert squares == pytest.approx((sent**2).sum(), rel=1e-12)


def sum_in_place(
    dtype: str, sources: list[Array], weights: list[float], scale: float, measured: bool = False
) -> tuple[float, float]:
    """Into the last source. Returns, if `measured`, the squared norms of (sources, destination)."""
    addresses = [source.ctypes.data for source in sources]
    norms = core.gpu_sum(dtype, addresses[-1], addresses, weights, scale, len(sources[-1]), measured)
    return float(norms[0]), float(norms[1])


def squared_norm(dtype: str, stored: Array) -> float:
    return float((widened(dtype, stored).astype(np.float64) ** 2).sum())


sums = given(
    source_count=st.integers(1, 9),
    count=st.one_of(st.integers(0, 50), st.integers(0, 20000), st.sampled_from([4096, 8192])),
    misaligned=st.sampled_from([None, None, 0, -1]),
    special=st.booleans(),
    seed=st.integers(0, 99),
)


@pytest.mark.parametrize("dtype", FLOATS)
@settings(max_examples=25)
@sums
def test_a_sum_has_the_bits_of_the_sum_in_rank_order(
    dtype: str, source_count: int, count: int, misaligned: int | None, special: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    memory = np.zeros((source_count, count + 64), storage(dtype))
    sources = []
    for number, row in enumerate(memory):
        odd = misaligned is not None and number == misaligned % source_count
        start = (-row.ctypes.data % 64) // row.itemsize + int(odd)
        sources.append(row[start : start + count])
        sources[-1][:] = random_elements(dtype, count, rng, special=special)
    weights = [float(weight) for weight in rng.choice([1.0, 0.0, 0.3, -2.5], source_count)]
    expected = reference_sum(dtype, sources, weights, 1 / 3)
    before = [source.copy() for source in sources]
    for measured in (False, True):
        sources[-1][:] = before[-1]
        norms = sum_in_place(dtype, sources, weights, 1 / 3, measured)
        np.testing.assert_array_equal(bits(sources[-1]), bits(expected))
        assert not memory[:, -1].any()
        if not measured:
            assert norms == (0.0, 0.0)
        elif not special:
            assert norms[0] == pytest.approx(sum(squared_norm(dtype, source) for source in before), rel=1e-12)
            assert norms[1] == pytest.approx(squared_norm(dtype, expected), rel=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("spoiled", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 4095, 4999])
def test_norms_of_what_is_not_finite_are_not_finite(dtype: str, spoiled: float, place: int) -> None:
    """Also of a source that has no weight."""
    sources = [from_numbers(dtype, np.ones(5000)) for _ in range(3)]
    sources[1][place] = from_numbers(dtype, np.array([spoiled]))[0]
    assert not np.isfinite(sum_in_place(dtype, sources, [1.0, 0.0, 1.0], 1.0, measured=True)).any()


def test_norms_are_those_of_what_is_stored() -> None:
    """The sum is too large for float16; its sources are not."""
    sources = [from_numbers("float16", np.full(10, 60000.0)) for _ in range(2)]
    of_sources, of_result = sum_in_place("float16", sources, [1.0, 1.0], 1.0, measured=True)
    assert of_sources == pytest.approx(squared_norm("float16", sources[0]) * 2) and of_result == math.inf


def test_all_float16_are_widened_and_rounded_as_they_should_be() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    wide = np.zeros(len(every), np.float32)
    address = wide.ctypes.data
    core.gpu_unpack("float32", "float16", [address], [0], [len(every)], every.ctypes.data, 1.0)
    np.testing.assert_array_equal(bits(wide), bits(narrowed("float32", every.astype(np.float32))))
    back = np.zeros_like(every)
    core.gpu_pack("float32", "float16", [address], [0], [len(every)], back.ctypes.data, 1.0)
    np.testing.assert_array_equal(bits(back), bits(narrowed("float16", every.astype(np.float32))))


def test_wrong_arguments_are_told() -> None:
    array = np.zeros(8, np.float32)
    at = array.ctypes.data
    with pytest.raises(RuntimeError, match="no kernel for these two dtypes"):
        core.gpu_pack("float16", "float32", [at], [0], [8], at, 1.0)
    with pytest.raises(RuntimeError, match="in their order, without overlap"):
        core.gpu_pack("float32", "float32", [at, at], [0, 3], [4, 4], at, 1.0)
    with pytest.raises(RuntimeError, match="of one length"):
        core.gpu_pack("float32", "float32", [at], [0, 3], [4, 4], at, 1.0)
    with pytest.raises(RuntimeError, match="1 to 1024 sources"):
        core.gpu_sum("float32", at, [], [], 1.0, 8)
    with pytest.raises(RuntimeError, match="floating-point"):
        core.gpu_sum("int32", at, [at], [1.0], 1.0, 8)
    with pytest.raises(RuntimeError, match="unknown dtype float8"):
        core.gpu_sum("float8", at, [at], [1.0], 1.0, 8)
