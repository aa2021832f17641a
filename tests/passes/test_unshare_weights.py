import numpy as np
import onnx_ir as ir
import pytest

from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.unshare_weights import UnshareWeights

WEIGHTS = "float[2,2] W = {1,2,3,4}, float[2] b = {5,6}"
HEADER = "g (float[n,3,2] x) => (float[n,3,2] y)"
TWICE = "p = MatMul(x, W) q = Add(p, b) r = MatMul(q, W) y = Add(r, b)"
NORMS = "z = LayerNormalization<axis=-1>(x, b, b) y = LayerNormalization<axis=-1>(z, b, b)"


def graph(body: str, header: str = HEADER) -> str:
    return f"{header} <{WEIGHTS}> {{ {body} }}"


def test_golden(parse, as_text):
    model = parse(graph(TWICE))
    assert UnshareWeights()(model).edits == 2
    assert as_text(model) == GOLDEN


@pytest.mark.parametrize(("body", "copies"), [(TWICE, 2), (NORMS, 3)])
def test_every_reader_has_its_own(parse, run_model, body, copies):
    before, model = parse(graph(body)), parse(graph(body))
    assert UnshareWeights()(model).edits == copies
    assert all(len(value.uses()) <= 1 for value in model.graph.initializers.values())
    feeds = {"x": np.random.default_rng(0).normal(size=(2, 3, 2)).astype(np.float32)}
    assert np.array_equal(run_model(model, feeds)[0], run_model(before, feeds)[0])


def test_copies_share_their_memory(parse):
    model = parse(graph(TWICE))
    model.graph.initializers["W"].const_value = ir.tensor(np.ones((2, 2), np.float32), name="W")
    UnshareWeights()(model)
    arrays = [model.graph.initializers[name].const_value.numpy() for name in ("W", "W_1")]
    assert np.shares_memory(*arrays)


def test_other_readers_keep_the_original(parse):
    model = parse(graph("p = MatMul(x, W) y = Add(p, b)".replace("y =", "q =") + " y = Mul(q, b)"))
    assert UnshareWeights()(model).edits == 1
    (reader,) = (node for node in model.graph if node.op_type == "Mul")
    assert reader.inputs[1].name == "b"


def test_unshared_weights_are_left_alone(parse):
    model = parse(graph("p = MatMul(x, W) y = Add(p, b)"))
    text = ir.to_onnx_text(model)
    assert UnshareWeights()(model).edits == 0
    assert ir.to_onnx_text(model) == text


def test_shared_constant_that_is_no_parameter_is_left_alone(parse):
    model = parse(graph("p = Mul(x, b) y = Add(p, b)"))
    assert UnshareWeights()(model).edits == 0


def test_wrong_stage_raises(parse):
    model = parse(graph(TWICE))
    model.metadata_props[STAGE_KEY] = Stage.CANONICAL
    with pytest.raises(StageError, match="unshare-weights"):
        UnshareWeights()(model)


GOLDEN = """\
<
   ir_version: 10,
   opset_import: ["" : 21]
>
g (float[n,3,2] x) => (float[n,3,2] y)
   <float[2,2] W =  {1,2,3,4}, float[2] b =  {5,6}, float[2,2] W_1 =  {1,2,3,4}, float[2] b_1 =  {5,6}, float[2,2] W, float[2] b, float[2,2] W_1, float[2] b_1, float[n,3,2] p, float[n,3,2] q, float[n,3,2] r>
{
   p = MatMul (x, W)
   q = Add (p, b)
   r = MatMul (q, W_1)
   y = Add (r, b_1)
}
"""  # noqa: E501 - a line of the printer
