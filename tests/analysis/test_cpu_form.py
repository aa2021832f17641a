import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper

from mptqc.analysis.cpu_form import cpu_form
from mptqc.graph.edit import remove_dead, set_initializer
from mptqc.runtime.session import PROVIDER_KEY, create_session

TEXT = """
<ir_version: 10, opset_import: ["": 21]>
g (float[n,3] x) => (float[n,3] y) <float[3] b = {1, 2, 0.1}>
{
  h = Cast<to = 10>(x)
  a = Add(h, b)
  y = Cast<to = 1>(a)
}
"""


@pytest.fixture
def narrow() -> ir.Model:
    model = ir.from_onnx_text(TEXT)
    set_initializer(model.graph[1], 1, np.array([1, 2, 0.1], np.float16))
    remove_dead(model)
    model.graph[0].outputs[0].dtype = model.graph[1].outputs[0].dtype = ir.DataType.FLOAT16
    model.metadata_props[PROVIDER_KEY] = "cuda"
    return model


def test_float16_becomes_float32_and_constants_keep_their_values(narrow: ir.Model):
    before = ir.to_proto(narrow).SerializeToString()
    proto = cpu_form(narrow)
    assert ir.to_proto(narrow).SerializeToString() == before
    onnx.checker.check_model(proto, full_check=True)
    assert {info.type.tensor_type.elem_type for info in proto.graph.value_info} == {TensorProto.FLOAT}
    assert list(numpy_helper.to_array(proto.graph.initializer[0])) == [1, 2, np.float32(np.float16(0.1))]
    assert not [entry for entry in proto.metadata_props if entry.key == PROVIDER_KEY]
    x = np.array([[0.3, 1000.1, 1]], np.float32)
    y = create_session(proto.SerializeToString(), graph_optimization=False).run(None, {"x": x})[0]
    assert np.array_equal(y, x + np.array([1, 2, np.float16(0.1)], np.float32))


def test_a_model_for_no_provider_is_left_alone(narrow: ir.Model):
    del narrow.metadata_props[PROVIDER_KEY]
    assert cpu_form(narrow) == ir.to_proto(narrow)
