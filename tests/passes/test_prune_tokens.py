"""PruneTokens: the output stays, the rows that nothing reads go."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from mptqc.analysis.shapes import concrete_shapes
from mptqc.graph.blocks import attention_projections, norm_readers
from mptqc.graph.match import find_attentions, find_linears, find_norms
from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.fold_affine import FoldAffine
from mptqc.passes.prune_tokens import PruneTokens, find_partial_values
from mptqc.passes.separate_projections import SeparateProjections
from mptqc.passes.stamp_sites import StampSites

# Sums of at most 16 products in another order, through one block: far below this, relative to the largest output.
TOLERANCE = 1e-5

# proj, its sum, norm2, fc1, Gelu, fc2, its sum and the last norm; the products' and biases' outputs apart; the context,
# its Transpose and Reshape, P, the scores, and q as MatMul, Add, Reshape, Transpose.
PARTIAL_IN_A_BLOCK = 20


def separated(model: ir.Model) -> ir.Model:
    for make in (FoldAffine, SeparateProjections):
        make(concrete_shapes(model))(model)
    return model


def images(batch: int = 3) -> dict[str, np.ndarray]:
    return {"images": np.random.default_rng(batch).normal(size=(batch, 3, 8, 8)).astype(np.float32)}


def tokens_of(model: ir.Model) -> dict[str, int]:
    """Tokens of the second block's values, by the stem of their names."""
    shapes = concrete_shapes(model)
    return {name: shapes[name][1] for name in ("proj1", "half1", "norm_b1", "fc1_1", "gelu1", "x2", "last_norm")}


@pytest.mark.parametrize(("head", "tokens"), [("class", 1), ("distilled", 2)])
def test_the_last_block_computes_the_read_tokens_only(tiny_vit, run_model, head, tokens):
    before, model = separated(tiny_vit(head)), separated(tiny_vit(head))
    assert PruneTokens(concrete_shapes(model))(model).edits == PARTIAL_IN_A_BLOCK
    assert set(tokens_of(model).values()) == {tokens}
    for batch in (1, 3):
        (wanted,), (got,) = run_model(before, images(batch)), run_model(model, images(batch))
        assert got.shape == wanted.shape
        assert np.abs(got - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def test_attention_keeps_all_keys_and_drops_the_queries(tiny_vit):
    model = separated(tiny_vit())
    PruneTokens(concrete_shapes(model))(model)
    shapes = concrete_shapes(model)
    attention = find_attentions(model)[1]
    assert [shapes[str(value.name)] for value in (attention.q, attention.k, attention.p, attention.v)] == [
        (1, 2, 1, 4),
        (1, 2, 4, 5),
        (1, 2, 1, 5),
        (1, 2, 5, 4),
    ]


def test_two_slices_are_all_that_is_added(tiny_vit):
    model = separated(tiny_vit())
    before = Counter(node.op_type for node in model.graph)
    PruneTokens(concrete_shapes(model))(model)
    assert Counter(node.op_type for node in model.graph) - before == Counter({"Slice": 2})


def test_earlier_blocks_keep_all_tokens(tiny_vit):
    model = separated(tiny_vit())
    PruneTokens(concrete_shapes(model))(model)
    shapes = concrete_shapes(model)
    assert {shapes[name][1] for name in ("proj0", "half0", "gelu0", "x1", "norm_a1")} == {5}


def test_a_fixed_batch_is_pruned_too(tiny_vit, run_model):
    before, model = separated(tiny_vit(batch="3")), separated(tiny_vit(batch="3"))
    assert PruneTokens(concrete_shapes(model))(model).edits == PARTIAL_IN_A_BLOCK
    (wanted,), (got,) = run_model(before, images()), run_model(model, images())
    assert np.abs(got - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def test_recorded_shapes_agree_with_the_computed_ones(tiny_vit):
    model = separated(tiny_vit())
    ir.passes.common.ShapeInferencePass()(model)
    PruneTokens(concrete_shapes(model))(model)
    shapes = concrete_shapes(model)
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None:
                known = [(dim, real) for dim, real in zip(value.shape, shapes[value.name], strict=True)]
                assert all(dim == real for dim, real in known if isinstance(dim, int)), value


def test_everything_around_the_attention_still_matches(tiny_vit):
    model = separated(tiny_vit())
    PruneTokens(concrete_shapes(model))(model)
    shapes = concrete_shapes(model)
    StampSites(shapes)(model)
    norms = {norm.site: [linear.site for linear in norm_readers(norm, model, shapes)] for norm in find_norms(model)}
    assert sorted(norms["block01.norm1"]) == ["block01.k", "block01.q", "block01.v"]
    assert norms["block01.norm2"] == ["block01.fc1"]
    around = attention_projections(find_attentions(model)[1], model, shapes)
    assert [linear.site for linear in (*around.scores, around.v, around.proj)] == [
        "block01.q",
        "block01.k",
        "block01.v",
        "block01.proj",
    ]
    assert len(find_linears(model)) == 13


def test_second_run_changes_nothing(tiny_vit):
    model = separated(tiny_vit())
    PruneTokens(concrete_shapes(model))(model)
    text = ir.to_onnx_text(model)
    assert PruneTokens(concrete_shapes(model))(model).edits == 0
    assert ir.to_onnx_text(model) == text


@pytest.mark.parametrize("head", ["mean", "dense"])
def test_heads_that_read_all_tokens_leave_the_model_alone(tiny_vit, head):
    model = separated(tiny_vit(head))
    text = ir.to_onnx_text(model)
    assert PruneTokens(concrete_shapes(model))(model).edits == 0
    assert ir.to_onnx_text(model) == text


HEADER = "g (float[b,6,4] x) => (float[b,4] y)"
CONSTANTS = (
    "int64 zero = {0}, int64 one = {1}, int64[1] at0 = {0}, int64[1] at1 = {1}, int64[1] at2 = {2}, "
    "int64[1] at4 = {4}, int64[1] last = {-1}, int64[1] max = {9223372036854775807}, int64[2] ends = {0,5}, "
    "int64[2] first2 = {0,1}, float[4] c = {1,2,3,4}, float[6,1] row = {1,2,3,4,5,6}, int64[3] folded = {1,6,-1}, "
    "int64[3] kept = {0,6,4}, int64[3] transposed = {-1,4,6}"
)


def graph(body: str, header: str = HEADER) -> str:
    return f"{header} <{CONSTANTS}> {{\n{body}\n}}"


POINTWISE = "a = Mul(x, c)\n  z = Add(a, x)\n"
SELECTIONS = {
    "gather_scalar": (POINTWISE + "y = Gather<axis=1>(z, zero)", HEADER),
    "gather_negative_axis": (POINTWISE + "y = Gather<axis=-2>(z, one)", HEADER),
    "gather_vector": (POINTWISE + "y = Gather<axis=1>(z, first2)", "g (float[b,6,4] x) => (float[b,2,4] y)"),
    "gather_apart": (POINTWISE + "y = Gather<axis=1>(z, ends)", "g (float[b,6,4] x) => (float[b,2,4] y)"),
    "gather_last": (POINTWISE + "y = Gather<axis=1>(z, last)", "g (float[b,6,4] x) => (float[b,1,4] y)"),
    "slice": (POINTWISE + "y = Slice(z, at0, at2, at1)", "g (float[b,6,4] x) => (float[b,2,4] y)"),
    "slice_from_the_end": (POINTWISE + "y = Slice(z, last, max, at1)", "g (float[b,6,4] x) => (float[b,1,4] y)"),
    "slice_with_step": (POINTWISE + "y = Slice(z, at0, max, at1, at2)", "g (float[b,6,4] x) => (float[b,3,4] y)"),
    "two_readers": (
        POINTWISE + "u = Gather<axis=1>(z, one)\nv = Gather<axis=1>(z, zero)\ny = Sub(u, v)",
        HEADER,
    ),
    "readers_of_overlapping_tokens": (
        POINTWISE + "u = Slice(z, at0, at2, at1)\nv = Slice(z, at1, at2, at1)\ny = Sub(u, v)",
        "g (float[b,6,4] x) => (float[b,2,4] y)",
    ),
    "constant_with_a_row_per_token": (
        "z = Mul(x, row)\ny = Gather<axis=1>(z, one)",
        HEADER,
    ),
    "reshape": ("z = Mul(x, c)\nr = Reshape(z, kept)\ny = Gather<axis=1>(r, one)", HEADER),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_every_kind_of_selection(parse, run_model, name):
    before, model = parse(graph(*SELECTIONS[name])), parse(graph(*SELECTIONS[name]))
    shapes = concrete_shapes(model)
    assert PruneTokens(shapes)(model).edits >= 1
    products = [node for node in model.graph if node.op_type == "Mul"]
    assert concrete_shapes(model)[products[0].outputs[0].name][1] < 6
    feeds = {"x": np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)}
    (wanted,), (got,) = run_model(before, feeds), run_model(model, feeds)
    np.testing.assert_array_equal(got, wanted)


NEGATIVES = {
    "computed_selection": (
        POINTWISE + "n = ReduceMax<keepdims=0>(x)\ni = Cast<to=7>(n)\nj = Sub(i, i)\ny = Gather<axis=1>(z, j)",
        HEADER,
    ),
    "another_reader": (
        POINTWISE + "u = Gather<axis=1>(z, zero)\nm = ReduceMean<keepdims=0>(z, at1)\ny = Add(u, m)",
        HEADER,
    ),
    "graph_output": (
        "z = Mul(x, c)\ny = Gather<axis=1>(z, zero)",
        "g (float[b,6,4] x) => (float[b,4] y, float[b,6,4] z)",
    ),
    "most_tokens": (POINTWISE + "y = Slice(z, at0, at4, at1)", "g (float[b,6,4] x) => (float[b,4,4] y)"),
    "another_axis": (POINTWISE + "y = Gather<axis=2>(z, zero)", "g (float[b,6,4] x) => (float[b,6] y)"),
    "images": (
        "z = Relu(x)\ny = Gather<axis=1>(z, zero)",
        "g (float[b,6,4,4] x) => (float[b,4,4] y)",
    ),
    "softmax_over_the_tokens": ("z = Softmax<axis=1>(x)\ny = Gather<axis=1>(z, zero)", HEADER),
    "norm_over_the_tokens": (
        "z = LayerNormalization<axis=1>(x, row)\ny = Gather<axis=1>(z, zero)",
        HEADER,
    ),
    "unknown_op": ("z = CumSum(x, one)\ny = Gather<axis=1>(z, zero)", HEADER),
    "batch_folded_into_the_channels": (
        "z = Reshape(x, folded)\ny = Gather<axis=1>(z, zero)",
        "g (float[b,6,4] x) => (float[1,n] y)",
    ),
    "tokens_moved_by_a_reshape": (
        "z = Reshape(x, transposed)\ny = Gather<axis=1>(z, zero)",
        "g (float[b,6,4] x) => (float[b,6] y)",
    ),
}


@pytest.mark.parametrize("name", NEGATIVES)
def test_left_alone(parse, name):
    model = parse(graph(*NEGATIVES[name]))
    text = ir.to_onnx_text(model)
    assert PruneTokens(concrete_shapes(model))(model).edits == 0
    assert ir.to_onnx_text(model) == text


def test_finding_edits_nothing(tiny_vit):
    model = separated(tiny_vit())
    text = ir.to_onnx_text(model)
    assert len(find_partial_values(model, concrete_shapes(model))) == PARTIAL_IN_A_BLOCK
    assert ir.to_onnx_text(model) == text


def test_a_shared_constant_stays_whole_for_its_other_reader(parse, run_model):
    body = (
        "z = Mul(x, row)\nu = Gather<axis=1>(z, one)\nw = Add(x, row)\nm = ReduceMax<keepdims=0>(w, at1)\ny = Add(u, m)"
    )
    before, model = parse(graph(body)), parse(graph(body))
    assert PruneTokens(concrete_shapes(model))(model).edits == 1
    feeds = {"x": np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)}
    np.testing.assert_array_equal(run_model(model, feeds)[0], run_model(before, feeds)[0])


def test_golden(parse, as_text):
    model = parse(graph(POINTWISE + "y = Gather<axis=1>(z, one)"))
    PruneTokens(concrete_shapes(model))(model)
    assert as_text(model) == GOLDEN


def test_wrong_stage_raises(tiny_vit):
    model = separated(tiny_vit())
    model.metadata_props[STAGE_KEY] = Stage.QUANTIZED
    with pytest.raises(StageError, match="prune-tokens"):
        PruneTokens({})(model)


GOLDEN = """\
<
   ir_version: 10,
   opset_import: ["" : 21]
>
g (float[b,6,4] x) => (float[b,4] y)
   <float[4] c =  {1,2,3,4}, int64[1] "x/tokens/starts" =  {1}, int64[1] "x/tokens/ends" =  {2}, \
int64[1] "x/tokens/axes" =  {1}, int64 one_1 =  {0}, float[4] c, int64[1] "x/tokens/starts", \
int64[1] "x/tokens/ends", int64[1] "x/tokens/axes", int64 one_1, float[b,1,4] "x/tokens/Slice_output", \
float[b,1,4] a, float[b,1,4] z>
{
   ["x/tokens/Slice"] "x/tokens/Slice_output" = Slice (x, "x/tokens/starts", "x/tokens/ends", "x/tokens/axes")
   a = Mul ("x/tokens/Slice_output", c)
   z = Add (a, "x/tokens/Slice_output")
   y = Gather <axis: int = 1> (z, one_1)
}
"""


def test_a_linear_of_tokens_first_stays_whole(smoothed, run_model):
    """Its product and its bias get fewer rows together."""
    random = np.random.default_rng(0)
    arrays = {
        "W": random.normal(size=(4, 4)).astype(np.float32),
        "b": random.normal(size=4).astype(np.float32),
        "zero": np.array(0, np.int64),
    }
    body = (
        "t = Transpose<perm=[1,0,2]>(x)\nm = MatMul(t, W)\nl = Add(m, b)\nu = Transpose<perm=[1,0,2]>(l)\n"
        "f = Relu(u)\ny = Gather<axis=1>(f, zero)"
    )
    model = smoothed("float[n,5,4] x", "float[n,4] y", body, {}, arrays)
    x = {"x": random.normal(size=(3, 5, 4)).astype(np.float32)}
    (wanted,) = run_model(model, x)
    assert PruneTokens(concrete_shapes(model))(model).edits
    (linear,) = find_linears(model)
    assert concrete_shapes(model)[str(linear.output.name)] == (1, 1, 4)
    np.testing.assert_allclose(run_model(model, x)[0], wanted, rtol=0, atol=1e-5)
