"""Weights of 2 to 5 bits by a trellis: each code gives its weight together with the codes before it.

    window  i_n = Σ_j c_(n−j)·2^(kj),  j = 0 … J−1; codes before a row's first are 0
    weight  w_n = table[i_n mod 2^(kJ)], int8

c_n is a signed code of k bits, n runs along the outputs of one input (a row of W [K, N]). Each weight may take any of
2^(kJ) values, but only 2^k of them after given neighbours; the row's codes are those whose weights are nearest to it as
a whole (Viterbi's algorithm). At the same k/8 bytes a weight that is nearer than any code of k bits for each weight
alone: 3.3 dB at 4 bits for Gaussian weights (docs/accuracy.md). Marcellin and Fischer, Trellis coded quantization,
IEEE Trans. Comm. 38 (1990); the window and a table of scrambled values: Tseng et al., QTIP, arXiv 2406.11235.

The table holds the quantiles of a logistic distribution, whose tails are those of weights, from −63 to 63 (so that
pairs of products fit 16 bits, see `Recipe.reduce_range`), in an order in which neighbours in the window say nothing
about each other.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

TAPS = {2: 6, 3: 4, 4: 3, 5: 2}
"""J for each k that a trellis is used for: windows of 12 bits, of 10 for k = 5."""

LARGEST = 63
"""The largest weight, in units of the scale."""

ROWS = 64
"""Rows that `encode` works on together."""


def window_bits(bits: int) -> int:
    """kJ."""
    return bits * TAPS[bits]


@cache
def table(bits: int) -> NDArray[np.int8]:
    """The weight of each window, [2^(kJ)] int8; read-only. It never changes: without it a plan's codes mean nothing.

    Raises:
        KeyError: no trellis has so many bits.
    """
    size = 1 << window_bits(bits)
    below = (np.arange(size) + 0.5) / size
    quantiles = np.log(below / (1 - below))
    values = np.rint(quantiles * (LARGEST / quantiles[-1])).astype(np.int8)
    made = np.empty(size, np.int8)
    made[np.argsort(_scrambled(size), kind="stable")] = values
    made.flags.writeable = False
    return made


def _scrambled(size: int) -> NDArray[np.uint32]:
    """A different number for each of 0 … size − 1, without order (the finalizer of MurmurHash3)."""
    key = np.arange(1, size + 1, dtype=np.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        key ^= key >> np.uint32(shift)
        key *= np.uint32(factor)
    return key ^ (key >> np.uint32(16))


@cache
def packed_table(bits: int) -> NDArray[np.int8]:
    """`table` by a window's bits as `reference.packing` lays codes down, the first one lowest; read-only."""
    packed = np.arange(1 << window_bits(bits))
    total = np.zeros_like(packed)
    for _ in range(TAPS[bits]):
        code = packed & ((1 << bits) - 1)
        total = (total << bits) + np.where(code >> (bits - 1), code - (1 << bits), code)
        packed >>= bits
    made = table(bits)[total]
    made.flags.writeable = False
    return made


@cache
def deviation(bits: int) -> float:
    """Root mean square of the table: weights of this deviation use it as it is meant."""
    return float(np.sqrt(np.mean(np.square(table(bits), dtype=np.float64))))


def windows(codes: NDArray[np.int8], bits: int) -> NDArray[np.int32]:
    """i of every code of rows [..., N]: int32, negative ones count from the table's end, as ONNX's Gather does."""
    total = codes.astype(np.int32)
    for tap in range(1, TAPS[bits]):
        total[..., tap:] += codes[..., :-tap].astype(np.int32) << (bits * tap)
    return total


def decode(codes: NDArray[np.int8], bits: int) -> NDArray[np.int8]:
    """The weights of rows of codes [..., N], int8."""
    return table(bits)[windows(codes, bits)]


def encode(rows: NDArray[np.float32], importance: NDArray[np.float32], bits: int) -> NDArray[np.int8]:
    """The codes of each row whose weights are nearest to it: least Σ_n importance_n·(x_n − w_n)², in float32.

    Args:
        rows: x [R, N] float32, in units of the scale.
        importance: [N] float32, above zero.
        bits: a key of TAPS.

    Returns:
        [R, N] int8. `mptqc.runtime.trellis` gives the same, faster, where the kernel library is.
    """
    made = np.empty(rows.shape, np.int8)
    for start in range(0, len(rows), ROWS):
        made[start : start + ROWS] = _encode(rows[start : start + ROWS], importance, bits)
    return made


@cache
def unsigned_table(bits: int) -> NDArray[np.float32]:
    """`table` by windows of unsigned codes u = c + 2^(k−1), whose bits they are side by side; float32, read-only."""
    made = np.roll(table(bits), first_state(bits)).astype(np.float32)
    made.flags.writeable = False
    return made


def first_state(bits: int) -> int:
    """The unsigned window before a row: all codes 0."""
    return sum(1 << (bits * tap + bits - 1) for tap in range(TAPS[bits]))


def _encode(rows: NDArray[np.float32], importance: NDArray[np.float32], bits: int) -> NDArray[np.int8]:
    """Viterbi's algorithm. States are unsigned windows; those that differ in the oldest code alone (h) lead to the
    same: state h·G + g is followed by g·2^k + u."""
    count, length = rows.shape
    fan, group = 1 << bits, 1 << (window_bits(bits) - bits)
    values = unsigned_table(bits).reshape(group, fan)
    cost = np.full((count, fan * group), np.float32(np.inf))
    cost[:, first_state(bits)] = 0
    oldest = np.empty((length, count, group), np.uint8)
    for n in range(length):
        before = cost.reshape(count, fan, group)
        oldest[n] = before.argmin(axis=1)
        best = before.min(axis=1)
        best -= best.min(axis=1, keepdims=True)
        error = rows[:, n, None, None] - values
        error *= error
        error *= importance[n]
        cost = (error + best[:, :, None]).reshape(count, fan * group)
    state = cost.argmin(axis=1)
    codes = np.empty((count, length), np.int8)
    every = np.arange(count)
    for n in range(length - 1, -1, -1):
        codes[:, n] = (state & (fan - 1)) - fan // 2
        group_of = state >> bits
        state = oldest[n, every, group_of].astype(np.int64) * group + group_of
    return codes
