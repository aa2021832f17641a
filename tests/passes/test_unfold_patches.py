"""UnfoldPatches: a Conv over disjoint patches becomes a Linear over unfolded ones."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mptqc.analysis.shapes import concrete_shapes
from mptqc.graph.match import find_linears
from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.unfold_patches import UnfoldPatches

EPSILON = 2.0**-24

TOKENS = "f = Reshape(c, flat)\ny = Transpose<perm=[0,2,1]>(f)"
GRID = "y = Transpose<perm=[0,2,3,1]>(c)"
CONV = "c = Conv<strides=[2,3]>(x, W, b)\n"
HEADER = "g (float[n,2,4,6] x) => (float[n,4,5] y)"
GRID_HEADER = "g (float[n,2,4,6] x) => (float[n,2,2,5] y)"


@pytest.fixture
def make(smoothed):
    def from_body(body: str, *, x: tuple[object, ...] = ("n", 2, 4, 6), y: str = "float[n,4,5] y", width: int = 5,
                  kernel: tuple[int, ...] = (2, 3), channels: int = 2, seed: int = 0) -> ir.Model:  # fmt: skip
        random = np.random.default_rng(seed)
        arrays = {
            "W": random.normal(size=(width, channels, *kernel)).astype(np.float32),
            "b": random.normal(size=width).astype(np.float32),
            "flat": np.array([0, width, -1], np.int64),
        }
        model = smoothed(
            f"float[{','.join(map(str, x))}] x", y, body, {}, {k: a for k, a in arrays.items() if k in body}
        )
        del model.metadata_props[STAGE_KEY]
        return model

    return from_body


def unfold(model: ir.Model) -> int:
    return UnfoldPatches(concrete_shapes(model))(model).edits


def images(*shape: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).normal(size=shape).astype(np.float32)}


def tolerance(model: ir.Model, feeds: dict[str, np.ndarray]) -> float:
    """Each side sums C·kh·kw products and a bias in float32, in an order of its own."""
    weight = model.graph.initializers["W"].const_value.numpy()
    terms = weight[0].size + 1
    return 2 * terms * EPSILON * terms * float(np.abs(weight).max() * np.abs(feeds["x"]).max())


@pytest.mark.parametrize(
    ("body", "y"),
    [
        (CONV + TOKENS, "float[n,4,5] y"),
        (CONV + GRID, "float[n,2,2,5] y"),
        (CONV.replace(", b)", ")") + TOKENS, "float[n,4,5] y"),
        (CONV.replace("strides", 'auto_pad="VALID", strides') + TOKENS, "float[n,4,5] y"),
        (CONV.replace("strides", "pads=[0,0,0,0], dilations=[1,1], group=1, strides") + TOKENS, "float[n,4,5] y"),
    ],
    ids=["tokens", "grid", "no_bias", "valid_padding", "spelt_out"],
)
def test_a_patch_embedding_becomes_a_linear(make, run_model, body, y):
    before, model = (
        make(body + "\nz = Relu(y)", y=y.replace("y", "z")),
        make(body + "\nz = Relu(y)", y=y.replace("y", "z")),
    )
    assert unfold(model) == 1
    assert [node.op_type for node in model.graph] == ["Reshape", "Transpose", "Reshape", "MatMul", "Add", "Relu"]
    assert len(find_linears(model)) == 1
    feeds = images(3, 2, 4, 6)
    (wanted,), (got,) = run_model(before, feeds), run_model(model, feeds)
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= tolerance(before, feeds)


def test_padding_becomes_a_pad(make, run_model):
    body = CONV.replace("strides", "pads=[2,0,0,3], strides") + TOKENS + "\nz = Relu(y)"
    before, model = make(body, y="float[n,9,5] z"), make(body, y="float[n,9,5] z")
    assert unfold(model) == 1
    assert [node.op_type for node in model.graph][:2] == ["Pad", "Reshape"]
    feeds = images(3, 2, 4, 6)
    (wanted,), (got,) = run_model(before, feeds), run_model(model, feeds)
    assert got.shape == wanted.shape == (3, 9, 5)
    assert np.abs(got - wanted).max() <= tolerance(before, feeds)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 4)).filter(lambda kernel: kernel != (1, 1)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_any_geometry(make, run_model, kernel, grid, channels, width, seed):
    size = [step * count for step, count in zip(kernel, grid, strict=True)]
    body = f"c = Conv<strides=[{kernel[0]},{kernel[1]}]>(x, W, b)\n{TOKENS}\nz = Relu(y)"
    before, model = (
        make(
            body, x=("n", channels, *size), y="float[n,t,w] z", kernel=kernel, channels=channels, width=width, seed=seed
        )
        for _ in range(2)
    )
    assert unfold(model) == 1
    feeds = images(2, channels, *size)
    (wanted,), (got,) = run_model(before, feeds), run_model(model, feeds)
    assert np.abs(got - wanted).max() <= tolerance(before, feeds)


NEGATIVES = {
    "overlapping": {"body": CONV.replace("[2,3]", "[1,3]") + TOKENS, "y": "float[n,6,5] y"},
    "apart": {"body": CONV.replace("[2,3]", "[2,4]") + TOKENS, "x": ("n", 2, 4, 7), "y": "float[n,4,5] y"},
    "padding_leaves_a_rest": {
        "body": CONV.replace("strides", "pads=[0,0,1,0], strides") + TOKENS,
        "y": "float[n,4,5] y",
    },
    "same_padding": {"body": CONV.replace("strides", 'auto_pad="SAME_UPPER", strides') + TOKENS, "y": "float[n,4,5] y"},
    "a_rest_is_left_over": {"body": CONV + TOKENS, "x": ("n", 2, 5, 6)},
    "grouped": {
        "body": CONV.replace("strides", "group=2, strides") + TOKENS,
        "channels": 1,
        "width": 4,
        "y": "float[n,4,4] y",
    },
    "pointwise": {"body": CONV.replace("[2,3]", "[1,1]") + TOKENS, "kernel": (1, 1), "y": "float[n,24,5] y"},
    "image_is_read": {"body": CONV + "y = Relu(c)", "y": "float[n,5,2,2] y"},
    "image_is_an_output": {
        "body": CONV + "y = Identity(c)\nf = Reshape(c, flat)\nt = Transpose<perm=[0,2,1]>(f)\nz = Relu(t)",
        "y": "float[n,5,2,2] y, float[n,4,5] z",
    },
    "channels_stay_in_the_middle": {"body": CONV + "f = Reshape(c, flat)\ny = Relu(f)", "y": "float[n,5,4] y"},
    "columns_first": {"body": CONV + "y = Transpose<perm=[0,3,2,1]>(c)", "y": "float[n,2,2,5] y"},
}


@pytest.mark.parametrize("name", NEGATIVES)
def test_left_alone(make, name):
    options = {"y": "float[n,4,5] y"} | NEGATIVES[name]
    body = options.pop("body")
    last = body.rsplit("\n", 1)[1]
    if last.startswith("y = T"):
        body += "\nw = Relu(y)"
        options["y"] = options["y"].replace(" y", " w")
    model = make(body, **options)
    text = ir.to_onnx_text(model)
    assert unfold(model) == 0
    assert ir.to_onnx_text(model) == text


def test_second_run_changes_nothing(tiny_vit):
    model = tiny_vit()
    assert unfold(model) == 1
    text = ir.to_onnx_text(model)
    assert unfold(model) == 0
    assert ir.to_onnx_text(model) == text


def test_golden(make, as_text):
    model = make(CONV + TOKENS + "\nz = Relu(y)", y="float[n,4,5] z")
    unfold(model)
    text = as_text(model)
    assert text[text.index("{\n   [") :] == GOLDEN


def test_wrong_stage_raises(make):
    model = make(CONV + TOKENS)
    model.metadata_props[STAGE_KEY] = Stage.CANONICAL
    with pytest.raises(StageError, match="unfold-patches"):
        UnfoldPatches({})(model)


GOLDEN = """\
{
   ["c/unfold/split"] "c/unfold/split_output" = Reshape (x, "c/unfold/grid")
   ["c/unfold/Transpose"] "c/unfold/Transpose_output" = Transpose <perm: ints = [0, 2, 4, 1, 3, 5]> \
("c/unfold/split_output")
   ["c/unfold/join"] "c/unfold/join_output" = Reshape ("c/unfold/Transpose_output", "c/unfold/flat")
   ["c/unfold/MatMul"] "c/unfold/MatMul_output" = MatMul ("c/unfold/join_output", "c/unfold/weight")
   ["c/unfold/Add"] "c/unfold/Add_output" = Add ("c/unfold/MatMul_output", "c/unfold/bias")
   [z] z = Relu ("c/unfold/Add_output")
}
"""
