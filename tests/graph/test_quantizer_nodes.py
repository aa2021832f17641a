"""Emitted quantizers equal the reference code for code, optimized or not, and codes travel instead of floats."""

import collections

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from quantizers import FOUR_REGIONS, THREE_REGIONS, opt_m

from mptqc.analysis.candidates import divisions_of
from mptqc.errors import PlanError
from mptqc.graph.edit import Builder, constant_of
from mptqc.graph.io import serialize
from mptqc.graph.quantizer_nodes import Operand, check_quantizer, emit_quantizer
from mptqc.plan import ActivationQuantizer, MultiRegion, Uniform
from mptqc.reference.quantizers import quantize
from mptqc.runtime.fused_ops import optimized_op_counts
from mptqc.runtime.session import create_session

# Integers, not st.floats: hypothesis refuses to make floats once a session flushes denormals to zero in this thread.
SCALES = st.builds(
    lambda mantissa, exponent: float(mantissa * 2.0**exponent), st.integers(2**15, 2**16 - 1), st.integers(-36, -6)
)


@st.composite
def uniform(draw: st.DrawFn) -> Uniform:
    bits = draw(st.integers(2, 8))
    return Uniform(bits=bits, scale=draw(SCALES), zero_point=draw(st.integers(0, 2**bits - 1)))


@st.composite
def regions(draw: st.DrawFn) -> MultiRegion:
    """Two to four regions that meet on their grids and fit 8 bits."""
    bits, below_zero = draw(st.integers(3, 7)), draw(st.booleans())
    divisions = divisions_of(bits, 4, below_zero=below_zero)
    m = draw(st.sampled_from(sorted(divisions)))
    return draw(st.sampled_from(divisions[m])).quantizer(bits, m, draw(SCALES))


def hard_values(quantizer: ActivationQuantizer) -> NDArray[np.float32]:
    """Every code's centre and tie in each region, values next to them, and far outside; float32."""
    coarse = [2**region.m for region in quantizer.upper] if isinstance(quantizer, MultiRegion) else []
    steps = np.arange(-300, 600, dtype=np.float64) / 2 * quantizer.scale
    values = np.concatenate([steps * step for step in (1, *coarse)]).astype(np.float32)
    around = np.concatenate([values, np.nextafter(values, np.float32(np.inf)), np.nextafter(values, np.float32(-1e9))])
    return np.concatenate([around, np.array([0.0, -0.0, 1e30, -1e30, 1e-30], np.float32)])


def quantizer_model(quantizer: ActivationQuantizer, *, signed: bool, producer: str = "Identity") -> tuple[bytes, int]:
    """x -> producer -> quantizer -> codes, and the codes' zero point."""
    attributes = "<axis = -1>" if producer == "Softmax" else ""
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["": 21]>\n'
        f"g (float[n, c] x) => (float[n, c] y) {{ y = {producer} {attributes} (x) }}"
    )
    node = model.graph[0]
    end = ir.node("Identity", [node.outputs[0]], name="end")
    model.graph.append(end)
    codes = emit_quantizer(node.outputs[0], Operand(quantizer, signed), Builder(end, "site"))
    model.graph.outputs.append(codes.codes)
    model.graph.remove(end, safe=True)
    zero_point = constant_of(codes.zero_point)
    assert zero_point is not None
    return serialize(model), int(zero_point)


def run(model: bytes, x: NDArray[np.float32], *, optimized: bool = True) -> list[NDArray[np.generic]]:
    return list(create_session(model, threads=1, graph_optimization=optimized).run(None, {"x": x}))


@settings(max_examples=60, deadline=None)
@given(quantizer=st.one_of(uniform(), regions()), signed=st.booleans(), optimized=st.booleans())
def test_codes_equal_the_reference(quantizer: ActivationQuantizer, signed: bool, optimized: bool) -> None:
    model, zero_point = quantizer_model(quantizer, signed=signed)
    x = hard_values(quantizer)[None]
    _, codes = run(model, x, optimized=optimized)
    assert codes.dtype == (np.int8 if signed else np.uint8)
    expected = quantize(quantizer, x) - quantizer.zero_point
    assert np.array_equal(codes.astype(np.int32) - zero_point, expected)


@settings(max_examples=40, deadline=None)
@given(quantizer=st.one_of(uniform(), regions()), producer=st.sampled_from(["Softmax", "Gelu", "Relu", "Sigmoid"]))
def test_codes_equal_the_reference_behind_ops_with_a_lower_bound(quantizer: ActivationQuantizer, producer: str) -> None:
    model, zero_point = quantizer_model(quantizer, signed=False, producer=producer)
    generator = np.random.default_rng(quantizer.bits)
    reach = np.float32(quantizer.scale * 300)
    x = np.concatenate(
        [
            generator.normal(size=(4, 500)) * reach,
            generator.normal(size=(4, 500)),
            np.linspace(-2, 0.1, 2000).reshape(4, -1),
        ],
        axis=1,
    ).astype(np.float32)
    y, codes = run(model, x)
    expected = quantize(quantizer, y.astype(np.float32)) - quantizer.zero_point
    assert np.array_equal(codes.astype(np.int32) - zero_point, expected)


def op_counts(model: bytes) -> dict[str, int]:
    return dict(collections.Counter(node.op_type for node in onnx.load_from_string(model).graph.node))


def test_eight_bits_need_no_clip() -> None:
    model, _ = quantizer_model(Uniform(bits=8, scale=0.1, zero_point=100), signed=False)
    assert op_counts(model) == {"Identity": 1, "QuantizeLinear": 1}


def test_softmax_at_four_bits_saturates_at_the_top_of_the_container() -> None:
    model, zero_point = quantizer_model(Uniform(bits=4, scale=1 / 15, zero_point=0), signed=False, producer="Softmax")
    assert op_counts(model) == {"Softmax": 1, "QuantizeLinear": 1}
    assert zero_point == 255 - 15


def test_unbounded_values_at_four_bits_are_clipped() -> None:
    model, _ = quantizer_model(Uniform(bits=4, scale=0.1, zero_point=7), signed=False)
    assert op_counts(model) == {"Identity": 1, "QuantizeLinear": 1, "Clip": 1}


def test_two_regions_after_softmax_need_one_clip() -> None:
    quantizer = opt_m(bits=4, scale=0.01, zero_point=0, m=3, low_codes=9)
    model, _ = quantizer_model(quantizer, signed=False, producer="Softmax")
    assert op_counts(model) == {"Softmax": 1, "QuantizeLinear": 3, "Clip": 1, "DequantizeLinear": 2, "Add": 1}


def test_each_further_region_is_three_ops_more() -> None:
    model, _ = quantizer_model(FOUR_REGIONS, signed=False, producer="Softmax")
    assert optimized_op_counts(model) == {"Softmax": 1, "QuantizeLinear": 4, "Clip": 3, "QLinearAdd": 3}


@pytest.mark.parametrize(
    ("quantizer", "problem"),
    [
        (Uniform(bits=4, scale=1.0, zero_point=16), "zero point 16"),
        (opt_m(bits=8, scale=1.0, zero_point=0, m=2, low_codes=5), "code 1008"),
        (opt_m(bits=4, scale=1.0, zero_point=1, m=2, low_codes=5), "3Δ"),
        (opt_m(bits=4, scale=1.0, zero_point=8, m=2, low_codes=5), "-4Δ"),
        (THREE_REGIONS.model_copy(update={"low_codes": 5}), "has 14 codes"),
        (THREE_REGIONS.model_copy(update={"upper": THREE_REGIONS.upper[::-1]}), "rising steps"),
        (FOUR_REGIONS.model_copy(update={"zero_point": 2}), "1Δ"),
    ],
)
def test_a_quantizer_that_does_not_fit_is_refused(quantizer: ActivationQuantizer, problem: str) -> None:
    with pytest.raises(PlanError, match=r"block00\.fc2") as caught:
        check_quantizer(quantizer, "block00.fc2")
    assert problem in str(caught.value)
