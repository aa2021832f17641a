"""FoldAttention: any shifts and scales leave the output; q, k and v themselves take them."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rotary_blocks import rotated

from mptqc.analysis.shapes import concrete_shapes
from mptqc.errors import PlanError, RefusalError
from mptqc.graph.match import find_linears
from mptqc.passes.base import STAGE_KEY, Stage, StageError, stage_of
from mptqc.passes.fold_attention import FoldAttention
from mptqc.plan import AttentionFold, QuantPlan
from mptqc.recipe import Recipe

EPSILON = 2.0**-24
T, C, HEADS, D = 3, 4, 2, 2
SITE = "block00.attention"
PROJECTIONS = "".join(
    f"m{letter} = MatMul(x, W_{letter})\n{letter} = Add(m{letter}, b_{letter})\nr{letter} = Reshape({letter}, heads)\n"
    for letter in "qkv"
)
BODY = (
    PROJECTIONS + "hq = Transpose<perm=[0,2,1,3]>(rq)\nhk = Transpose<perm=[0,2,3,1]>(rk)\n"
    "hv = Transpose<perm=[0,2,1,3]>(rv)\ns = MatMul(hq, hk)\nw = Add(s, mask)\np = Softmax<axis=-1>(w)\n"
    "c = MatMul(p, hv)\nt = Transpose<perm=[0,2,1,3]>(c)\nj = Reshape(t, joined)\nmo = MatMul(j, W_o)\ny = Add(mo, b_o)"
)
OUTPUT = f"float[n,{T},{C}] y"
KEYS = ("k_shift", "v_shift", "qk_scale", "v_scale")


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {f"W_{letter}": random.normal(size=(C, C)) / 2 for letter in "qkvo"}
    found |= {f"b_{letter}": random.normal(size=C) for letter in "qkvo"}
    found["mask"] = random.normal(size=(1, HEADS, T, T))
    found = {name: array.astype(np.float32) for name, array in found.items()}
    return found | {"heads": np.array([0, 0, HEADS, D]), "joined": np.array([0, 0, C])}


def plan_of(vectors: dict[str, np.ndarray], site: str = SITE) -> QuantPlan:
    neutral = {"k_shift": np.zeros(C), "v_shift": np.zeros(C), "qk_scale": np.ones(C), "v_scale": np.ones(C)}
    return QuantPlan(
        model_digest="",
        recipe=Recipe(),
        attention_folds=(AttentionFold(site=site),),
        arrays={f"{site}/{key}": array.astype(np.float32) for key, array in (neutral | vectors).items()},
    )


@pytest.fixture
def make(smoothed):
    def after_norms(body: str = BODY, outputs: str = OUTPUT, seed: int = 0) -> ir.Model:
        used = {name: array for name, array in arrays(seed).items() if name in body}
        model = smoothed(f"float[n,{T},{C}] x", outputs, body, {"p": SITE}, used)
        model.metadata_props[STAGE_KEY] = Stage.NORMS_SMOOTHED
        return model

    return after_norms


def fold(model: ir.Model, plan: QuantPlan) -> int:
    return FoldAttention(plan, concrete_shapes(model))(model).edits


def feeds() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).normal(size=(2, T, C)).astype(np.float32)}


def random_vectors(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "k_shift": random.normal(size=C),
        "v_shift": random.normal(size=C) * 3,
        "qk_scale": 10 ** random.uniform(-2, 2, C),
        "v_scale": 10 ** random.uniform(-2, 2, C),
    }


# Scores are sums of two products of Linears' outputs, each of some nine roundings relative to terms below 40 (|q|·|k|
# and |q|·|b_k|, two channels); softmax turns their absolute error into a relative one of P, whose rows weigh v and b_v,
# together below 15, through C·max|W_o| < 8: 2·9·40·2⁻²⁴·15·8. A fold that is wrong changes the output by 0.1 and more.
TOLERANCE = 6e-3


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1))
def test_any_fold_leaves_the_output(make, run_model, seed):
    before, model = make(seed=seed % 1000), make(seed=seed % 1000)
    fold(model, plan_of(random_vectors(seed)))
    (wanted,), (got,) = run_model(before, feeds()), run_model(model, feeds())
    assert np.abs(got - wanted).max() <= TOLERANCE


def test_of_rotary_heads_v_and_its_projection_are_folded_alone(block, run_model):
    before, model = rotated(block(), 2), rotated(block(), 2)
    model.metadata_props[STAGE_KEY] = Stage.NORMS_SMOOTHED
    random = np.random.default_rng(0)
    vectors = {"v_shift": random.normal(size=12), "v_scale": 10 ** random.uniform(-1, 1, 12)}
    neutral = {"k_shift": np.zeros(12), "qk_scale": np.ones(12)}
    arrays_of_site = {f"{SITE}/{key}": array.astype(np.float32) for key, array in (neutral | vectors).items()}
    folds = (AttentionFold(site=SITE),)
    assert fold(model, QuantPlan(model_digest="", recipe=Recipe(), attention_folds=folds, arrays=arrays_of_site)) == 1
    old, now = ({linear.site: linear.weight for linear in find_linears(each)} for each in (before, model))
    assert [site for site in old if not np.array_equal(old[site], now[site])] == ["block00.v", "block00.proj"]
    x = {"x": random.normal(size=(2, 7, 12)).astype(np.float32)}
    (wanted,), (got,) = run_model(before, x), run_model(model, x)
    assert np.abs(got - wanted).max() <= TOLERANCE


EFFECTS = {
    "k_shift": ("k", lambda k, b: k - b),
    "v_shift": ("v", lambda v, b: v - b),
    "qk_scale": ("k", lambda k, t: k * t),
    "v_scale": ("v", lambda v, s: v / s),
}


@pytest.mark.parametrize("key", KEYS)
def test_each_vector_does_what_it_says(make, run_model, key):
    letter, expected = EFFECTS[key]
    vector = random_vectors(7)[key].astype(np.float32)
    outputs = OUTPUT + f", float[n,{T},{C}] z"
    body = BODY + f"\nz = Identity({letter})"
    before, model = make(body, outputs), make()
    fold(model, plan_of({key: vector}))
    _, plain = run_model(before, feeds())
    model.graph.outputs.append(next(one.output for one in find_linears(model) if one.output.name == letter))
    _, folded = run_model(model, feeds())
    wanted = expected(plain, vector)
    assert np.abs(folded - wanted).max() <= 32 * EPSILON * (np.abs(wanted).max() + np.abs(plain).max() * vector.max())


def test_q_takes_the_inverse_of_ks_scale(make):
    before, model = make(), make()
    vector = np.array([2, 0.5, 4, 1])
    fold(model, plan_of({"qk_scale": vector}))
    q, k = find_linears(model)[:2]
    was_q, was_k = find_linears(before)[:2]
    np.testing.assert_array_equal(q.weight, was_q.weight / vector.astype(np.float32))
    np.testing.assert_array_equal(k.weight, was_k.weight * vector.astype(np.float32))
    np.testing.assert_array_equal(q.bias * vector.astype(np.float32), was_q.bias)


def test_no_node_is_added(make):
    model = make()
    ops = [node.op_type for node in model.graph]
    assert fold(model, plan_of(random_vectors(1))) == 1
    assert [node.op_type for node in model.graph] == ops


def test_a_plan_without_folds_only_moves_the_stage(make):
    model = make()
    text = ir.to_onnx_text(model)
    assert fold(model, QuantPlan(model_digest="", recipe=Recipe())) == 0
    assert ir.to_onnx_text(model) == text.replace("norms-smoothed", "smoothed")


def test_a_shared_weight_is_copied(make):
    body = BODY.replace("W_o", "W_q").replace("b_o", "b_q")
    before, model = make(body), make(body)
    fold(model, plan_of({"qk_scale": np.full(C, 2.0)}))
    np.testing.assert_array_equal(find_linears(model)[3].weight, find_linears(before)[3].weight)


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        (BODY + "\nz = Relu(v)", OUTPUT + f", float[n,{T},{C}] z", "v of"),
        (BODY.replace("Add(s, mask)", "Mul(s, mask)"), OUTPUT, "Mul"),
    ],
    ids=["v_read_elsewhere", "keys_weighted"],
)
def test_an_unsafe_fold_is_refused_and_edits_nothing(make, body, outputs, reason):
    model = make(body, outputs)
    text = ir.to_onnx_text(model)
    with pytest.raises(RefusalError, match=reason) as caught:
        fold(model, plan_of(random_vectors(1)))
    assert SITE in str(caught.value)
    assert ir.to_onnx_text(model) == text


def test_an_attention_that_the_model_does_not_have(make):
    with pytest.raises(PlanError, match=r"block07\.attention"):
        fold(make(), plan_of({}, site="block07.attention"))


@pytest.mark.parametrize("key", KEYS)
def test_a_vector_that_does_not_fit_edits_nothing(make, key):
    model = make()
    text = ir.to_onnx_text(model)
    with pytest.raises(PlanError, match=f"{SITE}/{key}"):
        fold(model, plan_of({key: np.ones(C + 1)}))
    assert ir.to_onnx_text(model) == text


@pytest.mark.parametrize("key", ["qk_scale", "v_scale"])
def test_a_scale_of_zero_is_refused(make, key):
    with pytest.raises(PlanError, match=f"{SITE}/{key}.*above zero"):
        fold(make(), plan_of({key: np.zeros(C)}))


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_vector_is_named(make, key):
    plan = plan_of({})
    plan = plan.model_copy(update={"arrays": {k: a for k, a in plan.arrays.items() if not k.endswith(key)}})
    with pytest.raises(PlanError, match=f"{SITE}/{key}"):
        fold(make(), plan)


def test_the_model_is_smoothed_after_it_and_cannot_be_again(make):
    model = make()
    fold(model, plan_of({}))
    assert stage_of(model) is Stage.SMOOTHED
    with pytest.raises(StageError, match="fold-attention"):
        fold(model, plan_of({}))


@pytest.mark.parametrize("stage", [Stage.RAW, Stage.CANONICAL, Stage.QUANTIZED])
def test_wrong_stage_raises(make, stage):
    model = make()
    model.metadata_props[STAGE_KEY] = stage
    with pytest.raises(StageError, match="fold-attention"):
        fold(model, plan_of({}))
