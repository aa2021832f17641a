"""The CUDA kernels against the numpy reference: on a GPU, and on an emulated device that runs the same source."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from code_quantizers import FOUR_REGIONS, PROBABILITIES, QUANTIZERS, TWO_REGIONS, UNIFORM
from cuda_kernels import (
    FLOAT_TYPES,
    GUARD,
    INVALID_ARGUMENT,
    OK,
    TILES,
    CudaKernels,
    DeviceMemory,
    HostMemory,
    Output,
    as_bytes,
    build_emulated,
)
from kernel_records import Addend, Attention, Linear, c_quantizer

from mptqc.errors import ProviderError
from mptqc.reference import custom_ops as ops
from mptqc.runtime.cuda import find_cuda_library, load_cuda_library, load_cuda_runtime

SCALES = ops.AttentionScales(0.021, 117, 0.019, 133, 0.013, 126)
CAPTURE_OF_THIS_THREAD = 1
SHIFTS = [0, 4, 17]
"""Bytes from an aligned address: copies of 16, of 4 and of single codes."""


@pytest.fixture(scope="session")
def emulated(emulated_library: Path) -> CudaKernels:
    return CudaKernels(ctypes.CDLL(str(emulated_library)), HostMemory)


@pytest.fixture(scope="session")
def on_gpu() -> CudaKernels:
    try:
        path = find_cuda_library()
        runtime = load_cuda_runtime()
        if path is None:
            pytest.skip("the CUDA kernel library was not built")
        library = load_cuda_library(path)
    except ProviderError as error:
        pytest.skip(str(error))
    if not library.mptqc_cuda_device_count():
        pytest.skip("no GPU")
    return CudaKernels(library, lambda: DeviceMemory(runtime))


@pytest.fixture(params=["emulated", "on_gpu"])
def kernels(request: pytest.FixtureRequest) -> Iterator[CudaKernels]:
    yield request.getfixturevalue(request.param)


def floats(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return generator.standard_normal(shape).astype(np.float32)


def codes(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return generator.integers(0, 256, shape, np.uint8)


def assert_codes_of(actual: np.ndarray, quantizer: ops.CodeQuantizer, y: np.ndarray, tolerance: np.ndarray) -> None:
    """The codes are those of floats within `tolerance` of y."""
    low = ops.quantize_codes(quantizer, (y - tolerance).astype(np.float32))
    high = ops.quantize_codes(quantizer, (y + tolerance).astype(np.float32))
    assert ((low <= actual) & (actual <= high)).all()
    assert low.size < 1000 or (low == high).mean() > 0.99  # the bounds are no free pass


LINEAR_TILES = [name for name in TILES if name != "auto"]
LINEAR_SHAPES = [
    (0, 8, 8), (1, 1, 1), (5, 3, 0), (2, 0, 5), (1, 4, 16), (7, 5, 17), (13, 66, 65), (33, 111, 130),
    (70, 64, 100), (65, 160, 33), (129, 332, 48), (130, 320, 150), (70, 2320, 132),
    (600, 144, 300),
]  # fmt: skip


@pytest.mark.parametrize("tile", LINEAR_TILES)
@pytest.mark.parametrize("quantizer", [None, TWO_REGIONS, FOUR_REGIONS])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), LINEAR_SHAPES)
def test_linear_equals_the_reference_bit_for_bit(kernels, tile, quantizer, rows, inputs, outputs):
    generator = np.random.default_rng(rows + inputs + outputs)
    a, weight = codes(generator, rows, inputs), codes(generator, inputs, outputs).view(np.int8)
    scale, bias = np.abs(floats(generator, outputs)) * 2e-3, floats(generator, outputs)
    arguments = {"input_scale": 0.17, "input_zero_point": 201}
    expected = ops.linear(a, weight, scale, bias, **arguments)
    if quantizer is not None:
        expected = ops.quantize_codes(quantizer, expected)
    actual = kernels.linear(a, weight, scale, bias, quantizer=quantizer, tile=tile, **arguments)
    assert np.array_equal(actual, expected)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("quantizer", [None, UNIFORM])
def test_linear_takes_arrays_at_any_address(kernels, shift, quantizer):
    generator = np.random.default_rng(shift)
    a, weight = codes(generator, 66, 64), codes(generator, 64, 72).view(np.int8)
    scale, bias, residual = np.full(72, 1e-3, np.float32), floats(generator, 72), floats(generator, 66, 72)
    arguments = {"input_scale": 0.1, "input_zero_point": 3, "residual": residual if quantizer is None else None}
    expected = ops.linear(a, weight, scale, bias, **arguments)
    if quantizer is not None:
        expected = ops.quantize_codes(quantizer, expected)
    actual = kernels.shifted(shift).linear(a, weight, scale, bias, quantizer=quantizer, **arguments)
    assert np.array_equal(actual, expected)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("tile", LINEAR_TILES)
def test_a_residual_of_float16_makes_an_output_of_float16(kernels, shift, tile):
    generator = np.random.default_rng(shift)
    a, weight = codes(generator, 67, 48), codes(generator, 48, 140).view(np.int8)
    scale, bias, residual = np.full(140, 1e-3, np.float32), floats(generator, 140), floats(generator, 67, 140) * 9
    residual = residual.astype(np.float16)
    residual[0, :2] = 65504, -65504  # + 16 is the first number that rounds to infinity
    bias[:2] = 1e3, -15.9
    scale[1] = 0
    arguments = {"input_scale": 0.1, "input_zero_point": 3}
    expected = ops.linear(a, weight, scale, bias, residual=residual, **arguments)
    assert list(expected[0, :2]) == [np.inf, -65504]
    actual = kernels.shifted(shift).linear(a, weight, scale, bias, residual=residual, tile=tile, **arguments)
    assert actual.dtype == np.float16
    assert np.array_equal(actual, expected)


def test_every_float16_is_widened_and_narrowed(kernels):
    """Behind a product of no terms: all of them, then what lies between neighbours and on the ties."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)]
    bias = np.zeros(every.size, np.float32)
    assert np.array_equal(of_bias(kernels, bias, residual=every[None]), every)
    positive = np.sort(every[every > 0]).astype(np.float32)
    tie = (positive[:-1] + positive[1:]) / 2
    x = np.concatenate([tie, np.nextafter(tie, np.float32(0)), np.nextafter(tie, np.float32(1e9)), [1e-9, 7e4, 0]])
    x = np.concatenate([x, -x]).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    assert np.array_equal(of_bias(kernels, x, residual=np.zeros((1, x.size), np.float16)), expected)


@pytest.mark.parametrize(("inputs", "tile"), [(30, "auto"), *((48, tile) for tile in LINEAR_TILES)])
@pytest.mark.parametrize("outputs", [37, 64])
def test_linear_adds_the_residual_at_the_row_it_writes(kernels, outputs, inputs, tile):
    generator = np.random.default_rng(1)
    a, weight = codes(generator, 8, 12, inputs), codes(generator, inputs, outputs).view(np.int8)
    scale, bias = np.full(outputs, 1e-3, np.float32), floats(generator, outputs)
    arguments = {
        "input_scale": 0.1, "input_zero_point": 128, "residual": floats(generator, 4, 2, 12, outputs),
        "rows": generator.permutation(24),
    }  # fmt: skip
    actual = kernels.linear(a, weight, scale, bias, tile=tile, **arguments)
    assert np.array_equal(actual, ops.linear(a, weight, scale, bias, **arguments))


@pytest.mark.parametrize("tile", LINEAR_TILES)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_linear_multiplies_its_outputs_before_it_quantizes_them(kernels, quantizer, tile):
    generator = np.random.default_rng(4)
    a, weight = codes(generator, 9, 16), codes(generator, 16, 77).view(np.int8)
    scale, bias = np.full(77, 1e-3, np.float32), floats(generator, 77)
    arguments = {"input_scale": 0.1, "input_zero_point": 128, "multiplier": np.exp(floats(generator, 77))}
    expected = ops.quantize_codes(quantizer, ops.linear(a, weight, scale, bias, **arguments))
    actual = kernels.linear(a, weight, scale, bias, quantizer=quantizer, tile=tile, **arguments)
    assert np.array_equal(actual, expected)


def test_linear_multiplies_what_gelu_makes(kernels):
    x, multiplier = np.linspace(-4, 4, 70, dtype=np.float32), np.linspace(0.1, 9, 70, dtype=np.float32)
    y = of_bias(kernels, x, activation="gelu", multiplier=multiplier)
    assert np.array_equal(y, of_bias(kernels, x, activation="gelu") * multiplier)
    assert np.abs(y - ops.gelu(x) * multiplier).max() < 5 * 9 * ops.GELU_TOLERANCE


@pytest.mark.parametrize("extreme", [0, 255])
@pytest.mark.parametrize("tile", LINEAR_TILES)
def test_linear_sums_extreme_codes_exactly(kernels, tile, extreme):
    a, weight = np.full((7, 304), extreme, np.uint8), np.tile(np.array([-128, 127], np.int8), (304, 10))
    ones, zeros = np.ones(20, np.float32), np.zeros(20, np.float32)
    arguments = {"input_scale": 1.0, "input_zero_point": 255 - extreme}
    expected = ops.linear(a, weight, ones, zeros, **arguments)
    assert np.abs(expected).min() == 304 * 127 * 255
    assert np.array_equal(kernels.linear(a, weight, ones, zeros, tile=tile, **arguments), expected)


@pytest.mark.parametrize(("inputs", "tile"), [(40, "auto"), *((48, tile) for tile in LINEAR_TILES)])
@pytest.mark.parametrize("multiplied", [False, True])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_linear_with_gelu(kernels, quantizer, multiplied, inputs, tile):
    generator = np.random.default_rng(2)
    a, weight = codes(generator, 31, inputs), codes(generator, inputs, 77).view(np.int8)
    scale, bias = np.full(77, 1.5e-4, np.float32), floats(generator, 77) * 2
    arguments = {"input_scale": 0.9, "input_zero_point": 128}
    multiplier = np.exp(floats(generator, 77)) if multiplied else np.ones(77, np.float32)
    actual = kernels.linear(
        a, weight, scale, bias, quantizer=quantizer, activation="gelu", multiplier=multiplier if multiplied else None,
        tile=tile, **arguments,
    )  # fmt: skip
    x = ops.linear(a, weight, scale, bias, **arguments)
    tolerance = ops.GELU_TOLERANCE * np.maximum(1, np.abs(x)) * multiplier
    assert_codes_of(actual, quantizer, ops.gelu(x) * multiplier, tolerance)


def of_bias(kernels: CudaKernels, x: np.ndarray, **arguments: object) -> np.ndarray:
    """What becomes of x behind a product of no terms."""
    empty, no_weight = np.zeros((1, 0), np.uint8), np.zeros((0, x.size), np.int8)
    return kernels.linear(empty, no_weight, np.ones_like(x), x, input_scale=1.0, input_zero_point=0, **arguments)[0]


@pytest.mark.parametrize("activation", ops.ACTIVATIONS[1:])
def test_gelu_is_within_its_tolerance(kernels, activation):
    x = np.concatenate([np.linspace(-12, 12, 20_003), [0, -0.0, 1e-30, 200, -200]]).astype(np.float32)
    error = np.abs(of_bias(kernels, x, activation=activation) - ops.activate(x, activation))
    assert (error / np.maximum(1, np.abs(x))).max() < ops.activation_tolerance(activation)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_quantizer_rounds_as_a_division_does(kernels, quantizer):
    """Ties, their neighbours, codes beyond either end, infinities."""
    steps = np.arange(-1200, 1200).astype(np.float32) * np.float32(quantizer.scale) / 4
    edges = np.array([0, -0.0, np.inf, -np.inf, 3e38, -3e38, 1e-40, -1e-40], np.float32)
    random = floats(np.random.default_rng(3), 20_000) * 5
    x = np.concatenate([steps, np.nextafter(steps, np.float32(9)), np.nextafter(steps, np.float32(-9)), edges, random])
    with np.errstate(over="ignore"):
        expected = ops.quantize_codes(quantizer, x)
    assert np.array_equal(of_bias(kernels, x, quantizer=quantizer), expected)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize(
    ("rows", "width"), [(0, 8), (1, 1), (3, 15), (33, 17), (5, 112), (6, 384), (5, 768), (3, 1024), (2, 2052)]
)
@pytest.mark.parametrize("float_type", FLOAT_TYPES)
def test_layer_norm(kernels, shift, rows, width, float_type):
    generator = np.random.default_rng(rows + width)
    x = (floats(generator, rows, width) * 3 + 1).astype(float_type)
    gamma, beta = floats(generator, width), floats(generator, width)
    y = ops.layer_norm(x, gamma, beta, 1e-6)
    size = (np.abs(ops.layer_norm(x, gamma, 0 * beta, 1e-6)) + np.abs(beta)).max(-1, keepdims=True, initial=0)
    for quantizer in QUANTIZERS:
        actual = kernels.shifted(shift).layer_norm(x, gamma, beta, 1e-6, quantizer)
        assert_codes_of(actual, quantizer, y, ops.LAYER_NORM_TOLERANCE * size)


@pytest.mark.parametrize("float_type", FLOAT_TYPES)
@pytest.mark.parametrize("width", [24, 25])
def test_layer_norm_moves_rows(kernels, width, float_type):
    generator = np.random.default_rng(0)
    x = floats(generator, 3, 35, width).astype(float_type)
    ones, zeros = np.ones(width, np.float32), np.zeros(width, np.float32)
    rows = generator.permutation(35)
    straight = kernels.layer_norm(x, ones, zeros, 1e-6, UNIFORM)
    assert np.array_equal(kernels.layer_norm(x, ones, zeros, 1e-6, UNIFORM, rows), straight[:, rows])


ATTENTION_SHAPES = [
    # batch, heads, rows, columns, width, value width
    (0, 2, 3, 3, 8, 8), (2, 1, 1, 1, 1, 1), (1, 3, 5, 7, 6, 18), (4, 2, 17, 17, 32, 32), (1, 2, 131, 66, 33, 65),
    (1, 1, 6, 65, 64, 64), (2, 3, 1, 197, 64, 16), (1, 2, 0, 5, 4, 4), (1, 1, 49, 300, 32, 32), (1, 1, 5, 200, 512, 4),
    (1, 1, 21, 257, 64, 60), (3, 4, 131, 40, 32, 32),
]  # fmt: skip


@pytest.mark.parametrize("p_quantizer", PROBABILITIES)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
@pytest.mark.parametrize("added", ["nothing", "bias", "bias and mask", "row of mask"])
@pytest.mark.parametrize("row_scale", [False, True])
def test_attention(kernels, shape, p_quantizer, added, row_scale):
    batch, heads, rows, columns, width, value_width = shape
    generator = np.random.default_rng(columns)
    q, k = codes(generator, batch, rows, heads * width), codes(generator, batch, columns, heads * width)
    v = codes(generator, batch, columns, heads * value_width)
    bias = floats(generator, 1, heads, rows, columns) if added.startswith("bias") else None
    mask = np.where(generator.random((max(batch // 2, 1), 1, rows, columns)) < 0.2, -100, 0).astype(np.float32)
    if added == "row of mask":
        mask = np.where(generator.random((1, 1, 1, columns)) < 0.2, -np.inf, 0).astype(np.float32)
        mask[..., 0] = 0
    elif added != "bias and mask":
        mask = None
    arguments = (q, k, v, heads, SCALES, p_quantizer, bias, mask)
    actual = kernels.attention(*arguments, row_scale=row_scale)
    output = ops.CodeQuantizer(0.05, 128)
    quantized = kernels.attention(*arguments, quantizer=output, row_scale=row_scale)
    assert np.array_equal(quantized, ops.quantize_codes(output, actual))
    if actual.size:
        assert_context_of(actual, q, k, v, heads, p_quantizer, bias, mask, row_scale)


def assert_context_of(actual, q, k, v, heads, p_quantizer, bias, mask, row_scale=False, scales=SCALES):
    """Rows whose codes of P are beyond doubt are equal, bit for bit without row_scale, whose r is a softmax; a doubtful
    code may be the next one."""
    p = ops.attention_probabilities(q, k, heads, scales, bias, mask)
    largest = None
    if row_scale:
        p, largest = ops.scale_rows(p)
    slack = ops.SOFTMAX_TOLERANCE * np.maximum(p, 2.0**-20)
    low = ops.quantize_codes(p_quantizer, (p - slack).astype(np.float32))
    high = ops.quantize_codes(p_quantizer, (p + slack).astype(np.float32))
    expected = ops.attention_context(low, p_quantizer, v, scales, largest)
    doubt = (high.astype(int) - low).sum(-1).max(1)[..., None]  # [B, T, 1], over heads
    r = np.float32(1) if largest is None else ops.by_context(largest, v.shape[2])
    of_r = np.zeros_like(expected) if largest is None else np.abs(expected) * np.float32(ops.SOFTMAX_TOLERANCE)
    step = p_quantizer.scale * scales.v_scale * 255 * r
    assert doubt.size < 20 or (doubt == 0).mean() > 0.8
    assert (np.abs(actual - expected) <= of_r + doubt * step * 1.001).all()


def test_scores_are_rounded_as_the_contract_says(kernels):
    """Where they are large and near each other, what a score is rounded by is more than the softmax's tolerance."""
    generator = np.random.default_rng(12)
    q, k = (255 - generator.integers(0, 3, (1, 64, 512)).astype(np.uint8) for _ in range(2))
    v, scales = codes(generator, 1, 64, 512), ops.AttentionScales(0.04, 117, 0.04, 133, 0.013, 126)
    actual = kernels.attention(q, k, v, 8, scales, PROBABILITIES[0])
    assert_context_of(actual, q, k, v, 8, PROBABILITIES[0], None, None, scales=scales)


def test_rows_of_probabilities_may_be_relative_to_their_largest(kernels):
    """Equal scores: every P is exactly 1 then, and r one over their number."""
    q, k = np.full((1, 2, 4), 117, np.uint8), np.full((1, 8, 4), 133, np.uint8)
    v = codes(np.random.default_rng(8), 1, 8, 4)
    actual = kernels.attention(q, k, v, 1, SCALES, ops.CodeQuantizer(2.0**-7, 0), row_scale=True)
    sums = np.float32(128) * (v.astype(np.float32) - SCALES.v_zero_point).sum(1)
    expected = sums * (np.float32(2.0**-7) * np.float32(SCALES.v_scale)) * np.float32(0.125)
    assert np.array_equal(actual, np.repeat(expected[:, None], 2, axis=1))


@pytest.mark.parametrize("shift", SHIFTS)
def test_attention_takes_arrays_at_any_address(kernels, shift):
    generator = np.random.default_rng(shift)
    q, k, v = (codes(generator, 1, 40, 64) for _ in range(3))
    bias = floats(generator, 1, 1, 1, 40)
    arguments = (q, k, v, 2, SCALES, PROBABILITIES[1], bias)
    assert_context_of(kernels.shifted(shift).attention(*arguments), *arguments[:4], PROBABILITIES[1], bias, None)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize(
    "shape",
    [(0, 3, 8, 8, 4, 4), (1, 1, 1, 1, 1, 1), (2, 3, 14, 51, 7, 17), (1, 3, 32, 48, 16, 16), (2, 1, 8, 12, 4, 6)],
)
def test_patches(kernels, shift, shape):
    *image, patch_height, patch_width = shape
    x = floats(np.random.default_rng(5), *image) * 3
    for quantizer in QUANTIZERS:
        expected = ops.quantize_codes(quantizer, ops.patches(x, patch_height, patch_width))
        assert np.array_equal(kernels.shifted(shift).patches(x, patch_height, patch_width, quantizer), expected)


@pytest.mark.parametrize("tile", LINEAR_TILES)
def test_kernels_that_follow_each_other_wait_for_what_they_read(kernels, tile):
    """Each begins before the one before it has ended, and none is waited for between them."""
    memory, generator, quantizer = kernels.new_memory(), np.random.default_rng(11), ops.CodeQuantizer(0.9, 128)
    expected, weight = codes(generator, 130, 192), codes(generator, 192, 192).view(np.int8)
    scale, bias = np.full(192, 3e-4, np.float32), floats(generator, 192)
    addresses = [memory.take(as_bytes(expected)) for _ in range(2)]
    offset = np.zeros(192, np.int32)
    constants = [memory.take(as_bytes(array)) for array in (ops.block_weight(weight), offset, scale, bias)]
    for i in range(6):
        source, target = addresses[i % 2], addresses[1 - i % 2]
        record = Linear(
            130, 192, 192, source, *constants, 0, None, None, 0, None, ctypes.pointer(c_quantizer(quantizer)), target
        )
        kernels.run_linear(record, "float32", tile)
        y = ops.linear(expected, weight, scale, bias, input_scale=1.0, input_zero_point=0)
        expected = ops.quantize_codes(quantizer, y)
    assert len(np.unique(expected)) > 50
    assert np.array_equal(memory.read(addresses[0], expected.size).reshape(expected.shape), expected)


def test_a_kernel_can_be_captured_into_a_graph_on_gpu(on_gpu):
    """The one that asks for more shared memory than a kernel has by itself."""
    memory = on_gpu.new_memory()
    runtime, check = memory.runtime, memory.check
    generator = np.random.default_rng(7)
    a, weight = codes(generator, 128, 128), codes(generator, 128, 128).view(np.int8)
    ones, zeros = np.ones(128, np.float32), np.zeros(128, np.float32)
    inputs = [a, ops.block_weight(weight), np.zeros(128, np.int32), ones, zeros]
    output = Output(memory, (128, 128), np.float32, 0)
    record = Linear(
        128, 128, 128, *[memory.take(as_bytes(array)) for array in inputs], 0, None, None, 0, None, None, output.address
    )
    stream, graph, executable = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    check(runtime.cudaStreamCreate(ctypes.byref(stream)))
    check(runtime.cudaStreamBeginCapture(stream, CAPTURE_OF_THIS_THREAD))
    assert on_gpu.call("linear", record, FLOAT_TYPES["float32"], TILES["128x128"], stream=stream) == OK
    check(runtime.cudaStreamEndCapture(stream, ctypes.byref(graph)))
    assert (output.array().view(np.uint8) == GUARD).all()  # captured is not run
    check(runtime.cudaGraphInstantiate(ctypes.byref(executable), graph, ctypes.c_ulonglong(0)))
    check(runtime.cudaGraphLaunch(executable, stream))
    expected = ops.linear(a, weight, ones, zeros, input_scale=1.0, input_zero_point=0)
    assert np.array_equal(output.array(), expected)


def test_unsound_records_are_refused(kernels):
    one = c_quantizer(ops.CodeQuantizer(1.0, 0))
    unsound = ctypes.pointer(c_quantizer(ops.CodeQuantizer(0.0, 0)))
    linear = Linear(1, 1, 1, *[256] * 5, 0, None, None, 0, None, unsound, 256)
    assert kernels.call("linear", linear, 0, 0) == INVALID_ARGUMENT
    for place in range(4, 9):  # weight, offset, scale, bias, multiplier
        places = [257 if i == place else 256 for i in range(3, 9)]
        misplaced = Linear(1, 1, 1, *places[:5], 0, places[5], None, 0, None, None, 256)
        assert kernels.call("linear", misplaced, 0, 0) == INVALID_ARGUMENT
    none = Addend(None, 0, 0, 0)
    too_wide = Attention(1, 1, 1, 1, 513, 1, *[256] * 3, 0, 0, 0, 1.0, 1.0, none, none, 0, one, None, 256)
    assert kernels.call("attention", too_wide) == INVALID_ARGUMENT


def test_the_emulated_device_sees_what_a_kernel_must_not_do(tmp_path: Path):
    """Without this, a mistake that it overlooks would look like a kernel that works."""
    source = tmp_path / "faults.cpp"
    source.write_text(FAULTS)
    try:
        build_emulated(tmp_path / "faults.so", [source])
    except FileNotFoundError as error:
        pytest.skip(str(error))
    library = ctypes.CDLL(str(tmp_path / "faults.so"))
    assert library.unawaited_copy() == 0xA5
    assert library.awaited_copy() == 42


FAULTS = """
#include "device.h"
namespace {
uint8_t source[16] = {42};
int seen;
template <bool kWait>
void kernel() {
  mptqc::copy_async<16>(mptqc::shared_memory(), source, true);
  mptqc::commit_copies();
  if (kWait) mptqc::wait_copies<0>();
  seen = mptqc::shared_memory()[0];
}
}
extern "C" __attribute__((visibility("default"))) int unawaited_copy() {
  mptqc::launch({1, 1, 16, nullptr}, kernel<false>);
  return seen;
}
extern "C" __attribute__((visibility("default"))) int awaited_copy() {
  mptqc::launch({1, 1, 16, nullptr}, kernel<true>);
  return seen;
}
"""
