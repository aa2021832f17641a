"""Integer weights in k/8 bytes each, as bit planes that ONNX Runtime widens once, when the session is created.

planes uint8 -> Cast -> Gather(table) -> (Slice ->) Reshape, summed over the planes

See `mptqc.reference.packing` for the layout, `mptqc.reference.trellis` for weights that a trellis codes. ONNX Runtime
keeps what each of these ops makes until the session is there, so few and narrow steps are less memory and time.
"""

from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.graph.edit import Builder, add_initializer
from mptqc.reference.custom_ops import BLOCK_INPUTS, BLOCK_OUTPUTS
from mptqc.reference.packing import MAX_BITS, Plane, pack, packed_bytes, planes_of
from mptqc.reference.trellis import TAPS, packed_table, table

PAIRED = 4
"""Bits of weights that a trellis codes whose bytes hold two codes."""


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

    Raises:
        ValueError: a code does not fit `bits`.
    """
    rows = _by_pairs(codes, build) if bits == PAIRED else _by_windows(codes, bits, build)
    shape = build.constant("trellis_shape", np.array([len(codes), -1], np.int64))
    weight = build.op("Reshape", [rows, shape], name="trellis")
    if bits == PAIRED and codes.shape[1] % 2:
        names = ("start", "end", "axis")
        bounds = [build.constant(name, np.array([at])) for name, at in zip(names, (0, -1, 1), strict=True)]
        weight = build.op("Slice", [weight, *bounds], name="trellis_cut")
    weight.shape, weight.dtype = ir.Shape(codes.shape), ir.DataType.INT8
    return weight


def to_blocks(weight: ir.Value, shape: tuple[int, ...], build: Builder) -> ir.Value:
    """`custom_ops.block_weight` of int8 [K, N] = `shape` in ONNX, where codes can not be stored in that order."""
    (inputs, outputs), padding = shape, (-shape[0] % BLOCK_INPUTS, -shape[1] % BLOCK_OUTPUTS)
    rows, columns = (inputs + padding[0]) // BLOCK_INPUTS, (outputs + padding[1]) // BLOCK_OUTPUTS
    pads = build.constant("block_pads", np.array([0, 0, *padding], np.int64))
    split = build.constant("block_shape", np.array([rows, BLOCK_INPUTS, columns, BLOCK_OUTPUTS], np.int64))
    apart = build.op("Reshape", [build.op("Pad", [weight, pads], name="block_padded"), split], name="block_rows")
    blocks = build.op("Transpose", [apart], {"perm": [2, 0, 3, 1]}, name="blocks")
    blocks.shape, blocks.dtype = ir.Shape((columns, rows, BLOCK_OUTPUTS, BLOCK_INPUTS)), ir.DataType.INT8
    return blocks


def _by_windows(codes: NDArray[np.int8], bits: int, build: Builder) -> ir.Value:
    """Weights by the window of each code; the pads of Conv are the zeros before a row.

    window = Conv(codes as float [K, 1, N], 2^(kj)), weight = Gather(table, window)
    """
    packed = emit_packed(codes[:, None], bits, build)
    factors = [1 << (bits * tap) for tap in reversed(range(TAPS[bits]))]
    return _look_up(packed, factors, _shared(build.graph, _table_name(bits), table(bits)), bits, build)


def _by_pairs(codes: NDArray[np.int8], build: Builder) -> ir.Value:
    """Weights of 4 bits, two for each byte of packed codes, by that byte and the one before it.

    pair = Conv(bytes as float [K, 1, N/2], [1, 2^8]), two weights = Gather(table of 2^16 pairs, pair)

    A third of the time and half of the memory that a window for each code takes. N is made even by a code 0.
    """
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    packed = build.constant("pairs", pack(even, PAIRED)[0].reshape(len(codes), 1, -1))
    return _look_up(packed, [1, 1 << 8], _pairs(build.graph), PAIRED, build)


def _look_up(units: ir.Value, factors: list[int], entries: ir.Value, bits: int, build: Builder) -> ir.Value:
    """Gather(entries, Σ of each unit and those before it, times `factors`); units [K, 1, n]."""
    kernel = _shared(build.graph, f"mptqc/trellis{bits}_window", np.array(factors, np.float32)[None, None])
    exact = build.op("Cast", [units], {"to": int(ir.DataType.FLOAT)}, name="trellis_units")
    window = build.op("Conv", [exact, kernel], {"pads": [len(factors) - 1, 0]}, name="trellis_window")
    index = build.op("Cast", [window], {"to": int(ir.DataType.INT32)}, name="trellis_index")
    return build.op("Gather", [entries, index], name="trellis_rows")


def _pairs(graph: ir.Graph) -> ir.Value:
    """Both weights of each two bytes, int8 [2^16, 2], made of the table [2^12] by ONNX Runtime once for all weights.

    Two bytes hold four codes, the first in the lowest bits; the windows are the first three and the last three.
    """
    if (made := next((node for node in graph if node.name == f"{_table_name(PAIRED)}/pairs"), None)) is not None:
        return made.outputs[0]
    build = Builder(graph[0], _table_name(PAIRED))
    entries = _shared(graph, _table_name(PAIRED), packed_table(PAIRED)[:, None])
    below, above = (
        build.op("Tile", [entries, build.constant(f"{name}_times", np.array(times))], name=name)
        for name, times in (("first_three", (16, 1)), ("last_three", (1, 16)))
    )
    column = build.op("Reshape", [above, build.constant("column", np.array([-1, 1]))], name="last_three_column")
    return build.op("Concat", [below, column], {"axis": 1}, name="pairs")


def _table_name(bits: int) -> str:
    return f"mptqc/trellis{bits}_table"


def _cut(part: ir.Value, size: int, label: str, build: Builder) -> ir.Value:
    """The first `size` codes: the last byte of a plane may be partly filled."""
    flat = build.op("Reshape", [part, build.constant(f"{label}_flat", np.array([-1], np.int64))], name=f"{label}_flat")
    bounds = [build.constant(f"{label}_{name}", np.array([at], np.int64)) for name, at in (("start", 0), ("end", size))]
    return build.op("Slice", [flat, *bounds], name=f"{label}_cut")


@cache
def unpacking_bytes(bits: int, *, by_trellis: bool = False, in_blocks: bool = False) -> int:
    """Bytes that the ops and names take which widen one weight of so many bits, its tables apart.

    Only a weight that a trellis codes needs ops more where products read it `in_blocks`.
    """
    if bits == MAX_BITS:
        return 0
    one, two = (_bytes_of_packed(bits, weights, by_trellis, in_blocks) for weights in (1, 2))
    return two - one - packed_bytes(_TYPICAL.size, bits)


@cache
def table_bytes(plane: Plane) -> int:
    """Bytes that the table of a plane takes in a file, once for all weights."""
    value = _table(ir.Graph([], [], nodes=[], name="shared"), plane)
    assert value.const_value is not None
    return _size(ir.to_proto(value.const_value))


@cache
def trellis_bytes(bits: int) -> int:
    """Bytes that the table and the window of a trellis take in a file, once for all weights of so many bits."""
    none, one, two = (_bytes_of_packed(bits, weights, by_trellis=True) for weights in range(3))
    return one - none - (two - one) - sum(map(table_bytes, tables_of(bits, by_trellis=True)))


def tables_of(bits: int, *, by_trellis: bool = False) -> tuple[Plane, ...]:
    """The planes whose tables widen weights of so many bits."""
    return () if bits == MAX_BITS or (by_trellis and bits == PAIRED) else planes_of(bits)


_TYPICAL = np.zeros((8, 8), np.int8)


def _bytes_of_packed(bits: int, weights: int, by_trellis: bool, in_blocks: bool = False) -> int:
    """Bytes of a model that holds so many packed weights."""
    inputs = [ir.val(f"x{number}", dtype=ir.DataType.INT8, shape=_TYPICAL.shape) for number in range(weights)]
    nodes = [ir.node("Identity", [value]) for value in inputs]
    graph = ir.Graph(inputs, [node.outputs[0] for node in nodes], nodes=nodes, opset_imports={"": 21}, name="packed")
    emit = emit_trellis if by_trellis else emit_packed
    for number, node in enumerate(nodes):
        build = Builder(node, f"block{number:02}.proj/unpack")
        weight = emit(_TYPICAL, bits, build)
        node.replace_input_with(0, to_blocks(weight, _TYPICAL.shape, build) if by_trellis and in_blocks else weight)
    return _size(ir.to_proto(ir.Model(graph, ir_version=10)))


def _size(proto: onnx.TensorProto | onnx.ModelProto) -> int:
    serialized: bytes = proto.SerializeToString()  # type: ignore[no-untyped-call] # protobuf has no types
    return len(serialized)


def _table(graph: ir.Graph, plane: Plane) -> ir.Value:
    """One table for all weights that have such a plane."""
    name = f"mptqc/table_bit{plane.shift}_width{plane.width}{'_signed' if plane.signed else ''}"
    return _shared(graph, name, plane.table())


def _shared(graph: ir.Graph, name: str, content: NDArray[np.generic]) -> ir.Value:
    """An initializer that all weights share."""
    return graph.initializers.get(name) or add_initializer(graph, name, content)
