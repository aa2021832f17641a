"""The integer products of a compiled model, as written or lowered, and where their codes come from.

MatMulInteger(a, b, a_zero, b_zero) -> Cast -> Mul(DequantizeLinear(1, a_scale) * b_scale) (-> Add bias)
com.microsoft.MatMulIntegerToFloat(a, b, a_scale, b_scale, a_zero, b_zero, bias)
"""

from dataclasses import dataclass, replace

import onnx_ir as ir

from mptqc.errors import VerifyError
from mptqc.graph.edit import constant_of, is_op, only_consumer, producer
from mptqc.graph.layout import MOVEMENT_OPS
from mptqc.graph.match import site_of
from mptqc.graph.stored_weight import StoredWeight, read_weight
from mptqc.reference.custom_ops import DOMAIN

LOWERED_OP, LOWERED_DOMAIN = "MatMulIntegerToFloat", "com.microsoft"


@dataclass(frozen=True)
class IntegerProduct:
    """y = (left − left_zero)·(right − right_zero)·left_scale·right_scale (+ bias); left uint8, right int8.

    `last` is the node that makes y. A Linear's right operand is constant; an attention's is computed.
    """

    node: ir.Node
    last: ir.Node
    left_scale: ir.Value
    right_scale: ir.Value
    bias: ir.Value | None

    @property
    def site(self) -> str:
        """The stamped site id."""
        return site_of(self.node)

    @property
    def left(self) -> ir.Value:
        """uint8 codes [.., M, K]."""
        return _present(self.node.inputs[0])

    @property
    def right(self) -> ir.Value:
        """int8 codes [.., K, N]."""
        return _present(self.node.inputs[1])

    @property
    def left_zero(self) -> ir.Value | None:
        """Scalar, or None for 0."""
        return self._zero_point(0)

    @property
    def right_zero(self) -> ir.Value | None:
        """Scalar, or None for 0."""
        return self._zero_point(1)

    def _zero_point(self, side: int) -> ir.Value | None:
        index = side + (4 if self.is_lowered else 2)
        return self.node.inputs[index] if len(self.node.inputs) > index else None

    @property
    def output(self) -> ir.Value:
        """y, float32."""
        return self.last.outputs[0]

    @property
    def is_linear(self) -> bool:
        """True for a Linear (one scale per output channel), False for a product of an attention (one scale)."""
        scale = constant_of(self.right_scale)
        return scale is not None and scale.ndim == 1

    @property
    def is_lowered(self) -> bool:
        """True for MatMulIntegerToFloat."""
        return self.node.op_type == LOWERED_OP


@dataclass(frozen=True)
class QuantizerSource:
    """`codes` are made from the float value `x`; movement may follow. A native operator shows no `x`: it is None."""

    x: ir.Value | None
    codes: ir.Value


def find_integer_products(model: ir.Model) -> list[IntegerProduct]:
    """Every product with a site, in graph order: one per integer Linear, two per integer attention.

    Raises:
        VerifyError: a MatMulInteger is not followed by what mptqc writes after it.
    """
    found = []
    for node in model.graph:
        if not site_of(node):
            continue
        if is_op(node, "MatMulInteger"):
            found.append(_match_written(node))
        elif node.op_type == LOWERED_OP and node.domain == LOWERED_DOMAIN:
            bias = node.inputs[6] if len(node.inputs) > 6 else None
            found.append(IntegerProduct(node, node, _present(node.inputs[2]), _present(node.inputs[3]), bias))
    return found


def _match_written(matmul: ir.Node) -> IntegerProduct:
    cast = only_consumer(matmul.outputs[0])
    scaled = only_consumer(cast.outputs[0]) if cast is not None and is_op(cast, "Cast") else None
    scale = producer(scaled.inputs[1], "Mul") if scaled is not None and is_op(scaled, "Mul") else None
    opened = producer(scale.inputs[0], "DequantizeLinear") if scale is not None else None
    if scaled is None or scale is None or opened is None:
        raise VerifyError(
            f"{site_of(matmul)}: {matmul.name} is not followed by Cast and Mul(DequantizeLinear(1, scale) · scale); "
            "something edited the model after it was quantized: compile again"
        )
    product = IntegerProduct(matmul, scaled, _present(opened.inputs[1]), _present(scale.inputs[1]), None)
    add = only_consumer(scaled.outputs[0])
    if not product.is_linear or add is None or not is_op(add, "Add"):
        return product
    bias = _present(add.inputs[1] if add.inputs[0] is scaled.outputs[0] else add.inputs[0])
    array = constant_of(bias)
    return replace(product, last=add, bias=bias) if array is not None and array.ndim == 1 else product


def find_sources(codes: ir.Value) -> list[QuantizerSource]:
    """Where the codes of a product's operand are made; more than one only if parts were joined.

    Raises:
        VerifyError: the codes do not come from a quantizer that mptqc writes.
    """
    found: dict[ir.Value, QuantizerSource] = {}
    frontier = [codes]
    while frontier:
        value = frontier.pop()
        node = value.producer()
        if is_op(node, "Concat") and node is not None:
            frontier.extend(_present(part) for part in node.inputs)
        elif is_op(node, *MOVEMENT_OPS) and node is not None:
            frontier.append(_present(node.inputs[0]))
        elif node is not None and node.domain == DOMAIN:
            found[value] = QuantizerSource(None, value)
        else:
            found[value] = QuantizerSource(_quantized_from(value), value)
    return list(found.values())


def _quantized_from(codes: ir.Value) -> ir.Value:
    clip = producer(codes, "Clip")
    quantize = producer(codes if clip is None else clip.inputs[0], "QuantizeLinear")
    if quantize is None:
        raise VerifyError(
            f"the codes {codes.name} are not made by QuantizeLinear; something edited the model after it was "
            "quantized: compile again"
        )
    x = _present(quantize.inputs[0])
    regions = producer(x, "Add")
    low = producer(regions.inputs[0], "DequantizeLinear") if regions is not None else None
    if low is None:
        return x
    return _quantized_from(_present(low.inputs[0]))


def stored_weight(product: IntegerProduct) -> StoredWeight:
    """The weight of a Linear's product, codes [K, N].

    Raises:
        VerifyError: the weight is computed in a way that mptqc does not write.
    """
    return read_weight(product.right, product.site)


def _present(value: ir.Value | None) -> ir.Value:
    assert value is not None, "a required input is there in every model that the checker accepts"
    return value
