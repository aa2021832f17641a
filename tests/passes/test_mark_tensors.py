"""Marks change nothing that is computed, and every tensor has one, also in a piece of the model."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mptqc.compiler import fold, load_canonical
from mptqc.graph.io import save_model
from mptqc.graph.segments import split
from mptqc.graph.tensors import find_marked, find_tensors
from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.mark_tensors import MarkTensors
from mptqc.plan import QuantPlan
from mptqc.recipe import Recipe
from mptqc.runtime.session import create_session, run_arrays


@pytest.fixture
def vit(tiny_vit, tmp_path: Path) -> ir.Model:
    model = tiny_vit("mean")
    model.metadata_props.pop(STAGE_KEY, None)
    save_model(model, tmp_path / "vit.onnx")
    canonical = load_canonical(tmp_path / "vit.onnx")
    fold(canonical, QuantPlan(model_digest="0", recipe=Recipe()))
    return canonical


def outputs_of(model: ir.Model) -> list[np.ndarray]:
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    names = [str(value.name) for value in model.graph.outputs]
    session = create_session(ir.to_proto(model).SerializeToString())
    return run_arrays(session, names, {str(model.graph.inputs[0].name): images})


def test_every_tensor_is_marked_once_and_outputs_stay(vit):
    wanted = [(tensor.site, tensor.kind, tensor.value.name) for tensor in find_tensors(vit).found]
    before = outputs_of(vit)
    assert MarkTensors()(vit).edits == len(wanted) > 0
    assert [(tensor.site, tensor.kind, tensor.value.name) for tensor in find_marked(vit)] == wanted
    for one, other in zip(before, outputs_of(vit), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_second_run_changes_nothing(vit):
    MarkTensors()(vit)
    text = ir.to_onnx_text(vit)
    assert not MarkTensors()(vit).modified
    assert ir.to_onnx_text(vit) == text


def test_each_mark_is_in_one_segment(vit):
    MarkTensors()(vit)
    sites = [tensor.site for tensor in find_marked(vit)]
    segments = [ir.from_proto(onnx.load_model_from_string(segment.model)) for segment in split(vit)]
    assert [tensor.site for segment in segments for tensor in find_marked(segment)] == sites


def test_only_a_smoothed_model_is_marked(vit):
    vit.metadata_props[STAGE_KEY] = Stage.CANONICAL
    with pytest.raises(StageError, match="mark-tensors"):
        MarkTensors()(vit)
