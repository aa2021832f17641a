"""Trellis codes: what they mean, and that no other codes are nearer."""

from itertools import product

import numpy as np
import pytest

from mptqc.reference.quantizers import quantize_weight
from mptqc.reference.trellis import (
    LARGEST,
    TAPS,
    decode,
    deviation,
    encode,
    first_state,
    table,
    unsigned_table,
    windows,
)

WIDTHS = sorted(TAPS)


def all_codes(bits, length):
    limit = 1 << (bits - 1)
    return np.array(list(product(range(-limit, limit), repeat=length)), np.int8)


def test_a_window_is_a_code_and_those_before_it():
    codes = np.array([[3, -4, 1, 0, -1]], np.int8)
    expected = [3, -4 + 8 * 3, 1 - 8 * 4 + 64 * 3, 8 - 64 * 4 + 512 * 3, -1 + 64 - 512 * 4]
    assert windows(codes, 3).tolist() == [expected]
    assert decode(codes, 3).tolist() == [[table(3)[index] for index in expected]]


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_window_has_a_place_of_its_own_in_the_table(bits):
    last = windows(all_codes(bits, TAPS[bits]), bits)[:, -1]
    assert sorted(last % table(bits).size) == list(range(table(bits).size))


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_table_is_symmetric_and_fits_seven_bits(bits):
    values = np.sort(table(bits))
    assert (values[0], values[-1]) == (-LARGEST, LARGEST)
    assert np.array_equal(values, -values[::-1])
    assert not table(bits).flags.writeable


@pytest.mark.parametrize(("bits", "digest"), [(2, -2163596), (3, -2163596), (4, -2163596), (5, -253186)])
def test_the_table_is_the_same_everywhere(bits, digest):
    weights = np.arange(1, table(bits).size + 1, dtype=np.int64)
    assert int(table(bits) @ weights) == digest


@pytest.mark.parametrize("bits", WIDTHS)
def test_unsigned_windows_hold_their_codes_side_by_side(bits):
    codes = np.random.default_rng(bits).integers(-(1 << (bits - 1)), 1 << (bits - 1), (50, TAPS[bits] + 2), np.int8)
    unsigned = codes.astype(int) + (1 << (bits - 1))
    window = sum(unsigned[:, -1 - tap] << (bits * tap) for tap in range(TAPS[bits]))
    assert np.array_equal(unsigned_table(bits)[window], decode(codes, bits)[:, -1])
    zeros = np.zeros((1, 1), np.int8)
    before = first_state(bits)
    after = (before << bits) % table(bits).size + (1 << (bits - 1))
    assert unsigned_table(bits)[after] == decode(zeros, bits)[0, 0]


@pytest.mark.parametrize(("bits", "length"), [(2, 6), (3, 4), (4, 3), (5, 2)])
def test_no_other_codes_are_nearer(bits, length):
    random = np.random.default_rng(bits)
    rows = (random.standard_normal((20, length)) * deviation(bits)).astype(np.float32)
    importance = random.uniform(0.2, 5, length).astype(np.float32)
    every = decode(all_codes(bits, length), bits).astype(np.float64)
    found = decode(encode(rows, importance, bits), bits)
    for row, made in zip(rows.astype(np.float64), found, strict=True):
        least = (importance * (every - row) ** 2).sum(axis=1).min()
        assert (importance * (made - row) ** 2).sum() == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("bits", WIDTHS)
def test_weights_of_the_table_come_back(bits):
    codes = np.random.default_rng(bits).integers(-(1 << (bits - 1)), 1 << (bits - 1), (3, 90), np.int8)
    rows = decode(codes, bits)
    again = encode(rows.astype(np.float32), np.ones(90, np.float32), bits)
    assert np.array_equal(decode(again, bits), rows)


@pytest.mark.parametrize(("bits", "gained_db"), [(2, 1.5), (3, 2.3), (4, 2.7), (5, 2.0)])
def test_it_is_nearer_to_gaussian_weights_than_uniform_codes(bits, gained_db):
    rows = np.random.default_rng(0).standard_normal((8, 400)).astype(np.float32)
    ones = np.ones(400, np.float32)

    def uniform_error(step):
        scale = np.full(400, step, np.float32)
        return np.square(quantize_weight(rows, scale, bits) * scale - rows).mean()

    uniform = min(uniform_error(step) for step in np.geomspace(0.03, 1.5, 60))
    scale = np.float32(0.95 / deviation(bits))
    by_trellis = np.square(decode(encode(rows / scale, ones, bits), bits) * scale - rows).mean()
    assert 10 * np.log10(uniform / by_trellis) > gained_db
