"""What the plan says of layers that stay float."""

import onnx_ir as ir

from mptqc.analysis.planner import float_layers

FLOAT_PRODUCTS = """<ir_version: 8, opset_import: ["" : 20]>
g (float[n,2,3] x) => (float[n,2,3] y)
<float[1,3,3] grouped = {1,2,3,4,5,6,7,8,9}, float[3,3] w = {1,2,3,4,5,6,7,8,9}, float[3] b = {1,1,1}> {
  m = MatMul(x, w)
  linear = Add(m, b)
  t = Transpose<perm = [0, 2, 1]>(x)
  [gram] s = MatMul(linear, t)
  r = Relu(s)
  [context] c = MatMul(r, x)
  [batched] y = MatMul(c, grouped)
}"""


def test_products_outside_linears_and_attentions_are_named():
    refused = float_layers(ir.from_onnx_text(FLOAT_PRODUCTS))
    assert [refusal.site for refusal in refused] == ["gram", "context", "batched"]
    assert {refusal.reason.partition(":")[0] for refusal in refused} == {"MatMul stays float"}


def test_a_block_has_no_float_products(block):
    assert float_layers(block()) == ()
