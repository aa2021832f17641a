import numpy as np
import onnx_ir as ir
import pytest

from mptqc.errors import ModelError
from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.decompose_attention import DecomposeAttention

# Softmax and two products of eight terms, each rounded in its own order: some 2·8 roundings of 2⁻²⁴.
TOLERANCE = 16 * 2**-24

CUBE = "float[n,5,8] q, float[n,6,8] k, float[n,6,8] v"
HEADS = "float[n,2,5,4] q, float[n,2,6,4] k, float[n,2,6,4] v"
PARTED = "q_num_heads=2, kv_num_heads=2"

FORMS = {
    "heads": (HEADS, "float[n,2,5,4] y", "y = Attention(q, k, v)"),
    "scaled": (HEADS, "float[n,2,5,4] y", "y = Attention<scale=0.3>(q, k, v)"),
    "float_mask": (f"{HEADS}, float[5,6] m", "float[n,2,5,4] y", "y = Attention(q, k, v, m)"),
    "bool_mask": (f"{HEADS}, bool[n,1,5,6] m", "float[n,2,5,4] y", "y = Attention(q, k, v, m)"),
    "joined": (CUBE, "float[n,5,8] y", f"y = Attention<{PARTED}>(q, k, v)"),
    "joined_mask": (f"{CUBE}, float[n,2,5,6] m", "float[n,5,8] y", f"y = Attention<{PARTED}, scale=0.5>(q, k, v, m)"),
}


def graph(inputs: str, outputs: str, body: str) -> str:
    return f"g ({inputs}) => ({outputs}) {{ [block] {body} }}"


def sample(model: ir.Model, batch: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    feeds = {}
    for value in model.graph.inputs:
        shape = [dim if isinstance(dim, int) else batch for dim in value.shape]
        array = generator.normal(size=shape).astype(np.float32)
        feeds[value.name] = array > -0.5 if value.dtype is ir.DataType.BOOL else array
    return feeds


@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize("name", FORMS)
def test_same_numbers_after(parse, run_model, name, opset):
    before, model = parse(graph(*FORMS[name]), opset, 11), parse(graph(*FORMS[name]), opset, 11)
    assert DecomposeAttention()(model).edits == 1
    assert "Attention" not in [node.op_type for node in model.graph]
    for batch in (1, 3):
        (wanted,), (got,) = run_model(before, sample(model, batch)), run_model(model, sample(model, batch))
        assert got.shape == wanted.shape
        assert np.abs(got - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def test_golden(parse, as_text):
    model = parse(graph(*FORMS["joined_mask"]), 23, 11)
    DecomposeAttention()(model)
    assert as_text(model) == GOLDEN


def test_attention_after_attention(parse):
    body = "z = Attention(q, k, v) y = Attention(z, k, v)"
    model = parse(graph(HEADS, "float[n,2,5,4] y", body), 23, 11)
    assert DecomposeAttention()(model).edits == 2
    assert [node.op_type for node in model.graph] == ["Transpose", "Mul", "MatMul", "Softmax", "MatMul"] * 2


REFUSED = {
    "is causal": (HEADS, "float[n,2,5,4] y", "y = Attention<is_causal=1>(q, k, v)"),
    "caps its scores": (HEADS, "float[n,2,5,4] y", "y = Attention<softcap=3.0>(q, k, v)"),
    "softmax_precision": (HEADS, "float[n,2,5,4] y", "y = Attention<softmax_precision=11>(q, k, v)"),
    "input past_key": (
        f"{HEADS}, float[n,2,1,4] a, float[n,2,1,4] b",
        "float[n,2,5,4] y, float[n,2,7,4] c, float[n,2,7,4] d",
        "y, c, d = Attention(q, k, v, , a, b)",
    ),
    "output qk_matmul_output": (
        HEADS,
        "float[n,2,5,4] y, float[n,2,5,6] s",
        "y, c, d, s = Attention(q, k, v)",
    ),
    "groups its heads": (
        HEADS.replace("[n,2,5,4]", "[n,4,5,4]"),
        "float[n,4,5,4] y",
        "y = Attention(q, k, v)",
    ),
    "mask of 3 columns": (f"{HEADS}, float[5,3] m", "float[n,2,5,4] y", "y = Attention(q, k, v, m)"),
    "no q_num_heads": (CUBE, "float[n,5,8] y", "y = Attention(q, k, v)"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_by_name_and_reason(parse, reason):
    model = parse(graph(*REFUSED[reason]), 23, 11)
    text = ir.to_onnx_text(model)
    with pytest.raises(ModelError, match=f"block .*{reason}"):
        DecomposeAttention()(model)
    assert ir.to_onnx_text(model) == text


def test_wrong_stage_raises(parse):
    model = parse(graph(*FORMS["heads"]), 23, 11)
    model.metadata_props[STAGE_KEY] = Stage.CANONICAL
    with pytest.raises(StageError, match="decompose-attention"):
        DecomposeAttention()(model)


GOLDEN = """\
<
   ir_version: 11,
   opset_import: ["" : 23]
>
g (float[n,5,8] q, float[n,6,8] k, float[n,6,8] v, float[n,2,5,6] m) => (float[n,5,8] y)
   <int64[4] "block/q_heads" =  {0,0,2,4}, int64[4] "block/k_heads" =  {0,0,2,4}, int64[4] "block/v_heads" =  {0,0,2,4}, float "block/scale" =  {0.5}, int64[3] "block/joined" =  {0,0,-1}, int64[4] "block/q_heads", int64[4] "block/k_heads", int64[4] "block/v_heads", float "block/scale", int64[3] "block/joined">
{
   ["block/q_part"] "block/q_part_output" = Reshape (q, "block/q_heads")
   ["block/q_transpose"] "block/q_transpose_output" = Transpose <perm: ints = [0, 2, 1, 3]> ("block/q_part_output")
   ["block/k_part"] "block/k_part_output" = Reshape (k, "block/k_heads")
   ["block/k_transpose"] "block/k_transpose_output" = Transpose <perm: ints = [0, 2, 3, 1]> ("block/k_part_output")
   ["block/v_part"] "block/v_part_output" = Reshape (v, "block/v_heads")
   ["block/v_transpose"] "block/v_transpose_output" = Transpose <perm: ints = [0, 2, 1, 3]> ("block/v_part_output")
   ["block/q_scaled"] "block/q_scaled_output" = Mul ("block/q_transpose_output", "block/scale")
   ["block/scores"] "block/scores_output" = MatMul ("block/q_scaled_output", "block/k_transpose_output")
   ["block/scores_masked"] "block/scores_masked_output" = Add ("block/scores_output", m)
   ["block/probabilities"] "block/probabilities_output" = Softmax <axis: int = -1> ("block/scores_masked_output")
   ["block/context"] "block/context_output" = MatMul ("block/probabilities_output", "block/v_transpose_output")
   ["block/context_transpose"] "block/context_transpose_output" = Transpose <perm: ints = [0, 2, 1, 3]> ("block/context_output")
   ["block/join"] y = Reshape ("block/context_transpose_output", "block/joined")
}
"""  # noqa: E501 - a line of the printer
