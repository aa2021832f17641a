"""What each operator of the domain `ai.mptqc` means, in numpy; docs/custom-ops.md is the same in words.

Codes are uint8 everywhere: x̂ = (code − zero_point)·scale. Integer sums are exact. An operator that writes codes is the
float function here and then `quantize_codes`.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from mptqc.plan import ActivationQuantizer, MultiRegion

CodeAttribute: TypeAlias = float | int | tuple[int, ...]
Number = TypeVar("Number", bound=np.generic)
Float = TypeVar("Float", np.float32, np.float16)

DOMAIN = "ai.mptqc"
DOMAIN_VERSION = 1

BLOCK_OUTPUTS, BLOCK_INPUTS = 16, 4
"""Sides of one block of a stored weight: 16 outputs times 4 inputs, one 64-byte vector."""

PANEL = 64
"""Outputs that a Linear makes together; the tables of a rotation fill whole ones."""

ROTATED_WIDTHS = (2, 4, 8, 16, 32, 64)
"""Widths of the heads that `LinearQuantize` rotates."""

UNIT_HEADS = "unit_heads"
"""The activation that brings heads to length 1."""

UNIT_WIDTHS = (16, 32, 64)
"""Widths of the heads that it takes."""

MOST_TERMS = 32768
"""The operators sum at most so many products of codes in 32 bits."""

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "silu")
"""What a Linear may apply to each output: nothing, x/2·(1 + erf(x/√2)), that by tanh, x·σ(QUICK_GELU_FACTOR·x), x·σ(x).

There is UNIT_HEADS besides.
"""

QUICK_GELU_FACTOR = 1.702

# How far an implementation's float may lie from the exact value, before it is quantized. Each is more than what the
# polynomials and the order of float32 sums can cost; a code step is never that small.
LAYER_NORM_TOLERANCE = 2.0**-17
"""Relative to the largest |γ·(x − mean)/σ| + |β| of the row, before anything is added."""
GELU_TOLERANCE = 2.0**-17
"""Relative to max(1, |x|), of GELU and of its approximation by tanh."""
QUICK_GELU_TOLERANCE = 2.0**-16
SILU_TOLERANCE = 2.0**-15
"""Relative to max(1, |x|)."""
UNIT_HEADS_TOLERANCE = 2.0**-19
"""Relative to |y|."""
SOFTMAX_TOLERANCE = 2.0**-18
"""Of a probability p, or of p over its row's largest, and of that largest.

Relative to max(p, 2^−20): a larger p has a score within 14 of the row's largest, which float32 rounds to 2^−20.
"""


@dataclass(frozen=True)
class CodeQuantizer:
    """The attributes `<prefix>_scale, _zero_point, _minimum, _maximum, _m, _split` of an operator.

    code = zero_point + clip(round(x/Δ), minimum − zero_point, T₁)
                      + Σᵢ 2^mᵢ·(clip(round(x/(2^mᵢ·Δ)), Tᵢ/2^mᵢ, Tᵢ₊₁/2^mᵢ) − Tᵢ/2^mᵢ)

    m and split = T hold one number for each upper region; T behind the last is maximum − zero_point.
    """

    scale: float
    zero_point: int
    minimum: int = 0
    maximum: int = 255
    m: tuple[int, ...] = ()
    split: tuple[int, ...] = ()

    def attributes(self, prefix: str) -> dict[str, CodeAttribute]:
        """The ONNX attributes, by name."""
        return {f"{prefix}_{name}": value for name, value in vars(self).items()}


def code_quantizer(quantizer: ActivationQuantizer) -> CodeQuantizer:
    """The quantizer of a plan as an operator's attributes: the same codes as `reference.quantizers.quantize`."""
    if isinstance(quantizer, MultiRegion):
        m = tuple(region.m for region in quantizer.upper)
        return CodeQuantizer(quantizer.scale, quantizer.zero_point, 0, quantizer.top_code, m, quantizer.splits)
    return CodeQuantizer(quantizer.scale, quantizer.zero_point, 0, 2**quantizer.bits - 1)


def quantize_codes(quantizer: CodeQuantizer, x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Codes of x, uint8, x's shape. Division is float32, rounding to nearest, ties to even."""
    ends = [*quantizer.split, quantizer.maximum - quantizer.zero_point]
    lowest = quantizer.minimum - quantizer.zero_point
    codes = np.clip(_round(x, quantizer.scale), lowest, ends[0]) + quantizer.zero_point
    for m, (first, last) in zip(quantizer.m, pairwise(ends), strict=True):
        step = 2**m
        codes += step * np.clip(_round(x, quantizer.scale * step), first // step, last // step) - first
    return codes.astype(np.uint8)


def _round(x: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    rounded: NDArray[np.float32] = np.rint(x.astype(np.float32) / np.float32(scale))
    return rounded


def block_weight(codes: NDArray[np.int8]) -> NDArray[np.int8]:
    """W [K, N] as the operators read it: [⌈N/16⌉, ⌈K/4⌉, 16, 4], block[n, k, i, j] = W[4k + j, 16n + i], 0 beyond."""
    inputs, outputs = codes.shape
    padded = np.pad(codes, ((0, -inputs % BLOCK_INPUTS), (0, -outputs % BLOCK_OUTPUTS)))
    rows, columns = padded.shape[0] // BLOCK_INPUTS, padded.shape[1] // BLOCK_OUTPUTS
    split = padded.reshape(rows, BLOCK_INPUTS, columns, BLOCK_OUTPUTS)
    return np.ascontiguousarray(split.transpose(2, 0, 3, 1))


def unblock_weight(blocks: NDArray[np.int8], inputs: int, outputs: int) -> NDArray[np.int8]:
    """W [K, N] of a blocked weight."""
    columns, rows = blocks.shape[:2]
    joined = blocks.transpose(1, 3, 0, 2).reshape(rows * BLOCK_INPUTS, columns * BLOCK_OUTPUTS)
    return np.ascontiguousarray(joined[:inputs, :outputs])


def layer_norm(
    x: NDArray[Float],
    gamma: NDArray[np.float32],
    beta: NDArray[np.float32],
    epsilon: float,
    rows: NDArray[np.int64] | None = None,
    residual: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """γ·(x − mean)/√(variance + ε) + β over the last axis (+ residual); float32, the residual's shape, else x's.

    `rows` [R]: row r of each group of R rows is made from row rows[r] of that group.
    """
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + np.float32(epsilon))
    y: NDArray[np.float32] = take_rows((normal * gamma + beta).astype(np.float32), rows)
    return y if residual is None else y.reshape(residual.shape) + residual


def take_rows(y: NDArray[Number], rows: NDArray[np.int64] | None) -> NDArray[Number]:
    """Row r of each group of R rows (all axes but the last) from row rows[r] of that group, rows [R]; y's shape."""
    return y if rows is None else _grouped(y, rows)[:, rows].reshape(y.shape)


def linear(
    a: NDArray[np.uint8],
    weight: NDArray[np.int8],
    weight_scale: NDArray[np.float32],
    bias: NDArray[np.float32],
    *,
    input_scale: float,
    input_zero_point: int,
    activation: str = "none",
    unit_heads: tuple[int, float] | None = None,
    multiplier: NDArray[np.float32] | None = None,
    factor: NDArray[np.float32] | None = None,
    rotary: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
    residual: NDArray[Float] | None = None,
    rows: NDArray[np.int64] | None = None,
) -> NDArray[np.float32] | NDArray[Float]:
    """y = activation(Σ_k (a − z)·w · (Δ_a·Δ_w) + b) (· multiplier) (· factor) (rotated) (+ residual), in float32 steps.

    a [.., K], weight [K, N] (not blocked); weight_scale, bias, multiplier [N]; `unit_heads` is (d, ε) of
    `to_unit_heads`, `rotary` as `rotate` takes it. The residual's shape and type (float32 or float16, to which the sum
    is rounded at last), or float32 of the factor's shape or [.., N].
    `rows` [R]: row r of each group of R rows goes to row rows[r] of that group, before the residual is added.
    """
    accumulator = (a.astype(np.float64) - input_zero_point) @ weight.astype(np.float64)  # exact: far below 2^53
    y = accumulator.astype(np.float32) * (np.float32(input_scale) * weight_scale) + bias
    if activation != "none":
        y = activate(y, activation)
    if unit_heads is not None:
        y = to_unit_heads(y, *unit_heads)
    if multiplier is not None:
        y = y * multiplier
    if factor is not None:
        y = y.reshape(factor.shape) * factor
    if rotary is not None:
        y = rotate(y, *rotary)
    if rows is not None:
        inverse = np.empty_like(rows)
        inverse[rows] = np.arange(rows.size)
        y = take_rows(y, inverse)
    if residual is None:
        return y
    with np.errstate(over="ignore"):  # infinity is what float16 has beyond 65504
        return (y.reshape(residual.shape) + residual).astype(residual.dtype)


def to_unit_heads(y: NDArray[np.float32], width: int, epsilon: float) -> NDArray[np.float32]:
    """Heads of `width` columns over their length, or over ε if that is more: y [.., N], float32."""
    heads = y.astype(np.float64).reshape(*y.shape[:-1], y.shape[-1] // width, width)
    length = np.sqrt(np.square(heads).sum(-1, keepdims=True))
    unit: NDArray[np.float32] = (heads / np.maximum(length, np.float32(epsilon))).astype(np.float32)
    return unit.reshape(y.shape)


def rotate(y: NDArray[np.float32], cosine: NDArray[np.float32], sine: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rotary position embedding, y·cos + y'·sin with the halves of each head of y changed over in y'; y's shape.

    y [.., N], its rows in groups of T tokens; cosine, sine [T, P/d, d] with d the width of a head: column n of y takes
    column n % P.
    """
    tokens, heads, width = cosine.shape
    parts = y.reshape(-1, tokens, y.shape[-1] // width, width)
    swapped = np.roll(parts, width // 2, axis=-1)
    by_head = np.arange(parts.shape[2]) % heads
    rotated: NDArray[np.float32] = parts * cosine[:, by_head] + swapped * sine[:, by_head]
    return rotated.reshape(y.shape)


def activate(x: NDArray[np.float32], activation: str) -> NDArray[np.float32]:
    """One of ACTIVATIONS but "none", float32."""
    if activation == "gelu":
        return gelu(x)
    wide = x.astype(np.float64)
    slope = wide if activation == "silu" else QUICK_GELU_FACTOR * wide
    if activation == "gelu_tanh":  # (1 + tanh(z))/2 = σ(2z)
        slope = 2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    with np.errstate(over="ignore"):
        y: NDArray[np.float32] = (wide / (1 + np.exp(-slope))).astype(np.float32)
    return y


def activation_tolerance(activation: str) -> float:
    """How far an implementation may be off, relative to max(1, |x|)."""
    return {"quick_gelu": QUICK_GELU_TOLERANCE, "silu": SILU_TOLERANCE}.get(activation, GELU_TOLERANCE)


def gelu(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """x/2·(1 + erf(x/√2)), float32."""
    wide = x.astype(np.float64)
    error_function = np.array([math.erf(z) for z in (wide / math.sqrt(2)).flat]).reshape(x.shape)
    y: NDArray[np.float32] = (wide / 2 * (1 + error_function)).astype(np.float32)
    return y


@dataclass(frozen=True)
class AttentionScales:
    """Scale and zero point of the codes that an attention reads."""

    q_scale: float
    q_zero_point: int
    k_scale: float
    k_zero_point: int
    v_scale: float
    v_zero_point: int


def attention_probabilities(
    q: NDArray[np.uint8],
    k: NDArray[np.uint8],
    heads: int,
    scales: AttentionScales,
    bias: NDArray[np.float32] | None = None,
    mask: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """softmax(Σ (q − z_q)(k − z_k) · (Δ_q·Δ_k) (+ bias) (+ mask)): q [B, T, H·d], k [B, S, H·d]; [B, H, T, S] float32.

    bias and mask are [W, 1 or H, 1 or T, S]; batch entry b takes entry b mod W.
    """
    query = _by_head(q, heads).astype(np.float64) - scales.q_zero_point
    key = _by_head(k, heads).astype(np.float64) - scales.k_zero_point
    accumulator = query @ key.swapaxes(-1, -2)
    scores = accumulator.astype(np.float32) * (np.float32(scales.q_scale) * np.float32(scales.k_scale))
    for added in (bias, mask):
        if added is not None:
            scores = scores + added[np.arange(q.shape[0]) % added.shape[0]]
    wide = scores.astype(np.float64)
    powers = np.exp(wide - wide.max(-1, keepdims=True))
    probabilities: NDArray[np.float32] = (powers / powers.sum(-1, keepdims=True)).astype(np.float32)
    return probabilities


def scale_rows(probabilities: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """E = P/r and r, the largest of each row: P [B, H, T, S] -> [B, H, T, S] and [B, H, T, 1]."""
    largest = probabilities.max(-1, keepdims=True)
    return probabilities / largest, largest


def attention_context(
    p: NDArray[np.uint8],
    p_quantizer: CodeQuantizer,
    v: NDArray[np.uint8],
    scales: AttentionScales,
    largest: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Σ (p − z_p)(v − z_v) · (Δ_p·Δ_v) (· r): p [B, H, T, S], v [B, S, H·e], r [B, H, T, 1]; [B, T, H·e] float32."""
    sums = context_sums(p.astype(np.float64) - p_quantizer.zero_point, v.astype(np.float64) - scales.v_zero_point)
    y: NDArray[np.float32] = sums.astype(np.float32) * (np.float32(p_quantizer.scale) * np.float32(scales.v_scale))
    return y if largest is None else y * by_context(largest, v.shape[2])


def by_context(rows: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """One number for each row of each head [B, H, T, 1], as the context [B, T, H·e] (H·e = width) is laid out."""
    heads = rows.shape[1]
    return np.repeat(rows[..., 0].swapaxes(1, 2), width // heads, axis=-1)


def context_sums(p: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
    """Σ p·v by head, of whole numbers and exact: p [B, H, T, S], v [B, S, H·e]; [B, T, H·e]."""
    batch, heads, rows, _ = p.shape
    total = p @ _by_head(v, heads)
    return np.ascontiguousarray(total.swapaxes(1, 2).reshape(batch, rows, v.shape[2]))


def patches(x: NDArray[Number], patch_height: int, patch_width: int) -> NDArray[Number]:
    """Disjoint patches of images x [B, C, h·P, w·Q]: [B, h, w, C·P·Q], channels slowest, columns fastest."""
    batch, channels, height, width = x.shape
    rows, columns, size = height // patch_height, width // patch_width, channels * patch_height * patch_width
    split = x.reshape(batch, channels, rows, patch_height, columns, patch_width)
    return np.ascontiguousarray(split.transpose(0, 2, 4, 1, 3, 5).reshape(batch, rows, columns, size))


def _by_head(x: NDArray[Number], heads: int) -> NDArray[Number]:
    """[B, T, H·d] -> [B, H, T, d]."""
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).swapaxes(1, 2)


def _grouped(y: NDArray[Number], rows: NDArray[np.int64]) -> NDArray[Number]:
    return y.reshape(math.prod(y.shape[:-1]) // rows.size, rows.size, y.shape[-1])
