import numpy as np
import onnx_ir as ir
import pytest

from mptqc.errors import ModelError
from mptqc.passes import simplify
from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.simplify import Simplify

WEIGHTS = "float[2,2] A = {1,2,3,4}, float[2,2] B = {0,1,1,0}, float[2] b = {5,6}"
HEADER = "g (float[batch,3,2] x) => (float[batch,3,2] y)"
QKV = (
    "q = MatMul(x, A) k = MatMul(x, B) qb = Add(q, b) kb = Add(k, b) kt = Transpose<perm=[0,2,1]>(kb) "
    "s = MatMul(qb, kt) p = Softmax<axis=-1>(s) y = MatMul(p, x)"
)


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if node.op_type != "Constant"]


def test_constants_are_folded(parse):
    model = parse(f"{HEADER} <{WEIGHTS}> {{ C = MatMul(A, B) y = MatMul(x, C) }}")
    assert Simplify()(model).edits > 0
    assert ops(model) == ["MatMul"]


def test_shape_arithmetic_goes_and_the_batch_stays_open(parse, run_model):
    body = (
        "s = Shape(x) i = Constant<value = int64 {0}>() n = Gather(s, i) a = Constant<value = int64[1] {0}>() "
        "u = Unsqueeze(n, a) t = Constant<value = int64[1] {6}>() target = Concat<axis=0>(u, t) y = Reshape(x, target)"
    )
    model = parse(f"g (float[batch,3,2] x) => (float[batch,6] y) {{ {body} }}")
    Simplify()(model)
    assert "Gather" not in ops(model)
    assert model.graph.inputs[0].shape == ("batch", 3, 2)
    for batch in (1, 3):
        (got,) = run_model(model, {"x": np.ones((batch, 3, 2), np.float32)})
        assert got.shape == (batch, 6)


def test_projections_stay_apart(parse):
    model = parse(f"{HEADER} <{WEIGHTS}> {{ {QKV} }}")
    Simplify()(model)
    assert ops(model) == ["MatMul", "MatMul", "Add", "Add", "Transpose", "MatMul", "Softmax", "MatMul"]


def test_names_and_metadata_are_kept(parse):
    model = parse(f"{HEADER} <{WEIGHTS}> {{ [first] y = MatMul(x, A) }}")
    model.metadata_props["author"] = "me"
    Simplify()(model)
    assert [node.name for node in model.graph] == ["first"]
    assert dict(model.metadata_props) == {"author": "me"}


def test_same_input_gives_same_bytes(parse):
    texts = set()
    for _ in range(2):
        model = parse(f"{HEADER} <{WEIGHTS}> {{ {QKV} }}")
        Simplify()(model)
        texts.add(ir.to_onnx_text(model))
    assert len(texts) == 1


def test_large_model_keeps_its_weights(parse, run_model, monkeypatch):
    monkeypatch.setattr(simplify, "_MESSAGE_BYTES", 0)
    monkeypatch.setattr(simplify, "_HIDDEN_BYTES", 16)
    before, model = (parse(f"{HEADER} <{WEIGHTS}> {{ {QKV} }}") for _ in range(2))
    Simplify()(model)
    assert [value.name for value in model.graph.inputs] == ["x"]
    feeds = {"x": np.random.default_rng(0).normal(size=(2, 3, 2)).astype(np.float32)}
    assert np.array_equal(run_model(model, feeds)[0], run_model(before, feeds)[0])


def test_invalid_model_is_refused(parse):
    model = parse(f"{HEADER} {{ y = MatMul(x) }}")
    with pytest.raises(ModelError, match="not valid ONNX"):
        Simplify()(model)


def test_wrong_stage_raises(parse):
    model = parse(f"{HEADER} {{ y = Relu(x) }}")
    model.metadata_props[STAGE_KEY] = Stage.CANONICAL
    with pytest.raises(StageError, match="simplify"):
        Simplify()(model)
