"""Sequential compensation: each Linear in graph order gets the weights that best make up for all quantized before it.

Two copies of the smoothed model advance together, one float, one quantized so far. At each Linear both inputs are at
hand; its target is the float output and, where the output is added to the residual stream, the float stream minus the
quantized one besides: each branch repairs the drift so far (METHOD, recipe step 6).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.analysis.frontier import Frontier
from mptqc.analysis.gptq import Moments, gptq, refit_bias, ridge
from mptqc.analysis.observe import Progress
from mptqc.analysis.weights import search_weight_scale
from mptqc.data.samples import Samples
from mptqc.graph.edit import is_op, producer
from mptqc.graph.layout import MOVEMENT_OPS, Shapes, readers
from mptqc.graph.match import Linear, find_linears
from mptqc.plan import LayerPlan, QuantPlan
from mptqc.reference.quantizers import fake_quantize

Array = NDArray[np.float32]
Quantize = Callable[[ir.Model, QuantPlan], None]
"""Make what the plan names run in integers, in place; the rest of the model stays float."""

BATCH = 8
HOLD_OUT = 4


@dataclass(frozen=True)
class Residual:
    """A Linear's output enters the stream at an Add, whose input `stream` is the stream before.

    `index` [elements of one image]: the stream's element i meets the output's element index[i].
    """

    stream: int
    index: NDArray[np.int64]


def compensate(
    model: ir.Model, shapes: Shapes, samples: Samples, plan: QuantPlan, quantize: Quantize, report: Progress
) -> QuantPlan:
    """Return the plan with weight codes, scales and a bias for every planned Linear.

    Args:
        model: the smoothed float model; not changed.
        shapes: its concrete shapes at batch 1.
        samples: calibration images; the values between two Linears are held for all of them.
        plan: complete with quantizers.
        quantize: applied to a private copy of the model, piece by piece.
        report: called with (step, done, total).
    """
    partial = ir.from_proto(ir.to_proto(model))
    quantize(partial, plan.model_copy(update={"layers": ()}))
    exact_side, quantized_side = Frontier(model, samples, BATCH), Frontier(partial, samples, BATCH)
    layers = {layer.site: layer for layer in plan.layers}
    linears = [linear for linear in find_linears(model) if linear.site in layers]
    done = 0
    for _, members in groupby(linears, key=lambda linear: linear.input.name):
        group = list(members)
        report("compensate", done, len(linears))
        twins = {linear.site: linear for linear in find_linears(partial)}
        residuals = {linear.site: find_residual(linear, shapes) for linear in group}
        exact_side.advance([value for linear in group for value in _needed(linear, residuals[linear.site])])
        quantized_side.advance(
            [value for linear in group for value in _needed(twins[linear.site], residuals[linear.site])]
        )
        for linear in group:
            twin, layer = twins[linear.site], layers[linear.site]
            moments = _collect(linear, twin, layer, residuals[linear.site], exact_side, quantized_side)
            plan = plan.with_arrays(_solve(*moments, linear, layer))
        quantize(
            partial,
            plan.model_copy(update={"layers": tuple(layers[linear.site] for linear in group), "attentions": ()}),
        )
        done += len(group)
    report("compensate", done, len(linears))
    return plan


def find_residual(linear: Linear, shapes: Shapes) -> Residual | None:
    """Where the Linear's output is added to another computed value, if that is all that reads it; else None."""
    read = readers(linear.output, shapes)
    if len(read) != 1 or not is_op(read[0].node, "Add") or read[0].node is None:
        return None
    node, value = read[0].node, read[0].value
    stream = 1 if node.inputs[0] is value else 0
    other = node.inputs[stream]
    if other is None or other.name not in shapes or shapes[str(other.name)] != shapes[str(value.name)]:
        return None
    return Residual(stream, read[0].trace.index.reshape(-1))


def _needed(linear: Linear, residual: Residual | None) -> list[ir.Value]:
    """The Linear's input, all it was moved from (a quantizer may be put there), and the stream it is added to."""
    values = [linear.input]
    while (node := producer(values[-1], *MOVEMENT_OPS)) is not None and node.inputs[0] is not None:
        values.append(node.inputs[0])
    if residual is not None:
        values.append(_stream(linear, residual))
    return values


def _stream(linear: Linear, residual: Residual) -> ir.Value:
    """The stream's value before the Linear's output is added to it."""
    value = linear.output
    while True:
        node = value.consumers()[0]
        if is_op(node, "Add"):
            operand = node.inputs[residual.stream]
            assert operand is not None
            return operand
        value = node.outputs[0]


def _collect(
    linear: Linear,
    twin: Linear,
    layer: LayerPlan,
    residual: Residual | None,
    exact_side: Frontier,
    quantized_side: Frontier,
) -> tuple[Moments, Moments]:
    """Moments of the quantized input and the target: of three batches in four, and of the fourth."""
    weight, bias = linear.weight, linear.bias
    fit, held_out = Moments.empty(*weight.shape), Moments.empty(*weight.shape)
    for batch in range(exact_side.batches):
        exact = _rows(exact_side.value(str(linear.input.name), batch))
        quantized = fake_quantize(layer.input, _rows(quantized_side.value(str(twin.input.name), batch)))
        target = exact @ weight + bias
        if residual is not None:
            before = exact_side.value(str(_stream(linear, residual).name), batch).astype(np.float32)
            after = quantized_side.value(str(_stream(twin, residual).name), batch).astype(np.float32)
            drift = before - after
            target.reshape(len(drift), -1)[:, residual.index] += drift.reshape(len(drift), -1)
        (held_out if batch % HOLD_OUT == HOLD_OUT - 1 else fit).add(quantized, target)
    return fit, held_out


def _solve(fit: Moments, held_out: Moments, linear: Linear, layer: LayerPlan) -> dict[str, NDArray[np.generic]]:
    """Scale, codes and bias of one Linear."""
    moments = fit + held_out
    hessian = moments.hessian
    weight = ridge(fit, held_out, linear.weight) if held_out.count else linear.weight
    scale = search_weight_scale(weight, layer.weight_bits, hessian.astype(np.float32))
    codes = gptq(hessian, weight, scale, layer.weight_bits)
    return {
        f"{layer.site}/weight_scale": scale,
        f"{layer.site}/weight_codes": codes,
        f"{layer.site}/bias": refit_bias(moments, codes, scale),
    }


def _rows(value: NDArray[np.generic]) -> Array:
    return value.reshape(-1, value.shape[-1]).astype(np.float32, copy=False)
