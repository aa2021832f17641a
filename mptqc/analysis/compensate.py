"""Sequential compensation: each Linear in graph order gets the weights that best make up for all quantized before it.

Two copies of the smoothed model advance together, one float, one quantized so far. At each Linear both inputs are at
hand; its target is the float output and, where the output is added to the residual stream, the float stream minus the
quantized one besides: each branch repairs the drift so far (METHOD, Compensation).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.analysis.frontier import Frontier
from mptqc.analysis.gptq import Factor, Moments, gptq, refit_bias, ridge, rows_to_round
from mptqc.analysis.observe import Progress
from mptqc.analysis.weights import search_trellis_scale, search_weight_scale
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
MOST_ROWS = 32_768


@dataclass(frozen=True)
class Residual:
    """A Linear's output enters the stream at an Add, whose input `stream` is the stream before.

    `element` [elements of one image's output]: the output's element i meets the stream's element element[i].
    """

    stream: int
    element: NDArray[np.int64]


@dataclass(frozen=True)
class Member:
    """One of the Linears that read one value through one quantizer: in the float model, and in the quantized one."""

    linear: Linear
    twin: Linear
    layer: LayerPlan
    residual: Residual | None


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
    for _, sharing in groupby(linears, key=lambda linear: (linear.input.name, layers[linear.site].input)):
        report("compensate", done, len(linears))
        twins = {linear.site: linear for linear in find_linears(partial)}
        group = [
            Member(linear, twins[linear.site], layers[linear.site], find_residual(linear, shapes)) for linear in sharing
        ]
        exact_side.advance([value for member in group for value in _needed(member.linear, member.residual)])
        quantized_side.advance([value for member in group for value in _needed(member.twin, member.residual)])
        plan = plan.with_arrays(_solve(*_collect(group, exact_side, quantized_side), group))
        quantize(partial, _only(plan, group))
        done += len(group)
    report("compensate", done, len(linears))
    return plan


def _only(plan: QuantPlan, group: Sequence[Member]) -> QuantPlan:
    """The plan of these Linears and nothing else."""
    layers = tuple(member.layer for member in group)
    return plan.model_copy(update={"layers": layers, "attentions": (), "tensors": ()})


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
    index = read[0].trace.index.reshape(-1)
    if len(index) != np.prod(shapes[str(linear.output.name)]):
        return None
    return Residual(stream, np.argsort(index))


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


def _collect(group: Sequence[Member], exact_side: Frontier, quantized_side: Frontier) -> tuple[Moments, Moments]:
    """Moments of the group's quantized input and its targets, side by side: of three batches in four, of the fourth."""
    inputs = group[0].linear.weight.shape[0]
    fit: Moments | None = None
    name, twin_name = str(group[0].linear.input.name), str(group[0].twin.input.name)
    step = _row_step(exact_side, name)
    for batch in range(exact_side.batches):
        chosen = slice(batch % step, None, step)
        exact = _rows(exact_side, name, batch)[:, chosen]
        quantized = fake_quantize(group[0].layer.input, _rows(quantized_side, twin_name, batch)[:, chosen])
        targets = [_target(member, exact, chosen, exact_side, quantized_side, batch) for member in group]
        x, target = quantized.reshape(-1, inputs), np.concatenate(targets, axis=1)
        if fit is None:
            fit = Moments.around(x, target)
            held_out = fit.empty()
        (held_out if batch % HOLD_OUT == HOLD_OUT - 1 else fit).add(x, target)
    assert fit is not None, "there is at least one calibration image"
    return fit, held_out


def _row_step(side: Frontier, name: str) -> int:
    """Every how many rows one is taken, so that all images together give about `MOST_ROWS`."""
    images, rows = _rows(side, name, 0).shape[:2]
    return int(max(1, side.batches * images * rows // MOST_ROWS))


def _target(
    member: Member, exact: Array, chosen: slice, exact_side: Frontier, quantized_side: Frontier, batch: int
) -> Array:
    """What the Linear should give for the chosen rows of each image, [images·rows, N]."""
    linear, residual = member.linear, member.residual
    target: Array = exact.reshape(-1, exact.shape[-1]) @ linear.weight + linear.bias
    if residual is not None:
        before = exact_side.value(str(_stream(linear, residual).name), batch).astype(np.float32, copy=False)
        after = quantized_side.value(str(_stream(member.twin, residual).name), batch).astype(np.float32, copy=False)
        drift = (before - after).reshape(len(exact), -1)[:, residual.element]
        target += drift.reshape(len(exact), -1, target.shape[1])[:, chosen].reshape(target.shape)
    return target


def _solve(fit: Moments, held_out: Moments, group: Sequence[Member]) -> dict[str, NDArray[np.generic]]:
    """Scales, codes and biases of a group."""
    moments = fit + held_out
    hessian = moments.hessian
    weight = np.concatenate([member.linear.weight for member in group], axis=1)
    if held_out.count:
        weight = ridge(fit, held_out, weight)
    factor = Factor.of(hessian)
    found: dict[str, NDArray[np.generic]] = {}
    start = 0
    for member in group:
        columns = slice(start, start + member.linear.weight.shape[1])
        start = columns.stop
        part = weight[:, columns]
        site, bits, by_trellis = member.layer.site, member.layer.weight_bits, member.layer.trellis
        scale = search_weight_scale(part, bits, hessian.astype(np.float32))
        if by_trellis:
            scale = search_trellis_scale(rows_to_round(factor, part, scale, bits), factor.counts, bits)
        codes = gptq(factor, part, scale, bits, by_trellis=by_trellis)
        found |= {
            f"{site}/weight_scale": scale,
            f"{site}/weight_codes": codes,
            f"{site}/bias": refit_bias(moments.of_targets(columns), member.layer.integers(codes), scale),
        }
    return found


def _rows(side: Frontier, name: str, batch: int) -> Array:
    """[images, rows of one image, channels]."""
    value = side.value(name, batch)
    return value.reshape(side.images(batch), -1, value.shape[-1]).astype(np.float32, copy=False)
