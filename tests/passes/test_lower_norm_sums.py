"""Norms whose floats go on: behind a residual's Add, as SwinV2 has them, or beside a quantizer."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from native_evaluator import compare_with_portable

from mptqc.analysis.shapes import concrete_shapes
from mptqc.analysis.verify_native import check_native_numbers
from mptqc.graph.integer_sites import find_integer_sites
from mptqc.graph.native_nodes import lowering_report, native_nodes
from mptqc.passes.base import run_passes
from mptqc.passes.lower_to_native import LowerToNative
from mptqc.passes.pack_weights import PackWeights
from mptqc.passes.quantize_linears import QuantizeLinears
from mptqc.plan import LayerPlan, QuantPlan, Uniform
from mptqc.recipe import Recipe
from mptqc.runtime.library import find_library
from mptqc.runtime.session import create_session

MakeSmoothed = Callable[..., ir.Model]
Model = tuple[ir.Model, QuantPlan]
WIDTH = 12
SITES = {"n": "norm00", "m": "norm01", "product": "linear00", "hidden": "linear01", "last": "linear02"}
SHIFTED = np.roll(np.arange(16).reshape(4, 4), -1, 0).reshape(2, 2, 2, 2).swapaxes(1, 2).reshape(-1)
"""Where the rows of windows of 2 × 2 come from in an image of 4 × 4 that is rolled up by one."""
POST_NORM = """
  below = Slice (x, one, end, one)
  above = Slice (x, zero, one, one)
  rolled = Concat <axis = 1> (below, above)
  split = Reshape (rolled, windows)
  parted = Transpose <perm = [0, 1, 3, 2, 4, 5]> (split)
  window = Reshape (parted, joined)
  product = MatMul (window, weight0)
  linear = Add (product, bias)
  parted_back = Reshape (linear, windows)
  split_back = Transpose <perm = [0, 1, 3, 2, 4, 5]> (parted_back)
  image = Reshape (split_back, grid)
  bottom = Slice (image, minus_one, end, one)
  others = Slice (image, zero, minus_one, one)
  unrolled = Concat <axis = 1> (bottom, others)
  n = LayerNormalization <axis = -1> (unrolled, gamma, beta)
  y = Add (x, n)
  tokens = Reshape (y, flat)
  hidden = MatMul (tokens, weight1)
  linear1 = Add (hidden, bias)
  m = LayerNormalization <axis = -1> (linear1, gamma, beta)
  z = Add (m, tokens)
  z_image = Reshape (z, grid)
  z_below = Slice (z_image, one, end, one)
  z_above = Slice (z_image, zero, one, one)
  z_rolled = Concat <axis = 1> (z_below, z_above)
  z_split = Reshape (z_rolled, windows)
  z_parted = Transpose <perm = [0, 1, 3, 2, 4, 5]> (z_split)
  z_window = Reshape (z_parted, joined)
  last = MatMul (z_window, weight2)
  out = Add (last, bias)
"""
SIMPLE = """
  product = MatMul (x, weight0)
  linear = Add (product, bias)
  n = LayerNormalization <axis = -1> (linear, gamma, beta)
  y = Add (x, n)
  last = MatMul (y, weight2)
  out = Add (last, bias)
"""


@pytest.fixture
def make(smoothed: MakeSmoothed) -> Callable[..., Model]:
    """A model that makes "out" and `output` from images x [n, 4, 4, 12], and a plan of its Linears but for `left_out`.

    A Linear's weight is that of its site's number. `own_scale` has one with another quantizer than the others.
    """

    def build(body: str = SIMPLE, output: str = "", left_out: str = "", own_scale: str = "") -> Model:
        random = np.random.default_rng(0)
        arrays = {
            "gamma": random.normal(size=WIDTH).astype(np.float32),
            "beta": random.normal(size=WIDTH).astype(np.float32),
            "bias": random.normal(size=WIDTH).astype(np.float32),
            "windows": np.array([-1, 2, 2, 2, 2, WIDTH], np.int64),
            "joined": np.array([-1, 4, WIDTH], np.int64),
            "grid": np.array([-1, 4, 4, WIDTH], np.int64),
            "flat": np.array([-1, 16, WIDTH], np.int64),
            "columns": np.array([-1, 4, WIDTH, 4], np.int64),
            "position": random.normal(size=(1, 4, 4, WIDTH)).astype(np.float32),
            "zero": np.array([0], np.int64),
            "one": np.array([1], np.int64),
            "minus_one": np.array([-1], np.int64),
            "end": np.array([np.iinfo(np.int64).max], np.int64),
        } | {f"weight{i}": random.normal(size=(WIDTH, WIDTH)).astype(np.float32) for i in range(3)}
        arrays = {name: array for name, array in arrays.items() if name in body}
        sites = {value: site for value, site in SITES.items() if f"  {value} = " in body or f"  {value}, " in body}
        outputs = "float[m, p, q] out" if "window" in body else "float[n, 4, 4, 12] out"
        model = smoothed("float[n, 4, 4, 12] x", f"{outputs}, {output}".strip(", "), body, sites, arrays)
        planned = [site for site in sites.values() if site.startswith("linear") and site != left_out]
        layers = tuple(
            LayerPlan(
                site=site,
                weight_bits=8,
                input=Uniform(bits=8, scale=0.03 if site == own_scale else 0.05, zero_point=128),
            )
            for site in planned
        )
        scale = {  # more than 63 saturates on AVX2
            f"{site}/weight_scale": np.abs(arrays[f"weight{int(site[-1])}"]).max(axis=0) / np.float32(63)
            for site in planned
        }
        return model, QuantPlan(model_digest="0", recipe=Recipe(), layers=layers, arrays=scale)

    return build


def lower(model: ir.Model, plan: QuantPlan, *, whole: bool = True) -> tuple[ir.Model, ir.Model]:
    """The portable model, and a copy of it lowered; both give the same, operator by operator."""
    run_passes(model, [QuantizeLinears(plan), PackWeights(plan)])
    native = ir.from_proto(ir.to_proto(model))
    LowerToNative(concrete_shapes(native), concrete_shapes(native, batch=2), whole=whole)(native)
    onnx.checker.check_model(ir.to_proto(native))
    x = np.random.default_rng(2).normal(size=(3, 4, 4, WIDTH)).astype(np.float32)
    compare_with_portable(native, model, {"x": x})
    return model, native


def counts(model: ir.Model) -> dict[str, int]:
    return dict(Counter(node.op_type for node in native_nodes(model)))


def norm_of(model: ir.Model, site: str) -> ir.Node:
    return next(node for node in native_nodes(model) if node.metadata_props["mptqc.site"] == site)


def constant(node: ir.Node, index: int) -> np.ndarray | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None or value.const_value is None else value.const_value.numpy()


def reasons(model: ir.Model) -> dict[str, str]:
    return {each.site: each.reason for each in lowering_report(model) if each.reason}


def test_norms_behind_linears_are_added_and_quantized(make: Callable[..., Model]) -> None:
    portable, native = lower(*make(POST_NORM, "float[n, 16, 12] z"))
    assert counts(native) == {"LayerNormAddQuantize": 2, "Linear": 3}
    assert reasons(native) == {}
    # What is left moves codes of x, and lays rows out anew.
    assert Counter(node.op_type for node in native.graph if not node.domain) <= Counter(
        QuantizeLinear=1, Slice=2, Concat=1, Transpose=1, Reshape=8
    )
    first, second = norm_of(native, "norm00"), norm_of(native, "norm01")
    assert np.array_equal(constant(first, 4), np.argsort(SHIFTED))
    assert (len(first.inputs), len(second.inputs), second.inputs[4]) == (5, 6, None)
    assert np.array_equal(constant(second, 5), SHIFTED)
    assert [value.name for value in (first.inputs[3], second.outputs[0])] == ["x", "z"]
    x = np.random.default_rng(2).normal(size=(3, 4, 4, WIDTH)).astype(np.float32)
    assert compare_with_portable(native, portable, {"x": x}) == {"LayerNormAddQuantize": 4, "Linear": 3}
    for before, after in zip(find_integer_sites(portable), find_integer_sites(native), strict=True):
        assert (before.site, before.scales, before.norm) == (after.site, after.scales, after.norm)


@pytest.mark.skipif(find_library() is None, reason="the kernel library was not built: no C++17 compiler")
def test_the_kernels_give_what_the_plan_means(make: Callable[..., Model]) -> None:
    model, plan = make(POST_NORM, "float[n, 16, 12] z")
    _, native = lower(model, plan)
    x = np.random.default_rng(2).normal(size=(2, 4, 4, WIDTH)).astype(np.float32)

    def run(names: Sequence[str]) -> Mapping[str, np.ndarray]:
        proto = ir.to_proto(native)
        computed = [name for name in dict.fromkeys(names) if name != "x"]
        del proto.graph.output[:]
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in computed)
        session = create_session(proto.SerializeToString(), threads=1, graph_optimization=False)
        return dict(zip(computed, session.run(computed, {"x": x}), strict=True)) | {"x": x}

    checks = check_native_numbers(native_nodes(native), plan, run)
    assert len(checks) == 7
    assert all(check.code_mismatches == 0 and check.codes for check in checks)
    norm_of(native, "norm01").attributes["output_scale"] = ir.AttrFloat32("output_scale", 0.3)
    checks = check_native_numbers(native_nodes(native), plan, run)
    assert [check.site for check in checks if check.code_mismatches] == ["norm01"]


def test_a_sum_that_no_quantizer_reads(make: Callable[..., Model]) -> None:
    _, native = lower(*make(left_out="linear02"))
    assert counts(native) == {"LayerNormAdd": 1, "Linear": 1}
    assert len(norm_of(native, "norm00").outputs) == 1


def test_a_norm_that_is_quantized_and_goes_on(make: Callable[..., Model]) -> None:
    body = """
  n = LayerNormalization <axis = -1> (x, gamma, beta)
  product = MatMul (n, weight0)
  linear = Add (product, bias)
  out = Add (n, linear)
"""
    portable, native = lower(*make(body))
    assert [node.op_type for node in native.graph] == ["LayerNormAddQuantize", "Linear"]
    norm, linear = native.graph
    assert len(norm.inputs) == 3
    assert linear.inputs[4] is norm.outputs[0]
    assert [site.norm for site in find_integer_sites(native)] == ["norm00"]
    assert [site.norm for site in find_integer_sites(portable)] == ["norm00"]


def test_a_norm_that_is_an_output_is_quantized_all_the_same(make: Callable[..., Model]) -> None:
    body = "  n = LayerNormalization <axis = -1> (x, gamma, beta)\n" + SIMPLE.replace("(x,", "(n,").replace(
        "  n = LayerNormalization <axis = -1> (linear, gamma, beta)\n", ""
    ).replace("Add (n, n)", "Neg (linear)")
    _, native = lower(*make(body, "float[n, 4, 4, 12] n"))
    assert counts(native) == {"LayerNormAddQuantize": 1, "Linear": 2}
    assert native.graph.outputs[1] is norm_of(native, "norm00").outputs[0]


def test_a_second_quantizer_of_the_sum_stays_portable(make: Callable[..., Model]) -> None:
    body = (
        SIMPLE.replace("out = Add (last, bias)", "")
        + """
  linear2 = Add (last, bias)
  hidden = MatMul (y, weight1)
  linear1 = Add (hidden, bias)
  out = Mul (linear1, linear2)
"""
    )
    _, native = lower(*make(body, own_scale="linear01"))
    assert counts(native) == {"LayerNormAddQuantize": 1, "Linear": 3}
    assert sum(node.op_type == "QuantizeLinear" for node in native.graph) == 2


def test_a_sum_may_be_what_another_norm_reads_and_adds(make: Callable[..., Model]) -> None:
    body = SIMPLE.replace("MatMul (y, weight2)", "MatMul (z, weight2)").replace(
        "  last =", "  m = LayerNormalization <axis = -1> (y, gamma, beta)\n  z = Add (m, y)\n  last ="
    )
    _, native = lower(*make(body))
    assert counts(native) == {"LayerNormAdd": 1, "LayerNormAddQuantize": 1, "Linear": 2}
    first, second = norm_of(native, "norm00"), norm_of(native, "norm01")
    assert [second.inputs[0], second.inputs[3]] == [first.outputs[0]] * 2


def test_the_residual_may_be_what_the_norm_reads(make: Callable[..., Model]) -> None:
    _, native = lower(*make(SIMPLE.replace("y = Add (x, n)", "y = Add (linear, n)")))
    norm = norm_of(native, "norm00")
    assert norm.op_type == "LayerNormAddQuantize"
    assert norm.inputs[0] is norm.inputs[3]


ADDED_TO_ITSELF = "y = Add (n, n)"
BY_COLUMNS = """t = Reshape (n, columns)
  s = Reshape (x, columns)
  u = Add (s, t)
  y = Reshape (u, grid)"""


@pytest.mark.parametrize(
    ("edits", "output", "reason"),
    [
        ({"y = Add (x, n)": "y = Add (x, n)\n  e = Neg (n)"}, "float[n, 4, 4, 12] e", "its floats are read by Add"),
        ({}, "float[n, 4, 4, 12] n", "its floats are read elsewhere"),
        ({"n = Layer": "n, mean = Layer"}, "float[n, 4, 4, 1] mean", "its statistics are read elsewhere"),
        ({"y = Add (x, n)": "y = Add (position, n)"}, "", "its floats are read by Add"),
        ({"y = Add (x, n)": "f = ReduceMean (x, one)\n  y = Add (f, n)"}, "", "its floats are read by Add"),
        ({"y = Add (x, n)": ADDED_TO_ITSELF}, "", "its floats are read by Add"),
        ({"y = Add (x, n)": BY_COLUMNS}, "", "its floats are read by Add u"),
        ({"y = Add (x, n)": "y = Sub (x, n)"}, "", "its floats are read by Sub"),
        ({"axis = -1": "axis = 2"}, "", "it is not over the last axis"),
    ],
)
def test_what_is_no_sum_with_a_residual_stays_portable(
    make: Callable[..., Model], edits: Mapping[str, str], output: str, reason: str
) -> None:
    body = SIMPLE
    for old, new in edits.items():
        body = body.replace(old, new)
    _, native = lower(*make(body, output))
    assert counts(native) == {"Linear": 2}
    assert reason in reasons(native)["norm00"]


def test_a_library_that_adds_no_norms_leaves_them_portable(make: Callable[..., Model]) -> None:
    _, native = lower(*make(), whole=False)
    assert counts(native) == {"Linear": 2}
    assert "its floats are read by Add" in reasons(native)["norm00"]


def test_a_fixed_batch(make: Callable[..., Model]) -> None:
    model, plan = make(POST_NORM, "float[n, 16, 12] z")
    model.graph.inputs[0].shape = ir.Shape([3, 4, 4, WIDTH])
    _, native = lower(model, plan)
    assert counts(native) == {"LayerNormAddQuantize": 2, "Linear": 3}
