"""The passes together, on a two-head block written as TorchScript exports it at opset 14."""

import collections

import numpy as np
import onnx_ir as ir
import pytest

from mptqc.passes.canonicalise import CANONICAL_PASSES, canonicalise

# Every value keeps its own arithmetic but norms and GELU, which round elsewhere: the project's bound for exports.
TOLERANCE = 1e-5

CHANNELS, TOKENS, HIDDEN = 8, 5, 16


def random_constants() -> str:
    generator = np.random.default_rng(3)
    shapes = {
        **{f"{name}_w": (CHANNELS, CHANNELS) for name in ("q", "k", "v", "proj")},
        "fc1_w": (CHANNELS, HIDDEN),
        "fc2_w": (HIDDEN, CHANNELS),
        **{f"{name}_b": (CHANNELS,) for name in ("q", "k", "v", "proj", "fc2")},
        "fc1_b": (HIDDEN,),
        "gamma": (CHANNELS,),
        "beta": (CHANNELS,),
        "position": (1, TOKENS, CHANNELS),
        "head_w": (3, CHANNELS),
        "head_b": (3,),
    }
    return ", ".join(
        f"float[{','.join(map(str, shape))}] {name} = {{{','.join(f'{value:.6f}' for value in values.reshape(-1))}}}"
        for name, shape in shapes.items()
        for values in [generator.normal(size=shape)]
    )


def norm(name: str, source: str) -> str:
    return f"""
  {name}_two = Constant<value = float {{2.0}}>()
  {name}_eps = Constant<value = float {{0.000001}}>()
  {name}_mean = ReduceMean<axes=[-1]>({source})
  {name}_d = Sub({source}, {name}_mean)
  {name}_sq = Pow({name}_d, {name}_two)
  {name}_var = ReduceMean<axes=[-1]>({name}_sq)
  {name}_ve = Add({name}_var, {name}_eps)
  {name}_sd = Sqrt({name}_ve)
  {name}_n = Div({name}_d, {name}_sd)
  {name}_s = Mul({name}_n, gamma)
  {name} = Add({name}_s, beta)
"""


def projection(name: str, source: str, perm: str) -> str:
    return f"""
  {name}_p = MatMul({source}, {name}_w)
  {name}_l = Add({name}_b, {name}_p)
  {name}_shape = Shape({source})
  {name}_zero = Constant<value = int64 {{0}}>()
  {name}_batch = Gather({name}_shape, {name}_zero)
  {name}_axis = Constant<value = int64[1] {{0}}>()
  {name}_first = Unsqueeze({name}_batch, {name}_axis)
  {name}_rest = Constant<value = int64[3] {{{TOKENS},2,4}}>()
  {name}_target = Concat<axis=0>({name}_first, {name}_rest)
  {name}_h = Reshape({name}_l, {name}_target)
  {name}_t = Transpose<perm={perm}>({name}_h)
"""


BLOCK = f"""
  start = Add(x, position)
  same = Identity(start)
{norm("norm1", "same")}
{projection("q", "norm1", "[0,2,1,3]")}
{projection("k", "norm1", "[0,2,3,1]")}
{projection("v", "norm1", "[0,2,1,3]")}
  scale = Constant<value = float {{0.5}}>()
  qs = Mul(q_t, scale)
  scores = MatMul(qs, k_t)
  prob = Softmax<axis=3>(scores)
  context = MatMul(prob, v_t)
  heads = Transpose<perm=[0,2,1,3]>(context)
  joined_shape = Constant<value = int64[3] {{-1,{TOKENS},{CHANNELS}}}>()
  joined = Reshape(heads, joined_shape)
  proj_p = MatMul(joined, proj_w)
  proj = Add(proj_p, proj_b)
  residual = Add(same, proj)
{norm("norm2", "residual")}
  fc1_p = MatMul(norm2, fc1_w)
  fc1 = Add(fc1_p, fc1_b)
  root2 = Constant<value = float {{1.4142135}}>()
  one = Constant<value = float {{1.0}}>()
  half = Constant<value = float {{0.5}}>()
  u = Div(fc1, root2)
  e = Erf(u)
  a = Add(e, one)
  g1 = Mul(fc1, a)
  g = Mul(g1, half)
  fc2_p = MatMul(g, fc2_w)
  fc2 = Add(fc2_p, fc2_b)
  out = Add(residual, fc2)
{norm("norm3", "out")}
  zero = Constant<value = int64 {{0}}>()
  token = Gather<axis=1>(norm3, zero)
  y = Gemm<transB=1>(token, head_w, head_b)
"""

TEXT = f"g (float[batch,{TOKENS},{CHANNELS}] x) => (float[batch,3] y) <{random_constants()}> {{{BLOCK}}}"


@pytest.fixture
def model(parse) -> ir.Model:
    return parse(TEXT, opset=14, ir_version=7)


def test_canonical_ops(model):
    canonicalise(model)
    counts = collections.Counter(node.op_type for node in model.graph)
    assert counts == {
        **{"LayerNormalization": 3, "Gelu": 1, "Softmax": 1, "MatMul": 9, "Add": 10, "Mul": 1},
        **{"Transpose": 4, "Reshape": 4, "Gather": 1},
    }


def test_every_parameter_has_one_reader(model):
    canonicalise(model)
    norms = [node for node in model.graph if node.op_type == "LayerNormalization"]
    assert len({value for node in norms for value in node.inputs[1:]}) == 6
    assert all(len(value.uses()) == 1 for node in norms for value in node.inputs[1:])


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_same_numbers_at_any_batch(model, parse, run_model, batch):
    before = parse(TEXT, opset=14, ir_version=7)
    canonicalise(model)
    feeds = {"x": np.random.default_rng(batch).normal(size=(batch, TOKENS, CHANNELS)).astype(np.float32)}
    (wanted,), (got,) = run_model(before, feeds), run_model(model, feeds)
    assert got.shape == (batch, 3)
    assert np.abs(got - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def test_versions(model):
    canonicalise(model)
    assert (model.opset_imports[""], model.ir_version) == (21, 10)


def test_same_model_gives_same_text(model, parse):
    other = parse(TEXT, opset=14, ir_version=7)
    assert ir.to_onnx_text(canonicalise(model)) == ir.to_onnx_text(canonicalise(other))


def test_again_changes_nothing(model):
    canonicalise(model)
    nodes = [(node.op_type, node.name) for node in model.graph]
    canonicalise(model)
    assert [(node.op_type, node.name) for node in model.graph] == nodes


def test_shapes_are_known(model):
    canonicalise(model)
    assert all(output.shape is not None for node in model.graph for output in node.outputs)


def test_names_of_the_passes_differ():
    names = [each.name for each in CANONICAL_PASSES]
    assert len(set(names)) == len(names) - 1  # InferShapes runs twice
