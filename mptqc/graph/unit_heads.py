"""Heads brought to length 1, as SwinV2's attention by cosines has it: matched as exporters write it.

x / Clip(ReduceL2(x, -1), ε) (· factor)
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.graph.edit import Builder, constant_of, only_consumer, producer, scalar_of
from mptqc.graph.shapes import is_last_axis


@dataclass(frozen=True)
class UnitHeads:
    """`output` is x over the larger of ε and the length of its last axis, times a constant `factor` if there is one."""

    x: ir.Value
    epsilon: float
    factor: NDArray[np.float32] | None
    output: ir.Value


def match_unit_heads(output: ir.Value) -> UnitHeads | None:
    """The division that makes `output`, or the Mul behind it; None if it is something else or x has other readers."""
    factor, divided = None, output
    multiply = producer(output, "Mul")
    for value, other in () if multiply is None else (multiply.inputs, tuple(multiply.inputs)[::-1]):
        constant = constant_of(other)
        if value is not None and constant is not None and only_consumer(value) is multiply:
            factor, divided = constant.astype(np.float32, copy=False), value
    divide = producer(divided, "Div")
    clip = None if divide is None else producer(divide.inputs[1], "Clip")
    reduce = None if clip is None else producer(clip.inputs[0], "ReduceL2")
    if divide is None or clip is None or reduce is None:
        return None
    x, epsilon = divide.inputs[0], _lower_limit(clip)
    if x is None or reduce.inputs[0] is not x or set(x.consumers()) != {divide, reduce} or x.is_graph_output():
        return None
    alone = all(only_consumer(node.outputs[0]) is not None for node in (reduce, clip))
    if not alone or epsilon is None or not _over_the_last_axis(reduce, x):
        return None
    return UnitHeads(x, epsilon, factor, output)


def emit_unit_heads(x: ir.Value, epsilon: float, factor: NDArray[np.float32] | None, build: Builder) -> ir.Value:
    """The same ops on another x; the factor broadcasts to its shape."""
    length = build.op("ReduceL2", [x, build.constant("last_axis", np.array([-1], np.int64))], {"keepdims": 1})
    bounded = build.op("Clip", [length, build.constant("epsilon", np.array(epsilon, np.float32))])
    y = build.op("Div", [x, bounded])
    return y if factor is None else build.op("Mul", [y, build.constant("factor", factor)])


def _lower_limit(clip: ir.Node) -> float | None:
    """ε of Clip(·, ε), above 0; None if there is an upper limit as well."""
    limits = [*clip.inputs[1:], None, None]
    lower = scalar_of(limits[0])
    return lower if limits[1] is None and lower is not None and lower > 0 else None


def _over_the_last_axis(reduce: ir.Node, x: ir.Value) -> bool:
    axis = scalar_of(reduce.inputs[1]) if len(reduce.inputs) > 1 else None
    return axis is not None and is_last_axis(int(axis), x) and reduce.attributes.get_int("keepdims", 1) == 1
