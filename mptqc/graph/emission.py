"""Write quantizers and integer products in standard ONNX, in the form that ONNX Runtime runs fastest.

Quantizer, uniform      QuantizeLinear (-> Clip)
Quantizer, two-region   q0 = QuantizeLinear(x, Δ) up to T;  q1 = QuantizeLinear(x, 2^m·Δ) from T on, clipped;
                        DequantizeLinear(q0) + DequantizeLinear(q1) -> QuantizeLinear(Δ)   (ORT: one QLinearAdd)
Product                 Cast(MatMulInteger(a, b, a_zero, b_zero)) * (a_scale * b_scale) (+ bias)

ONNX Runtime fuses the product to MatMulIntegerToFloat only if `a_scale * b_scale` is not folded to a constant first.
So a_scale is DequantizeLinear(1, Δ) of a scalar, which its constant folding leaves alone.

A quantizer goes above the data movement that leads to its reader, so that what is moved is 8 bits wide.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mptqc.errors import PlanError
from mptqc.graph.edit import Builder, add_initializer, is_op, producer, scalar_of
from mptqc.plan import ActivationQuantizer, TwoRegion, Uniform

CODES = 256
"""How many codes an 8-bit container has."""

ONE_NAME = "mptqc/one"

WEIGHT_BITS_KEY = "mptqc.weight_bits"
"""Metadata of an integer Linear's product: the bits that its weight codes really have."""

# The smallest value each op can give: GELU's minimum is −0.16997 (erf) or −0.17004 (tanh).
_LOWEST = {"Softmax": 0.0, "Sigmoid": 0.0, "Relu": 0.0, "Gelu": -0.1701}

# Movement with one data input. Of these the last two may drop elements.
_MOVEMENT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Slice", "Gather")
_DROPPING = ("Slice", "Gather")


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


Uses = Mapping[tuple[ir.Node, int], Operand]
"""Every planned operand of a product, by the node that reads it and the input's index."""


class QuantizerEmitter:
    """Emits each (value, operand) once, however many products read it. Products must be visited in graph order."""

    def __init__(self, uses: Uses) -> None:
        self._uses = uses
        self._route: dict[tuple[ir.Value, Operand], list[ir.Value]] = {}
        self._emitted: dict[tuple[ir.Value, Operand], Codes] = {}
        self._scales: dict[ir.Value, ir.Value] = {}
        self._moves = 0
        self._prefixes: dict[str, int] = {}
        # All routes are found before the first edit: a new QuantizeLinear would count as one more reader.
        for (node, index), operand in uses.items():
            self._find_route(_input(node, index), operand)

    def codes(self, node: ir.Node, index: int, prefix: str) -> Codes:
        """The codes that `node` is to read at input `index`, made from what it reads now.

        Raises:
            PlanError: the quantizer does not fit an 8-bit container.
        """
        operand = self._uses[node, index]
        check_quantizer(operand.quantizer, prefix)
        return self._codes(_input(node, index), operand, node, prefix)

    def open_scale(self, codes: Codes, build: Builder, name: str) -> ir.Value:
        """The scale as a value that ONNX Runtime does not fold; one per constant."""
        if codes.scale not in self._scales:
            one = build.graph.initializers.get(ONE_NAME)
            if one is None:
                one = add_initializer(build.graph, ONE_NAME, np.array(1, np.uint8))
            self._scales[codes.scale] = build.op("DequantizeLinear", [one, codes.scale], name=name)
        return self._scales[codes.scale]

    def _codes(self, value: ir.Value, operand: Operand, anchor: ir.Node, prefix: str) -> Codes:
        key = (value, operand)
        if key not in self._emitted:
            sources = self._route[key]
            parts = [self._codes(source, operand, anchor, prefix) for source in sources]
            if parts:
                self._emitted[key] = self._move(value, parts, Builder(anchor, prefix))
            else:
                self._emitted[key] = emit_quantizer(value, operand, Builder(anchor, self._unique(prefix)))
        return self._emitted[key]

    def _unique(self, prefix: str) -> str:
        """The prefix, numbered if one reader needs more than one quantizer (parts of a Concat)."""
        number = self._prefixes.get(prefix, 0)
        self._prefixes[prefix] = number + 1
        return f"{prefix}/part{number}" if number else prefix

    def _move(self, value: ir.Value, parts: list[Codes], build: Builder) -> Codes:
        """Do to codes what the producer of `value` does to floats."""
        node = value.producer()
        assert node is not None
        self._moves += 1
        codes = [part.codes for part in parts]
        made = build.node(node.op_type, [*codes, *node.inputs[len(parts) :]], name=f"move{self._moves}_{node.op_type}")
        made.attributes.update(node.attributes)
        moved = made.outputs[0]
        moved.shape, moved.type = value.shape, parts[0].codes.type
        return Codes(moved, parts[0].scale, parts[0].zero_point)

    def _find_route(self, value: ir.Value, operand: Operand) -> list[ir.Value]:
        """The values above the movement that makes `value`, where to quantize instead; none if it must stay here."""
        key = (value, operand)
        if key not in self._route:
            sources = self._sources(value, operand)
            self._route[key] = sources
            for source in sources:
                self._find_route(source, operand)
        return self._route[key]

    def _sources(self, value: ir.Value, operand: Operand) -> list[ir.Value]:
        node = value.producer()
        if node is None or not self._is_only_read_as(value, operand):
            return []
        if is_op(node, "Concat"):
            # A roll, or re-joined windows: worth it if every part was cut from a value that is quantized whole.
            parts = [part for part in node.inputs if part is not None]
            cut = all(producer(part, *_DROPPING) is not None and self._find_route(part, operand) for part in parts)
            return parts if cut else []
        if not is_op(node, *_MOVEMENT):
            return []
        source = _input(node, 0)
        if source.producer() is None and not source.is_graph_input():
            return []
        if is_op(node, *_DROPPING) and not (len(source.uses()) > 1 and self._is_only_read_as(source, operand)):
            return []
        return [source]

    def _is_only_read_as(self, value: ir.Value, operand: Operand) -> bool:
        """True if every reader, through movement, is a product that takes `value` quantized as `operand`."""
        if value.is_graph_output():
            return False
        for use in value.uses():
            if (use.node, use.idx) in self._uses:
                if self._uses[use.node, use.idx] != operand:
                    return False
            elif is_op(use.node, "Concat") or (is_op(use.node, *_MOVEMENT) and use.idx == 0):
                if not self._is_only_read_as(use.node.outputs[0], operand):
                    return False
            else:
                return False
        return True


def emit_quantizer(x: ir.Value, operand: Operand, build: Builder) -> Codes:
    """Quantize `x`; the codes equal the reference's, shifted by a constant that the zero point carries."""
    quantizer = operand.quantizer
    if isinstance(quantizer, Uniform):
        scale = build.constant("scale", np.array(quantizer.scale, np.float32))
        low, high = -quantizer.zero_point, 2**quantizer.bits - 1 - quantizer.zero_point
        codes, zero = _saturate(x, scale, low, high, operand, build, "quantize")
        return Codes(codes, scale, build.constant("zero_point", zero))
    return _emit_two_region(x, quantizer, operand, build)


def _emit_two_region(x: ir.Value, quantizer: TwoRegion, operand: Operand, build: Builder) -> Codes:
    coarse = 2**quantizer.m
    first = quantizer.split // coarse
    scale = build.constant("scale", np.array(quantizer.scale, np.float32))
    coarse_scale = build.constant("scale_high", np.array(quantizer.scale * coarse, np.float32))
    container = Operand(quantizer, operand.signed)
    low, low_zero = _saturate(x, scale, -quantizer.zero_point, quantizer.split, container, build, "quantize_low")
    high, high_zero = _saturate(x, coarse_scale, first, first + quantizer.high_codes, container, build, "quantize_high")
    bottom = _bottom(operand.signed)
    dtype = high_zero.dtype.type
    low_part = build.op(
        "DequantizeLinear", [low, scale, build.constant("zero_point_low", low_zero)], name="dequantize_low"
    )
    shifted = build.constant("zero_point_high_shifted", np.array(int(high_zero) + first, dtype))
    high_part = build.op("DequantizeLinear", [high, coarse_scale, shifted], name="dequantize_high")
    total = build.op("Add", [low_part, high_part], name="join_regions")
    zero_point = build.constant("zero_point", np.array(quantizer.zero_point + bottom, dtype))
    codes = build.op("QuantizeLinear", [total, scale, zero_point], name="quantize")
    for value in (low_part, high_part, total):
        value.shape, value.dtype = x.shape, ir.DataType.FLOAT
    codes.shape, codes.dtype = x.shape, ir.DataType.INT8 if operand.signed else ir.DataType.UINT8
    return Codes(codes, scale, zero_point)


def _saturate(
    x: ir.Value, scale: ir.Value, low: int, high: int, operand: Operand, build: Builder, name: str
) -> tuple[ir.Value, np.ndarray[tuple[int, ...], np.dtype[np.uint8 | np.int8]]]:
    """clip(round(x/scale), low, high) + zero_point, and the zero point (a scalar of the container's type).

    QuantizeLinear saturates at both ends of the container for nothing, so the range is put where that does the most.
    """
    bottom = _bottom(operand.signed)
    dtype = np.int8 if operand.signed else np.uint8
    lowest = _lowest_code(x, scale)
    at_bottom, at_top = bottom - low, bottom + CODES - 1 - high
    centred = -((high - low + 1) // 2) - low
    limits: tuple[int | None, int | None]
    if _fits(at_top, operand.signed) and (high - low == CODES - 1 or (lowest is not None and lowest >= low)):
        zero, limits = at_top, (None, None)
    elif operand.signed and _fits(centred, operand.signed) and isinstance(operand.quantizer, Uniform):
        # Small codes keep pairs of products within 16 bits on CPUs that add them there (AVX2 without VNNI).
        zero, limits = centred, (low, high)
    elif _fits(at_bottom, operand.signed):
        zero, limits = at_bottom, (None, high)
    else:
        zero, limits = at_top, (low, None)
    codes = build.op("QuantizeLinear", [x, scale, build.constant(f"{name}_zero", np.array(zero, dtype))], name=name)
    codes.shape, codes.dtype = x.shape, ir.DataType.INT8 if operand.signed else ir.DataType.UINT8
    if limits != (None, None):
        bounds = [
            None if limit is None else build.constant(f"{name}_{side}", np.array(limit + zero, dtype))
            for side, limit in zip(("min", "max"), limits, strict=True)
        ]
        clipped = build.op("Clip", [codes, *(bounds if bounds[1] is not None else bounds[:1])], name=f"{name}_clip")
        clipped.shape, clipped.type = codes.shape, codes.type
        codes = clipped
    return codes, np.array(zero, dtype)


def emit_product(
    left: Codes, right: ir.Value, right_zero: ir.Value | None, scale: ir.Value, build: Builder, name: str
) -> tuple[ir.Node, ir.Value]:
    """Multiply codes in integers: left [.., M, K] uint8, right [.., K, N] int8; `scale` broadcasts over [.., M, N].

    Returns the MatMulInteger node and the float32 product.
    """
    zero_points = [left.zero_point] if right_zero is None else [left.zero_point, right_zero]
    product = build.node("MatMulInteger", [left.codes, right, *zero_points], name=name)
    as_float = build.op("Cast", [product.outputs[0]], {"to": int(ir.DataType.FLOAT)}, name=f"{name}_as_float")
    result = build.op("Mul", [as_float, scale], name=f"{name}_scaled")
    product.outputs[0].dtype = ir.DataType.INT32
    as_float.dtype = result.dtype = ir.DataType.FLOAT
    return product, result


def weight_bits_of(node: ir.Node) -> int:
    """The bits of an integer Linear's weight codes; 8 if nothing is recorded."""
    return int(node.metadata_props.get(WEIGHT_BITS_KEY, "8"))


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
    if quantizer.high_codes < 1 or quantizer.top_code >= CODES:
        raise PlanError(
            f"{where}: a two-region quantizer of {quantizer.bits} bits with m = {quantizer.m} and "
            f"{quantizer.low_codes} low codes reaches code {quantizer.top_code}; 8 bits hold 255: the plan is damaged"
        )
    if quantizer.split < 0 or quantizer.split % 2**quantizer.m:
        raise PlanError(
            f"{where}: the regions meet at {quantizer.split}Δ, which is not a multiple of 2^{quantizer.m} from 0 on; "
            "the plan is damaged"
        )


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None, f"{node.op_type} {node.name} lacks input {index}"
    return value


def _bottom(signed: bool) -> int:
    """The smallest code of the container."""
    return -CODES // 2 if signed else 0


def _fits(zero_point: int, signed: bool) -> bool:
    return 0 <= zero_point - _bottom(signed) < CODES


def _lowest_code(x: ir.Value, scale: ir.Value) -> int | None:
    """The smallest round(x/scale) that the op which makes `x` can lead to; None if it has no bound."""
    node, step = x.producer(), scalar_of(scale)
    if node is None or step is None or not is_op(node, *_LOWEST):
        return None
    return int(np.rint(np.float32(_LOWEST[node.op_type]) / np.float32(step)))
