"""Packed weights: what ONNX Runtime widens them to, and what they take in a file beyond their planes."""

import numpy as np
import onnx_ir as ir
import pytest

from mptqc.errors import VerifyError
from mptqc.graph.edit import Builder
from mptqc.graph.packed_weights import (
    emit_packed,
    emit_trellis,
    table_bytes,
    tables_of,
    to_blocks,
    trellis_bytes,
    unpacking_bytes,
)
from mptqc.graph.stored_weight import read_weight
from mptqc.reference.packing import packed_bytes, planes_of
from mptqc.reference.trellis import TAPS, decode
from mptqc.runtime.session import create_session

SITES = ("block00.q", "block00.fc1", "block11.proj")
NAMES = 12 * 8 * 2
"""Names of other lengths: a dozen values a weight, whose names differ by a few letters."""


def model_of(weights, emit, bits):
    """A model that puts out what it widens: one int8 output a weight."""
    inputs = [ir.val(site, dtype=ir.DataType.INT8, shape=ir.Shape(codes.shape)) for site, codes in weights.items()]
    nodes = [ir.node("Identity", [value]) for value in inputs]
    for node, codes in zip(nodes, weights.values(), strict=True):
        node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.INT8, ir.Shape(codes.shape)
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([], outputs, nodes=nodes, opset_imports={"": 17}, name="g")
    for node, (site, codes) in zip(nodes, weights.items(), strict=True):
        node.replace_input_with(0, emit(codes, bits, Builder(node, f"{site}/unpack")))
    return ir.to_proto(ir.Model(graph, ir_version=9))


@pytest.mark.parametrize("outputs", [1, 16, 17])
@pytest.mark.parametrize("bits", sorted(TAPS))
def test_a_trellis_codes_are_widened_to_its_weights_and_read_back(bits, outputs):
    random = np.random.default_rng(bits)
    weights = {site: random.integers(-(1 << bits - 1), 1 << bits - 1, (8, outputs), dtype=np.int8) for site in SITES}
    proto = model_of(weights, emit_trellis, bits)
    made = create_session(proto.SerializeToString()).run(None, {})
    read = ir.from_proto(proto).graph.outputs
    for codes, integers, output in zip(weights.values(), made, read, strict=True):
        np.testing.assert_array_equal(integers, decode(codes, bits))
        stored = read_weight(output.producer().inputs[0], "site")
        np.testing.assert_array_equal(stored.trellis_codes, codes)
        np.testing.assert_array_equal(stored.integers, integers)
        assert stored.bits == bits


@pytest.mark.parametrize("bits", sorted(TAPS))
def test_a_trellis_of_other_ops_is_refused(bits):
    model = ir.from_proto(model_of({"site": np.zeros((8, 16), np.int8)}, emit_trellis, bits))
    conv = next(node for node in model.graph if node.op_type == "Conv")
    conv.outputs[0].replace_all_uses_with(conv.inputs[0])
    with pytest.raises(VerifyError, match=r"^site: its weight .*; compile again$"):
        read_weight(model.graph.outputs[0].producer().inputs[0], "site")


def file_bytes(codes, bits, emit=emit_packed):
    inputs = [ir.val(site, dtype=ir.DataType.INT8, shape=ir.Shape(codes.shape)) for site in SITES]
    nodes = [ir.node("Identity", [value]) for value in inputs]
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 21}, name="g")
    plain = ir.to_proto(ir.Model(graph, ir_version=10)).ByteSize()
    for site, node in zip(SITES, nodes, strict=True):
        node.replace_input_with(0, emit(codes, bits, Builder(node, f"{site}/unpack")))
    return ir.to_proto(ir.Model(graph, ir_version=10)).ByteSize() - plain


@pytest.mark.parametrize("bits", range(2, 8))
def test_the_arithmetic_is_near_a_file(bits):
    codes = np.zeros((16, 24), np.int8)
    tables = sum(table_bytes(plane) for plane in planes_of(bits))
    expected = tables + len(SITES) * (packed_bytes(codes.size, bits) + unpacking_bytes(bits))
    assert abs(file_bytes(codes, bits) - expected) <= len(SITES) * NAMES


def test_eight_bits_need_no_unpacking():
    assert unpacking_bytes(8) == 0


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("bits", sorted(TAPS))
def test_so_it_is_of_weights_that_a_trellis_codes(bits, in_blocks):
    def emit(codes, bits, build):
        weight = emit_trellis(codes, bits, build)
        return to_blocks(weight, codes.shape, build) if in_blocks else weight

    codes = np.zeros((16, 24), np.int8)
    shared = sum(map(table_bytes, tables_of(bits, by_trellis=True))) + trellis_bytes(bits)
    more = unpacking_bytes(bits, by_trellis=True, in_blocks=in_blocks)
    expected = shared + len(SITES) * (packed_bytes(codes.size, bits) + more)
    assert abs(file_bytes(codes, bits, emit) - expected) <= len(SITES) * NAMES
