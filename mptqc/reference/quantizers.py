"""What a quantizer means, in numpy; kernels, simulation and the emitted ONNX answer to this file.

Rounding is ONNX's QuantizeLinear: float32 division, to nearest, ties to even.
"""

import numpy as np
from numpy.typing import NDArray

from mptqc.plan import ActivationQuantizer, MultiRegion, Uniform


def quantize(quantizer: ActivationQuantizer, x: NDArray[np.float32]) -> NDArray[np.int32]:
    """Codes in units of Δ, zero at `zero_point`: x̂ = (code − zero_point)·Δ; int32, x's shape, in 0..255."""
    if isinstance(quantizer, Uniform):
        codes = _round(x, quantizer.scale) + quantizer.zero_point
        clipped: NDArray[np.float32] = np.clip(codes, 0, 2**quantizer.bits - 1)
        return clipped.astype(np.int32)
    return _quantize_regions(quantizer, x)


def _quantize_regions(quantizer: MultiRegion, x: NDArray[np.float32]) -> NDArray[np.int32]:
    codes = np.clip(_round(x, quantizer.scale), -quantizer.zero_point, quantizer.splits[0]) + quantizer.zero_point
    for region, split in zip(quantizer.upper, quantizer.splits, strict=True):
        step = 2**region.m
        first = split // step
        codes += step * (np.clip(_round(x, quantizer.scale * step), first, first + region.codes) - first)
    return codes.astype(np.int32)


def _round(x: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    rounded: NDArray[np.float32] = np.rint(x / np.float32(scale))
    return rounded


def dequantize(quantizer: ActivationQuantizer, codes: NDArray[np.int32]) -> NDArray[np.float32]:
    """x̂, float32."""
    return (codes - quantizer.zero_point).astype(np.float32) * np.float32(quantizer.scale)


def fake_quantize(quantizer: ActivationQuantizer, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """x̂ = dequantize(quantize(x)), float32."""
    return dequantize(quantizer, quantize(quantizer, x))


def weight_limits(bits: int) -> tuple[int, int]:
    """Smallest and largest weight code: −2^(k−1), 2^(k−1) − 1."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def quantize_weight(weight: NDArray[np.float32], scale: NDArray[np.float32], bits: int) -> NDArray[np.int8]:
    """Nearest codes of W [..., N] at one scale per output channel [N] (last axis); int8, symmetric."""
    low, high = weight_limits(bits)
    return np.clip(np.rint(weight / scale.astype(np.float32)), low, high).astype(np.int8)


def integer_linear(
    quantizer: ActivationQuantizer,
    x: NDArray[np.float32],
    weight_codes: NDArray[np.int8],
    weight_scale: NDArray[np.float32],
    bias: NDArray[np.float32],
) -> NDArray[np.float32]:
    """y = Δ_x·Δ_w[n]·Σ_k (code_x − z)·code_w + b: x [..., K], codes [K, N], scale and bias [N]; float32 [..., N].

    The sum is exact (float64 holds it); scaling and bias are float32, as in ONNX Runtime.
    """
    centred = (quantize(quantizer, x) - quantizer.zero_point).astype(np.float64)
    accumulator = centred @ weight_codes.astype(np.float64)
    return accumulator.astype(np.float32) * (np.float32(quantizer.scale) * weight_scale) + bias
