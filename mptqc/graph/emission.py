"""Write integer products in standard ONNX, in the form that ONNX Runtime runs fastest.

Product   Cast(MatMulInteger(a, b, a_zero, b_zero)) * (a_scale * b_scale) (+ bias)

ONNX Runtime fuses this to MatMulIntegerToFloat only if `a_scale * b_scale` is not folded to a constant first. So
a_scale is DequantizeLinear(1, Δ) of a scalar, which its constant folding leaves alone.

A quantizer goes above the data movement that leads to its reader, so that what is moved is 8 bits wide.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from mptqc.graph.edit import Builder, add_initializer, is_op, producer
from mptqc.graph.quantizer_nodes import Codes, Operand, check_quantizer, emit_quantizer

ONE_NAME = "mptqc/one"

WEIGHT_BITS_KEY = "mptqc.weight_bits"
"""Metadata of an integer Linear's product: the bits that its weight codes really have."""

# Movement with one data input. Of these the last two may drop elements.
_MOVEMENT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Slice", "Gather")
_DROPPING = ("Slice", "Gather")


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


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None, f"{node.op_type} {node.name} lacks input {index}"
    return value
