"""The residual streams of a model: which values carry one, who writes to it and who reads it.

A stream is a set of values of one width C, joined by residual Adds, Concats of tokens and data movement that keeps
channels last. Linears and constants (class token, position embedding) write to it, norms read it.
"""

from dataclasses import dataclass, field

import onnx_ir as ir

from mptqc.graph.edit import constant_of, is_op, producer
from mptqc.graph.layout import Shapes
from mptqc.graph.match import Linear, Norm, find_linears, find_norms, match_linear_output


@dataclass(frozen=True)
class Use:
    """Input `index` of `node`."""

    node: ir.Node
    index: int


@dataclass
class Stream:
    """One residual stream.

    Attributes:
        width: C.
        values: the values that carry it.
        linear_writers: Linears whose output enters it.
        constant_writers: where a constant [..., C] enters it.
        other_writers: values computed otherwise that enter it, with the use that they enter by.
        norms: LayerNormalizations that read it.
        linear_readers: Linears that read it directly.
        other_readers: uses that are none of these, the model's outputs aside.
        outputs: values of the stream that are outputs of the model.
    """

    width: int
    values: set[ir.Value] = field(default_factory=set)
    linear_writers: list[Linear] = field(default_factory=list)
    constant_writers: list[Use] = field(default_factory=list)
    other_writers: list[Use] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    linear_readers: list[Linear] = field(default_factory=list)
    other_readers: list[Use] = field(default_factory=list)
    outputs: list[ir.Value] = field(default_factory=list)


def find_streams(model: ir.Model, shapes: Shapes) -> list[Stream]:
    """Every residual stream that a norm reads and at least one residual Add joins, in graph order."""
    norms = {norm.node: norm for norm in find_norms(model)}
    linears = {linear.matmul: linear for linear in find_linears(model)}
    found: list[Stream] = []
    for norm in norms.values():
        if any(norm.input in stream.values for stream in found):
            continue
        stream = _grow(norm.input, len(norm.gamma), norms, linears, shapes)
        if stream is not None and stream.linear_writers:
            found.append(stream)
    return found


def _grow(
    start: ir.Value, width: int, norms: dict[ir.Node, Norm], linears: dict[ir.Node, Linear], shapes: Shapes
) -> Stream | None:
    stream = Stream(width)
    frontier = [start]
    joined = False
    while frontier:
        value = frontier.pop()
        if value in stream.values:
            continue
        stream.values.add(value)
        if value.is_graph_output():
            stream.outputs.append(value)
        linear = match_linear_output(value)
        node = value.producer()
        if linear is not None:
            stream.linear_writers.append(linear)
        elif node is None or not _carries(node, value, width, shapes):
            return None  # the stream begins at something that is no Linear: nothing to write its rotation into
        else:
            joined = joined or is_op(node, "Add")
            for index, operand in enumerate(_carried_inputs(node)):
                frontier += _enter(stream, node, index, operand, width, shapes)
        for use in value.uses():
            frontier += _leave(stream, use.node, use.idx, width, norms, linears, shapes)
    return stream if joined else None


def _enter(
    stream: Stream, node: ir.Node, index: int, operand: ir.Value | None, width: int, shapes: Shapes
) -> list[ir.Value]:
    """File one operand of a carrying node; return it if it carries the stream itself."""
    if operand is None:
        return []
    if constant_of(operand) is not None:
        stream.constant_writers.append(Use(node, index))
        return []
    source = operand.producer()
    if match_linear_output(operand) is not None or (source is not None and _carries(source, operand, width, shapes)):
        return [operand]
    stream.other_writers.append(Use(node, index))
    return []


def _leave(
    stream: Stream,
    node: ir.Node,
    index: int,
    width: int,
    norms: dict[ir.Node, Norm],
    linears: dict[ir.Node, Linear],
    shapes: Shapes,
) -> list[ir.Value]:
    """File one reader of a value of the stream; return the outputs that carry the stream on."""
    if is_op(node, "Shape"):
        return []
    if node in norms and index == 0:
        stream.norms.append(norms[node])
        return []
    if node in linears and index == 0:
        stream.linear_readers.append(linears[node])
        return []
    onward = [out for out in node.outputs if _carries(node, out, width, shapes) and index < len(_carried_inputs(node))]
    if onward:
        return onward
    stream.other_readers.append(Use(node, index))
    return []


def _carried_inputs(node: ir.Node) -> list[ir.Value | None]:
    """The inputs of a carrying node that hold the stream's channels."""
    return list(node.inputs) if is_op(node, "Add", "Concat") else [node.inputs[0]]


def _carries(node: ir.Node, value: ir.Value, width: int, shapes: Shapes) -> bool:
    """True if each row [C] of `value` is a sum of rows, or one of the rows, of the node's carried inputs."""
    if shapes.get(str(value.name), (0,))[-1:] != (width,):
        return False
    operands = _carried_inputs(node)
    for operand in operands:
        constant = constant_of(operand)
        shape = constant.shape if constant is not None else shapes.get("" if operand is None else str(operand.name), ())
        if shape[-1:] != (width,):
            return False
    rank = len(shapes[str(value.name)])
    match node.op_type if node.domain == "" else "":
        case "Add":
            return producer(value, "Add") is not None and match_linear_output(value) is None
        case "Reshape" | "Squeeze" | "Unsqueeze" | "Identity" | "Expand":
            return True
        case "Transpose":
            permutation = node.attributes.get("perm")
            return permutation is not None and permutation.as_ints()[-1] == rank - 1
        case "Concat" | "Gather" | "Split":
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
            return axis not in (-1, rank - 1)
        case "Slice":
            axes = constant_of(node.inputs[3]) if len(node.inputs) > 3 else None
            return axes is not None and not {-1, rank - 1} & {int(axis) for axis in axes.reshape(-1)}
        case _:
            return False
