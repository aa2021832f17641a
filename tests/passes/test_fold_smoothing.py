"""FoldSmoothing: any shift and scale leaves the output; what the readers see is shifted and scaled."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mptqc.analysis.shapes import concrete_shapes
from mptqc.errors import PlanError, RefusalError
from mptqc.graph.match import find_linears, find_norms
from mptqc.passes.base import STAGE_KEY, Stage, StageError, stage_of
from mptqc.passes.fold_smoothing import FoldSmoothing
from mptqc.plan import NormFold, QuantPlan
from mptqc.recipe import Recipe

EPSILON = 2.0**-24
C, N = 6, 5
SITE = "block00.norm1"
BODY = (
    "n = LayerNormalization<axis=-1>(x, gamma, beta)\nm1 = MatMul(n, W1)\ny1 = Add(m1, b1)\n"
    "m2 = MatMul(n, W2)\ny2 = Add(b2, m2)"
)
OUTPUTS = f"float[n,3,{N}] y1, float[n,3,{N}] y2"
SITES = {"n": SITE, "m1": "block00.q", "m2": "block00.k"}


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {"gamma": (C,), "beta": (C,), "W1": (C, N), "b1": (N,), "W2": (C, N), "b2": (N,)}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def plan_of(scale: np.ndarray, shift: np.ndarray, site: str = SITE) -> QuantPlan:
    return QuantPlan(
        model_digest="",
        recipe=Recipe(),
        norm_folds=(NormFold(site=site, alpha=0.5),),
        arrays={f"{site}/scale": scale.astype(np.float32), f"{site}/shift": shift.astype(np.float32)},
    )


@pytest.fixture
def make(smoothed):
    def at_canonical(
        body: str = BODY, outputs: str = OUTPUTS, sites: dict[str, str] = SITES, seed: int = 0
    ) -> ir.Model:
        used = {name: array for name, array in arrays(seed).items() if name in body}
        model = smoothed(f"float[n,3,{C}] x", outputs, body, sites, used)
        model.metadata_props[STAGE_KEY] = Stage.CANONICAL
        return model

    return at_canonical


def fold(model: ir.Model, plan: QuantPlan) -> int:
    return FoldSmoothing(plan, concrete_shapes(model))(model).edits


def feeds() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).normal(size=(2, 3, C)).astype(np.float32)}


SCALE, SHIFT = np.array([0.1, 10, 1, 3, 0.5, 2]), np.array([5, -3, 0, 1, 0.25, -8])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1))
def test_any_fold_leaves_the_output(make, run_model, seed):
    random = np.random.default_rng(seed)
    scale, shift = 10 ** random.uniform(-3, 3, C), random.normal(size=C) * 10 ** random.uniform(-2, 2, C)
    before, model = make(seed=seed % 1000), make(seed=seed % 1000)
    fold(model, plan_of(scale, shift))
    x = feeds()["x"].astype(np.float64)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    for linear, wanted, got in zip(
        find_linears(before), run_model(before, feeds()), run_model(model, feeds()), strict=True
    ):
        # γ', β', W' and B' are rounded once, y is (three operations), each term of the product and their sum are: about
        # ten roundings in a row, every one relative to the terms |γn|, |β|, |b| times |W|; LayerNormalization's own
        # reductions add as many. The reader sees (y − b)/s, so |b|·|W| counts as a term though it cancels.
        gamma, beta = find_norms(before)[0].gamma, find_norms(before)[0].beta
        terms = (np.abs(gamma * normed) + np.abs(beta) + 2 * np.abs(shift)) @ np.abs(linear.weight) + np.abs(
            linear.bias
        )
        assert (np.abs(got - wanted) <= 24 * EPSILON * terms).all()


def test_norm_and_readers_take_opposite_folds(make):
    before, model = make(), make()
    fold(model, plan_of(SCALE, SHIFT))
    norm, folded = find_norms(before)[0], find_norms(model)[0]
    np.testing.assert_allclose(folded.gamma, norm.gamma / SCALE, rtol=2 * EPSILON)
    np.testing.assert_allclose(folded.beta, (norm.beta - SHIFT) / SCALE, rtol=4 * EPSILON)
    for linear, other in zip(find_linears(before), find_linears(model), strict=True):
        np.testing.assert_allclose(other.weight, linear.weight * SCALE[:, None], rtol=2 * EPSILON)
        np.testing.assert_allclose(other.bias, linear.bias + SHIFT @ linear.weight, atol=16 * EPSILON * 20)


def test_scale_1_and_shift_0_change_no_bit(make, run_model):
    before, model = make(), make()
    assert fold(model, plan_of(np.ones(C), np.zeros(C))) == 1
    for wanted, got in zip(run_model(before, feeds()), run_model(model, feeds()), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_no_node_is_added(make):
    model = make()
    ops = [node.op_type for node in model.graph]
    fold(model, plan_of(SCALE, SHIFT))
    assert [node.op_type for node in model.graph] == ops


def test_a_plan_without_folds_changes_nothing(make):
    model = make()
    text = ir.to_onnx_text(model)
    assert fold(model, QuantPlan(model_digest="", recipe=Recipe())) == 0
    assert ir.to_onnx_text(model) == text.replace("canonical", "norms-smoothed")


def test_a_shared_gamma_is_copied(make):
    body = BODY + "\no = LayerNormalization<axis=-1>(x, gamma, beta)\nm3 = MatMul(o, W1)\ny3 = Add(m3, b1)"
    model = make(body, OUTPUTS + f", float[n,3,{N}] y3")
    fold(model, plan_of(SCALE, SHIFT))
    untouched = find_norms(model)[1]
    np.testing.assert_array_equal(untouched.gamma, arrays()["gamma"])
    np.testing.assert_array_equal(find_linears(model)[2].weight, arrays()["W1"])


def test_a_reader_that_cannot_be_compensated_refuses_and_edits_nothing(make):
    model = make(BODY + "\nz = Relu(n)", OUTPUTS + f", float[n,3,{C}] z")
    text = ir.to_onnx_text(model)
    with pytest.raises(RefusalError, match=r"block00\.norm1 is also read by Relu"):
        fold(model, plan_of(SCALE, SHIFT))
    assert ir.to_onnx_text(model) == text


def test_a_norm_that_the_model_does_not_have(make):
    with pytest.raises(PlanError, match=r"block07\.norm1"):
        fold(make(), plan_of(SCALE, SHIFT, site="block07.norm1"))


@pytest.mark.parametrize("key", ["scale", "shift"])
def test_a_missing_vector_is_named(make, key):
    plan = plan_of(SCALE, SHIFT)
    plan = plan.model_copy(update={"arrays": {k: a for k, a in plan.arrays.items() if not k.endswith(key)}})
    with pytest.raises(PlanError, match=f"{SITE}/{key}"):
        fold(make(), plan)


@pytest.mark.parametrize(
    ("scale", "shift"),
    [(np.ones(C - 1), SHIFT), (SCALE, np.zeros(1)), (np.ones((C, 1)), SHIFT), (np.zeros(C), SHIFT), (-SCALE, SHIFT)],
    ids=["short_scale", "scalar_shift", "another_rank", "zero_scale", "negative_scale"],
)
def test_vectors_that_do_not_fit_edit_nothing(make, scale, shift):
    model = make()
    text = ir.to_onnx_text(model)
    with pytest.raises(PlanError, match=SITE):
        fold(model, plan_of(scale, shift))
    assert ir.to_onnx_text(model) == text


def test_folding_twice_is_a_stage_error(make):
    model = make()
    fold(model, plan_of(SCALE, SHIFT))
    assert stage_of(model) is Stage.NORMS_SMOOTHED
    with pytest.raises(StageError, match="fold-smoothing"):
        fold(model, plan_of(SCALE, SHIFT))


@pytest.mark.parametrize("stage", [Stage.RAW, Stage.SMOOTHED, Stage.QUANTIZED])
def test_wrong_stage_raises(make, stage):
    model = make()
    model.metadata_props[STAGE_KEY] = stage
    with pytest.raises(StageError, match="fold-smoothing"):
        fold(model, plan_of(SCALE, SHIFT))


def test_golden(smoothed, as_text):
    constants = {"gamma": [1, 2], "beta": [0, 4], "W": [[1, 2], [3, 4]], "b": [10, 20]}
    initializers = {name: np.array(array, np.float32) for name, array in constants.items()}
    body = "n = LayerNormalization<axis=-1>(x, gamma, beta)\nm = MatMul(n, W)\ny = Add(m, b)"
    model = smoothed("float[n,2] x", "float[n,2] y", body, {"n": "head.norm"}, initializers)
    model.metadata_props[STAGE_KEY] = Stage.CANONICAL
    fold(model, plan_of(np.array([2, 0.5]), np.array([1, 2]), "head.norm"))
    assert as_text(model) == GOLDEN


GOLDEN = """\
<
   ir_version: 10,
   opset_import: ["" : 21],
   metadata_props: ["mptqc.stage": "norms-smoothed"]
>
g (float[n,2] x) => (float[n,2] y)
   <float[2] gamma =  {1,2}, float[2] beta =  {0,4}, float[2,2] W =  {1,2,3,4}, float[2] b =  {10,20}, float[2] \
gamma_1 =  {0.5,4}, float[2] beta_1 =  {-0.5,4}, float[2] b_1 =  {17,30}, float[2,2] W_1 =  {2,4,1.5,2}, float[2] \
gamma, float[2] beta, float[2,2] W, float[2] b, float[2] gamma_1, float[2] beta_1, float[2] b_1, float[2,2] W_1>
{
   [n] n = LayerNormalization <axis: int = -1> (x, gamma_1, beta_1)
   [m] m = MatMul (n, W_1)
   [y] y = Add (m, b_1)
}
"""
