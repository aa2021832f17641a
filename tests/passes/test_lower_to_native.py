"""Whole blocks as operators of `ai.mptqc`: the same values, and what stays portable and why."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from lowering import (
    FLOAT_GELU,
    WHOLE_BLOCK,
    Edit,
    MakeModel,
    MakePlan,
    X,
    lower,
    make_output,
    native_counts,
    node,
    refusals,
)
from native_evaluator import compare_with_portable, run_native
from quantizers import FOUR_REGIONS, opt_m

from mptqc.graph.edit import Builder, remove_dead, replace_value
from mptqc.graph.io import serialize
from mptqc.graph.native_nodes import Lowering, native_nodes
from mptqc.passes.base import Stage, StageError, stage_of
from mptqc.passes.lower_to_native import LowerToNative
from mptqc.plan import LayerPlan, QuantPlan, Region, Uniform
from mptqc.recipe import Recipe
from mptqc.runtime.session import create_session

SHIFTED_WINDOWS = """
  n = LayerNormalization <axis = -1> (x, gamma, beta)
  below = Slice (n, one, end, rows)
  above = Slice (n, zero, one, rows)
  rolled = Concat <axis = 1> (below, above)
  split = Reshape (rolled, windows)
  parted = Transpose <perm = [0, 1, 3, 2, 4, 5]> (split)
  window = Reshape (parted, joined)
  product = MatMul (window, weight)
  linear = Add (product, bias)
  parted_back = Reshape (linear, windows)
  split_back = Transpose <perm = [0, 1, 3, 2, 4, 5]> (parted_back)
  image = Reshape (split_back, grid)
  last = Slice (image, minus_one, end, rows)
  others = Slice (image, zero, minus_one, rows)
  unrolled = Concat <axis = 1> (last, others)
  y = Add (x, unrolled)
"""


def test_a_block_becomes_fused_operators(block: MakeModel, block_plan: MakePlan) -> None:
    _, native = lower(block(), block_plan(8, 8, two_region=False))
    assert {each.domain for each in native.graph} == {"ai.mptqc"}
    assert native_counts(native) == WHOLE_BLOCK
    assert refusals(native) == []
    assert stage_of(native) is Stage.LOWERED
    assert native.opset_imports["ai.mptqc"] == 1


@pytest.mark.parametrize(
    ("weight_bits", "activation_bits", "two_region"),
    [(8, 8, False), (5, 6, False), (2, 3, False), (4, 4, True), (3, 5, True)],
)
def test_every_operator_gives_the_portable_values(
    block: MakeModel, block_plan: MakePlan, weight_bits: int, activation_bits: int, two_region: bool
) -> None:
    portable, native = lower(block(), block_plan(weight_bits, activation_bits, two_region=two_region))
    assert compare_with_portable(native, portable, {"x": X}) == WHOLE_BLOCK


def test_quantizers_of_more_regions_give_the_portable_values(block: MakeModel, block_plan: MakePlan) -> None:
    plan = block_plan(4, 4)
    layers = tuple(
        layer.model_copy(update={"input": FOUR_REGIONS}) if layer.site.endswith("fc2") else layer
        for layer in plan.layers
    )
    probabilities = opt_m(bits=4, scale=0.01, zero_point=0, m=1, low_codes=3)
    three = probabilities.model_copy(update={"upper": (Region(1, 7), Region(3, 6))})
    attentions = tuple(attention.model_copy(update={"p": three}) for attention in plan.attentions)
    portable, native = lower(block(), plan.model_copy(update={"layers": layers, "attentions": attentions}))
    assert compare_with_portable(native, portable, {"x": X}) == WHOLE_BLOCK
    (attention,) = (each for each in native_nodes(native) if each.op_type == "AttentionQuantize")
    assert attention.attributes["p_m"].as_ints() == (1, 3)
    before_fc2 = [
        each for each in native_nodes(native) if "output_m" in each.attributes and each.attributes["output_m"].as_ints()
    ]
    assert [each.attributes["output_m"].as_ints() for each in before_fc2] == [(1, 2, 3)]


def test_the_whole_runs_in_numpy(block: MakeModel, block_plan: MakePlan) -> None:
    portable, native = lower(block(), block_plan(8, 8, two_region=False))
    expected = create_session(serialize(portable), threads=1).run(None, {"x": X})[0]
    (found,) = run_native(native, {"x": X})
    # No code of this block lies at a rounding boundary, and the last product is exact.
    assert np.array_equal(found, expected)


def test_scores_take_their_mask_and_probabilities_two_regions(block: MakeModel, block_plan: MakePlan) -> None:
    _, native = lower(block(), block_plan())
    attention = next(each for each in native_nodes(native) if each.op_type == "AttentionQuantize")
    assert len(attention.inputs) == 4
    mask = attention.inputs[3]
    assert mask is not None and mask.const_value is not None
    assert mask.const_value.numpy().shape == (1, 1, 7, 7)
    assert (attention.attributes["p_m"].as_ints(), attention.attributes["p_split"].as_ints()) == ((2,), (4,))


def test_a_norm_is_repeated_for_another_quantizer(block: MakeModel, block_plan: MakePlan) -> None:
    plan = block_plan(8, 8, two_region=False)
    other = Uniform(bits=8, scale=0.03, zero_point=120)
    layers = tuple(
        each.model_copy(update={"input": other}) if each.site == "block00.k" else each for each in plan.layers
    )
    portable, native = lower(block(), plan.model_copy(update={"layers": layers}))
    assert compare_with_portable(native, portable, {"x": X}) == {**WHOLE_BLOCK, "LayerNormQuantize": 2}


def test_a_context_that_stays_float_is_joined_all_the_same(block: MakeModel, block_plan: MakePlan) -> None:
    plan = block_plan(8, 8, two_region=False)
    layers = tuple(each for each in plan.layers if each.site != "block00.proj")
    portable, native = lower(block(), plan.model_copy(update={"layers": layers}))
    expected = {"LayerNormQuantize": 1, "LinearQuantize": 4, "Attention": 1, "Linear": 1}
    assert compare_with_portable(native, portable, {"x": X}) == expected
    assert not any(each.op_type == "Transpose" for each in native.graph)


def test_shifted_windows_become_row_tables(smoothed: Callable[..., ir.Model]) -> None:
    model, plan = shifted_windows(smoothed)
    portable, native = lower(model, plan)
    assert [each.op_type for each in native.graph] == ["LayerNormQuantize", "Reshape", "Linear"]
    norm, _, linear = native.graph
    tables = [node.inputs[position].const_value.numpy() for node, position in ((norm, 3), (linear, 5))]
    expected = np.roll(np.arange(16).reshape(4, 4), -1, 0).reshape(2, 2, 2, 2).swapaxes(1, 2).reshape(-1)
    assert np.array_equal(tables[0], expected)
    assert np.array_equal(tables[1], expected)
    x = np.random.default_rng(2).normal(size=(3, 4, 4, 12)).astype(np.float32)
    assert compare_with_portable(native, portable, {"x": x}) == {"LayerNormQuantize": 1, "Linear": 1}


def shifted_windows(smoothed: Callable[..., ir.Model]) -> tuple[ir.Model, QuantPlan]:
    """A norm, roll, windows of 2 × 2, a Linear, and back, on images of 4 × 4."""
    random = np.random.default_rng(0)
    arrays = {
        "gamma": random.normal(size=12).astype(np.float32),
        "beta": random.normal(size=12).astype(np.float32),
        "weight": random.normal(size=(12, 12)).astype(np.float32),
        "bias": random.normal(size=12).astype(np.float32),
        "windows": np.array([-1, 2, 2, 2, 2, 12], np.int64),
        "joined": np.array([-1, 4, 12], np.int64),
        "grid": np.array([-1, 4, 4, 12], np.int64),
        "zero": np.array([0], np.int64),
        "one": np.array([1], np.int64),
        "minus_one": np.array([-1], np.int64),
        "end": np.array([np.iinfo(np.int64).max], np.int64),
        "rows": np.array([1], np.int64),
    }
    image = "float[n, 4, 4, 12]"
    model = smoothed(f"{image} x", f"{image} y", SHIFTED_WINDOWS, {"n": "norm00", "product": "linear00"}, arrays)
    layer = LayerPlan(site="linear00", weight_bits=8, input=Uniform(bits=8, scale=0.03, zero_point=128))
    scale = np.abs(arrays["weight"]).max(axis=0) / np.float32(63)  # more saturates on AVX2
    return model, QuantPlan(model_digest="0", recipe=Recipe(), layers=(layer,), arrays={"linear00/weight_scale": scale})


def subtract_from_scores(model: ir.Model) -> None:
    softmax = node(model, "a")
    build = Builder(softmax, "test")
    one = build.constant("one", np.array(1, np.float32))
    softmax.replace_input_with(0, build.op("Sub", [softmax.inputs[0], one]))


def compute_the_mask(model: ir.Model) -> None:
    add = node(model, "sm")
    add.replace_input_with(1, Builder(add, "test").op("Neg", [add.inputs[1]]))


def interleave_heads(model: ir.Model) -> None:
    """Channels become (channel, head) in place of (head, channel)."""
    shape = node(model, "qs").inputs[1]
    assert shape is not None
    shape.const_value = ir.tensor(np.array([0, 0, 6, 2], np.int64), name=shape.name)
    for name, permutation in (("q", [0, 3, 1, 2]), ("k", [0, 3, 2, 1]), ("v", [0, 3, 1, 2]), ("ct", [0, 2, 3, 1])):
        node(model, name).attributes["perm"] = ir.AttrInt64s("perm", permutation)


INTERLEAVED = {"LayerNormQuantize": 1, "LinearQuantize": 3, "Linear": 3}  # q, proj and fc1 quantize; k and v are int8
PORTABLE_ATTENTION = INTERLEAVED


@pytest.mark.parametrize(
    ("edit", "site", "reason", "counts"),
    [
        (make_output("n", ["n", 7, 12]), None, "", {**WHOLE_BLOCK, "LayerNormQuantize": 0, "LayerNormAddQuantize": 1}),
        (make_output("s", ["n", 2, 7, 7]), "block00.attention", "s, on the way to its softmax", PORTABLE_ATTENTION),
        (subtract_from_scores, "block00.attention", "Sub test/Sub lies between", PORTABLE_ATTENTION),
        (compute_the_mask, "block00.attention", "Add sm adds something", PORTABLE_ATTENTION),
        (interleave_heads, "block00.attention", "the heads of q lie in", INTERLEAVED),
        (make_output("f", ["n", 7, 20]), None, "", FLOAT_GELU),
        (make_output("g", ["n", 7, 20]), None, "", FLOAT_GELU),
    ],
)
def test_what_an_operator_cannot_express_keeps_its_portable_form(
    block: MakeModel, block_plan: MakePlan, edit: Edit, site: str | None, reason: str, counts: dict[str, int]
) -> None:
    model = block()
    edit(model)
    portable, native = lower(model, block_plan())
    assert native_counts(native) == {op: count for op, count in counts.items() if count}
    assert [each.site for each in refusals(native)] == ([] if site is None else [site])
    assert all(reason in each.reason for each in refusals(native))
    compare_with_portable(native, portable, {"x": X})


@pytest.mark.parametrize("letters", ["q", "k", "v", "qkv"])
def test_codes_whose_heads_lie_apart_are_brought_together(block: MakeModel, block_plan: MakePlan, letters: str) -> None:
    """What is made after the heads are parted is quantized there: q and v [B, H, T, d], k [B, H, d, T]."""
    model = block()
    for letter in letters:
        moved = node(model, letter)
        reader = moved.outputs[0].consumers()[0]
        opposite = Builder(reader, letter).op("Neg", [moved.outputs[0]])
        reader.replace_input_with("qkv".index(letter) % 2 if letter != "v" else 1, opposite)
    portable, native = lower(model, block_plan())
    assert native_counts(native)["AttentionQuantize"] == 1
    assert len([each for each in native.graph if each.op_type == "Transpose" and "together" in str(each.name)]) == len(
        letters
    )
    compare_with_portable(native, portable, {"x": X})
    expected = create_session(serialize(portable), threads=1).run(None, {"x": X})[0]
    assert np.array_equal(run_native(native, {"x": X})[0], expected)


@pytest.mark.parametrize(("more", "left"), [(("same", "same"), 1), (("by head", "same"), 2), (("by head",), 2)])
def test_more_additions_than_two_are_joined(
    block: MakeModel, block_plan: MakePlan, more: tuple[str, ...], left: int
) -> None:
    model = block()
    softmax, random = node(model, "a"), np.random.default_rng(0)
    build = Builder(softmax, "more")
    scores = node(model, "sm").outputs[0]
    for each in more:
        constant = random.normal(size=(1, 2 if each == "by head" else 1, 7, 7)).astype(np.float32)
        scores = build.op("Add", [scores, build.constant("mask", constant)])
    softmax.replace_input_with(0, scores)
    portable, native = lower(model, block_plan(8, 8, two_region=False))
    attention = next(each for each in native_nodes(native) if each.op_type == "AttentionQuantize")
    assert len(attention.inputs) == 3 + left
    expected = create_session(serialize(portable), threads=1).run(None, {"x": X})[0]
    assert np.abs(run_native(native, {"x": X})[0] - expected).max() < 0.02 * np.abs(expected).max()  # a code or two


def test_an_rms_norm_stays_portable_and_is_named(block: MakeModel, block_plan: MakePlan) -> None:
    model = block()
    norm = next(node for node in model.graph if node.op_type == "LayerNormalization")
    build, x = Builder(norm, "rms"), norm.inputs[0]
    mean = build.op("ReduceMean", [build.op("Mul", [x, x]), build.constant("last", np.array([-1]))], name="mean")
    replace_value(norm.outputs[0], build.op("Div", [x, build.op("Sqrt", [mean])]))
    remove_dead(model)
    portable, native = lower(model, block_plan(7, 8, two_region=False))
    reason = "it is an RMSNorm; the kernels compute LayerNorms"
    assert refusals(native) == [Lowering("rms/mean", "LayerNormQuantize", reason)]
    compare_with_portable(native, portable, {"x": X})


def test_a_model_that_is_not_quantized_is_refused(block: MakeModel, block_plan: MakePlan) -> None:
    with pytest.raises(StageError, match="lower-to-native"):
        LowerToNative({}, {})(block())
    _, native = lower(block(), block_plan())
    with pytest.raises(StageError, match="lower-to-native"):
        LowerToNative({}, {})(native)
