import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.narrow_doubles import NarrowDoubles

# One product and one sum in float32 instead of float64: two roundings of 2⁻²⁴, and one more for the cast back.
TOLERANCE = 3 * 2**-24

HEADER = "g (float[n,4] x) => (float[n,4] y)"
BODY = """<double two = {2.5}> {
  d = Cast<to=11>(x)
  c = Constant<value = double {0.1}>()
  p = Mul(d, two)
  s = Add(p, c)
  y = Cast<to=1>(s)
}"""


def test_golden(parse, as_text):
    model = parse(f"{HEADER} {BODY}")
    assert NarrowDoubles()(model).edits > 0
    assert as_text(model) == GOLDEN


def test_same_numbers_after(parse, run_model):
    before, model = parse(f"{HEADER} {BODY}"), parse(f"{HEADER} {BODY}")
    NarrowDoubles()(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    feeds = {"x": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)}
    (wanted,), (got,) = run_model(before, feeds), run_model(model, feeds)
    assert np.abs(got - wanted).max() <= TOLERANCE * np.abs(wanted).max()


@pytest.mark.parametrize(
    "text",
    [f"{HEADER} {{ y = Relu(x) }}", "g (float[n,4] x) => (double[n,4] y) { y = Cast<to=11>(x) }"],
    ids=["no_doubles", "double_output"],
)
def test_left_alone(parse, text):
    model = parse(text)
    before = ir.to_onnx_text(model)
    assert NarrowDoubles()(model).edits == 0
    assert ir.to_onnx_text(model) == before


def test_second_run_changes_nothing(parse):
    model = parse(f"{HEADER} {BODY}")
    NarrowDoubles()(model)
    assert NarrowDoubles()(model).edits == 0


def test_wrong_stage_raises(parse):
    model = parse(f"{HEADER} {BODY}")
    model.metadata_props[STAGE_KEY] = Stage.CANONICAL
    with pytest.raises(StageError, match="narrow-doubles"):
        NarrowDoubles()(model)


GOLDEN = """\
<
   ir_version: 10,
   opset_import: ["" : 21]
>
g (float[n,4] x) => (float[n,4] y)
   <float two =  {2.5}, float two, float[n,4] d, float c, float[n,4] p, float[n,4] s>
{
   d = Cast <to: int = 1> (x)
   c = Constant <value: tensor = float {0.1}> ()
   p = Mul (d, two)
   s = Add (p, c)
   y = Cast <to: int = 1> (s)
}
"""
