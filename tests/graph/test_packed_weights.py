"""What packed weights take in a file beyond their planes, as the arithmetic of budgets has it."""

import numpy as np
import onnx_ir as ir
import pytest

from mptqc.graph.edit import Builder
from mptqc.graph.packed_weights import emit_packed, table_bytes, unpacking_bytes
from mptqc.reference.packing import packed_bytes, planes_of

SITES = ("block00.q", "block00.fc1", "block11.proj")
NAMES = 12 * 8 * 2
"""Names of other lengths: a dozen values a weight, whose names differ by a few letters."""


def file_bytes(codes, bits):
    inputs = [ir.val(site, dtype=ir.DataType.INT8, shape=ir.Shape(codes.shape)) for site in SITES]
    nodes = [ir.node("Identity", [value]) for value in inputs]
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 21}, name="g")
    plain = ir.to_proto(ir.Model(graph, ir_version=10)).ByteSize()
    for site, node in zip(SITES, nodes, strict=True):
        node.replace_input_with(0, emit_packed(codes, bits, Builder(node, f"{site}/unpack")))
    return ir.to_proto(ir.Model(graph, ir_version=10)).ByteSize() - plain


@pytest.mark.parametrize("bits", range(2, 8))
def test_the_arithmetic_is_near_a_file(bits):
    codes = np.zeros((16, 24), np.int8)
    tables = sum(table_bytes(plane) for plane in planes_of(bits))
    expected = tables + len(SITES) * (packed_bytes(codes.size, bits) + unpacking_bytes(bits))
    assert abs(file_bytes(codes, bits) - expected) <= len(SITES) * NAMES


def test_eight_bits_need_no_unpacking():
    assert unpacking_bytes(8) == 0
