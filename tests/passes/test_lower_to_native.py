from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from gated_blocks import gated, with_gate
from native_evaluator import compare_with_portable, run_native
from quantizers import FOUR_REGIONS, opt_m
from rotary_blocks import rotated

from mptqc.analysis.shapes import concrete_shapes
from mptqc.graph.edit import Builder, remove_dead, replace_value
from mptqc.graph.integer_sites import find_integer_sites
from mptqc.graph.io import serialize
from mptqc.graph.match import find_linears
from mptqc.graph.native_nodes import Lowering, lowering_report, native_nodes
from mptqc.passes.base import Stage, StageError, run_passes, stage_of
from mptqc.passes.lower_to_native import LowerToNative
from mptqc.passes.pack_weights import PackWeights
from mptqc.passes.quantize_attentions import QuantizeAttentions
from mptqc.passes.quantize_linears import QuantizeLinears
from mptqc.plan import LayerPlan, QuantPlan, Region, Uniform
from mptqc.recipe import Recipe
from mptqc.reference.custom_ops import block_weight
from mptqc.reference.packing import packed_bytes
from mptqc.reference.trellis import TAPS, decode
from mptqc.runtime.session import create_session

MakeModel = Callable[[], ir.Model]
MakePlan = Callable[..., QuantPlan]
Edit = Callable[[ir.Model], None]
X = np.random.default_rng(1).normal(size=(3, 7, 12)).astype(np.float32)
WHOLE_BLOCK = {"LayerNormQuantize": 1, "LinearQuantize": 5, "AttentionQuantize": 1, "Linear": 1}
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


def lower(model: ir.Model, plan: QuantPlan) -> tuple[ir.Model, ir.Model]:
    """The portable model, and a copy of it lowered."""
    run_passes(model, [QuantizeLinears(plan), QuantizeAttentions(plan), PackWeights(plan)])
    native = ir.from_proto(ir.to_proto(model))
    LowerToNative(concrete_shapes(native), concrete_shapes(native, batch=2))(native)
    onnx.checker.check_model(ir.to_proto(native))
    return model, native


def native_counts(model: ir.Model) -> dict[str, int]:
    return dict(Counter(node.op_type for node in native_nodes(model)))


def value(model: ir.Model, name: str) -> ir.Value:
    return next(out for node in model.graph for out in node.outputs if out.name == name)


def node(model: ir.Model, name: str) -> ir.Node:
    return next(each for each in model.graph if each.name == name)


def refusals(model: ir.Model) -> list[Lowering]:
    return [each for each in lowering_report(model) if each.reason]


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


@pytest.mark.parametrize("bits", [8, 4])
def test_rotated_heads_give_the_portable_values(block: MakeModel, block_plan: MakePlan, bits: int) -> None:
    portable, native = lower(rotated(block(), 3), block_plan(bits, bits, two_region=False))
    assert native_counts(native) == WHOLE_BLOCK
    # q and k are codes side by side here alone: they are compared by the attention that reads them
    assert compare_with_portable(native, portable, {"x": X}) == WHOLE_BLOCK | {"LinearQuantize": 3}
    assert {each.op_type for each in native.graph if each.domain == ""} <= {"Gather", "Cast", "Reshape", "Add", "Slice"}
    linears = {
        each.metadata_props["mptqc.site"]: each for each in native_nodes(native) if each.op_type == "LinearQuantize"
    }
    q, v = linears["block00.q"], linears["block00.v"]
    assert len(v.inputs) == 4
    assert q.inputs[4] is None
    assert [tuple(table.shape) for table in q.inputs[5:] if table is not None and table.shape is not None] == [
        (7, 16, 4)
    ] * 2
    expected = create_session(serialize(portable), threads=1).run(None, {"x": X})[0]
    (found,) = run_native(native, {"x": X})
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("heads", "own_tables", "reason"),
    [(2, False, "its heads are 6 wide"), (3, True, "each of its 3 heads is rotated in its own way")],
)
def test_heads_that_cannot_be_rotated_stay_portable(
    block: MakeModel, block_plan: MakePlan, heads: int, own_tables: bool, reason: str
) -> None:
    portable, native = lower(rotated(block(), heads, own_tables=own_tables), block_plan())
    assert [(each.site, each.op) for each in refusals(native)] == [
        (f"block00.{letter}", "Linear with rotation") for letter in "qk"
    ]
    assert all(reason in each.reason for each in refusals(native))
    assert native_counts(native) == {"LayerNormQuantize": 1, "LinearQuantize": 3, "AttentionQuantize": 1, "Linear": 3}
    assert compare_with_portable(native, portable, {"x": X})


def split_unevenly(model: ir.Model) -> None:
    for name in ("qs/rotary/halves", "ks/rotary/halves"):
        model.graph.initializers[name].const_value = ir.tensor(np.array([1, 3], np.int64), name=name)


def one_number_a_token(model: ir.Model) -> None:
    for name, table in model.graph.initializers.items():
        if name.endswith(("rotary/cos", "rotary/sin")):
            assert table.const_value is not None
            table.const_value = ir.tensor(np.ascontiguousarray(table.const_value.numpy()[..., :1]), name=name)
            table.shape = ir.Shape([7, 1, 1])


def gelu_before_the_heads(model: ir.Model) -> None:
    for name in ("qs", "ks"):
        reshape = node(model, name)
        reshape.replace_input_with(0, Builder(reshape, name).op("Gelu", [reshape.inputs[0]]))


@pytest.mark.parametrize("edit", [split_unevenly, one_number_a_token, gelu_before_the_heads])
def test_what_is_nearly_a_rotation_gives_the_portable_values(
    block: MakeModel, block_plan: MakePlan, edit: Edit
) -> None:
    model = rotated(block(), 3)
    edit(model)
    portable, native = lower(model, block_plan(8, 8, two_region=False))
    assert not [each for each in native_nodes(native) if len(each.inputs) > 5 and each.op_type == "LinearQuantize"]
    expected = create_session(serialize(portable), threads=1).run(None, {"x": X})[0]
    assert np.array_equal(run_native(native, {"x": X})[0], expected)


def test_a_library_without_rotation_leaves_it_portable(block: MakeModel, block_plan: MakePlan) -> None:
    plan = block_plan()
    native = run_passes(rotated(block(), 3), [QuantizeLinears(plan), QuantizeAttentions(plan), PackWeights(plan)])
    LowerToNative(concrete_shapes(native), concrete_shapes(native, batch=2), whole=False)(native)
    assert [each.reason for each in refusals(native)] == ["the target's kernels rotate no heads"] * 2


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


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_keep_their_codes_bits_and_bytes(block: MakeModel, block_plan: MakePlan, bits: int) -> None:
    portable, native = lower(block(), block_plan(bits))
    for before, after in zip(find_integer_sites(portable), find_integer_sites(native), strict=True):
        assert (before.site, before.scales, before.norm) == (after.site, after.scales, after.norm)
        if before.weight is None:
            assert after.weight is None
            continue
        assert after.weight is not None
        assert np.array_equal(before.weight.integers, after.weight.integers)
        assert after.weight.bits == bits
        assert after.weight.stored_bytes == block_weight(before.weight.integers).size * bits // 8


@pytest.mark.parametrize("bits", sorted(TAPS))
def test_weights_keep_the_codes_of_a_trellis(block: MakeModel, block_plan: MakePlan, bits: int) -> None:
    plan = block_plan(bits)
    shapes = {linear.site: linear.weight.shape for linear in find_linears(block())}
    random, limit = np.random.default_rng(bits), 2 ** (bits - 1)
    layers = tuple(layer.model_copy(update={"trellis": True}) for layer in plan.layers)
    codes = {
        f"{layer.site}/weight_codes": random.integers(-limit, limit, shapes[layer.site], np.int8) for layer in layers
    }
    plan = plan.model_copy(update={"layers": layers}).with_arrays(codes)
    portable, native = lower(block(), plan)
    for before, after in zip(find_integer_sites(portable), find_integer_sites(native), strict=True):
        if before.weight is not None:
            assert after.weight is not None
            planned = codes[f"{before.site}/weight_codes"]
            for stored in (before.weight, after.weight):
                assert np.array_equal(stored.trellis_codes, planned)
                assert np.array_equal(stored.integers, decode(planned, bits))
                assert (stored.bits, stored.stored_bytes) == (bits, packed_bytes(planned.size, bits))
    assert compare_with_portable(native, portable, {"x": X}) == WHOLE_BLOCK


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


def make_output(name: str, shape: list[int | str]) -> Edit:
    """A value of the float block also becomes an output of the model."""

    def edit(model: ir.Model) -> None:
        found = value(model, name)
        found.dtype, found.shape = ir.DataType.FLOAT, ir.Shape(shape)
        model.graph.outputs.append(found)

    return edit


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
FLOAT_GELU = {**WHOLE_BLOCK, "LinearQuantize": 4, "Linear": 2}


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


def gelu_by_tanh(model: ir.Model) -> None:
    node(model, "g").attributes["approximate"] = ir.AttrString("approximate", "tanh")


def quick_gelu(factor: float) -> Edit:
    def edit(model: ir.Model) -> None:
        gelu = node(model, "g")
        build = Builder(gelu, "quick")
        slope = build.op("Mul", [gelu.inputs[0], build.constant("factor", np.array(factor, np.float32))])
        result = build.op("Mul", [gelu.inputs[0], build.op("Sigmoid", [slope])])
        for use in list(gelu.outputs[0].uses()):
            use.node.replace_input_with(use.idx, result)
        model.graph.remove(gelu, safe=True)

    return edit


@pytest.mark.parametrize(
    ("edit", "activation"), [(gelu_by_tanh, "gelu_tanh"), (quick_gelu(1.702), "quick_gelu"), (quick_gelu(1.7), None)]
)
def test_other_gelus(block: MakeModel, block_plan: MakePlan, edit: Edit, activation: str | None) -> None:
    model = block()
    edit(model)
    portable, native = lower(model, block_plan(8, 8, two_region=False))
    assert native_counts(native) == (FLOAT_GELU if activation is None else WHOLE_BLOCK)
    named = {
        each.attributes["activation"].as_string() for each in native_nodes(native) if "activation" in each.attributes
    }
    assert named == {"none", activation} - {None}
    compare_with_portable(native, portable, {"x": X})


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


GATED = {**WHOLE_BLOCK, "Linear": 2}  # the gate stays float


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(7, 8), (4, 4)])
@pytest.mark.parametrize("activation", ["silu", "gelu", "none"])
def test_gates_give_the_portable_values(
    block: MakeModel, block_plan: MakePlan, activation: str, weight_bits: int, activation_bits: int
) -> None:
    model = gated(block(), activation)
    portable, native = lower(model, with_gate(block_plan(weight_bits, activation_bits, two_region=False), model))
    assert native_counts(native) == GATED
    assert refusals(native) == []
    by_site = {each.metadata_props["mptqc.site"]: each for each in native_nodes(native)}
    gate, gating = by_site["block00.gate"], by_site["block00.fc1"]
    assert gate.attributes["activation"].as_string() == activation
    assert [each is None for each in gating.inputs] == [False] * 4 + [True] * 3 + [False]
    assert gating.inputs[7] is gate.outputs[0]
    assert compare_with_portable(native, portable, {"x": X}) == GATED


def test_a_library_without_factors_leaves_them_portable(block: MakeModel, block_plan: MakePlan) -> None:
    model = gated(block())
    plan = with_gate(block_plan(8, 8, two_region=False), model)
    native = run_passes(model, [QuantizeLinears(plan), QuantizeAttentions(plan), PackWeights(plan)])
    LowerToNative(concrete_shapes(native), concrete_shapes(native, batch=2), whole=False)(native)
    by_site = {each.metadata_props["mptqc.site"]: each for each in native_nodes(native)}
    assert by_site["block00.fc1"].op_type == "Linear"
    assert by_site["block00.gate"].attributes["activation"].as_string() == "silu"
    assert [len(each.inputs) for each in by_site.values() if each.op_type == "Linear"] == [4, 4, 4]


def by_a_constant(model: ir.Model) -> None:
    multiply = next(each for each in model.graph if each.op_type == "Mul" and value(model, "f") in each.inputs)
    index = 0 if multiply.inputs[1] is value(model, "f") else 1
    constant = np.random.default_rng(3).standard_normal((1, 7, 20)).astype(np.float32)
    multiply.replace_input_with(index, Builder(multiply, "test").constant("constant", constant))


def squared(model: ir.Model) -> None:
    multiply = next(each for each in model.graph if each.op_type == "Mul" and value(model, "f") in each.inputs)
    for index in (0, 1):
        multiply.replace_input_with(index, value(model, "f"))


@pytest.mark.parametrize("edit", [make_output("f", ["n", 7, 20]), by_a_constant, squared])
def test_what_is_nearly_a_gate_gives_the_portable_values(block: MakeModel, block_plan: MakePlan, edit: Edit) -> None:
    model = gated(block())
    edit(model)
    portable, native = lower(model, with_gate(block_plan(7, 8, two_region=False), model))
    fc1 = next(each for each in native_nodes(native) if each.metadata_props["mptqc.site"] == "block00.fc1")
    assert len(fc1.inputs) == 4
    assert compare_with_portable(native, portable, {"x": X})["Linear"] >= 2


def test_a_constant_added_to_every_image_is_no_residual(block: MakeModel, block_plan: MakePlan) -> None:
    model = block()
    y = model.graph.outputs[0].producer()
    assert y is not None
    position = Builder(y, "test").constant("position", np.ones((1, 7, 12), np.float32))
    added = ir.node("Add", [y.outputs[0], position], name="added")
    added.outputs[0].name, added.outputs[0].dtype, added.outputs[0].shape = (
        "added",
        ir.DataType.FLOAT,
        y.outputs[0].shape,
    )
    model.graph.append(added)
    model.graph.outputs[0] = added.outputs[0]
    portable, native = lower(model, block_plan())
    assert [each.name for each in native.graph if each.op_type == "Add" and not each.domain] == ["added"]
    assert compare_with_portable(native, portable, {"x": X}) == WHOLE_BLOCK


def test_a_model_that_is_not_quantized_is_refused(block: MakeModel, block_plan: MakePlan) -> None:
    with pytest.raises(StageError, match="lower-to-native"):
        LowerToNative({}, {})(block())
    _, native = lower(block(), block_plan())
    with pytest.raises(StageError, match="lower-to-native"):
        LowerToNative({}, {})(native)
