import numpy as np
import onnx_ir as ir
import pytest

from mptqc.graph.match import (
    find_attentions,
    find_convolutions,
    find_linears,
    find_norms,
    find_rms_norms,
    match_linear,
    match_linear_output,
    site_of,
)

CONSTANTS = (
    "float[3,2] W = {1,2,3,4,5,6}, float[2] b = {7,8}, float[1,2] row = {7,8}, float one = {1}, "
    "float[3] gamma = {1,2,3}, float[3] beta = {4,5,6}, float[4,3] gammas = {1,2,3,4,5,6,7,8,9,10,11,12}, "
    "float two = {2}, int64[1] last = {-1}, "
    "float[4,4] mask = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}, float[1,3,1,1] kernel = {1,2,3}, float[1] kb = {4}"
)
HEADER = "g (float[n,4,3] x) => (float[n,4,2] y)"


def parse(body: str, header: str = HEADER) -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]>\n{header} <{CONSTANTS}> {{\n{body}\n}}')


@pytest.mark.parametrize("addition", ["Add(p, b)", "Add(b, p)"])
def test_linear(addition):
    model = parse(f"p = MatMul(x, W)\ny = {addition}")
    (linear,) = find_linears(model)
    assert linear.input is model.graph.inputs[0]
    assert linear.output is model.graph.outputs[0]
    np.testing.assert_array_equal(linear.weight, [[1, 2], [3, 4], [5, 6]])
    np.testing.assert_array_equal(linear.bias, [7, 8])
    assert match_linear_output(model.graph.outputs[0]) == linear


@pytest.mark.parametrize(
    "body",
    [
        "y = MatMul(x, W)",
        "p = MatMul(x, W)\ny = Add(p, row)",
        "p = MatMul(x, W)\ny = Add(p, one)",
        "p = MatMul(x, W)\ny = Add(p, p)",
        "p = MatMul(x, W)\nq = Add(p, b)\ny = Mul(p, q)",
        "p = MatMul(x, W)\ny = Sub(p, b)",
        "w = Transpose(x)\np = MatMul(x, w)\ny = Add(p, b)",
        "p = Gemm(x, W)\ny = Add(p, b)",
    ],
    ids=[
        "no_bias",
        "bias_as_a_row",
        "scalar_bias",
        "added_to_itself",
        "second_reader",
        "sub",
        "computed_weight",
        "gemm",
    ],
)
def test_no_linear(body):
    assert find_linears(parse(body)) == []


def test_a_product_that_is_a_graph_output_begins_no_linear():
    model = parse("p = MatMul(x, W)\ny = Add(p, b)", "g (float[n,4,3] x) => (float[n,4,2] y, float[n,4,2] p)")
    assert match_linear(model.graph[0]) is None


def test_a_sum_of_two_linears_is_no_linears_output():
    model = parse("p = MatMul(x, W)\nq = Add(p, b)\nr = MatMul(x, W)\ns = Add(r, b)\ny = Add(q, s)")
    assert match_linear_output(model.graph.outputs[0]) is None
    assert len(find_linears(model)) == 2


def test_norm():
    model = parse("y = LayerNormalization<axis=-1>(x, gamma, beta)", "g (float[n,4,3] x) => (float[n,4,3] y)")
    (norm,) = find_norms(model)
    assert (norm.input, norm.output) == (model.graph.inputs[0], model.graph.outputs[0])
    np.testing.assert_array_equal(norm.gamma, [1, 2, 3])
    np.testing.assert_array_equal(norm.beta, [4, 5, 6])


@pytest.mark.parametrize(
    "body",
    [
        "y = LayerNormalization(x, gamma)",
        "s = Shape(x)\nw = ConstantOfShape(s)\ny = LayerNormalization(x, w, beta)",
        "y = LayerNormalization<axis=1>(x, gammas, gammas)",
    ],
    ids=["no_beta", "computed_gamma", "over_two_axes"],
)
def test_no_norm(body):
    assert find_norms(parse(body, "g (float[n,4,3] x) => (float[n,4,3] y)")) == []


@pytest.mark.parametrize(("call", "bias"), [("Conv(x, kernel, kb)", 4), ("Conv(x, kernel)", 0)])
def test_convolution(call, bias):
    (found,) = find_convolutions(parse(f"y = {call}", "g (float[n,3,4,4] x) => (float[n,1,4,4] y)"))
    assert found.weight.shape == (1, 3, 1, 1)
    np.testing.assert_array_equal(found.bias, [bias])


@pytest.mark.parametrize("call", ["Conv(x, z)", "Conv(x, kernel, z)"])
def test_a_convolution_of_computed_parameters_is_none(call):
    header = "g (float[n,3,4,4] x, float[m] z) => (float[n,1,4,4] y)"
    assert find_convolutions(parse(f"y = {call}", header)) == []


ATTENTION_HEADER = "g (float[n,4,3] q, float[n,3,4] k, float[n,4,3] v) => (float[n,4,3] y)"
SCORES = {
    "plain": "p = Softmax<axis=-1>(s)",
    "default_axis": "p = Softmax(s)",
    "scaled": "t = Mul(s, one)\np = Softmax<axis=-1>(t)",
    "divided": "t = Div(s, one)\np = Softmax<axis=-1>(t)",
    "masked": "t = Add(mask, s)\np = Softmax<axis=-1>(t)",
    "twice_masked": "t = Add(s, mask)\nu = Reshape(t, x)\nw = Add(u, mask)\nz = Reshape(w, x)\np = Softmax<axis=-1>(z)",
    "filled": "t = Where(f, one, s)\np = Softmax<axis=-1>(t)",
}


@pytest.mark.parametrize("name", SCORES)
def test_attention(name):
    header = ATTENTION_HEADER.replace(") =>", ", int64[3] x, bool f) =>")
    model = parse(f"s = MatMul(q, k)\n{SCORES[name]}\ny = MatMul(p, v)", header)
    (attention,) = find_attentions(model)
    assert [value.name for value in (attention.q, attention.k, attention.p, attention.v)] == ["q", "k", "p", "v"]


@pytest.mark.parametrize(
    "body",
    [
        "s = MatMul(q, k)\np = Softmax<axis=1>(s)\ny = MatMul(p, v)",
        "s = MatMul(q, k)\np = Softmax<axis=-1>(s)\ny = MatMul(v, p)",
        "s = MatMul(q, k)\np = Softmax<axis=-1>(s)\nc = MatMul(p, v)\ny = MatMul(p, c)",
        "s = MatMul(q, k)\np = Softmax<axis=-1>(s)\ny = Mul(p, v)",
        "s = MatMul(q, k)\np = Softmax<axis=-1>(s)\ny = MatMul(p, mask)",
        "s = MatMul(q, mask)\np = Softmax<axis=-1>(s)\ny = MatMul(p, v)",
        "s = Relu(q)\np = Softmax<axis=-1>(s)\ny = MatMul(p, v)",
    ],
    ids=["over_queries", "probabilities_right", "two_readers", "no_product", "constant_v", "constant_k", "no_scores"],
)
def test_no_attention(body):
    assert find_attentions(parse(body, ATTENTION_HEADER)) == []


def test_matches_carry_their_site(smoothed):
    arrays = {"w": np.ones((2, 2), np.float32), "b": np.ones(2, np.float32)}
    model = smoothed("float[n,2] x", "float[n,2] y", "p = MatMul(x, w)\ny = Add(p, b)", {"p": "block00.fc1"}, arrays)
    (linear,) = find_linears(model)
    assert linear.site == "block00.fc1"
    assert site_of(linear.add) == ""


def test_a_whole_vit(tiny_vit):
    model = tiny_vit(blocks=3)
    counts = [len(find(model)) for find in (find_linears, find_norms, find_attentions, find_convolutions)]
    assert counts == [3 * 4 + 1, 3 * 2 + 1, 3, 1]


MEAN = "m = ReduceMean<keepdims = 1>(s, last)"


@pytest.mark.parametrize("square", ["s = Pow(x, two)", "s = Mul(x, x)"])
def test_rms_norm(square):
    model = parse(f"{square}\n{MEAN}\nr = Sqrt(m)\nd = Div(x, r)\np = MatMul(d, W)\ny = Add(p, b)")
    assert [node.op_type for node in find_rms_norms(model)] == ["ReduceMean"]


@pytest.mark.parametrize("square", ["c = Sub(x, one)\ns = Mul(c, c)", "s = Mul(x, one)", "s = Pow(x, one)"])
def test_other_means_are_no_rms_norms(square):
    model = parse(f"{square}\n{MEAN}\nd = Div(x, m)\np = MatMul(d, W)\ny = Add(p, b)")
    assert find_rms_norms(model) == []
