"""Traces, against ONNX's own evaluator: push arange through the ops and compare with the index that `trace` finds."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from mptqc.graph.layout import Shapes, readers, trace

OPSET = 21


def parse(body: str, header: str = "g (float[2,3,4] x) => (float[n] y)", constants: str = "") -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : {OPSET}]>\n{header} <{constants}> {{\n{body}\n}}')


def evaluate(model: ir.Model, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    """Every value of the model, by name."""
    proto = ir.to_proto(model)
    names = [out for node in proto.graph.node for out in node.output if out]
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in names)
    return dict(zip(names, ReferenceEvaluator(proto).run(None, feeds), strict=True)) | feeds


def arange(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def shapes_of(model: ir.Model, **feeds: np.ndarray) -> Shapes:
    return {name: array.shape for name, array in evaluate(model, **feeds).items()}


def value(model: ir.Model, name: str) -> ir.Value:
    return next(out for node in model.graph for out in node.outputs if out.name == name)


class Chain:
    """Writes a random chain of data movement, keeping the current value's shape by running it on numpy's side."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.current, self.shape = "x", shape
        self._start = shape

    def constant(self, numbers: list[int]) -> str:
        name = f"c{len(self.initializers)}"
        self.initializers.append(onnx.numpy_helper.from_array(np.array(numbers, np.int64), name))
        return name

    def add(self, op: str, inputs: list[str], outputs: int = 1, **attributes: object) -> list[str]:
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(onnx.helper.make_node(op, inputs, names, **attributes))
        return names

    def model(self) -> ir.Model:
        graph = onnx.helper.make_graph(
            self.nodes,
            "chain",
            [onnx.helper.make_tensor_value_info("x", 1, self._start)],
            [onnx.helper.make_tensor_value_info(self.current, 1, None)],
            self.initializers,
        )
        proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=10)
        return ir.from_proto(proto)


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    chain = Chain(tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))))
    for _ in range(draw(st.integers(1, 6))):
        rank = len(chain.shape)
        axis = draw(st.integers(-rank, rank - 1))
        size = chain.shape[axis]
        kind = draw(
            st.sampled_from(["transpose", "reshape", "slice", "split", "gather", "roll", "unsqueeze", "squeeze"])
        )
        now = chain.current
        if kind == "transpose":
            permutation = draw(st.permutations(range(rank)))
            (chain.current,) = chain.add("Transpose", [now], perm=permutation)
            chain.shape = tuple(chain.shape[i] for i in permutation)
        elif kind == "reshape":
            order = draw(st.permutations([d for d in chain.shape if d != 1] or [1]))
            (chain.current,) = chain.add("Reshape", [now, chain.constant([-1, *order[1:]])])
            chain.shape = tuple(order)
        elif kind == "slice":
            start = draw(st.integers(-size, size - 1))
            step = draw(st.integers(1, 2))
            end = draw(st.sampled_from([size, np.iinfo(np.int64).max]))
            bounds = [chain.constant([number]) for number in (start, end, axis, step)]
            (chain.current,) = chain.add("Slice", [now, *bounds])
            chain.shape = resized(chain.shape, axis, len(range(size)[start:end:step]))
        elif kind == "split" and size > 1:
            first = draw(st.integers(1, size - 1))
            outputs = chain.add("Split", [now, chain.constant([first, size - first])], 2, axis=axis)
            taken = draw(st.integers(0, 1))
            chain.current = outputs[taken]
            chain.shape = resized(chain.shape, axis, (first, size - first)[taken])
        elif kind == "gather":
            indices = draw(st.lists(st.integers(-size, size - 1), min_size=1, max_size=3))
            (chain.current,) = chain.add("Gather", [now, chain.constant(indices)], axis=axis)
            chain.shape = resized(chain.shape, axis, len(indices))
        elif kind == "roll" and size > 1:
            by = draw(st.integers(1, size - 1))
            ends = [[chain.constant([number]) for number in bounds] for bounds in ((by, size, axis), (0, by, axis))]
            parts = [chain.add("Slice", [now, *bounds])[0] for bounds in ends]
            (chain.current,) = chain.add("Concat", parts, axis=axis)
        elif kind == "unsqueeze" and rank < 6:
            (chain.current,) = chain.add("Unsqueeze", [now, chain.constant([0])])
            chain.shape = (1, *chain.shape)
        elif kind == "squeeze" and chain.shape[0] == 1 and rank > 1:
            (chain.current,) = chain.add("Squeeze", [now, chain.constant([0])])
            chain.shape = chain.shape[1:]
    if not chain.nodes:
        (chain.current,) = chain.add("Identity", ["x"])
    return chain


def resized(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    new = list(shape)
    new[axis] = size
    return tuple(new)


@settings(max_examples=150, deadline=None)
@given(chains())
def test_a_trace_says_where_every_element_came_from(chain: Chain) -> None:
    model = chain.model()
    x = arange(*chain.model().graph.inputs[0].shape.numpy())
    values = evaluate(model, x=x)
    found = trace(value(model, chain.current), {name: array.shape for name, array in values.items()})
    assert found.source is model.graph.inputs[0]
    np.testing.assert_array_equal(found.index, values[chain.current])


@settings(max_examples=50, deadline=None)
@given(chains())
def test_readers_find_the_far_end_of_a_chain(chain: Chain) -> None:
    model = chain.model()
    shapes = shapes_of(model, x=arange(*model.graph.inputs[0].shape.numpy()))
    found = readers(model.graph.inputs[0], shapes)
    assert chain.current in [reader.value.name for reader in found if reader.node is None]


def test_a_computed_value_is_its_own_source() -> None:
    model = parse("r = Relu(x)\ny = Sqrt(r)")
    found = trace(value(model, "r"), shapes_of(model, x=arange(2, 3, 4)))
    assert found.source.name == "r"
    np.testing.assert_array_equal(found.index, arange(2, 3, 4))


def test_the_trace_stops_at_the_nearest_computed_value() -> None:
    model = parse("t = Transpose<perm=[1,0,2]>(x)\nr = Relu(t)\ny = Transpose<perm=[2,1,0]>(r)")
    assert trace(value(model, "y"), shapes_of(model, x=arange(2, 3, 4))).source.name == "r"


def test_channels_are_positions_on_the_sources_last_axis() -> None:
    model = parse("y = Transpose<perm=[2,0,1]>(x)")
    shapes = shapes_of(model, x=arange(2, 3, 4))
    channels = trace(value(model, "y"), shapes).channels(shapes)
    np.testing.assert_array_equal(channels, np.broadcast_to(np.arange(4)[:, None, None], (4, 2, 3)))


SOURCES = {
    "computed_indices": "s = ReduceSum<keepdims=0>(x)\ni = Cast<to=7>(s)\nj = Sub(i, i)\ny = Gather<axis=1>(x, j)",
    "computed_bounds": "n = Shape(x)\no = Sub(n, n)\ny = Slice(x, o, n)",
    "backwards": "y = Slice(x, last, first, axis, back)",
    "concat_of_two_values": "r = Relu(x)\ny = Concat<axis=1>(r, x)",
    "concat_with_a_constant": "y = Concat<axis=1>(x, extra)",
    "pad": "y = Pad(x, pads)",
    "expand": "y = Expand(x, wide)",
}
CONSTANTS = (
    "int64[1] last = {-1}, int64[1] first = {-9}, int64[1] axis = {1}, int64[1] back = {-1}, "
    "int64[6] pads = {0,1,0,0,0,0}, int64[4] wide = {2,2,3,4}, "
    "float[2,1,4] extra = {1,2,3,4,5,6,7,8}"
)


@pytest.mark.parametrize("name", SOURCES)
def test_what_cannot_be_followed_is_a_source_itself(name: str) -> None:
    model = parse(SOURCES[name], constants=CONSTANTS)
    shapes = shapes_of(model, x=arange(2, 3, 4))
    assert trace(value(model, "y"), shapes).source.name == "y"


def test_a_constant_is_no_source() -> None:
    model = parse("t = Transpose<perm=[1,0,2]>(extra)\ny = Add(x, t)", constants=CONSTANTS)
    shapes = dict(shapes_of(model, x=arange(1, 2, 4)), extra=(2, 1, 4))
    assert trace(value(model, "t"), shapes).source.name == "t"


def test_a_value_of_unknown_shape_is_not_followed() -> None:
    model = parse("t = Transpose<perm=[1,0,2]>(x)\ny = Identity(t)")
    shapes = dict(shapes_of(model, x=arange(2, 3, 4)))
    del shapes["t"]
    assert trace(value(model, "y"), shapes).source.name == "y"


def test_a_split_whose_other_output_is_unused() -> None:
    model = parse("a, b, c = Split<axis=2, num_outputs=3>(x)\ny = Relu(b)", "g (float[2,3,6] x) => (float[n] y)")
    x = arange(2, 3, 6)
    found = trace(value(model, "b"), shapes_of(model, x=x))
    np.testing.assert_array_equal(found.index, x[:, :, 2:4])


def test_readers_are_computing_nodes_and_graph_outputs() -> None:
    model = parse(
        "t = Transpose<perm=[1,0,2]>(x)\nu = Reshape(t, flat)\nr = Relu(u)\ns = Mul(x, x)\n"
        "n = Shape(t)\nm = Cast<to=1>(n)",
        "g (float[2,3,4] x) => (float[n] r, float[n] s, float[n] t, float[3] m)",
        "int64[1] flat = {-1}",
    )
    found = readers(model.graph.inputs[0], shapes_of(model, x=arange(2, 3, 4)))
    assert [(reader.node.op_type if reader.node else None, reader.value.name) for reader in found] == [
        ("Mul", "x"),
        (None, "t"),
        ("Relu", "u"),
    ]


def test_a_concat_with_other_data_is_a_reader() -> None:
    model = parse("y = Concat<axis=1>(extra, x)", constants=CONSTANTS)
    (reader,) = readers(model.graph.inputs[0], shapes_of(model, x=arange(2, 3, 4)))
    assert reader.node is not None
    assert reader.node.op_type == "Concat"


def test_a_rolled_value_is_one_movement() -> None:
    model = parse(
        "a = Slice(x, one, max, one)\nb = Slice(x, zero, one, one)\nr = Concat<axis=1>(a, b)\ny = Relu(r)",
        constants="int64[1] zero = {0}, int64[1] one = {1}, int64[1] max = {9223372036854775807}",
    )
    x = arange(2, 3, 4)
    (reader,) = readers(model.graph.inputs[0], shapes_of(model, x=x))
    np.testing.assert_array_equal(reader.trace.index, np.roll(x, -1, axis=1))
