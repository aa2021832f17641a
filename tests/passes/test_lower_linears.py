"""What the operators take in of what follows a Linear: rotations, activations, gates, residuals; and its weight."""

import numpy as np
import onnx_ir as ir
import pytest
from gated_blocks import gated, with_gate
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
    value,
)
from native_evaluator import compare_with_portable, run_native
from rotary_blocks import rotated

from mptqc.analysis.shapes import concrete_shapes
from mptqc.graph.edit import Builder
from mptqc.graph.integer_sites import find_integer_sites
from mptqc.graph.io import serialize
from mptqc.graph.match import find_linears
from mptqc.graph.native_nodes import native_nodes
from mptqc.passes.base import run_passes
from mptqc.passes.lower_to_native import LowerToNative
from mptqc.passes.pack_weights import PackWeights
from mptqc.passes.quantize_attentions import QuantizeAttentions
from mptqc.passes.quantize_linears import QuantizeLinears
from mptqc.reference.custom_ops import block_weight
from mptqc.reference.packing import packed_bytes
from mptqc.reference.trellis import TAPS, decode
from mptqc.runtime.session import create_session


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
