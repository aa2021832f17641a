"""Which outputs of an operator of `ai.mptqc` are right: bounds that follow from the tolerances of `custom_ops`.

Integer sums, scaling and quantizers are exact and monotone, so a tolerance of a float function becomes a pair of bounds
on what follows it. Where no code is near a rounding boundary the two are equal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mptqc.reference.custom_ops import (
    LAYER_NORM_TOLERANCE,
    SOFTMAX_TOLERANCE,
    UNIT_HEADS,
    UNIT_HEADS_TOLERANCE,
    AttentionScales,
    CodeQuantizer,
    activate,
    activation_tolerance,
    attention_probabilities,
    by_context,
    context_sums,
    layer_norm,
    linear,
    patches,
    quantize_codes,
    rotate,
    scale_rows,
    take_rows,
    to_unit_heads,
    unblock_weight,
)

Array: TypeAlias = NDArray[Any]
Attributes: TypeAlias = Mapping[str, Any]
Bounds: TypeAlias = tuple[Array, Array]

SMALLEST_PROBABILITY = 2.0**-20


def output_bounds(
    op_type: str, attributes: Attributes, inputs: Sequence[Array | None], *, slack: float = 1.0
) -> tuple[Bounds, ...]:
    """The least and greatest right value of each output of one operator, inputs as the operator takes them.

    Args:
        op_type: an operator of docs/custom-ops.md.
        attributes: all its attributes.
        inputs: None for an absent one; those at the end may be left off.
        slack: what the tolerances are multiplied by; 0 gives the reference's own output twice.

    Raises:
        ValueError: there is no such operator.
    """
    match op_type:
        case "LayerNormQuantize":
            x, gamma, beta, rows = _padded(inputs, 4)
            return (_quantized(_layer_norm(attributes, (x, gamma, beta), slack, rows), attributes),)
        case "LayerNormAdd":
            x, gamma, beta, residual, rows = _padded(inputs, 5)
            return (_layer_norm(attributes, (x, gamma, beta), slack, rows, residual),)
        case "LayerNormAddQuantize":
            x, gamma, beta, residual, rows, code_rows = _padded(inputs, 6)
            bounds = _layer_norm(attributes, (x, gamma, beta), slack, rows, residual)
            low, high = _quantized(bounds, attributes)
            return bounds, (take_rows(low, code_rows), take_rows(high, code_rows))
        case "Linear":
            a, blocks, weight_scale, bias, residual, rows, factor = _padded(inputs, 7)
            after = {"residual": residual, "rows": rows, "factor": factor}
            return (_linear(attributes, (a, blocks, weight_scale, bias), slack, **after),)
        case "LinearQuantize":
            a, blocks, weight_scale, bias, multiplier, cosine, sine, factor = _padded(inputs, 8)
            bounds = _linear(attributes, (a, blocks, weight_scale, bias), slack, multiplier=multiplier, factor=factor)
            if cosine is not None:  # without an activation both bounds are the reference's own output
                bounds = (rotate(bounds[0], cosine, sine), rotate(bounds[1], cosine, sine))
            return (_quantized(bounds, attributes),)
        case "Attention":
            return (_attention(attributes, inputs, slack),)
        case "AttentionQuantize":
            return (_quantized(_attention(attributes, inputs, slack), attributes),)
        case "QuantizePatches":
            cut = patches(_padded(inputs, 1)[0], int(attributes["patch_height"]), int(attributes["patch_width"]))
            return (_quantized((cut, cut), attributes),)
        case _:
            raise ValueError(f"ai.mptqc has no operator {op_type}")


def quantizer_of(attributes: Attributes, prefix: str) -> CodeQuantizer:
    """The quantizer that six attributes describe."""
    return CodeQuantizer(**{field.name: attributes[f"{prefix}_{field.name}"] for field in fields(CodeQuantizer)})


def _quantized(bounds: Bounds, attributes: Attributes) -> Bounds:
    quantizer = quantizer_of(attributes, "output")
    low, high = (quantize_codes(quantizer, bound) for bound in bounds)
    return low, high


def _layer_norm(
    attributes: Attributes,
    operands: tuple[Array, Array, Array],
    slack: float,
    rows: Array | None,
    residual: Array | None = None,
) -> Bounds:
    x, gamma, beta = operands
    epsilon = float(attributes["epsilon"])
    y = layer_norm(x, gamma, beta, epsilon, rows)
    scaled = layer_norm(x, gamma, np.zeros_like(beta), epsilon, rows)
    error = slack * LAYER_NORM_TOLERANCE * (np.abs(scaled) + np.abs(beta)).max(axis=-1, keepdims=True, initial=0)
    if residual is None:
        return y - error, y + error
    return (y - error).reshape(residual.shape) + residual, (y + error).reshape(residual.shape) + residual


def _linear(
    attributes: Attributes,
    operands: tuple[Array, Array, Array, Array],
    slack: float,
    *,
    multiplier: Array | None = None,
    factor: Array | None = None,
    residual: Array | None = None,
    rows: Array | None = None,
) -> Bounds:
    a, blocks, weight_scale, bias = operands
    weight = unblock_weight(blocks, a.shape[-1], weight_scale.size)
    scales = {"input_scale": attributes["input_scale"], "input_zero_point": int(attributes["input_zero_point"])}
    x = linear(a, weight, weight_scale, bias, **scales, rows=rows)
    low: Array = x
    high: Array = x
    activation = attributes["activation"]
    if activation == UNIT_HEADS:
        y = to_unit_heads(x, int(attributes["head_width"]), float(attributes["head_epsilon"]))
        error = slack * UNIT_HEADS_TOLERANCE * np.abs(y)
        low, high = y - error, y + error
    elif activation != "none":
        y, error = activate(x, activation), slack * activation_tolerance(activation) * np.maximum(1, np.abs(x))
        low, high = y - error, y + error
    if multiplier is not None:
        low, high = np.minimum(low * multiplier, high * multiplier), np.maximum(low * multiplier, high * multiplier)
    if factor is not None:
        ends = [bound.reshape(factor.shape) * factor for bound in (low, high)]
        low, high = np.minimum(*ends), np.maximum(*ends)
    if residual is not None:
        low, high = low.reshape(residual.shape) + residual, high.reshape(residual.shape) + residual
    float_type = np.float32 if residual is None else residual.dtype
    return low.astype(np.float32).astype(float_type), high.astype(np.float32).astype(float_type)


def _attention(attributes: Attributes, inputs: Sequence[Array | None], slack: float) -> Bounds:
    q, k, v, bias, mask = _padded(inputs, 5)
    scales = AttentionScales(**{field.name: attributes[field.name] for field in fields(AttentionScales)})
    quantizer = quantizer_of(attributes, "p")
    p = attention_probabilities(q, k, int(attributes["heads"]), scales, bias, mask)
    largest: Array | None = None
    if attributes["row_scale"]:
        p, largest = scale_rows(p)
    error = slack * SOFTMAX_TOLERANCE * np.maximum(p, SMALLEST_PROBABILITY)
    bounds: Bounds = (p - error, p + error)
    low, high = (quantize_codes(quantizer, bound).astype(np.float64) - quantizer.zero_point for bound in bounds)
    value = v.astype(np.float64) - scales.v_zero_point
    up, down = np.maximum(value, 0), np.minimum(value, 0)
    scale = np.float32(quantizer.scale) * np.float32(scales.v_scale)
    sums = (context_sums(low, up) + context_sums(high, down), context_sums(high, up) + context_sums(low, down))
    least, most = (total.astype(np.float32) * scale for total in sums)
    if largest is None:
        return least, most
    rows = by_context(largest, v.shape[2])
    ends = [
        bound * rows * np.float32(1 + sign * slack * SOFTMAX_TOLERANCE) for bound in (least, most) for sign in (-1, 1)
    ]
    return np.minimum(ends[0], ends[1]), np.maximum(ends[2], ends[3])


def _padded(inputs: Sequence[Array | None], count: int) -> list[Any]:
    """The inputs, those left off at the end as None."""
    return [*inputs, *[None] * (count - len(inputs))]
