"""Quantizers read back from the nodes that `quantizer_nodes` writes, as the attributes of an operator of `ai.mptqc`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mptqc.graph.edit import Builder, constant_of, is_op, only_consumer, producer
from mptqc.graph.quantizer_nodes import CODES, lowest_code
from mptqc.reference.custom_ops import CodeQuantizer

SIGNED_OFFSET = 128
"""What is added to an int8 code, and to its zero point and limits, to make it a uint8 code."""
UNSIGNED_SUFFIX = "/unsigned"
LEAST_SCALE, MOST_SCALE = 2.0**-100, 2.0**100
"""The scales that the operators take."""


@dataclass(frozen=True)
class FoundQuantizer:
    """`codes` are the quantized `x`; `quantizer` gives them as uint8, in an int8 container they are 128 less."""

    x: ir.Value
    codes: ir.Value
    quantizer: CodeQuantizer
    signed: bool

    def agrees(self, scale: ir.Value, zero_point: ir.Value | None) -> bool:
        """True if a product that reads the codes takes them with this quantizer's scale and zero point."""
        number = constant_of(scale)
        zero = np.zeros(1) if zero_point is None else constant_of(zero_point)
        if number is None or zero is None or number.size != 1 or zero.size != 1:
            return False
        offset = SIGNED_OFFSET if self.signed else 0
        return float(number.reshape(-1)[0]) == self.quantizer.scale and (
            int(zero.reshape(-1)[0]) + offset == self.quantizer.zero_point
        )


def match_quantizer(codes: ir.Value) -> FoundQuantizer | None:
    """The quantizer that makes `codes`, or None if they are made otherwise."""
    joined = producer(codes, "QuantizeLinear")
    regions = None if joined is None else producer(joined.inputs[0], "Add")
    if joined is not None and regions is not None and producer(regions.inputs[0], "DequantizeLinear") is not None:
        return _match_regions(codes, joined, regions)
    found = _match_range(codes)
    if found is None:
        return None
    quantizer = CodeQuantizer(found.scale, found.zero_point, found.minimum, found.maximum)
    return FoundQuantizer(found.x, codes, quantizer, found.signed)


def quantizers_of(x: ir.Value) -> list[FoundQuantizer] | None:
    """Every quantizer that reads `x`, if nothing else does; else None."""
    found: dict[ir.Value, FoundQuantizer] = {}
    for node in x.consumers():
        quantizer = match_reader(node)
        if quantizer is None or quantizer.x is not x:
            return None
        found[quantizer.codes] = quantizer
    return None if x.is_graph_output() else list(found.values())


def match_reader(node: ir.Node) -> FoundQuantizer | None:
    """The quantizer that begins with this QuantizeLinear, or None."""
    if not is_op(node, "QuantizeLinear"):
        return None
    found, value = None, node.outputs[0]
    while True:
        quantizer = match_quantizer(value)
        if quantizer is not None and quantizer.x is node.inputs[0]:
            found = quantizer
        after = only_consumer(value)
        if after is None or not is_op(after, "Clip", "DequantizeLinear", "Add", "QuantizeLinear"):
            return found
        value = after.outputs[0]


def emit_unsigned(found: FoundQuantizer, build: Builder) -> ir.Value:
    """The same codes in a uint8 container; the quantizer is uniform."""
    quantizer = found.quantizer
    scale = build.constant("scale", np.array(quantizer.scale, np.float32))
    zero_point = build.constant("zero_point", np.array(quantizer.zero_point, np.uint8))
    codes = build.op("QuantizeLinear", [found.x, scale, zero_point], name="quantize")
    if (quantizer.minimum, quantizer.maximum) != (0, CODES - 1):
        limits = [
            build.constant(name, np.array(limit, np.uint8))
            for name, limit in (("minimum", quantizer.minimum), ("maximum", quantizer.maximum))
        ]
        codes = build.op("Clip", [codes, *limits], name="quantize_clip")
    codes.name = f"{found.codes.name}{UNSIGNED_SUFFIX}"
    codes.shape, codes.dtype = found.codes.shape, ir.DataType.UINT8
    return codes


@dataclass(frozen=True)
class _Range:
    """QuantizeLinear (-> Clip) as uint8 codes: clip(zero_point + round(x/scale), minimum, maximum)."""

    x: ir.Value
    scale: float
    zero_point: int
    minimum: int
    maximum: int
    signed: bool


def _match_range(codes: ir.Value | None) -> _Range | None:
    clip = producer(codes, "Clip")
    node = producer(codes if clip is None else clip.inputs[0], "QuantizeLinear")
    if node is None or len(node.inputs) < 3 or node.inputs[0] is None:
        return None
    scale, zero_point = constant_of(node.inputs[1]), constant_of(node.inputs[2])
    limits = [] if clip is None else [value for value in clip.inputs[1:] if value is not None]
    scalars = [scale, zero_point, *map(constant_of, limits)]
    if any(array is None or array.size != 1 for array in scalars):
        return None
    assert scale is not None
    assert zero_point is not None
    if not LEAST_SCALE <= float(scale.reshape(-1)[0]) <= MOST_SCALE or zero_point.dtype not in (np.uint8, np.int8):
        return None
    signed = zero_point.dtype == np.int8
    offset = SIGNED_OFFSET if signed else 0
    minimum, maximum = _limit(clip, 1), _limit(clip, 2)
    return _Range(
        node.inputs[0],
        float(scale.reshape(-1)[0]),
        int(zero_point.reshape(-1)[0]) + offset,
        0 if minimum is None else minimum + offset,
        CODES - 1 if maximum is None else maximum + offset,
        bool(signed),
    )


def _limit(clip: ir.Node | None, index: int) -> int | None:
    value = clip.inputs[index] if clip is not None and len(clip.inputs) > index else None
    array = constant_of(value)
    return None if array is None else int(array.reshape(-1)[0])


def _match_regions(codes: ir.Value, joined: ir.Node, sum_of_parts: ir.Node) -> FoundQuantizer | None:
    """The regions below and one above them, and that their codes meet on the grid of the one above."""
    parts = list(_dequantized(sum_of_parts))
    last = _match_range(codes)
    if len(parts) != 2 or last is None or parts[1][0].quantizer.m:
        return None
    (found, low_zero), (found_above, split_code) = parts
    low, high = found.quantizer, found_above.quantizer
    m = math.frexp(high.scale / low.scale)[1] - 1
    split = low.maximum - low.zero_point
    first = split_code - high.zero_point
    lowest = lowest_code(found.x, high.scale)
    starts_there = high.minimum == split_code or (high.minimum < split_code and lowest is not None and lowest >= first)
    consistent = (
        found.x is found_above.x
        and found.signed == found_above.signed == last.signed
        and low.scale == last.scale
        and low_zero == low.zero_point
        and max((0, *low.m)) < m <= 7
        and high.scale == low.scale * 2**m
        and starts_there
        and split == first * 2**m >= 0
        and low.minimum <= low.zero_point
    )
    maximum = last.zero_point + split + 2**m * (high.maximum - split_code)
    if not consistent or maximum >= CODES or (last.minimum, last.maximum) != (0, CODES - 1):
        return None
    minimum = max(0, last.zero_point + low.minimum - low.zero_point)
    quantizer = CodeQuantizer(low.scale, last.zero_point, minimum, maximum, (*low.m, m), (*low.split, split))
    return FoundQuantizer(found.x, codes, quantizer, found.signed)


def _dequantized(regions: ir.Node) -> Iterator[tuple[FoundQuantizer, int]]:
    """The quantizer that makes each operand of the Add, and the code that the operand takes for zero."""
    for value in regions.inputs:
        node = producer(value, "DequantizeLinear")
        found = None if node is None or node.inputs[0] is None else match_quantizer(node.inputs[0])
        if node is None or found is None or len(node.inputs) < 3:
            continue
        scale, zero = constant_of(node.inputs[1]), constant_of(node.inputs[2])
        if scale is None or zero is None or scale.size != 1 or zero.size != 1:
            continue
        if float(scale.reshape(-1)[0]) == found.quantizer.scale:
            yield found, int(zero.reshape(-1)[0]) + (SIGNED_OFFSET if found.signed else 0)
