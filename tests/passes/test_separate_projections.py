"""SeparateProjections: q, k and v get a Linear each, whatever lay between; columns are only picked, so bits stay."""

import numpy as np
import onnx_ir as ir
import pytest

from mptqc.analysis.shapes import concrete_shapes
from mptqc.graph.blocks import attention_projections
from mptqc.graph.match import find_attentions, find_linears
from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.fold_affine import FoldAffine
from mptqc.passes.separate_projections import SeparateProjections, find_projections

# The product's columns are the same sums; ONNX Runtime may add the three or four terms in another order.
TOLERANCE = 1e-6

B, T, C, H, D = 2, 3, 4, 2, 2
RANDOM = np.random.default_rng(5)


def array(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


ARRAYS = {
    "W": array(C, 3 * C),
    "b": array(3 * C),
    **{f"W_{letter}": array(C, C) for letter in "qkv"},
    **{f"b_{letter}": array(C) for letter in "qkv"},
    "W_kv": array(C, 2 * C),
    "b_kv": array(2 * C),
    "parts_first": np.array([0, 0, 3, H, D], np.int64),
    "heads_first": np.array([0, 0, H, 3 * D], np.int64),
    "kv_parts": np.array([0, 0, 2, H, D], np.int64),
    "heads": np.array([0, 0, H, D], np.int64),
    "merged": np.array([-1, T, D], np.int64),
    **{f"i{i}": np.array(i, np.int64) for i in range(3)},
    **{f"at{i}": np.array([i], np.int64) for i in range(3)},
    "axis0": np.array([0], np.int64),
    "three": np.array([3], np.int64),
    "shuffled": np.array([2, 0, 1], np.int64),
}
ATTEND = "s = MatMul(q, kt)\np = Softmax<axis=-1>(s)\ny = MatMul(p, v)"
QKV = "m = MatMul(x, W)\nqkv = Add(m, b)\n"
TURNED = QKV + "r = Reshape(qkv, parts_first)\nt = Transpose<perm=[2,0,3,1,4]>(r)\n"
FORMS = {
    "gather": TURNED
    + "q = Gather<axis=0>(t, i0)\nk = Gather<axis=0>(t, i1)\nv = Gather<axis=0>(t, i2)\n"
    + "kt = Transpose<perm=[0,1,3,2]>(k)\n",
    "slice_and_squeeze": TURNED
    + "sq = Slice(t, at0, at1, axis0)\nq = Squeeze(sq, axis0)\nsk = Slice(t, at1, at2, axis0)\nk = Squeeze(sk, axis0)\n"
    + "sv = Slice(t, at2, three, axis0)\nv = Squeeze(sv, axis0)\nkt = Transpose<perm=[0,1,3,2]>(k)\n",
    "split_of_the_channels": QKV
    + "a, c, e = Split<axis=2, num_outputs=3>(qkv)\nra = Reshape(a, heads)\nq = Transpose<perm=[0,2,1,3]>(ra)\n"
    + "rc = Reshape(c, heads)\nkt = Transpose<perm=[0,2,3,1]>(rc)\n"
    + "re = Reshape(e, heads)\nv = Transpose<perm=[0,2,1,3]>(re)\n",
    "heads_outermost": QKV
    + "r = Reshape(qkv, heads_first)\nt = Transpose<perm=[0,2,1,3]>(r)\nq, k, v = Split<axis=3, num_outputs=3>(t)\n"
    + "kt = Transpose<perm=[0,1,3,2]>(k)\n",
    "separate_q_fused_kv": "mq = MatMul(x, W_q)\nlq = Add(mq, b_q)\nrq = Reshape(lq, heads)\n"
    + "q = Transpose<perm=[0,2,1,3]>(rq)\nmk = MatMul(x, W_kv)\nkv = Add(mk, b_kv)\nr = Reshape(kv, kv_parts)\n"
    + "t = Transpose<perm=[2,0,3,1,4]>(r)\nk = Gather<axis=0>(t, i0)\nv = Gather<axis=0>(t, i1)\n"
    + "kt = Transpose<perm=[0,1,3,2]>(k)\n",
}
EDITS = dict.fromkeys(FORMS, 3) | {"separate_q_fused_kv": 2}
OUTPUT = f"float[b,{H},{T},{D}] y"
SEPARATE = (
    "".join(
        f"m{letter} = MatMul(x, W_{letter})\nl{letter} = Add(m{letter}, b_{letter})\n"
        f"r{letter} = Reshape(l{letter}, heads)\n"
        for letter in "qkv"
    )
    + "q = Transpose<perm=[0,2,1,3]>(rq)\nkt = Transpose<perm=[0,2,3,1]>(rk)\nv = Transpose<perm=[0,2,1,3]>(rv)\n"
)


@pytest.fixture
def make(smoothed):
    def from_body(body: str, outputs: str = OUTPUT, x: str = f"float[b,{T},{C}] x") -> ir.Model:
        used = {name: array for name, array in ARRAYS.items() if name in body}
        model = smoothed(x, outputs, body, {}, used)
        del model.metadata_props[STAGE_KEY]
        return model

    return from_body


def separate(model: ir.Model) -> int:
    return SeparateProjections(concrete_shapes(model))(model).edits


def feeds() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).normal(size=(B, T, C)).astype(np.float32)}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_becomes_three_linears(make, run_model, name):
    before, model = make(FORMS[name] + ATTEND), make(FORMS[name] + ATTEND)
    assert separate(model) == EDITS[name]
    assert [linear.weight.shape for linear in find_linears(model)] == [(C, C)] * 3
    assert sorted(node.op_type for node in model.graph) == sorted(
        ["MatMul", "Add", "Reshape", "Transpose"] * 3 + ["MatMul", "Softmax", "MatMul"]
    )
    (wanted,), (got,) = run_model(before, feeds()), run_model(model, feeds())
    assert np.abs(got - wanted).max() <= TOLERANCE


@pytest.mark.parametrize("name", FORMS)
def test_columns_are_in_head_channel_order(make, name):
    model = make(FORMS[name] + ATTEND + "\nback = Transpose<perm=[0,2,1,3]>(y)", f"float[b,{T},{H},{D}] back")
    separate(model)
    (attention,) = find_attentions(model)
    shapes = concrete_shapes(model)
    assert [shapes[str(value.name)] for value in (attention.q, attention.k, attention.v)] == [
        (1, H, T, D),
        (1, H, D, T),
        (1, H, T, D),
    ]
    for value, layout in ((attention.q, (0, 2, 1, 3)), (attention.k, (0, 2, 3, 1)), (attention.v, (0, 2, 1, 3))):
        transpose = value.producer()
        assert tuple(transpose.attributes["perm"].as_ints()) == layout
        np.testing.assert_array_equal(transpose.inputs[0].producer().inputs[1].const_value.numpy(), [0, 0, H, D])


NORMED = (
    FORMS["gather"].replace("q = Gather", "q0 = Gather").replace("k = Gather", "k0 = Gather").replace("(k)", "(k1)")
    .replace("kt = ", "q = Relu(q0)\nk1 = Relu(k0)\nkt = ")
)  # fmt: skip


def test_what_is_normed_on_its_way_gets_a_linear_too(make, run_model):
    before, model = make(NORMED + ATTEND), make(NORMED + ATTEND)
    assert separate(model) == 3
    assert [linear.weight.shape for linear in find_linears(model)] == [(C, C)] * 3
    (wanted,), (got,) = run_model(before, feeds()), run_model(model, feeds())
    assert np.abs(got - wanted).max() <= TOLERANCE
    assert separate(model) == 0
    again = make(NORMED + ATTEND)
    separate(again)
    assert ir.to_onnx_text(again) == ir.to_onnx_text(model)


NEGATIVES = {
    "separate_already": SEPARATE + ATTEND,
    "computed_after_the_linear": SEPARATE.replace("Reshape(lq,", "Reshape(x,")
    .replace("Reshape(lk,", "Reshape(x,")
    .replace("Reshape(lv,", "Reshape(x,")
    + ATTEND,
    "no_bias": FORMS["gather"].replace("qkv = Add(m, b)\n", "qkv = Relu(m)\n") + ATTEND,
    "normed_q_and_k": SEPARATE.replace("q = Tr", "tq = Tr").replace("kt = Tr", "tk = Tr").replace("v = Tr", "tv = Tr")
    + "q = Relu(tq)\nkt = Relu(tk)\nv = Relu(tv)\n"
    + ATTEND,
}


@pytest.mark.parametrize("name", NEGATIVES)
def test_left_alone(make, name):
    model = make(NEGATIVES[name])
    text = ir.to_onnx_text(model)
    assert separate(model) == 0
    assert ir.to_onnx_text(model) == text


def test_tokens_that_are_shuffled_between_are_left_alone(make):
    body = (
        SEPARATE.replace(
            "q = Transpose<perm=[0,2,1,3]>(rq)", "z = Gather<axis=1>(rq, shuffled)\nq = Transpose<perm=[0,2,1,3]>(z)"
        )
        + ATTEND
    )
    model = make(body)
    assert separate(model) == 0


def test_heads_merged_into_the_batch_are_left_alone(make):
    parted = SEPARATE.replace("q = Tr", "q4 = Tr").replace("kt = Tr", "k4 = Tr").replace("v = Tr", "v4 = Tr")
    merged = "q = Reshape(q4, merged)\nk = Reshape(k4, merged)\nv = Reshape(v4, merged)\n"
    body = parted.replace("0,2,3,1", "0,2,1,3") + merged + "kt = Transpose<perm=[0,2,1]>(k)\n" + ATTEND
    model = make(body, f"float[n,{T},{D}] y")
    assert find_attentions(model)
    assert separate(model) == 0


def test_the_fused_linear_stays_for_another_reader(make, run_model):
    body, outputs = FORMS["gather"] + ATTEND + "\nz = Relu(qkv)", OUTPUT + f", float[b,{T},{3 * C}] z"
    before, model = make(body, outputs), make(body, outputs)
    assert separate(model) == 3
    assert len(find_linears(model)) == 4
    for wanted, got in zip(run_model(before, feeds()), run_model(model, feeds()), strict=True):
        assert np.abs(got - wanted).max() <= TOLERANCE


def test_two_attentions_may_share_a_linear(make, run_model):
    second = ATTEND.replace("MatMul(q, kt)", "MatMul(q2, kt2)").replace("s =", "s2 =").replace("(s)", "(s2)")
    second = second.replace("p =", "p2 =").replace("MatMul(p, v)", "MatMul(p2, v2)").replace("y =", "y2 =")
    again = "q2 = Gather<axis=0>(t, i2)\nk2 = Gather<axis=0>(t, i0)\nv2 = Gather<axis=0>(t, i1)\n"
    body = FORMS["gather"] + ATTEND + "\n" + again + "kt2 = Transpose<perm=[0,1,3,2]>(k2)\n" + second
    outputs = OUTPUT + f", {OUTPUT}2"
    before, model = make(body, outputs), make(body, outputs)
    assert separate(model) == 6
    for wanted, got in zip(run_model(before, feeds()), run_model(model, feeds()), strict=True):
        assert np.abs(got - wanted).max() <= TOLERANCE


def test_a_whole_vit(tiny_vit, run_model):
    before, model = tiny_vit(), tiny_vit()
    FoldAffine(concrete_shapes(model))(model)
    assert separate(model) == 6
    shapes = concrete_shapes(model)
    assert [attention_projections(one, model, shapes).heads for one in find_attentions(model)] == [2, 2]
    images = {"images": np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32)}
    (wanted,), (got,) = run_model(before, images), run_model(model, images)
    assert np.abs(got - wanted).max() <= 10 * TOLERANCE * np.abs(wanted).max()


def test_second_run_changes_nothing(make):
    model = make(FORMS["heads_outermost"] + ATTEND)
    separate(model)
    text = ir.to_onnx_text(model)
    assert separate(model) == 0
    assert ir.to_onnx_text(model) == text


def test_finding_edits_nothing(make):
    model = make(FORMS["gather"] + ATTEND)
    text = ir.to_onnx_text(model)
    found = find_projections(model, concrete_shapes(model))
    assert [one.letter for one in found] == ["q", "k", "v"]
    assert [one.columns.tolist() for one in found] == [
        np.arange(start, start + C).reshape(H, D).tolist() for start in (0, C, 2 * C)
    ]
    assert ir.to_onnx_text(model) == text


def test_golden(make, as_text):
    model = make(FORMS["heads_outermost"] + ATTEND)
    separate(model)
    text = as_text(model)
    assert text[text.index("{\n") :] == GOLDEN


def test_wrong_stage_raises(make):
    model = make(FORMS["gather"] + ATTEND)
    model.metadata_props[STAGE_KEY] = Stage.CANONICAL
    with pytest.raises(StageError, match="separate-projections"):
        SeparateProjections({})(model)


GOLDEN = """\
{
   ["m/q/MatMul"] "m/q/MatMul_output" = MatMul (x, "m/q/weight")
   ["m/q/Add"] "m/q/Add_output" = Add ("m/q/MatMul_output", "m/q/bias")
   ["m/q/Reshape"] "m/q/Reshape_output" = Reshape ("m/q/Add_output", "m/q/heads")
   ["m/q/Transpose"] "m/q/Transpose_output" = Transpose <perm: ints = [0, 2, 1, 3]> ("m/q/Reshape_output")
   ["m/v/MatMul"] "m/v/MatMul_output" = MatMul (x, "m/v/weight")
   ["m/v/Add"] "m/v/Add_output" = Add ("m/v/MatMul_output", "m/v/bias")
   ["m/v/Reshape"] "m/v/Reshape_output" = Reshape ("m/v/Add_output", "m/v/heads")
   ["m/v/Transpose"] "m/v/Transpose_output" = Transpose <perm: ints = [0, 2, 1, 3]> ("m/v/Reshape_output")
   ["m/k/MatMul"] "m/k/MatMul_output" = MatMul (x, "m/k/weight")
   ["m/k/Add"] "m/k/Add_output" = Add ("m/k/MatMul_output", "m/k/bias")
   ["m/k/Reshape"] "m/k/Reshape_output" = Reshape ("m/k/Add_output", "m/k/heads")
   ["m/k/Transpose"] "m/k/Transpose_output" = Transpose <perm: ints = [0, 2, 3, 1]> ("m/k/Reshape_output")
   [s] s = MatMul ("m/q/Transpose_output", "m/k/Transpose_output")
   [p] p = Softmax <axis: int = -1> (s)
   [y] y = MatMul (p, "m/v/Transpose_output")
}
"""
