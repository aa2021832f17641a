"""Integer weights in k/8 bytes each, as bit planes that ONNX Runtime widens once, when the session is created.

planes uint8 -> Cast -> Gather(table) -> (Slice ->) Reshape, summed over the planes

See `mptqc.reference.packing` for the layout, `mptqc.reference.trellis` for weights that a trellis codes.
"""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.graph.edit import Builder, add_initializer
from mptqc.reference.packing import MAX_BITS, Plane, pack, packed_bytes, planes_of
from mptqc.reference.trellis import TAPS, table


def emit_packed(codes: NDArray[np.int8], bits: int, build: Builder) -> ir.Value:
    """Write codes of any shape as planes and the ops that widen them; returns the int8 value, of the codes' shape.

    Raises:
        ValueError: a code does not fit `bits`.
    """
    shape = build.constant("shape", np.array(codes.shape, np.int64))
    parts = []
    for plane, content in zip(planes_of(bits), pack(codes, bits), strict=True):
        label = f"bit{plane.shift}"
        index = build.op(
            "Cast", [build.constant(label, content)], {"to": int(ir.DataType.INT32)}, name=f"{label}_index"
        )
        part = build.op("Gather", [_table(build.graph, plane), index], name=f"{label}_codes")
        if content.size * plane.codes_per_byte != codes.size:
            part = _cut(part, codes.size, label, build)
        parts.append(build.op("Reshape", [part, shape], name=f"{label}_shaped"))
    total = parts[0]
    for number, part in enumerate(parts[1:]):
        total = build.op("Add", [total, part], name=f"add{number}")
    total.shape, total.dtype = ir.Shape(codes.shape), ir.DataType.INT8
    return total


def emit_trellis(codes: NDArray[np.int8], bits: int, build: Builder) -> ir.Value:
    """Write a trellis' codes [K, N] packed, and the ops that make its weights of them; returns the int8 value [K, N].

        window = Conv(codes as float [K, 1, N], 2^(kj)), its pads the zeros before a row
        weight = Gather(table, window)

    Raises:
        ValueError: a code does not fit `bits`.
    """
    inputs, outputs = codes.shape
    packed = emit_packed(codes.reshape(inputs, 1, outputs), bits, build)
    exact = build.op("Cast", [packed], {"to": int(ir.DataType.FLOAT)}, name="trellis_codes")
    window = build.op("Conv", [exact, _window(build.graph, bits)], {"pads": [TAPS[bits] - 1, 0]}, name="trellis_window")
    index = build.op("Cast", [window], {"to": int(ir.DataType.INT32)}, name="trellis_index")
    rows = build.op("Gather", [_trellis(build.graph, bits), index], name="trellis_rows")
    weight = build.op(
        "Reshape", [rows, build.constant("trellis_shape", np.array(codes.shape, np.int64))], name="trellis"
    )
    weight.shape, weight.dtype = ir.Shape(codes.shape), ir.DataType.INT8
    return weight


def _cut(part: ir.Value, size: int, label: str, build: Builder) -> ir.Value:
    """The first `size` codes: the last byte of a plane may be partly filled."""
    flat = build.op("Reshape", [part, build.constant(f"{label}_flat", np.array([-1], np.int64))], name=f"{label}_flat")
    bounds = [build.constant(f"{label}_{name}", np.array([at], np.int64)) for name, at in (("start", 0), ("end", size))]
    return build.op("Slice", [flat, *bounds], name=f"{label}_cut")


@cache
def unpacking_bytes(bits: int, *, by_trellis: bool = False) -> int:
    """Bytes that the ops and names take which widen one weight of so many bits, its tables apart."""
    if bits == MAX_BITS:
        return 0
    one, two = (_bytes_of_packed(bits, weights, by_trellis) for weights in (1, 2))
    return two - one - packed_bytes(_TYPICAL.size, bits)


@cache
def table_bytes(plane: Plane) -> int:
    """Bytes that the table of a plane takes in a file, once for all weights."""
    return _bytes_of_shared(partial(_table, plane=plane))


@cache
def trellis_bytes(bits: int) -> int:
    """Bytes that the table and the window of a trellis take in a file, once for all weights of so many bits."""
    return sum(_bytes_of_shared(partial(find, bits=bits)) for find in (_window, _trellis))


_TYPICAL = np.zeros((8, 8), np.int8)


def _bytes_of_packed(bits: int, weights: int, by_trellis: bool) -> int:
    """Bytes of a model that holds so many packed weights."""
    inputs = [ir.val(f"x{number}", dtype=ir.DataType.INT8, shape=_TYPICAL.shape) for number in range(weights)]
    nodes = [ir.node("Identity", [value]) for value in inputs]
    graph = ir.Graph(inputs, [node.outputs[0] for node in nodes], nodes=nodes, opset_imports={"": 21}, name="packed")
    emit = emit_trellis if by_trellis else emit_packed
    for number, node in enumerate(nodes):
        node.replace_input_with(0, emit(_TYPICAL, bits, Builder(node, f"block{number:02}.proj/unpack")))
    return _size(ir.to_proto(ir.Model(graph, ir_version=10)))


def _bytes_of_shared(find: Callable[[ir.Graph], ir.Value]) -> int:
    """Bytes of an initializer that all weights share."""
    value = find(ir.Graph([], [], nodes=[], name="shared"))
    assert value.const_value is not None
    return _size(ir.to_proto(value.const_value))


def _size(proto: onnx.TensorProto | onnx.ModelProto) -> int:
    serialized: bytes = proto.SerializeToString()  # type: ignore[no-untyped-call] # protobuf has no types
    return len(serialized)


def _table(graph: ir.Graph, plane: Plane) -> ir.Value:
    """One table for all weights that have such a plane."""
    name = f"mptqc/table_bit{plane.shift}_width{plane.width}{'_signed' if plane.signed else ''}"
    return _shared(graph, name, plane.table())


def _window(graph: ir.Graph, bits: int) -> ir.Value:
    """What Conv multiplies a code and those before it by, oldest first: [1, 1, J] float32."""
    factors = np.array([1 << (bits * tap) for tap in reversed(range(TAPS[bits]))], np.float32)
    return _shared(graph, f"mptqc/trellis{bits}_window", factors.reshape(1, 1, -1))


def _trellis(graph: ir.Graph, bits: int) -> ir.Value:
    """The table of all weights that a trellis codes with so many bits."""
    return _shared(graph, f"mptqc/trellis{bits}_table", table(bits))


def _shared(graph: ir.Graph, name: str, content: NDArray[np.generic]) -> ir.Value:
    """An initializer that all weights share."""
    return graph.initializers.get(name) or add_initializer(graph, name, content)
