import hypothesis
import hypothesis.strategies as st
import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from mptqc.graph.edit import is_op
from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.canonicalise_linear import CanonicaliseLinear, find_linears

# Sums of three products in another order: three roundings of 2⁻²⁴ and one of the bias.
TOLERANCE = 4 * 2**-24

CONSTANTS = (
    "float[3,2] W = {1,-2,3,4.5,-5,6}, float[2,3] Wt = {1,3,-5,-2,4.5,6}, float[2] b = {0.5,-1}, float one_bias = {2}, "
    "float[4,2] table = {1,2,3,4,5,6,7,8}, float[2,2] V = {1,2,3,4}, float[2,3,2] stack = {1,2,3,4,5,6,7,8,9,1,2,3}"
)
CUBE = "g (float[n,4,3] x) => (float[n,4,2] y)"
ROWS = "g (float[n,3] x) => (float[n,2] y)"

FORMS = {
    "gemm": (ROWS, "y = Gemm(x, W, b)"),
    "gemm_transposed": (ROWS, "y = Gemm<transB=1>(x, Wt, b)"),
    "gemm_scaled": (ROWS, "y = Gemm<alpha=0.5, beta=2.0>(x, W, b)"),
    "gemm_no_bias": (ROWS, "y = Gemm(x, W)"),
    "gemm_one_bias": (ROWS, "y = Gemm(x, W, one_bias)"),
    "matmul": (CUBE, "y = MatMul(x, W)"),
    "matmul_add": (CUBE, "p = MatMul(x, W) y = Add(p, b)"),
    "add_matmul": (CUBE, "p = MatMul(x, W) y = Add(b, p)"),
    "scalar_bias": (CUBE, "p = MatMul(x, W) y = Add(p, one_bias)"),
    "transposed_constant": (CUBE, "T = Transpose<perm=[1,0]>(Wt) p = MatMul(x, T) y = Add(p, b)"),
}


def graph(header: str, body: str) -> str:
    return f"{header} <{CONSTANTS}> {{ {body} }}"


def sample(model: ir.Model) -> dict[str, np.ndarray]:
    shape = [2 if not isinstance(dim, int) else dim for dim in model.graph.inputs[0].shape]
    return {"x": np.random.default_rng(1).normal(size=shape).astype(np.float32)}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_becomes_matmul_and_add(parse, run_model, name):
    before, model = parse(graph(*FORMS[name])), parse(graph(*FORMS[name]))
    CanonicaliseLinear()(model)
    product, add = model.graph
    assert (product.op_type, add.op_type) == ("MatMul", "Add")
    assert product.inputs[0] is model.graph.inputs[0]
    assert add.inputs[0] is product.outputs[0]
    assert (product.inputs[1].shape, add.inputs[1].shape) == ((3, 2), (2,))
    (wanted,), (got,) = run_model(before, sample(model)), run_model(model, sample(model))
    assert np.abs(got - wanted).max() <= TOLERANCE * np.abs(wanted).max()


@hypothesis.given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    transposed=st.booleans(),
    alpha=st.sampled_from([1.0, 0.5, -2.0]),
    beta=st.sampled_from([1.0, 0.0, 4.0]),
    bias=st.sampled_from(["none", "vector", "row", "scalar", "table"]),
    seed=st.integers(0, 1000),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_gemm_is_its_formula(sizes, transposed, alpha, beta, bias, seed):
    rows, K, N = sizes
    generator = np.random.default_rng(seed)
    # Small integers and powers of two: every intermediate value is exact in float32.
    x, W = (generator.integers(-4, 5, shape).astype(np.float32) for shape in ((rows, K), (K, N)))
    shapes = {"vector": (N,), "row": (1, N), "scalar": (1,), "table": (rows, N)}
    C = generator.integers(-4, 5, shapes[bias]).astype(np.float32) if bias in shapes else None
    X, Y = (ir.val(name, ir.DataType.FLOAT, shape) for name, shape in (("x", (rows, K)), ("y", (rows, N))))
    arrays = {"W": np.ascontiguousarray(W.T) if transposed else W, **({} if C is None else {"C": C})}
    values = [ir.val(name, const_value=ir.tensor(array, name=name)) for name, array in arrays.items()]
    gemm = ir.node("Gemm", [X, *values], {"alpha": alpha, "beta": beta, "transB": int(transposed)}, outputs=[Y])
    graph = ir.Graph([X], [Y], nodes=[gemm], initializers=values, opset_imports={"": 21}, name="g")
    model = CanonicaliseLinear()(ir.Model(graph, ir_version=10)).model
    assert is_op(model.graph[0], "MatMul") and is_op(model.graph[1], "Add")
    (got,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    assert np.array_equal(got, alpha * (x @ W) + (0 if C is None else beta * C))


def test_golden(parse, as_text):
    model = parse(graph(CUBE, "r = Relu(x) p = MatMul(r, W) y = Add(table, p)"))
    CanonicaliseLinear()(model)
    assert as_text(model) == GOLDEN


def test_edits_are_counted(parse):
    model = parse(graph(*FORMS["gemm"]))
    assert CanonicaliseLinear()(model).edits == 1
    assert CanonicaliseLinear()(model).edits == 0


def test_canonical_form_is_left_alone(parse):
    model = parse(graph(*FORMS["matmul_add"]))
    text = ir.to_onnx_text(model)
    assert CanonicaliseLinear()(model).edits == 0
    assert ir.to_onnx_text(model) == text


def test_linear_after_linear(parse, run_model):
    body = "z = Gemm(x, W, b) y = Gemm<transB=1>(z, V)"
    text = graph(ROWS, body)
    before, model = parse(text), parse(text)
    CanonicaliseLinear()(model)
    assert [node.op_type for node in model.graph] == ["MatMul", "Add", "MatMul", "Add"]
    (wanted,), (got,) = run_model(before, sample(model)), run_model(model, sample(model))
    assert np.abs(got - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def test_product_read_twice_gets_a_zero_bias(parse, run_model):
    body = "p = MatMul(x, W) q = Add(p, b) y = Mul(p, q)"
    before, model = parse(graph(CUBE, body)), parse(graph(CUBE, body))
    assert CanonicaliseLinear()(model).edits == 1
    (match,) = find_linears(model.graph)
    assert not match.bias.any()
    (wanted,), (got,) = run_model(before, sample(model)), run_model(model, sample(model))
    assert np.array_equal(got, wanted)


def test_product_that_is_a_graph_output(parse):
    model = parse(graph("g (float[n,4,3] x) => (float[n,4,2] y, float[n,4,2] p)", "p = MatMul(x, W) y = Add(p, b)"))
    CanonicaliseLinear()(model)
    assert [output.name for output in model.graph.outputs] == ["y", "p"]
    assert [node.op_type for node in model.graph] == ["MatMul", "Add", "Add"]


def test_position_table_is_no_bias(parse):
    model = parse(graph(CUBE, "p = MatMul(x, W) y = Add(p, table)"))
    CanonicaliseLinear()(model)
    assert [node.op_type for node in model.graph] == ["MatMul", "Add", "Add"]
    (match,) = find_linears(model.graph)
    assert not match.bias.any()


def test_residual_of_a_gemm_is_added_after(parse, run_model):
    header = "g (float[n,3] x, float[n,2] r) => (float[n,2] y)"
    before, model = (
        parse(graph(header, "y = Gemm<beta=3.0>(x, W, r)")),
        parse(graph(header, "y = Gemm<beta=3.0>(x, W, r)")),
    )
    CanonicaliseLinear()(model)
    assert [node.op_type for node in model.graph] == ["MatMul", "Add", "Mul", "Add"]
    feeds = {**sample(model), "r": np.full((2, 2), 0.25, np.float32)}
    (wanted,), (got,) = run_model(before, feeds), run_model(model, feeds)
    assert np.abs(got - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def test_shared_weight_is_kept_for_both(parse):
    model = parse(graph(CUBE, "p = MatMul(x, W) q = MatMul(x, W) y = Add(p, q)"))
    CanonicaliseLinear()(model)
    products = [node for node in model.graph if node.op_type == "MatMul"]
    assert products[0].inputs[1] is products[1].inputs[1] is model.graph.initializers["W"]


NEGATIVES = {
    "computed_operand": ("g (float[n,4,3] x, float[3,2] w) => (float[n,4,2] y)", "y = MatMul(x, w)"),
    "constant_on_the_left": ("g (float[2,3,5] x) => (float[2,2,5] y)", "y = MatMul(Wt, x)"),
    "transposed_input": ("g (float[3,5] x) => (float[5,2] y)", "y = Gemm<transA=1>(x, W, b)"),
    "stacked_matrices": ("g (float[n,3] x) => (float[2,n,2] y)", "y = MatMul(x, stack)"),
}


@pytest.mark.parametrize("name", NEGATIVES)
def test_no_linear_is_left_alone(parse, name):
    header, body = NEGATIVES[name]
    model = parse(graph(header, body))
    text = ir.to_onnx_text(model)
    assert CanonicaliseLinear()(model).edits == 0
    assert ir.to_onnx_text(model) == text


def test_wrong_stage_raises(parse):
    model = parse(graph(*FORMS["gemm"]))
    model.metadata_props[STAGE_KEY] = Stage.QUANTIZED
    with pytest.raises(StageError, match="canonicalise-linear"):
        CanonicaliseLinear()(model)


GOLDEN = """\
<
   ir_version: 10,
   opset_import: ["" : 21]
>
g (float[n,4,3] x) => (float[n,4,2] y)
   <float[3,2] W =  {1,-2,3,4.5,-5,6}, float[4,2] table =  {1,2,3,4,5,6,7,8}, float[2] "p/bias" =  {0,0}, float[3,2] W, float[4,2] table, float[2] "p/bias", float[n,4,3] r, float[n,4,2] "p/MatMul_output", float[n,4,2] "p/Add_output">
{
   r = Relu (x)
   ["p/MatMul"] "p/MatMul_output" = MatMul (r, W)
   ["p/Add"] "p/Add_output" = Add ("p/MatMul_output", "p/bias")
   y = Add (table, "p/Add_output")
}
"""  # noqa: E501 - a line of the printer
