"""Heads at length 1 (SwinV2): divided before they are turned; in the native target the Linears that make them do it."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from native_evaluator import compare_with_portable

from mptqc.analysis.shapes import concrete_shapes
from mptqc.graph.match import find_attentions, find_linears
from mptqc.graph.native_nodes import lowering_report, native_nodes
from mptqc.graph.unit_heads import match_unit_heads
from mptqc.passes.base import STAGE_KEY, Stage, run_passes
from mptqc.passes.lower_to_native import LowerToNative
from mptqc.passes.pack_weights import PackWeights
from mptqc.passes.quantize_attentions import QuantizeAttentions
from mptqc.passes.quantize_linears import QuantizeLinears
from mptqc.passes.turn_unit_heads import TurnUnitHeads
from mptqc.plan import AttentionPlan, LayerPlan, QuantPlan, Uniform
from mptqc.recipe import Recipe
from mptqc.runtime.session import create_session, run_arrays

HEADS, TOKENS, INPUTS = 3, 5, 8
UNIT = """
  {0}p = MatMul (x, w{0})
  {0}l = Add ({0}p, b{0})
  {0}s = Reshape ({0}l, heads)
  {0}t = Transpose <perm = [0, 2, 1, 3]> ({0}s)
  {0}n = ReduceL2 <keepdims = 1> ({0}t, last)
  {0}c = Clip ({0}n, epsilon)
  {0}d = Div ({0}t, {0}c)
"""
BODY = f"""{UNIT.format("q")}{UNIT.format("k")}
  q = Mul (factor, qd)
  k = Transpose <perm = [0, 1, 3, 2]> (kd)
  vp = MatMul (x, wv)
  vl = Add (vp, bv)
  vs = Reshape (vl, heads)
  v = Transpose <perm = [0, 2, 1, 3]> (vs)
  s = MatMul (q, k)
  a = Softmax <axis = -1> (s)
  h = MatMul (a, v)
  ht = Transpose <perm = [0, 2, 1, 3]> (h)
  hr = Reshape (ht, joined)
  op = MatMul (hr, wo)
  y = Add (op, bo)
"""
SITES = {f"{letter}p": f"block00.{letter}" for letter in "qkv"} | {"a": "block00.attention", "op": "block00.proj"}
X = np.random.default_rng(1).standard_normal((2, TOKENS, INPUTS)).astype(np.float32)
Make = Callable[..., ir.Model]


@pytest.fixture
def make(smoothed: Make) -> Make:
    """make(width, body): an attention by cosines of three heads, x [n, 5, 8] to y [n, 5, 8], at stage raw."""

    def build(width: int = 16, body: str = BODY, **more: np.ndarray) -> ir.Model:
        random, channels = np.random.default_rng(0), HEADS * width
        shapes = {f"w{letter}": (INPUTS, channels) for letter in "qkv"} | {"wo": (channels, INPUTS), "bo": (INPUTS,)}
        shapes |= {f"b{letter}": (channels,) for letter in "qkv"}
        arrays: dict[str, np.ndarray] = {
            name: (random.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32) for name, shape in shapes.items()
        }
        arrays |= {
            "heads": np.array([0, 0, HEADS, width], np.int64),
            "joined": np.array([0, 0, channels], np.int64),
            "last": np.array([-1], np.int64),
            "epsilon": np.array(1e-12, np.float32),
            "factor": np.float32([[[3]], [[4]], [[5]]]),
        }
        io = f"float[n, {TOKENS}, {INPUTS}]"
        model = smoothed(f"{io} x", f"{io} y", body, SITES, arrays | more)
        for node in model.graph:
            if node.op_type == "Transpose" and node.name != "ht":
                shape = [TOKENS, width] if node.name != "k" else [width, TOKENS]
                node.outputs[0].shape = ir.Shape(["n", HEADS, *shape])
        del model.metadata_props[STAGE_KEY]
        return model

    return build


def run(model: ir.Model) -> np.ndarray:
    return run_arrays(create_session(ir.to_proto(model).SerializeToString()), ["y"], {"x": X})[0]


def test_heads_are_divided_before_they_are_turned(make: Make) -> None:
    model = make()
    expected = run(model)
    assert TurnUnitHeads()(model).edits == 2
    attention = find_attentions(model)[0]
    for operand, permutation in ((attention.q, (0, 2, 1, 3)), (attention.k, (0, 2, 3, 1))):
        transpose = operand.producer()
        assert transpose is not None and transpose.inputs[0] is not None
        assert tuple(transpose.attributes["perm"].as_ints()) == permutation
        unit = match_unit_heads(transpose.inputs[0])
        assert unit is not None
        reshape = unit.x.producer()
        assert reshape is not None and reshape.op_type == "Reshape"
    assert np.array_equal(run(model), expected)
    assert TurnUnitHeads()(model).edits == 0


@pytest.mark.parametrize(
    ("old", "new", "more", "edits"),
    [
        ("qn = ReduceL2 <keepdims = 1> (qt, last)", "qn = ReduceL1 <keepdims = 1> (qt, last)", {}, 1),
        ("qn = ReduceL2 <keepdims = 1> (qt, last)", "qn = ReduceL2 <keepdims = 1> (qt, before)", {"before": [2]}, 1),
        ("qc = Clip (qn, epsilon)", "qc = Clip (qn, epsilon, upper)", {"upper": np.float32(9)}, 1),
        ("qd = Div (qt, qc)", "qd = Div (kt, qc)", {}, 0),
        ("q = Mul (factor, qd)", "q = Mul (factor, qd)", {"factor": np.ones((1, TOKENS, 1), np.float32)}, 1),
        ("v = Transpose <perm = [0, 2, 1, 3]> (vs)", "v = Mul (qd, factor)", {}, 1),
    ],
    ids=["another norm", "another axis", "an upper limit", "another's length", "a factor by token", "read elsewhere"],
)
def test_what_is_nearly_that_is_left(make: Make, old: str, new: str, more: dict[str, np.ndarray], edits: int) -> None:
    assert BODY.count(old) == 1
    model = make(body=BODY.replace(old, new), **{name: np.asarray(array) for name, array in more.items()})
    expected = run(model)
    assert TurnUnitHeads()(model).edits == edits
    assert np.array_equal(run(model), expected)


def lowered(model: ir.Model, *, whole: bool = True) -> tuple[ir.Model, ir.Model]:
    """The model turned and quantized, and a copy of it lowered."""
    TurnUnitHeads()(model)
    model.metadata_props[STAGE_KEY] = Stage.SMOOTHED
    middle = Uniform(bits=8, scale=0.03, zero_point=128)
    probability = Uniform(bits=8, scale=1 / 255, zero_point=0)
    layers = tuple(LayerPlan(site=linear.site, weight_bits=7, input=middle) for linear in find_linears(model))
    arrays = {
        f"{linear.site}/weight_scale": np.abs(linear.weight).max(axis=0) / np.float32(63)
        for linear in find_linears(model)
    }
    cosine = Uniform(bits=7, scale=0.02, zero_point=64)
    attention = AttentionPlan(site="block00.attention", q=middle, k=cosine, p=probability, v=cosine)
    plan = QuantPlan(
        model_digest="0", recipe=Recipe(), layers=layers, attentions=(attention,), elements={}, arrays=arrays
    )
    run_passes(model, [QuantizeLinears(plan), QuantizeAttentions(plan), PackWeights(plan)])
    native = ir.from_proto(ir.to_proto(model))
    LowerToNative(concrete_shapes(native), concrete_shapes(native, batch=2), whole)(native)
    onnx.checker.check_model(ir.to_proto(native))
    return model, native


@pytest.mark.parametrize("width", [16, 32, 64])
def test_the_linears_give_the_portable_values(make: Make, width: int) -> None:
    portable, native = lowered(make(width))
    assert Counter(node.op_type for node in native.graph if node.domain) == {
        "LinearQuantize": 3, "AttentionQuantize": 1, "Linear": 1
    }  # fmt: skip
    assert not [each for each in lowering_report(native) if each.reason]
    q, k = (
        next(node for node in native_nodes(native) if node.metadata_props["mptqc.site"] == f"block00.{letter}")
        for letter in "qk"
    )
    for node, inputs in ((q, 5), (k, 4)):
        assert len(node.inputs) == inputs
        assert node.attributes["activation"].as_string() == "unit_heads"
        assert node.attributes["head_width"].as_int() == width
        assert node.attributes["head_epsilon"].as_float() == np.float32(1e-12)
    compared = compare_with_portable(native, portable, {"x": X})
    assert compared["AttentionQuantize"] == 1 and compared["Linear"] == 1


def test_heads_of_another_width_stay_portable(make: Make) -> None:
    portable, native = lowered(make(12))
    refused = [each for each in lowering_report(native) if each.reason]
    assert [(each.site, each.op) for each in refused] == [
        (f"block00.{letter}", "Linear with unit heads") for letter in "qk"
    ]
    assert all("are not 16, 32, 64 wide" in each.reason for each in refused)
    assert compare_with_portable(native, portable, {"x": X})


def test_a_library_without_it_leaves_them_portable(make: Make) -> None:
    _, native = lowered(make(), whole=False)
    reasons = [each.reason for each in lowering_report(native) if each.op == "Linear with unit heads"]
    assert reasons == ["the target's kernels bring no heads to length 1"] * 2
