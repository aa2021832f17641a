from dataclasses import dataclass

import numpy as np
import pytest

from mptqc.analysis.candidates import uniform
from mptqc.analysis.observe import Rows, Slices
from mptqc.analysis.tensor_ranges import (
    NormInputSearch,
    NormReader,
    search_gelu_input,
    search_rows,
    search_scores,
)
from mptqc.plan import ActivationQuantizer, Uniform
from mptqc.recipe import RangeMethod
from mptqc.reference.custom_ops import gelu
from mptqc.reference.quantizers import fake_quantize

Array = np.ndarray
BITS = [4, 8]
# Errors are summed in float32 there and in float64 here: at most 2¹⁴ terms, added in pairs.
ROUNDING = 1 + 64 * 2.0**-24


@dataclass(frozen=True)
class Scaled:
    quantizer: ActivationQuantizer
    exponents: Array | None


def search_norm_input(
    rows: Rows, readers: list[NormReader], bits: int, method: RangeMethod, *, exponents: bool, seed: int
) -> Scaled:
    search = NormInputSearch(rows, readers, method, seed)
    chosen = search.best_exponents(bits) if exponents else None
    return Scaled(search.quantizer(bits, chosen), chosen)


def rows_of(values: Array) -> Rows:
    values = values.astype(np.float32)
    return Rows(values, np.ones(len(values), np.float32), values.min(axis=0), values.max(axis=0))


def min_max(values: Array, bits: int) -> Uniform:
    return uniform(bits, min(float(values.min()), 0.0), max(float(values.max()), 0.0))


def normalised(x: Array) -> Array:
    centred = x - x.mean(axis=1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + 1e-6)


def softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@pytest.fixture
def stream() -> Rows:
    """A residual stream with two channels that reach 40 times as far as the others."""
    x = np.random.default_rng(0).normal(size=(300, 16))
    x[:, [3, 11]] *= 40
    return rows_of(x)


@pytest.fixture
def reader() -> NormReader:
    random = np.random.default_rng(1)
    return NormReader(random.uniform(0.5, 2, 16).astype(np.float32), [random.normal(size=(16, 24)).astype(np.float32)])


def norm_error(x: Array, rows: Rows, reader: NormReader) -> float:
    error = (normalised(x.astype(np.float64)) - normalised(rows.rows.astype(np.float64))) * reader.gamma
    return float(np.square(error @ reader.weights[0]).sum())


@pytest.mark.parametrize("bits", BITS)
def test_what_a_norm_reads_is_never_worse_than_min_max(stream: Rows, reader: NormReader, bits: int) -> None:
    found = search_norm_input(stream, [reader], bits, RangeMethod.OUTPUT, exponents=False, seed=0)
    plain = fake_quantize(min_max(stream.rows, bits), stream.rows)
    assert found.exponents is None
    error = norm_error(fake_quantize(found.quantizer, stream.rows), stream, reader)
    assert error <= norm_error(plain, stream, reader) * (1 + 1e-4)  # the norm itself is computed in float32 there


@pytest.mark.parametrize("bits", BITS)
def test_exponents_bring_channels_that_reach_far_within_reach(stream: Rows, reader: NormReader, bits: int) -> None:
    without = search_norm_input(stream, [reader], bits, RangeMethod.OUTPUT, exponents=False, seed=0)
    found = search_norm_input(stream, [reader], bits, RangeMethod.OUTPUT, exponents=True, seed=0)
    assert found.exponents is not None and found.exponents.min() == 0
    assert sorted(np.argsort(found.exponents)[-2:].tolist()) == [3, 11]
    factor = np.exp2(found.exponents.astype(np.float32))
    error = norm_error(fake_quantize(found.quantizer, stream.rows / factor) * factor, stream, reader)
    assert error < norm_error(fake_quantize(without.quantizer, stream.rows), stream, reader) / 2


def test_channels_of_one_reach_take_no_exponents(reader: NormReader) -> None:
    signs = np.sign(np.random.default_rng(0).normal(size=(200, 16)))
    found = search_norm_input(rows_of(signs), [reader], 4, RangeMethod.OUTPUT, exponents=True, seed=0)
    assert found.exponents is None


def gelu_error(quantizer: ActivationQuantizer, x: Array, weight: Array) -> float:
    error = gelu(fake_quantize(quantizer, x)).astype(np.float64) - gelu(x)
    return float(np.square(error @ weight).sum())


@pytest.mark.parametrize("bits", BITS)
def test_what_gelu_reads_is_never_worse_than_min_max(bits: int) -> None:
    random = np.random.default_rng(2)
    rows, weight = rows_of(random.standard_t(4, size=(150, 12)) - 1), random.normal(size=(12, 5)).astype(np.float32)
    found = search_gelu_input(rows, [weight], bits, RangeMethod.OUTPUT, seed=0)
    best, plain = (gelu_error(one, rows.rows, weight) for one in (found, min_max(rows.rows, bits)))
    assert best <= plain * ROUNDING


def test_values_that_gelu_takes_to_zero_get_no_codes() -> None:
    x = np.random.default_rng(3).normal(size=(200, 8)) * 2
    x[:, 0] = -40
    rows = rows_of(x)
    found = search_gelu_input(rows, [np.eye(8, dtype=np.float32)], 4, RangeMethod.OUTPUT, seed=0)
    assert isinstance(found, Uniform)
    assert -found.zero_point * found.scale > -5


def slices_of(scores: Array, v: Array) -> Slices:
    nothing = np.zeros((len(scores), 1, 1), np.float32)
    return Slices(nothing, nothing, softmax(scores), v, np.zeros(len(scores), np.int64), scores)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mask", [-100.0, -np.inf])
def test_masked_scores_do_not_set_the_range(bits: int, mask: float) -> None:
    random = np.random.default_rng(4)
    scores = (random.normal(size=(20, 9, 9)) * 2).astype(np.float32)
    scores[:, :, 5:] = np.where(random.random((20, 9, 4)) < 0.5, np.float32(mask), scores[:, :, 5:])
    slices = slices_of(scores, random.normal(size=(20, 9, 4)).astype(np.float32))
    found = search_scores(slices, bits, RangeMethod.OUTPUT, seed=0)
    assert (2**bits - 1) * found.scale < 40
    error = np.matmul(softmax(fake_quantize(found, scores)) - slices.p, slices.v)
    signal = np.matmul(slices.p, slices.v)
    assert np.square(error).sum() < np.square(signal).sum() * (0.1 if bits == 4 else 0.001)


def test_one_massive_token_does_not_decide_for_all() -> None:
    x = np.random.default_rng(5).normal(size=(400, 16))
    x[7] *= 30
    found = search_rows(rows_of(x), 4, RangeMethod.OUTPUT, seed=0)
    assert found.scale < min_max(x, 4).scale / 4


@pytest.mark.parametrize("method", RangeMethod)
def test_every_method_finds_a_quantizer(stream: Rows, reader: NormReader, method: RangeMethod) -> None:
    found = search_norm_input(stream, [reader], 8, method, exponents=False, seed=0)
    assert found.quantizer.bits == 8
    if method is RangeMethod.MIN_MAX:
        assert found.quantizer == min_max(stream.rows, 8)
