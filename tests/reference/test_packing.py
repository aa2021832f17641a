"""Packing loses nothing, at any width and shape, and takes k/8 bytes a code."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from mptqc.reference.packing import pack, packed_bytes, planes_of, unpack


@st.composite
def codes_of_some_bits(draw: st.DrawFn) -> tuple[NDArray[np.int8], int]:
    bits = draw(st.integers(2, 8))
    limit = 2 ** (bits - 1)
    shape = draw(array_shapes(min_dims=1, max_dims=3, max_side=19))
    return draw(arrays(np.int8, shape, elements=st.integers(-limit, limit - 1))), bits


@given(codes_of_some_bits())
def test_unpack_restores_the_codes(case: tuple[NDArray[np.int8], int]) -> None:
    codes, bits = case
    assert np.array_equal(unpack(pack(codes, bits), bits, codes.shape), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_survives(bits: int) -> None:
    limit = 2 ** (bits - 1)
    codes = np.arange(-limit, limit, dtype=np.int8)
    assert np.array_equal(unpack(pack(codes, bits), bits, codes.shape), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_code_takes_its_bits(bits: int) -> None:
    codes = np.zeros((24, 16), np.int8)
    assert sum(plane.nbytes for plane in pack(codes, bits)) == codes.size * bits // 8


@pytest.mark.parametrize(
    ("bits", "widths"), [(2, (2,)), (3, (2, 1)), (4, (4,)), (5, (4, 1)), (7, (4, 2, 1)), (8, (4, 4))]
)
def test_planes_are_few(bits: int, widths: tuple[int, ...]) -> None:
    assert tuple(plane.width for plane in planes_of(bits)) == widths


def test_the_first_code_lies_in_the_lowest_bits() -> None:
    (plane,) = pack(np.array([1, -1, 7], np.int8), 4)
    assert plane.tolist() == [0xF1, 0x07]


@pytest.mark.parametrize("code", [-9, 8])
def test_a_code_that_does_not_fit_is_refused(code: int) -> None:
    with pytest.raises(ValueError, match="do not fit 4 bits"):
        pack(np.array([code], np.int8), 4)


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"not {bits}"):
        pack(np.zeros(1, np.int8), bits)


def test_planes_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="do not hold 9 codes"):
        unpack(pack(np.zeros(6, np.int8), 4), 4, (3, 3))


@given(st.integers(2, 8), st.integers(1, 100))
def test_bytes_are_those_of_the_planes(bits, size):
    planes = pack(np.zeros(size, np.int8), bits)
    assert packed_bytes(size, bits) == sum(plane.size for plane in planes)
