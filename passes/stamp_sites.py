"""Write a stable id on every Linear, norm, attention and convolution; the canonical form is complete after it.

Ids follow the structure, since exporters rename weights: block03.qkv, block03.proj, block03.fc1, block03.gate,
block03.fc2, block03.attention, block03.norm1, patch_embed, head, and linear00, norm00, conv00 for what is none of
these.
"""

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from mptqc.graph.blocks import match_gated
from mptqc.graph.edit import constant_of, is_op, only_consumer, producer
from mptqc.graph.layout import Shapes, readers, trace
from mptqc.graph.match import (
    SITE_KEY,
    Attention,
    Linear,
    find_attentions,
    find_convolutions,
    find_linears,
    find_norms,
    match_linear_output,
)
from mptqc.graph.rotary import match_rotated
from mptqc.passes.base import Pass, PassResult, Stage

_NORMS = {"fc1": "norm2", "gate": "norm2", "fc2": "norm3"}


@dataclass(frozen=True)
class StampSites(Pass):
    """Stamp `mptqc.site` into the metadata of every node that a plan can speak of."""

    name: ClassVar[str] = "stamp-sites"
    ensures: ClassVar[Stage | None] = Stage.CANONICAL
    shapes: Shapes

    def call(self, model: ir.Model) -> PassResult:
        """Stamp every site; runs of the same model give the same ids."""
        names = name_sites(model, self.shapes)
        for node, name in names.items():
            node.metadata_props[SITE_KEY] = name
        return PassResult(model, len(names))


def name_sites(model: ir.Model, shapes: Shapes) -> dict[ir.Node, str]:
    """Site ids by node: MatMul of a Linear, LayerNormalization, Softmax of an attention, Conv."""
    names: dict[ir.Node, str] = {}
    linears = find_linears(model)
    by_input = {linear.matmul: linear for linear in linears}
    for block, attention in enumerate(find_attentions(model)):
        prefix = f"block{block:02d}"
        names[attention.softmax] = f"{prefix}.attention"
        _name_projections(attention, prefix, names, shapes)
        for reader in readers(attention.context.outputs[0], shapes):
            if reader.node in by_input:
                names.setdefault(reader.node, f"{prefix}.proj")
    order = {node: position for position, node in enumerate(model.graph)}
    starts = sorted(order[attention.softmax] for attention in find_attentions(model))
    for linear in linears:
        if linear.matmul not in names:
            _name_mlp(linear, by_input, sum(start < order[linear.matmul] for start in starts) - 1, names, shapes)
    _name_ends(model, linears, names, shapes)
    counts: dict[str, int] = {}
    unnamed: dict[str, list[ir.Node]] = {
        "linear": [linear.matmul for linear in linears],
        "conv": [convolution.node for convolution in find_convolutions(model)],
    }
    for kind, nodes in unnamed.items():
        for node in nodes:
            if node not in names:
                names[node] = f"{kind}{counts.setdefault(kind, 0):02d}"
                counts[kind] += 1
    _name_norms(model, by_input, names, shapes)
    return _without_repeats(names)


def _name_projections(attention: Attention, prefix: str, names: dict[ir.Node, str], shapes: Shapes) -> None:
    """qkv if one Linear makes all three; else the letters that each one makes (q, k, v, kv, …)."""
    letters: dict[ir.Node, str] = {}
    for letter, value in (("q", attention.q), ("k", attention.k), ("v", attention.v)):
        source = trace(value, shapes).source
        rotated = match_rotated(source)
        linear = match_linear_output(source if rotated is None else trace(rotated.x, shapes).source)
        if linear is not None:
            letters[linear.matmul] = letters.get(linear.matmul, "") + letter
    for node, made in letters.items():
        names.setdefault(node, f"{prefix}.{made}")


def _name_mlp(
    linear: Linear, by_input: dict[ir.Node, Linear], block: int, names: dict[ir.Node, str], shapes: Shapes
) -> None:
    """fc1 -> Gelu -> fc2, or activation(gate)·fc1 (-> norm) -> fc2."""
    prefix = f"block{max(block, 0):02d}"
    for reader in readers(linear.output, shapes):
        gated = None if reader.node is None else match_gated(reader.node)
        if reader.node is None or not (is_op(reader.node, "Gelu") or (gated and gated.value.matmul is linear.matmul)):
            continue
        output = reader.node.outputs[0]
        norm = only_consumer(output)
        if norm is not None and is_op(norm, "LayerNormalization"):
            output = norm.outputs[0]
        for second in readers(output, shapes):
            if second.node in by_input and second.node not in names:
                names[linear.matmul] = f"{prefix}.fc1"
                names[second.node] = f"{prefix}.fc2"
                if gated is not None:
                    names.setdefault(gated.gate.matmul, f"{prefix}.gate")


def _name_ends(model: ir.Model, linears: list[Linear], names: dict[ir.Node, str], shapes: Shapes) -> None:
    """patch_embed reads the image; a head's output reaches the model's output through nothing but Add, Mul and Div."""
    images = set(model.graph.inputs)
    candidates = [(convolution.node, convolution.input) for convolution in find_convolutions(model)]
    for node, value in [*candidates, *((linear.matmul, linear.input) for linear in linears)]:
        if trace(value, shapes).source in images:
            names.setdefault(node, "patch_embed")
    frontier = list(model.graph.outputs)
    while frontier:
        source = trace(frontier.pop(0), shapes).source
        linear = match_linear_output(source)
        if linear is not None:
            names.setdefault(linear.matmul, "head")
            continue
        ending = producer(source, "Add", "Mul", "Div", "Softmax", "ReduceMean", "Concat", "Unsqueeze")
        if ending is not None:
            frontier.extend(value for value in ending.inputs if value is not None and constant_of(value) is None)


def _name_norms(model: ir.Model, linears: dict[ir.Node, Linear], names: dict[ir.Node, str], shapes: Shapes) -> None:
    """A norm is named after the Linear it feeds: block03.norm1 (q, k, v), .norm2 (fc1), .norm3 (fc2), head.norm, …"""
    unnamed = 0
    for norm in find_norms(model):
        fed = [names[reader.node] for reader in readers(norm.output, shapes) if reader.node in linears]
        if not fed:
            names[norm.node] = f"norm{unnamed:02d}"
            unnamed += 1
            continue
        block, _, part = fed[0].rpartition(".")
        if block:
            names[norm.node] = f"{block}.{_NORMS.get(part, 'norm1')}"
        else:
            names[norm.node] = f"{part}.norm"


def _without_repeats(names: dict[ir.Node, str]) -> dict[ir.Node, str]:
    """Number the second and later holders of one name: head, head.1, …"""
    seen: dict[str, int] = {}
    result = {}
    for node, name in names.items():
        seen[name] = seen.get(name, -1) + 1
        result[node] = f"{name}.{seen[name]}" if seen[name] else name
    return result
