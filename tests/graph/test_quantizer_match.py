import numpy as np
import onnx_ir as ir
import pytest
from quantizers import FOUR_REGIONS, THREE_REGIONS, opt_m

from mptqc.graph.edit import Builder
from mptqc.graph.quantizer_match import SIGNED_OFFSET, emit_unsigned, match_quantizer, match_reader, quantizers_of
from mptqc.graph.quantizer_nodes import Operand, emit_quantizer
from mptqc.plan import ActivationQuantizer, Uniform
from mptqc.reference.custom_ops import quantize_codes
from mptqc.reference.quantizers import quantize
from mptqc.runtime.session import create_session

MODEL = """<ir_version: 10, opset_import: ["": 21]>
g (float[n] x) => (float[n] y) {
  a = OPERATION (x)
  y = Relu (a)
}"""
X = np.concatenate([np.linspace(-9, 9, 4001), np.random.default_rng(0).normal(size=1000)]).astype(np.float32)
QUANTIZERS: list[ActivationQuantizer] = [
    *(Uniform(bits=bits, scale=4 / 2**bits, zero_point=2**bits // 3) for bits in range(2, 9)),
    Uniform(bits=4, scale=0.2, zero_point=0),
    *(opt_m(bits=4, scale=0.05, zero_point=zero, m=3, low_codes=zero + 1 + 8) for zero in (0, 1, 3)),
    THREE_REGIONS,
    FOUR_REGIONS,
    opt_m(bits=5, scale=0.02, zero_point=2, m=2, low_codes=3),
]


def quantized(quantizer: ActivationQuantizer, signed: bool, operation: str) -> tuple[ir.Model, ir.Value]:
    model = ir.from_onnx_text(MODEL.replace("OPERATION", operation))
    first, last = model.graph
    codes = emit_quantizer(first.outputs[0], Operand(quantizer, signed), Builder(last, "q"))
    model.graph.outputs.extend([first.outputs[0], codes.codes])
    return model, codes.codes


@pytest.mark.parametrize("operation", ["Neg", "Gelu", "Softmax"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_what_is_written_is_read_back(quantizer: ActivationQuantizer, signed: bool, operation: str) -> None:
    """The found attributes give the codes that the nodes give in ONNX Runtime, and mean what the plan means."""
    model, codes = quantized(quantizer, signed, operation)
    found = match_quantizer(codes)
    assert found is not None
    assert (found.signed, found.quantizer.scale) == (signed, np.float32(quantizer.scale))
    session = create_session(ir.to_proto(model).SerializeToString(), threads=1, graph_optimization=False)
    operated, code = session.run(["a", str(codes.name)], {"x": X})
    unsigned = quantize_codes(found.quantizer, operated)
    assert np.array_equal(unsigned.astype(np.int32) - (SIGNED_OFFSET if signed else 0), code)
    planned = quantize(quantizer, operated) - quantizer.zero_point
    assert np.array_equal(unsigned.astype(np.int32) - found.quantizer.zero_point, planned)


@pytest.mark.parametrize("quantizer", QUANTIZERS[:8], ids=str)
def test_signed_codes_are_written_anew_as_unsigned_ones(quantizer: ActivationQuantizer) -> None:
    model, codes = quantized(quantizer, signed=True, operation="Neg")
    found = match_quantizer(codes)
    assert found is not None
    unsigned = emit_unsigned(found, Builder(model.graph[-1], "unsigned"))
    again = match_quantizer(unsigned)
    assert again is not None
    assert (again.quantizer, again.signed, again.x) == (found.quantizer, False, found.x)


def test_a_value_read_by_something_else_too_has_no_list_of_quantizers() -> None:
    model, codes = quantized(QUANTIZERS[2], signed=False, operation="Neg")
    first, last = model.graph[0], model.graph[-1]
    model.graph.outputs.pop()
    model.graph.outputs.pop()
    assert quantizers_of(first.outputs[0]) is None
    last.replace_input_with(0, model.graph.inputs[0])
    assert [each.codes for each in quantizers_of(first.outputs[0]) or []] == [codes]


@pytest.mark.parametrize("quantizer", [QUANTIZERS[2], QUANTIZERS[6], *QUANTIZERS[-3:]], ids=str)
def test_codes_that_are_opened_again_are_matched_from_their_first_node(quantizer: ActivationQuantizer) -> None:
    model, codes = quantized(quantizer, signed=False, operation="Neg")
    first, last = model.graph[0], model.graph[-1]
    model.graph.outputs[1:] = []
    build = Builder(last, "open")
    zero_point = build.constant("zero_point", np.array(3, np.uint8))
    build.op("DequantizeLinear", [codes, build.constant("scale", np.array(1, np.float32)), zero_point])
    found = [match_reader(node) for node in first.outputs[0].consumers() if node is not last]
    assert {None if each is None else each.codes for each in found} == {codes}


@pytest.mark.parametrize(
    ("op_type", "index", "array"),
    [
        ("QuantizeLinear", 1, np.ones(5, np.float32)),  # one scale per channel
        ("QuantizeLinear", 1, np.array(2.0**-120, np.float32)),
        ("DequantizeLinear", 2, np.array(7, np.uint8)),  # regions that do not meet
        ("DequantizeLinear", 1, np.array(0.3, np.float32)),
    ],
)
def test_what_the_attributes_cannot_say_is_no_match(op_type: str, index: int, array: np.ndarray) -> None:
    model, codes = quantized(QUANTIZERS[-1], signed=False, operation="Gelu")
    node = [each for each in model.graph if each.op_type == op_type][1]
    node.replace_input_with(index, Builder(node, "test").constant("other", array))
    assert match_quantizer(codes) is None
