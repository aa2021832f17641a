"""Rotate each residual stream: an exact change of basis that spreads outlier channels over all of them.

    x -> xR  with R orthogonal and R·1 = 1: mean and variance of a token survive, so LN(xR) = LN(x)R for γ = 1, β = 0

    writers   W -> WR, b -> bR;  constants c -> cR
    readers   the norm's γ, β go to the Linears that read it, W -> diag(γ)W, b -> b + βW; then W -> RᵀW
              also where they read tokens' means, or the norm's channels beside others
    others    a MatMul by R (writers) or Rᵀ (readers and norms) in floats, where a rotation cannot be folded

    R = 11ᵀ/C + B·Q·Bᵀ, B [C, C−1] an orthonormal basis of the complement of 1, Q random orthogonal by the plan's seed.

Exact in real arithmetic (METHOD, Rotation). The stage does not change, so the plan says once which seed was used;
a second run would rotate again, which is as exact and as useless.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.errors import RefusalError
from mptqc.graph.blocks import Reading, norm_readers, pooled_readers
from mptqc.graph.edit import Builder, add_initializer, constant_of, remove_dead, set_initializer
from mptqc.graph.layout import Shapes
from mptqc.graph.match import Linear, Norm
from mptqc.graph.streams import Stream, Use, find_streams
from mptqc.passes.base import Pass, PassResult, Stage

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class RotateStreams(Pass):
    """Rotate every residual stream by a seeded orthogonal matrix that keeps the all-ones vector."""

    name: ClassVar[str] = "rotate-streams"
    requires: ClassVar[tuple[Stage, ...]] = (Stage.CANONICAL,)
    seed: int
    shapes: Shapes

    def call(self, model: ir.Model) -> PassResult:
        """Find all streams and who can be compensated, then rotate them."""
        found = [(stream, _readers_by_norm(stream, model, self.shapes)) for stream in find_streams(model, self.shapes)]
        for position, (stream, readers) in enumerate(found):
            _rotate(stream, readers, rotation(stream.width, self.seed + position))
        remove_dead(model)
        return PassResult(model, len(found))


def rotation(width: int, seed: int) -> Matrix:
    """R [C, C], float64: orthogonal, R·1 = 1."""
    random = np.random.default_rng(seed)
    ones = np.full((width, 1), width**-0.5)
    basis = np.linalg.qr(np.concatenate([ones, random.standard_normal((width, width - 1))], axis=1))[0][:, 1:]
    turned, triangle = np.linalg.qr(random.standard_normal((width - 1, width - 1)))
    orthogonal = turned * np.sign(np.diag(triangle))
    result: Matrix = ones @ ones.T + basis @ orthogonal @ basis.T
    return result


def _readers_by_norm(stream: Stream, model: ir.Model, shapes: Shapes) -> dict[Norm, list[Reading]]:
    """For each norm the Linears that take its rotation; none where something else reads it."""
    readers: dict[Norm, list[Reading]] = {}
    for norm in stream.norms:
        try:
            readers[norm] = [Reading(linear, 0) for linear in norm_readers(norm, model, shapes)]
        except RefusalError:
            readers[norm] = pooled_readers(norm.output, model, shapes) or []
    return readers


def _rotate(stream: Stream, readers: dict[Norm, list[Reading]], matrix: Matrix) -> None:
    for linear in stream.linear_writers:
        _set_linear(linear, linear.weight @ matrix, linear.bias @ matrix)
    for use in stream.constant_writers:
        constant = constant_of(use.node.inputs[use.index])
        assert constant is not None
        set_initializer(use.node, use.index, (constant.astype(np.float64) @ matrix).astype(np.float32))
    for linear in stream.linear_readers:
        _set_linear(linear, matrix.T @ linear.weight, linear.bias.astype(np.float64))
    for norm, readings in readers.items():
        if not readings:
            _turn_input(Use(norm.node, 0), matrix.T)
            continue
        gamma, beta = norm.gamma.astype(np.float64), norm.beta.astype(np.float64)
        set_initializer(norm.node, 1, np.ones_like(norm.gamma))
        set_initializer(norm.node, 2, np.zeros_like(norm.beta))
        for reading in readings:
            linear, rows = reading.linear, slice(reading.start, reading.start + stream.width)
            weight = linear.weight.astype(np.float64)
            bias = linear.bias + beta @ weight[rows]
            weight[rows] = matrix.T @ (gamma[:, None] * weight[rows])
            _set_linear(linear, weight, bias)
    for use in stream.other_writers:
        _turn_input(use, matrix)
    for use in stream.other_readers:
        _turn_input(use, matrix.T)
    for value in stream.outputs:
        _turn_graph_output(value, matrix.T)


def _set_linear(linear: Linear, weight: Matrix, bias: Matrix) -> None:
    set_initializer(linear.matmul, 1, weight.astype(np.float32))
    set_initializer(linear.add, linear.bias_index, bias.astype(np.float32))


def _turn_input(use: Use, matrix: Matrix) -> None:
    """Put a MatMul before one input of a node."""
    build = Builder(use.node, f"{use.node.name}/rotate{use.index}")
    turned = build.op("MatMul", [use.node.inputs[use.index], build.constant("matrix", matrix.astype(np.float32))])
    use.node.replace_input_with(use.index, turned)


def _turn_graph_output(value: ir.Value, matrix: Matrix) -> None:
    """Let the graph give the value times a matrix, under the value's name; its readers stay with the value itself."""
    node = value.producer()
    assert node is not None
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    name, position = value.name, list(graph.outputs).index(value)
    constant = add_initializer(graph, f"{node.name}/rotate_output/matrix", matrix.astype(np.float32))
    turned = ir.node("MatMul", [value, constant], name=f"{node.name}/rotate_output")
    graph.insert_after(node, turned)
    value.name = f"{name}_rotated"
    result = turned.outputs[0]
    result.name, result.shape, result.type = name, value.shape, value.type
    graph.outputs[position] = result
