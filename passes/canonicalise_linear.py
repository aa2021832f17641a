"""Write every Linear in one way: y = Add(MatMul(x, W), b), x [.., K], W [K, N], b [N], float32 initializers.

Gemm(x, W; alpha, beta, transB) + C     W ← alpha·W(ᵀ), b ← beta·C
Reshape → Gemm → Reshape                the MatMul takes x as it is, if the Reshapes only join and part the rows
MatMul, no Add                          b = 0
MatMul(x, Transpose(constant))          the constant is folded
"""

import logging
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.graph.edit import Builder, constant_of, is_op, only_consumer, producer, remove_dead, replace_value
from mptqc.graph.shapes import dims_of, rank_of
from mptqc.passes.base import Pass, PassResult

logger = logging.getLogger(__name__)

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class LinearMatch:
    """One Linear as it stands: `x` [.., K] in, `output` [.., N] out, W [K, N], b [N].

    `residual` is a Gemm's C that is no bias (not constant, or varying along the rows); it is added after the bias.
    `weight_value` is the initializer to keep when W is already what it holds, likewise `bias_value`.
    """

    node: ir.Node
    x: ir.Value
    output: ir.Value
    weight: Matrix
    bias: Matrix
    weight_value: ir.Value | None = None
    bias_value: ir.Value | None = None
    residual: ir.Value | None = None
    residual_scale: float = 1.0


@dataclass(frozen=True)
class CanonicaliseLinear(Pass):
    """Bring every Linear to MatMul and Add with explicit float32 initializers. One run is a fixpoint.

    A product whose second operand is not a constant matrix is no Linear and stays as it is. Reshapes around a Linear
    are left to UnflattenLinear.
    """

    name: ClassVar[str] = "canonicalise-linear"

    def call(self, model: ir.Model) -> PassResult:
        """Find all, then rewrite one by one, in graph order."""
        edits = 0
        replaced: dict[ir.Value, ir.Value] = {}
        for match in find_linears(model.graph):
            if not _is_canonical(match):
                replaced[match.output] = _rewrite(match, replaced)
                edits += 1
        if edits:
            remove_dead(model)
        return PassResult(model, edits)


def find_linears(graph: ir.Graph) -> list[LinearMatch]:
    """Return every Linear, canonical or not, in graph order; pure."""
    found = []
    for node in graph:
        match = _match_gemm(node) if is_op(node, "Gemm") else _match_matmul(node) if is_op(node, "MatMul") else None
        if match is not None:
            found.append(match)
    return found


def folded_constant(value: ir.Value | None) -> NDArray[np.generic] | None:
    """The array of a constant, also behind Transpose, Reshape and Identity; None if it is computed from inputs."""
    array = constant_of(value)
    if array is not None:
        return array
    node = producer(value, "Transpose", "Reshape", "Identity")
    if node is None:
        return None
    inner = folded_constant(node.inputs[0])
    if inner is None or is_op(node, "Identity"):
        return inner
    if is_op(node, "Transpose"):
        perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else None
        return np.transpose(inner, perm)
    target = constant_of(node.inputs[1])
    if target is None or (target == 0).any():
        return None
    return inner.reshape([int(size) for size in target])


def _match_gemm(node: ir.Node) -> LinearMatch | None:
    x, weight = node.inputs[0], folded_constant(node.inputs[1])
    if x is None or weight is None or weight.ndim != 2 or weight.dtype != np.float32:
        return None
    if node.attributes.get_int("transA", 0) or constant_of(x) is not None:
        return None
    alpha = node.attributes.get_float("alpha", 1.0)
    beta = node.attributes.get_float("beta", 1.0)
    assert alpha is not None and beta is not None
    transposed = node.attributes.get_int("transB", 0)
    kept = node.inputs[1] if not transposed and alpha == 1.0 and constant_of(node.inputs[1]) is not None else None
    W = np.ascontiguousarray(weight.T if transposed else weight) * np.float32(alpha) if kept is None else weight
    addend = node.inputs[2] if len(node.inputs) > 2 else None
    bias = _bias_vector(folded_constant(addend), W.shape[1], 2)
    zeros = np.zeros(W.shape[1], np.float32)
    if bias is None:
        residual = addend if beta != 0 else None
        return LinearMatch(node, x, node.outputs[0], W.astype(np.float32), zeros, kept, None, residual, beta)
    return LinearMatch(node, x, node.outputs[0], W.astype(np.float32), bias * np.float32(beta), kept)


def _match_matmul(node: ir.Node) -> LinearMatch | None:
    x, weight = node.inputs[0], folded_constant(node.inputs[1])
    if x is None or weight is None or weight.dtype != np.float32 or constant_of(x) is not None:
        return None
    rank = rank_of(x)
    widened = weight.ndim > 2 and (rank is None or rank < weight.ndim or any(size != 1 for size in weight.shape[:-2]))
    if weight.ndim < 2 or widened or (rank is not None and rank < 2):
        return None
    plain = weight.ndim == 2 and constant_of(node.inputs[1]) is not None
    kept = node.inputs[1] if plain else None
    W = np.ascontiguousarray(weight.reshape(weight.shape[-2:]), np.float32) if not plain else weight.astype(np.float32)
    add = only_consumer(node.outputs[0])
    if add is not None and is_op(add, "Add"):
        other = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
        array = constant_of(other)
        bias = _bias_vector(array, W.shape[1], rank)
        if bias is not None:
            same = array is not None and array.shape == bias.shape
            return LinearMatch(node, x, add.outputs[0], W, bias, kept, other if same else None)
    return LinearMatch(node, x, node.outputs[0], W, np.zeros(W.shape[1], np.float32), kept)


def _bias_vector(array: NDArray[np.generic] | None, channels: int, rank: int | None) -> Matrix | None:
    """A constant of one value per output channel (or one for all) as [N]; None if it is more than a bias."""
    if array is None or array.dtype != np.float32 or array.size not in (1, channels):
        return None
    if array.ndim > (1 if rank is None else rank) or (array.ndim and array.size != array.shape[-1]):
        return None
    return np.broadcast_to(array.reshape(-1), channels).astype(np.float32)


def _is_canonical(match: LinearMatch) -> bool:
    add = match.output.producer()
    return (
        is_op(match.node, "MatMul")
        and match.weight_value is not None
        and match.bias_value is not None
        and add is not None
        and add.inputs[0] is match.node.outputs[0]
    )


def _rewrite(match: LinearMatch, replaced: dict[ir.Value, ir.Value]) -> ir.Value:
    x = replaced.get(match.x, match.x)
    anchor = match.output.producer()
    assert anchor is not None
    prefix = (match.node.name or match.output.name or "linear").removesuffix("/MatMul").removesuffix("/Gemm")
    build = Builder(anchor, prefix)
    weight = match.weight_value or build.constant("weight", match.weight)
    bias = match.bias_value or build.constant("bias", match.bias)
    product = build.op("MatMul", [x, weight])
    new = build.op("Add", [product, bias])
    x_dims = dims_of(x)
    if x_dims is not None:
        product.shape = ir.Shape([*x_dims[:-1], match.weight.shape[1]])
        new.shape = ir.Shape([*x_dims[:-1], match.weight.shape[1]])
    product.dtype = new.dtype = ir.DataType.FLOAT
    if match.residual is not None:
        residual = replaced.get(match.residual, match.residual)
        if match.residual_scale != 1.0:
            residual = build.op("Mul", [residual, build.constant("beta", np.array(match.residual_scale, np.float32))])
        new = build.op("Add", [new, residual], name="Add_residual")
    replace_value(match.output, new)
    logger.debug("rewrote %s", prefix)
    return new
