"""Cut a model into segments that run one after the other: what changes in one leaves the values before it as they are.

A cut lies between two sites (never inside a Linear or an attention), where the fewest values cross it: for a
transformer at each addition to the residual stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import onnx
import onnx_ir as ir

from mptqc.graph.edit import constant_of
from mptqc.graph.match import find_attentions, find_linears
from mptqc.graph.tensors import find_marked


@dataclass(frozen=True)
class Segment:
    """Some nodes of a model as a model of their own, at the same stage.

    Attributes:
        model: ONNX bytes.
        inputs: values that it reads, by name.
        outputs: values that later segments read, and the graph outputs that it makes.
        sites: Linears, attentions and marked tensors in it.
    """

    model: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sites: tuple[str, ...]


def split(model: ir.Model) -> list[Segment]:
    """Cut the model; all its nodes are in one segment each, in graph order."""
    nodes = list(model.graph)
    spans = _spans(nodes, model)
    gaps = [_narrowest(nodes, one[1], two[0] - 1) for one, two in pairwise(spans)]
    cuts = [0]
    for index, (width, position) in enumerate(gaps):
        near = [gaps[other][0] for other in (index - 1, index + 1) if 0 <= other < len(gaps)]
        if all(width <= other for other in near):
            cuts.append(position + 1)
    bounds = zip(cuts, [*cuts[1:], len(nodes)], strict=True)
    return [_segment(model, nodes[start:stop], set(nodes[stop:])) for start, stop in bounds]


def _spans(nodes: Sequence[ir.Node], model: ir.Model) -> list[tuple[int, int]]:
    """First and last node of each site, those that overlap joined, in order."""
    place = {node: position for position, node in enumerate(nodes)}
    found = [(place[linear.matmul], place[linear.add]) for linear in find_linears(model)]
    found += [(place[attention.scores], place[attention.context]) for attention in find_attentions(model)]
    joined: list[tuple[int, int]] = []
    for first, last in sorted(found):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(last, joined[-1][1])
        else:
            joined.append((first, last))
    return joined


def _narrowest(nodes: Sequence[ir.Node], first: int, last: int) -> tuple[int, int]:
    """(values that cross, position): the last position of first..last after which the fewest values are alive."""
    widths = [(_crossing(nodes, position), -position) for position in range(first, last + 1)]
    width, position = min(widths)
    return width, -position


def _crossing(nodes: Sequence[ir.Node], position: int) -> int:
    before = set(nodes[: position + 1])
    return sum(any(user not in before for user in value.consumers()) for node in before for value in node.outputs)


def _segment(model: ir.Model, nodes: Sequence[ir.Node], later: set[ir.Node]) -> Segment:
    made = {value for node in nodes for value in node.outputs}
    read = [value for node in nodes for value in node.inputs if value is not None]
    constants = {str(value.name): value for value in read if value.is_initializer()}
    inputs = {str(value.name): value for value in read if value not in made and not value.is_initializer()}
    outputs = {
        str(value.name): value
        for node in nodes
        for value in node.outputs
        if value.is_graph_output() or any(user in later for user in value.consumers())
    }
    graph = onnx.GraphProto(name="segment")
    graph.node.extend(ir.to_proto(node) for node in nodes)
    for name, value in constants.items():
        array = constant_of(value)
        assert array is not None
        graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    graph.input.extend(ir.to_proto(value) for value in inputs.values())
    graph.output.extend(ir.to_proto(value) for value in outputs.values())
    kept = [value for value in made if value.name not in outputs and value.type is not None]
    graph.value_info.extend(ir.to_proto(value) for value in kept)
    imports = [onnx.helper.make_opsetid(domain, number) for domain, number in model.opset_imports.items()]
    proto = onnx.helper.make_model(graph, opset_imports=imports, ir_version=model.ir_version)
    onnx.helper.set_model_props(proto, dict(model.metadata_props))
    part = ir.from_proto(proto)
    sites = [linear.site for linear in find_linears(part)] + [attention.site for attention in find_attentions(part)]
    sites += [tensor.site for tensor in find_marked(part)]
    serialized: bytes = proto.SerializeToString()  # type: ignore[no-untyped-call] # protobuf has no types
    return Segment(serialized, tuple(inputs), tuple(outputs), tuple(sites))
