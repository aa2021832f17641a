# ruff: noqa: E501 - the golden is ONNX text as it is printed
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from mptqc.graph.edit import constant_of
from mptqc.graph.emission import WEIGHT_BITS_KEY
from mptqc.graph.io import serialize
from mptqc.graph.match import SITE_KEY
from mptqc.graph.stored_weight import read_weight
from mptqc.passes.base import STAGE_KEY, Stage, StageError, stage_of
from mptqc.passes.pack_weights import PackWeights
from mptqc.passes.quantize_linears import QuantizeLinears
from mptqc.plan import LayerPlan, QuantPlan, Uniform
from mptqc.recipe import Recipe
from mptqc.reference.trellis import TAPS, decode
from mptqc.runtime.fused_ops import optimized_op_counts
from mptqc.runtime.session import create_session

MakeModel = Callable[[], ir.Model]
MakePlan = Callable[..., QuantPlan]
MakeSmoothed = Callable[..., ir.Model]
X = np.random.default_rng(1).normal(size=(3, 7, 12)).astype(np.float32)


def integer_weight(smoothed: MakeSmoothed, codes: NDArray[np.int8], bits: int) -> ir.Model:
    """One MatMulInteger whose output shows the codes: x is the identity matrix."""
    model = smoothed(
        "uint8[m, k] x", f"int32[m, {codes.shape[1]}] y", "y = MatMulInteger (x, w)", {"y": "head"}, {"w": codes}
    )
    model.graph[0].metadata_props[WEIGHT_BITS_KEY] = str(bits)
    return model


@st.composite
def codes_of_some_bits(draw: st.DrawFn) -> tuple[NDArray[np.int8], int]:
    bits = draw(st.integers(2, 8))
    limit = 2 ** (bits - 1)
    shape = draw(st.tuples(st.integers(1, 11), st.integers(1, 11)))
    return draw(arrays(np.int8, shape, elements=st.integers(-limit, limit - 1))), bits


@settings(max_examples=40, deadline=None)
@given(case=codes_of_some_bits(), optimized=st.booleans())
def test_onnx_runtime_unpacks_the_very_codes(
    smoothed: MakeSmoothed, case: tuple[NDArray[np.int8], int], optimized: bool
) -> None:
    codes, bits = case
    model = integer_weight(smoothed, codes, bits)
    PackWeights()(model)
    session = create_session(serialize(model), threads=1, graph_optimization=optimized)
    (found,) = session.run(None, {"x": np.eye(codes.shape[0], dtype=np.uint8)})
    assert np.array_equal(found, codes)


@pytest.mark.parametrize("bits", range(2, 8))
def test_unpacking_is_done_when_the_session_is_created(smoothed: MakeSmoothed, bits: int) -> None:
    model = integer_weight(smoothed, np.zeros((16, 8), np.int8), bits)
    PackWeights()(model)
    assert optimized_op_counts(serialize(model)) == {"MatMulInteger": 1}


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_weight_takes_its_bits_in_the_file(smoothed: MakeSmoothed, bits: int) -> None:
    model = integer_weight(smoothed, np.zeros((96, 64), np.int8), bits)
    PackWeights()(model)
    stored = sum(
        value.const_value.nbytes
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and name is not None and ("/bit" in name or name == "w")
    )
    assert stored == 96 * 64 * bits // 8


def trellis_plan(codes: NDArray[np.int8], bits: int) -> QuantPlan:
    """Of one weight, of site "head"."""
    quantizer = Uniform(bits=8, scale=1.0, zero_point=0)
    layer = LayerPlan(site="head", weight_bits=bits, input=quantizer, trellis=True)
    return QuantPlan(model_digest="", recipe=Recipe(), layers=(layer,), arrays={"head/weight_codes": codes})


@pytest.mark.parametrize("optimized", [True, False])
@pytest.mark.parametrize("bits", sorted(TAPS))
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (7, 19), (16, 64)])
def test_onnx_runtime_decodes_a_trellis(
    smoothed: MakeSmoothed, shape: tuple[int, int], bits: int, optimized: bool
) -> None:
    codes = np.random.default_rng(bits).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, np.int8)
    weight = decode(codes, bits)
    model = integer_weight(smoothed, weight, bits)
    PackWeights(trellis_plan(codes, bits))(model)
    session = create_session(serialize(model), threads=1, graph_optimization=optimized)
    (found,) = session.run(None, {"x": np.eye(shape[0], dtype=np.uint8)})
    assert np.array_equal(found, weight)
    stored = read_weight(model.graph[-1].inputs[1], "head")
    assert np.array_equal(stored.integers, weight)
    assert stored.trellis_codes is not None and np.array_equal(stored.trellis_codes, codes)
    assert stored.bits == bits


@pytest.mark.parametrize("bits", sorted(TAPS))
def test_that_too_is_done_when_the_session_is_created_and_takes_its_bits(smoothed: MakeSmoothed, bits: int) -> None:
    codes = np.zeros((96, 64), np.int8)
    model = integer_weight(smoothed, decode(codes, bits), bits)
    PackWeights(trellis_plan(codes, bits))(model)
    assert optimized_op_counts(serialize(model)) == {"MatMulInteger": 1}
    assert read_weight(model.graph[-1].inputs[1], "head").stored_bytes == codes.size * bits // 8


def test_eight_bits_stay_as_they_are(smoothed: MakeSmoothed) -> None:
    codes = np.arange(-6, 6, dtype=np.int8).reshape(3, 4)
    model = integer_weight(smoothed, codes, 8)
    result = PackWeights()(model)
    assert not result.modified
    found = constant_of(model.graph[0].inputs[1])
    assert found is not None
    assert np.array_equal(found, codes)


def test_layers_share_the_tables(block: MakeModel, block_plan: MakePlan) -> None:
    model = block()
    QuantizeLinears(block_plan(3))(model)
    result = PackWeights()(model)
    assert result.edits == 6
    tables = [name for name in model.graph.initializers if name.startswith("mptqc/table")]
    assert sorted(tables) == ["mptqc/table_bit0_width2", "mptqc/table_bit2_width1_signed"]


def test_a_product_without_site_is_left_alone(smoothed: MakeSmoothed) -> None:
    model = integer_weight(smoothed, np.zeros((4, 4), np.int8), 4)
    del model.graph[0].metadata_props[SITE_KEY]
    assert not PackWeights()(model).modified


def test_outputs_stay_bit_equal(block: MakeModel, block_plan: MakePlan) -> None:
    model = block()
    QuantizeLinears(block_plan(5))(model)
    before = create_session(serialize(model), threads=1).run(None, {"x": X})[0]
    PackWeights()(model)
    assert np.array_equal(create_session(serialize(model), threads=1).run(None, {"x": X})[0], before)


def test_the_model_is_quantized_after_it(block: MakeModel, block_plan: MakePlan) -> None:
    model = block()
    QuantizeLinears(block_plan())(model)
    PackWeights()(model)
    assert stage_of(model) is Stage.QUANTIZED
    with pytest.raises(StageError, match="pack-weights"):
        PackWeights()(model)


def test_a_float_model_that_is_not_smoothed_is_refused(block: MakeModel) -> None:
    model = block()
    model.metadata_props[STAGE_KEY] = Stage.CANONICAL
    with pytest.raises(StageError, match="pack-weights"):
        PackWeights()(model)


GOLDEN = """\
   ["head/unpack/bit0_index"] "head/unpack/bit0_index_output" = Cast <to: int = 6> ("head/unpack/bit0")
   ["head/unpack/bit0_codes"] "head/unpack/bit0_codes_output" = Gather ("mptqc/table_bit0_width4_signed", "head/unpack/bit0_index_output")
   ["head/unpack/bit0_shaped"] "head/unpack/bit0_shaped_output" = Reshape ("head/unpack/bit0_codes_output", "head/unpack/shape")
   [y] y = MatMulInteger (x, "head/unpack/bit0_shaped_output")
"""


def test_golden(smoothed: MakeSmoothed, as_text: Callable[[ir.Model], str]) -> None:
    model = integer_weight(smoothed, np.array([[1, -1, 7], [-8, 0, 3]], np.int8), 4)
    PackWeights()(model)
    _, nodes = as_text(model).split("{\n   [")  # before it: the 256-entry table among the initializers
    assert "   [" + nodes.removesuffix("}\n") == GOLDEN
