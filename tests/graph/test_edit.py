import numpy as np
import onnx_ir as ir
import pytest

from mptqc.graph.edit import (
    Builder,
    add_initializer,
    constant_of,
    is_op,
    only_consumer,
    producer,
    remove_dead,
    replace_value,
    scalar_of,
    set_initializer,
)


def parse(body: str, header: str = "g (float[n] x) => (float[n] y)", constants: str = "float[2] c = {1,2}") -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]>\n{header} <{constants}> {{\n{body}\n}}')


def names(model: ir.Model) -> list[str]:
    return [str(value.name) for node in model.graph for value in node.outputs]


def test_constant_of_an_initializer():
    model = parse("y = Add(x, c)")
    np.testing.assert_array_equal(constant_of(model.graph[0].inputs[1]), [1, 2])


def test_constant_of_a_constant_node():
    model = parse("k = Constant<value = float[2] {3,4}>()\ny = Add(x, k)")
    np.testing.assert_array_equal(constant_of(model.graph[1].inputs[1]), [3, 4])


@pytest.mark.parametrize("index", [0, 1])
def test_a_computed_value_or_graph_input_is_no_constant(index):
    model = parse("r = Relu(x)\ny = Add(x, r)")
    assert constant_of(model.graph[1].inputs[index]) is None


def test_a_missing_input_is_no_constant():
    assert constant_of(None) is None


@pytest.mark.parametrize(("constants", "expected"), [("float c = {3}", 3.0), ("float[1,1] c = {4}", 4.0)])
def test_scalar_of_one_element_of_any_rank(constants, expected):
    assert scalar_of(parse("y = Add(x, c)", constants=constants).graph[0].inputs[1]) == expected


def test_two_elements_are_no_scalar():
    assert scalar_of(parse("y = Add(x, c)").graph[0].inputs[1]) is None


def test_an_op_of_another_domain_is_another_op():
    node = ir.node("Add", [], domain="com.example")
    assert not is_op(node, "Add")
    assert is_op(ir.node("Add", []), "Add", "Sub")
    assert not is_op(None, "Add")


def test_producer_must_be_of_the_named_op():
    model = parse("r = Relu(x)\ny = Add(x, r)")
    relu = model.graph[0]
    assert producer(relu.outputs[0], "Relu") is relu
    assert producer(relu.outputs[0], "Add") is None
    assert producer(model.graph.inputs[0], "Relu") is None


@pytest.mark.parametrize(
    ("body", "header"),
    [
        ("r = Relu(x)\na = Sqrt(r)\nb = Sqrt(r)\ny = Add(a, b)", "g (float[n] x) => (float[n] y)"),
        ("r = Relu(x)\ny = Mul(r, r)", "g (float[n] x) => (float[n] y)"),
        ("r = Relu(x)\ny = Sqrt(r)", "g (float[n] x) => (float[n] y, float[n] r)"),
        ("r = Relu(x)", "g (float[n] x) => (float[n] r)"),
    ],
    ids=["two_nodes", "twice_by_one_node", "graph_output_too", "graph_output_alone"],
)
def test_only_consumer_refuses_other_readers(body, header):
    assert only_consumer(parse(body, header).graph[0].outputs[0]) is None


def test_only_consumer():
    model = parse("r = Relu(x)\ny = Sqrt(r)")
    assert only_consumer(model.graph[0].outputs[0]) is model.graph[1]


def test_a_taken_initializer_name_gets_a_number():
    graph = parse("y = Add(x, c)").graph
    assert [add_initializer(graph, "c", np.zeros(1, np.float32)).name for _ in range(2)] == ["c_1", "c_2"]


def test_set_initializer_copies_on_write():
    model = parse("r = Add(x, c)\ny = Mul(r, c)")
    set_initializer(model.graph[0], 1, np.array([5, 6], np.float32))
    np.testing.assert_array_equal(constant_of(model.graph[0].inputs[1]), [5, 6])
    np.testing.assert_array_equal(constant_of(model.graph[1].inputs[1]), [1, 2])


def test_a_new_constant_for_a_constant_nodes_output_takes_another_name():
    model = parse("k = Constant<value = float[2] {3,4}>()\nr = Add(x, k)\ny = Mul(r, k)")
    value = set_initializer(model.graph[1], 1, np.array([5, 6], np.float32))
    assert value.name not in names(model)


def test_builder_inserts_before_the_anchor_in_order():
    model = parse("r = Relu(x)\ny = Sqrt(r)")
    build = Builder(model.graph[1], "new")
    inner = build.op("Neg", [model.graph[0].outputs[0]])
    model.graph[1].replace_input_with(0, inner)
    build.op("Abs", [inner], name="last")
    assert [node.op_type for node in model.graph] == ["Relu", "Neg", "Abs", "Sqrt"]
    assert names(model) == ["r", "new/Neg_output", "new/last_output", "y"]


def test_builders_of_one_prefix_never_repeat_a_name():
    model = parse("y = Relu(x)")
    for _ in range(2):
        build = Builder(model.graph[len(model.graph) - 1], "p")
        build.op("Neg", [model.graph.inputs[0]])
        build.op("Neg", [model.graph.inputs[0]])
    assert len(set(names(model))) == len(names(model)) == 5
    assert len({node.name for node in model.graph}) == 5


def test_replaced_graph_output_keeps_its_name():
    model = parse("y = Relu(x)")
    old = model.graph[0].outputs[0]
    new = Builder(model.graph[0], "p").op("Sqrt", [model.graph.inputs[0]])
    replace_value(old, new)
    assert model.graph.outputs[0] is new
    assert new.name == "y"
    assert new.shape == old.shape
    remove_dead(model)
    assert [node.op_type for node in model.graph] == ["Sqrt"]


def test_replaced_value_is_read_nowhere():
    model = parse("r = Relu(x)\na = Sqrt(r)\ny = Add(a, r)")
    old = model.graph[0].outputs[0]
    replace_value(old, model.graph.inputs[0])
    assert not old.uses()


def test_a_graph_input_cannot_become_a_graph_output():
    model = parse("y = Relu(x)")
    with pytest.raises(AssertionError, match="no node's output"):
        replace_value(model.graph[0].outputs[0], model.graph.inputs[0])


def test_remove_dead_drops_what_no_output_needs():
    model = parse("d = Add(x, c)\ny = Relu(x)")
    remove_dead(model)
    assert [node.op_type for node in model.graph] == ["Relu"]
    assert not model.graph.initializers
