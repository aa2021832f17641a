"""The structures of the canonical form, found by values and uses; finding never edits.

Linear      MatMul(x, W[K,N]) -> Add(b[N])
Norm        LayerNormalization(x, γ[C], β[C]) over the last axis
Attention   MatMul(q[…,T,d], k[…,d,S]) -> (Add/Reshape/Mul/Where)* -> Softmax -> MatMul(P, v[…,S,d])
            or, its rows scaled, Softmax -> Div(P, r = ReduceMax(P)) -> MatMul(E, v) -> Mul(r)
Convolution Conv(x, W[N,C,kh,kw], b[N])
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.graph.edit import constant_of, is_op, only_consumer, producer, scalar_of

SITE_KEY = "mptqc.site"

SCORE_OPS = ("Add", "Sub", "Mul", "Div", "Reshape", "Where")
"""What may lie between the scores of an attention and its Softmax in a float model."""

QUANTIZER_OPS = ("QuantizeLinear", "Clip", "DequantizeLinear", "Identity")
"""What lies there besides once the scores are a quantized tensor, or marked as one."""


def site_of(node: ir.Node) -> str:
    """The site id stamped on a node, or an empty string."""
    return node.metadata_props.get(SITE_KEY, "")


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None, f"{node.op_type} {node.name} lacks input {index}"
    return value


def _array(value: ir.Value) -> NDArray[np.float32]:
    array = constant_of(value)
    assert array is not None
    return array.astype(np.float32, copy=False)


@dataclass(frozen=True)
class Linear:
    """y = xW + b as MatMul and Add; W [K, N], b [N], float32."""

    matmul: ir.Node
    add: ir.Node

    @property
    def site(self) -> str:
        """The stamped site id."""
        return site_of(self.matmul)

    @property
    def input(self) -> ir.Value:
        """x, […, K]."""
        return _input(self.matmul, 0)

    @property
    def output(self) -> ir.Value:
        """y, […, N]."""
        return self.add.outputs[0]

    @property
    def bias_index(self) -> int:
        """Which input of the Add is b."""
        return 1 if self.add.inputs[0] is self.matmul.outputs[0] else 0

    @property
    def weight(self) -> NDArray[np.float32]:
        """W, [K, N]."""
        return _array(_input(self.matmul, 1))

    @property
    def bias(self) -> NDArray[np.float32]:
        """b, [N]."""
        return _array(_input(self.add, self.bias_index))


@dataclass(frozen=True)
class Norm:
    """LayerNormalization over the last axis with γ and β [C]."""

    node: ir.Node

    @property
    def site(self) -> str:
        """The stamped site id."""
        return site_of(self.node)

    @property
    def input(self) -> ir.Value:
        """x, […, C]."""
        return _input(self.node, 0)

    @property
    def output(self) -> ir.Value:
        """y, […, C]."""
        return self.node.outputs[0]

    @property
    def gamma(self) -> NDArray[np.float32]:
        """γ, [C]."""
        return _array(_input(self.node, 1))

    @property
    def beta(self) -> NDArray[np.float32]:
        """β, [C]."""
        return _array(_input(self.node, 2))


@dataclass(frozen=True)
class Attention:
    """softmax(qk + …)v, however the heads are laid out; `q`, `k`, `p`, `v` are the operands of the two products.

    `row_scale` multiplies the second product by the largest probability of each row, if `p` was divided by it.
    """

    scores: ir.Node
    softmax: ir.Node
    context: ir.Node
    row_scale: ir.Node | None = None

    @property
    def site(self) -> str:
        """The stamped site id."""
        return site_of(self.softmax)

    @property
    def masked_scores(self) -> ir.Value:
        """What the softmax reads, […, T, S]: the scores with all that is added to them."""
        return _input(self.softmax, 0)

    @property
    def q(self) -> ir.Value:
        """[…, T, d]."""
        return _input(self.scores, 0)

    @property
    def k(self) -> ir.Value:
        """[…, d, S] (transposed)."""
        return _input(self.scores, 1)

    @property
    def p(self) -> ir.Value:
        """[…, T, S]: the probabilities, or what is left of them when each row is divided by its largest."""
        return _input(self.context, 0)

    @property
    def v(self) -> ir.Value:
        """[…, S, d]."""
        return _input(self.context, 1)


@dataclass(frozen=True)
class Convolution:
    """Conv with constant W [N, C/groups, kh, kw]."""

    node: ir.Node

    @property
    def site(self) -> str:
        """The stamped site id."""
        return site_of(self.node)

    @property
    def input(self) -> ir.Value:
        """x, [B, C, H, W]."""
        return _input(self.node, 0)

    @property
    def output(self) -> ir.Value:
        """y, [B, N, H', W']."""
        return self.node.outputs[0]

    @property
    def weight(self) -> NDArray[np.float32]:
        """W, [N, C/groups, kh, kw]."""
        return _array(_input(self.node, 1))

    @property
    def bias(self) -> NDArray[np.float32]:
        """b, [N]; zeros if the Conv has none."""
        if len(self.node.inputs) < 3 or self.node.inputs[2] is None:
            return np.zeros(self.weight.shape[0], np.float32)
        return _array(self.node.inputs[2])


def find_linears(model: ir.Model) -> list[Linear]:
    """Every Linear, in graph order."""
    return [linear for node in model.graph if (linear := match_linear(node)) is not None]


def match_linear(matmul: ir.Node) -> Linear | None:
    """The Linear that this MatMul begins, or None."""
    if not is_op(matmul, "MatMul"):
        return None
    weight = constant_of(matmul.inputs[1])
    add = only_consumer(matmul.outputs[0])
    if weight is None or weight.ndim != 2 or weight.dtype != np.float32 or not is_op(add, "Add"):
        return None
    assert add is not None
    bias = constant_of(add.inputs[1 if add.inputs[0] is matmul.outputs[0] else 0])
    if bias is None or bias.shape != (weight.shape[1],):
        return None
    return Linear(matmul, add)


def match_linear_output(value: ir.Value) -> Linear | None:
    """The Linear whose output is `value`, or None."""
    add = producer(value, "Add")
    if add is None:
        return None
    for operand in add.inputs:
        matmul = producer(operand, "MatMul")
        linear = None if matmul is None else match_linear(matmul)
        if linear is not None and linear.add is add:
            return linear
    return None


def find_norms(model: ir.Model) -> list[Norm]:
    """Every LayerNormalization with constant γ and β along the last axis alone, in graph order."""
    return [
        Norm(node)
        for node in model.graph
        if is_op(node, "LayerNormalization")
        and len(node.inputs) > 2
        and all(array is not None and array.ndim == 1 for array in map(constant_of, node.inputs[1:3]))
    ]


def find_rms_norms(model: ir.Model) -> list[ir.Node]:
    """The first node of every norm by root mean square, RMSNormalization or ReduceMean(x·x), in graph order.

    They are named where a LayerNorm would be folded or lowered. One whose x is centred is a LayerNorm in pieces.
    """
    return [
        node
        for node in model.graph
        if is_op(node, "RMSNormalization") or (is_op(node, "ReduceMean") and _is_square(node.inputs[0]))
    ]


def _is_square(value: ir.Value | None) -> bool:
    """True for x² or x·x of an x that no Sub made."""
    square = producer(value, "Pow", "Mul")
    if square is None or producer(square.inputs[0], "Sub") is not None:
        return False
    return square.inputs[0] is square.inputs[1] if square.op_type == "Mul" else scalar_of(square.inputs[1]) == 2


def find_convolutions(model: ir.Model) -> list[Convolution]:
    """Every Conv with constant weights and, if it has one, bias, in graph order."""
    return [
        Convolution(node)
        for node in model.graph
        if is_op(node, "Conv") and all(value is None or constant_of(value) is not None for value in node.inputs[1:])
    ]


def find_attentions(model: ir.Model) -> list[Attention]:
    """Every softmax between two products of computed values, in graph order."""
    return [found for node in model.graph if (found := match_attention(node)) is not None]


def match_attention(softmax: ir.Node) -> Attention | None:
    """The attention around this Softmax (over the last axis, as `NormaliseSoftmax` writes it), or None."""
    if not is_op(softmax, "Softmax") or softmax.attributes.get_int("axis", -1) != -1:
        return None
    divided = match_scaled_rows(softmax.outputs[0])
    p = softmax.outputs[0] if divided is None else divided
    context = only_consumer(p)
    if not is_op(context, "MatMul") or context is None or context.inputs[0] is not p:
        return None
    if constant_of(context.inputs[1]) is not None:
        return None
    row_scale = None if divided is None else only_consumer(context.outputs[0])
    for node in _above_softmax(softmax):
        if is_op(node, "MatMul") and all(constant_of(value) is None for value in node.inputs):
            return Attention(node, softmax, context, row_scale)
    return None


def match_scaled_rows(probabilities: ir.Value) -> ir.Value | None:
    """P/r, if `ScaleProbabilities` divided the probabilities P by the largest of each row, r; else None."""
    divide = next((node for node in probabilities.consumers() if is_op(node, "Div")), None)
    largest = None if divide is None else producer(divide.inputs[1], "ReduceMax")
    if divide is None or largest is None or largest.inputs[0] is not probabilities:
        return None
    return divide.outputs[0] if set(probabilities.consumers()) == {divide, largest} else None


def _above_softmax(softmax: ir.Node) -> Iterator[ir.Node]:
    """The scores' chain upward: scaling, masks, relative position bias, window reshapes; ends at its first product."""
    frontier = [softmax.inputs[0]]
    while frontier:
        value = frontier.pop(0)
        node = None if value is None else value.producer()
        if node is None:
            continue
        if is_op(node, "MatMul"):
            yield node
        elif is_op(node, *SCORE_OPS, *QUANTIZER_OPS):
            frontier.extend(node.inputs)
