"""Segments: every node in one, cuts where the residual stream alone crosses, and the same values when run in turn."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mptqc.analysis.observe import with_outputs
from mptqc.compiler import load_canonical
from mptqc.graph.io import save_model
from mptqc.graph.segments import split
from mptqc.passes.base import STAGE_KEY, stage_of
from mptqc.runtime.session import create_session


@pytest.fixture
def model(tiny_vit, tmp_path):
    made = tiny_vit("class")
    made.metadata_props.pop(STAGE_KEY, None)
    save_model(made, tmp_path / "vit.onnx")
    return load_canonical(tmp_path / "vit.onnx")


def part_of(segment) -> ir.Model:
    return ir.from_proto(onnx.load_model_from_string(segment.model))


def test_every_node_is_in_one_segment_in_order(model):
    segments = split(model)
    assert [node.name for segment in segments for node in part_of(segment).graph] == [node.name for node in model.graph]


def test_cuts_are_at_the_residual_stream(model):
    sites = [set(segment.sites) for segment in split(model)]
    assert sites == [
        {"patch_embed"},
        {f"block00.{name}" for name in ("q", "k", "v", "attention", "proj")},
        {"block00.fc1", "block00.fc2"},
        {f"block01.{name}" for name in ("q", "k", "v", "attention", "proj")},
        {"block01.fc1", "block01.fc2"},
        {"head"},
    ]
    assert all(len(segment.inputs) == 1 for segment in split(model))


def test_segments_keep_the_stage(model):
    assert {stage_of(part_of(segment)) for segment in split(model)} == {stage_of(model)}


def test_run_in_turn_they_give_the_models_outputs(model):
    images = np.random.default_rng(0).standard_normal((3, 3, 8, 8)).astype(np.float32)
    # Without ONNX Runtime's fusions, which may differ at a cut, the very same operators run.
    whole = create_session(with_outputs(model, ["logits"]), graph_optimization=False).run(None, {"images": images})[0]
    values = {"images": images}
    for segment in split(model):
        session = create_session(segment.model, graph_optimization=False)
        found = session.run(list(segment.outputs), {name: values[name] for name in segment.inputs})
        values |= dict(zip(segment.outputs, found, strict=True))
    assert np.array_equal(values["logits"], whole)


def test_a_value_that_skips_ahead_is_passed_on(smoothed):
    weight = np.eye(3, dtype=np.float32)
    model = smoothed(
        "float[n, 3] x",
        "float[n, 3] y",
        "a = MatMul (x, w)\n b = Add (a, c)\n d = MatMul (b, v)\n e = Add (d, c)\n y = Add (e, x)",
        {"a": "one", "d": "two"},
        {"w": weight, "v": weight, "c": np.ones(3, np.float32)},
    )
    segments = split(model)
    assert [segment.sites for segment in segments] == [("one",), ("two",)]
    assert segments[1].inputs == ("b", "x")
