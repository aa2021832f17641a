import numpy as np
import onnx_ir as ir
import pytest

from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.complete_layer_norm import CompleteLayerNorm

HEADER = "g (float[b,3,4] x) => (float[b,3,4] y)"
GAMMA = "<float[4] gamma = {1,2,3,4}, float[4] beta = {4,3,2,1}, float[3,4] table = {1,2,3,4,1,2,3,4,1,2,3,4}>"


def test_golden(parse, as_text):
    model = parse(f"{HEADER} {GAMMA} {{ [norm] y = LayerNormalization<axis=2, epsilon=0.001>(x, gamma) }}")
    assert CompleteLayerNorm()(model).edits == 1
    assert as_text(model) == GOLDEN


@pytest.mark.parametrize("norm", ["LayerNormalization<axis=2>(x, gamma)", "LayerNormalization(x, gamma, beta)"])
def test_same_numbers_after(parse, run_model, norm):
    before, model = (parse(f"{HEADER} {GAMMA} {{ y = {norm} }}") for _ in range(2))
    assert CompleteLayerNorm()(model).edits == 1
    (node,) = model.graph
    assert node.attributes["axis"].as_int() == -1
    assert node.inputs[2] is not None
    feeds = {"x": np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)}
    assert np.array_equal(run_model(model, feeds)[0], run_model(before, feeds)[0])


LEFT = {
    "complete": (HEADER, "y = LayerNormalization<axis=-1>(x, gamma, beta)"),
    "two_axes": (HEADER, "y = LayerNormalization<axis=1>(x, table)"),
    "computed_gamma": (HEADER.replace(" x)", " x, float[4] g)"), "y = LayerNormalization<axis=-1>(x, g)"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(parse, name):
    header, body = LEFT[name]
    model = parse(f"{header} {GAMMA} {{ {body} }}")
    text = ir.to_onnx_text(model)
    assert CompleteLayerNorm()(model).edits == 0
    assert ir.to_onnx_text(model) == text


def test_wrong_stage_raises(parse):
    model = parse(f"{HEADER} {GAMMA} {{ y = LayerNormalization(x, gamma) }}")
    model.metadata_props[STAGE_KEY] = Stage.CANONICAL
    with pytest.raises(StageError, match="complete-layer-norm"):
        CompleteLayerNorm()(model)


GOLDEN = """\
<
   ir_version: 10,
   opset_import: ["" : 21]
>
g (float[b,3,4] x) => (float[b,3,4] y)
   <float[4] gamma =  {1,2,3,4}, float[4] beta =  {4,3,2,1}, float[3,4] table =  {1,2,3,4,1,2,3,4,1,2,3,4}, float[4] "norm/beta" =  {0,0,0,0}, float[4] gamma, float[4] beta, float[3,4] table, float[4] "norm/beta">
{
   [norm] y = LayerNormalization <axis: int = -1, epsilon: float = 0.001> (x, gamma, "norm/beta")
}
"""  # noqa: E501 - a line of the printer
