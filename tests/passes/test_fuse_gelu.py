import numpy as np
import onnx_ir as ir
import pytest

from mptqc.graph.convert_precision import SOURCE_PRECISION_KEY
from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.fuse_gelu import FuseGelu

# Constants printed with six to eight digits and float32's erf and tanh; the fused op rounds elsewhere.
TOLERANCE = 3e-6

HEADER = "g (float[b,8] x) => (float[b,8] y)"
CONSTANTS = (
    "float root2 = {1.41421354}, float rroot2 = {0.70710677}, float one = {1}, float half = {0.5}, float two = {2}, "
    "float three = {3}, float c = {0.044715}, float k = {0.79788458}, float kc = {0.035677407}"
)
ARGUMENT = "  u = Div(x, root2)\n  e = Erf(u)\n"
CUBIC = "  x3 = Pow(x, three)\n  t3 = Mul(x3, c)\n  s = Add(x, t3)\n  u = Mul(s, k)\n  e = Tanh(u)\n"

EXACT = {
    "torchscript": ARGUMENT + "  a = Add(e, one)\n  p = Mul(x, a)\n  y = Mul(p, half)\n",
    "half_first": ARGUMENT + "  a = Add(one, e)\n  h = Mul(half, x)\n  y = Mul(h, a)\n",
    "half_on_erf": ARGUMENT + "  a = Add(e, one)\n  h = Mul(a, half)\n  y = Mul(h, x)\n",
    "halved_by_division": ARGUMENT + "  a = Add(e, one)\n  h = Div(a, two)\n  y = Mul(x, h)\n",
    "x_divided": ARGUMENT + "  a = Add(e, one)\n  h = Div(x, two)\n  y = Mul(h, a)\n",
    "multiplied_argument": "  u = Mul(rroot2, x)\n  e = Erf(u)\n  a = Add(e, one)\n  p = Mul(x, a)\n"
    "  y = Mul(p, half)\n",
    "half_inside": ARGUMENT + "  m = Mul(e, half)\n  a = Add(m, half)\n  y = Mul(x, a)\n",
}
TANH = {
    "torchscript": CUBIC + "  a = Add(e, one)\n  h = Mul(x, half)\n  y = Mul(h, a)\n",
    "factored": "  q = Mul(x, x)\n  r = Mul(q, c)\n  v = Add(one, r)\n  w = Mul(x, k)\n  u = Mul(w, v)\n  e = Tanh(u)\n"
    "  a = Add(one, e)\n  p = Mul(a, x)\n  y = Mul(half, p)\n",
    "distributed": "  q = Mul(x, x)\n  r = Mul(q, x)\n  v = Mul(kc, r)\n  w = Mul(x, k)\n  u = Add(v, w)\n"
    "  e = Tanh(u)\n  a = Add(one, e)\n  p = Mul(a, x)\n  y = Mul(half, p)\n",
}


def graph(body: str, header: str = HEADER) -> str:
    return f"{header} <{CONSTANTS}> {{{body}}}"


@pytest.mark.parametrize(
    ("body", "approximate"),
    [(body, "none") for body in EXACT.values()] + [(body, "tanh") for body in TANH.values()],
    ids=[*EXACT, *(f"tanh_{name}" for name in TANH)],
)
def test_every_form_becomes_one_node(parse, run_model, body, approximate):
    before, model = parse(graph(body)), parse(graph(body))
    assert FuseGelu()(model).edits == 1
    (node,) = model.graph
    assert (node.op_type, node.attributes["approximate"].as_string()) == ("Gelu", approximate)
    feeds = {"x": np.linspace(-6, 6, 80, dtype=np.float32).reshape(10, 8)}
    (wanted,), (got,) = run_model(before, feeds), run_model(model, feeds)
    assert np.abs(got - wanted).max() <= TOLERANCE


def test_golden(parse, as_text):
    model = parse(graph("  z = Relu(x)\n" + EXACT["torchscript"].replace("x, ", "z, ")))
    FuseGelu()(model)
    assert as_text(model) == GOLDEN


def test_chain_of_two(parse):
    first = EXACT["torchscript"].replace("y =", "z =")
    second = "  u2 = Div(z, root2)\n  e2 = Erf(u2)\n  a2 = Add(e2, one)\n  p2 = Mul(z, a2)\n  y = Mul(p2, half)\n"
    model = parse(graph(first + second))
    assert FuseGelu()(model).edits == 2
    assert [node.op_type for node in model.graph] == ["Gelu", "Gelu"]


def test_second_run_changes_nothing(parse):
    model = parse(graph(EXACT["torchscript"]))
    FuseGelu()(model)
    text = ir.to_onnx_text(model)
    assert FuseGelu()(model).edits == 0
    assert ir.to_onnx_text(model) == text


TORCH = EXACT["torchscript"]
NEGATIVES = {
    "inner_read_elsewhere": graph(TORCH.replace("y =", "z =") + "  y = Add(z, e)\n"),
    "argument_read_elsewhere": graph(TORCH.replace("y =", "z =") + "  y = Add(z, u)\n"),
    "inner_is_graph_output": graph(TORCH, "g (float[b,8] x) => (float[b,8] y, float[b,8] a)"),
    "other_factor": graph(TORCH.replace("Mul(x, a)", "Mul(w, a)"), "g (float[b,8] x, float[b,8] w) => (float[b,8] y)"),
    "no_half": graph(TORCH.replace("Mul(p, half)", "Mul(p, two)")),
    "wrong_root": graph(TORCH).replace("1.41421354", "1.4142857"),
    "wrong_sum": graph(TORCH.replace("Add(e, one)", "Add(e, half)")),
    "wrong_cubic": graph(TANH["torchscript"]).replace("0.044715}", "0.0448}"),
    "sigmoid": f"{HEADER} <float k = {{1.702}}> {{ u = Mul(x, k)\n e = Sigmoid(u)\n y = Mul(x, e) }}",
    "half_as_vector": graph(TORCH).replace("float half = {0.5}", "float[8] half = {0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.4}"),
}


@pytest.mark.parametrize("name", NEGATIVES)
def test_left_alone(parse, name):
    model = parse(NEGATIVES[name])
    text = ir.to_onnx_text(model)
    assert FuseGelu()(model).edits == 0
    assert ir.to_onnx_text(model) == text


def test_rounded_constants_count_in_a_converted_model(parse):
    text = graph(TORCH).replace("1.41421354", "1.4140625")
    assert FuseGelu()(parse(text)).edits == 0
    model = parse(text)
    model.metadata_props[SOURCE_PRECISION_KEY] = "float16"
    assert FuseGelu()(model).edits == 1


def test_wrong_stage_raises(parse):
    model = parse(graph(TORCH))
    model.metadata_props[STAGE_KEY] = Stage.SMOOTHED
    with pytest.raises(StageError, match="fuse-gelu"):
        FuseGelu()(model)


GOLDEN = """\
<
   ir_version: 10,
   opset_import: ["" : 21]
>
g (float[b,8] x) => (float[b,8] y)
   <float[b,8] z>
{
   z = Relu (x)
   ["y/Gelu"] y = Gelu <approximate: string = "none"> (z)
}
"""
