"""One quantizer in standard ONNX, in the form that ONNX Runtime runs fastest.

Uniform      QuantizeLinear (-> Clip)
OPT-m        q = QuantizeLinear(x, Δ) up to T;  then for each upper region
             h = QuantizeLinear(x, 2^m·Δ) from its T to the next, clipped;
             q = DequantizeLinear(q) + DequantizeLinear(h) -> QuantizeLinear(Δ)   (ORT: one QLinearAdd)

Both give the reference's codes exactly.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.errors import PlanError
from mptqc.graph.edit import Builder, constant_of, producer
from mptqc.plan import ActivationQuantizer, MultiRegion, Uniform

CODES = 256
"""How many codes an 8-bit container has."""

# The smallest value each op can give: GELU's minimum is −0.16997 (erf) or −0.17004 (tanh).
_LOWEST = {"Softmax": 0.0, "Sigmoid": 0.0, "Relu": 0.0, "Gelu": -0.1701}


@dataclass(frozen=True)
class Operand:
    """How one input of a product is quantized: `signed` asks for an int8 container instead of uint8."""

    quantizer: ActivationQuantizer
    signed: bool = False


@dataclass(frozen=True)
class Codes:
    """A quantized value: x̂ = (codes − zero_point)·scale. `scale` and `zero_point` are scalar constants."""

    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value


def emit_quantizer(x: ir.Value, operand: Operand, build: Builder) -> Codes:
    """Quantize `x`; the codes equal the reference's, shifted by a constant that the zero point carries."""
    quantizer = operand.quantizer
    scale = build.constant("scale", np.array(quantizer.scale, np.float32))
    if isinstance(quantizer, MultiRegion):
        return _emit_regions(x, quantizer, scale, operand.signed, build)
    low, high = -quantizer.zero_point, 2**quantizer.bits - 1 - quantizer.zero_point
    fitted = _fit(low, high, lowest_code(x, quantizer.scale), operand.signed, centred=True)
    codes, zero_point = _saturate(x, scale, fitted, operand.signed, build, "quantize")
    return Codes(codes, scale, zero_point)


def _emit_regions(x: ir.Value, quantizer: MultiRegion, scale: ir.Value, signed: bool, build: Builder) -> Codes:
    fit = _fit(-quantizer.zero_point, quantizer.splits[0], lowest_code(x, quantizer.scale), signed)
    codes, codes_zero = _saturate(x, scale, fit, signed, build, "quantize_low")
    zero_point = build.constant("zero_point", _container(quantizer.zero_point + _bottom(signed), signed))
    for region, split in zip(quantizer.upper, quantizer.splits, strict=True):
        step = quantizer.scale * 2**region.m
        first = split // 2**region.m
        fit = _fit(first, first + region.codes, lowest_code(x, step), signed)
        step_scale = build.constant("scale_high", np.array(step, np.float32))
        high, _ = _saturate(x, step_scale, fit, signed, build, "quantize_high")
        split_code = build.constant("split_code", _container(fit.zero_point + first, signed))
        low_part = build.op("DequantizeLinear", [codes, scale, codes_zero], name="dequantize_low")
        high_part = build.op("DequantizeLinear", [high, step_scale, split_code], name="dequantize_high")
        total = build.op("Add", [low_part, high_part], name="join_regions")
        codes, codes_zero = build.op("QuantizeLinear", [total, scale, zero_point], name="quantize"), zero_point
        for value in (low_part, high_part, total):
            value.shape, value.dtype = x.shape, ir.DataType.FLOAT
        codes.shape, codes.type = x.shape, zero_point.type
    return Codes(codes, scale, zero_point)


@dataclass(frozen=True)
class _Fit:
    """Where a range of codes lies in the container: codes = round(x/Δ) + zero_point, then clipped to the limits."""

    zero_point: int
    minimum: int | None = None
    maximum: int | None = None


def _fit(low: int, high: int, lowest: int | None, signed: bool, *, centred: bool = False) -> _Fit:
    """Place low..high so that QuantizeLinear's own saturation, which is free, does as much of the clipping as it can.

    `lowest` is the smallest round(x/Δ) that can occur, if known.
    """
    at_bottom, at_top = _bottom(signed) - low, _bottom(signed) + CODES - 1 - high
    in_the_middle = -((high - low + 1) // 2) - low
    fills = high - low == CODES - 1
    if _fits(at_top, signed) and (fills or (lowest is not None and lowest >= low)):
        return _Fit(at_top)
    if centred and signed:
        # Small codes keep pairs of products within 16 bits on CPUs that add them there (AVX2 without VNNI).
        return _Fit(in_the_middle, low + in_the_middle, high + in_the_middle)
    if _fits(at_bottom, signed):
        return _Fit(at_bottom, maximum=high + at_bottom)
    return _Fit(at_top, minimum=low + at_top)


def _saturate(
    x: ir.Value, scale: ir.Value, fit: _Fit, signed: bool, build: Builder, name: str
) -> tuple[ir.Value, ir.Value]:
    """The codes of one range, and their zero point."""
    zero_point = build.constant(f"{name}_zero_point", _container(fit.zero_point, signed))
    codes = build.op("QuantizeLinear", [x, scale, zero_point], name=name)
    codes.shape, codes.type = x.shape, zero_point.type
    limits = [
        None if limit is None else build.constant(f"{name}_{side}", _container(limit, signed))
        for side, limit in (("minimum", fit.minimum), ("maximum", fit.maximum))
    ]
    if limits[1] is None:
        limits.pop()
    if limits == [None]:
        return codes, zero_point
    clipped = build.op("Clip", [codes, *limits], name=f"{name}_clip")
    clipped.shape, clipped.type = codes.shape, codes.type
    return clipped, zero_point


def check_quantizer(quantizer: ActivationQuantizer, where: str) -> None:
    """Refuse a quantizer whose codes do not fit 8 bits, or whose regions do not meet on the coarse grid.

    Raises:
        PlanError: as above; names `where` and the value at fault.
    """
    if isinstance(quantizer, Uniform):
        if quantizer.zero_point >= 2**quantizer.bits:
            raise PlanError(
                f"{where}: zero point {quantizer.zero_point} is not a code of {quantizer.bits} bits "
                f"(0 to {2**quantizer.bits - 1}); the plan is damaged"
            )
        return
    ms = [region.m for region in quantizer.upper]
    held = quantizer.low_codes + sum(region.codes for region in quantizer.upper)
    if held != 2**quantizer.bits or quantizer.top_code >= CODES or ms != sorted(set(ms)):
        regions = ", ".join(f"{region.codes} codes of 2^{region.m}" for region in quantizer.upper)
        raise PlanError(
            f"{where}: an OPT-m quantizer of {quantizer.bits} bits with {quantizer.low_codes} low codes, then "
            f"{regions}, has {held} codes and reaches code {quantizer.top_code}; {2**quantizer.bits} codes, none above "
            "255, and rising steps are needed: the plan is damaged"
        )
    for region, split in zip(quantizer.upper, quantizer.splits, strict=True):
        if split < 0 or split % 2**region.m:
            raise PlanError(
                f"{where}: the regions meet at {split}Δ, which is not a multiple of 2^{region.m} from 0 on; "
                "the plan is damaged"
            )


def _bottom(signed: bool) -> int:
    """The smallest code of the container."""
    return -CODES // 2 if signed else 0


def _container(number: int, signed: bool) -> NDArray[np.generic]:
    """A scalar of the container's type."""
    return np.array(number, np.int8 if signed else np.uint8)


def _fits(zero_point: int, signed: bool) -> bool:
    return 0 <= zero_point - _bottom(signed) < CODES


def lowest_code(x: ir.Value, scale: float) -> int | None:
    """The smallest round(x/scale) that the ops which make `x` can lead to; None if it has no bound."""
    lowest = _lowest(x)
    return None if lowest is None else int(np.rint(np.float32(lowest) / np.float32(scale)))


def _lowest(x: ir.Value | None) -> float | None:
    """A bound from below on `x`, also through the ops of `ScaleProbabilities` and `FoldGelu`."""
    node = producer(x, *_LOWEST, "Div", "Mul")
    if node is None or node.op_type in _LOWEST:
        return None if node is None else _LOWEST[node.op_type]
    lowest = _lowest(node.inputs[0])
    if node.op_type == "Div":
        return lowest if producer(node.inputs[1], "ReduceMax") is not None and lowest == 0 else None
    factor = constant_of(node.inputs[1])
    if lowest is None or factor is None or not (factor.astype(np.float32) > 0).all():
        return None
    return lowest * float(factor.max())
