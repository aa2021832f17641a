import logging
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import pytest

from mptqc.passes.base import STAGE_KEY, Pass, PassResult, Stage, StageError, run_passes, stage_of


@dataclass(frozen=True)
class Smooth(Pass):
    """Counts what it is told to."""

    name: ClassVar[str] = "smooth"
    requires: ClassVar[tuple[Stage, ...]] = (Stage.CANONICAL,)
    ensures: ClassVar[Stage | None] = Stage.SMOOTHED
    edits: int = 1

    def call(self, model: ir.Model) -> PassResult:
        return PassResult(model, self.edits)


@dataclass(frozen=True)
class Look(Smooth):
    """Leaves the stage as it is."""

    ensures: ClassVar[Stage | None] = None


def model_at(stage: str | None) -> ir.Model:
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 21]> g (float[n] x) => (float[n] y) { y = Relu(x) }')
    if stage is not None:
        model.metadata_props[STAGE_KEY] = stage
    return model


def test_an_untouched_model_is_raw():
    assert stage_of(model_at(None)) is Stage.RAW


def test_a_pass_records_the_stage_it_ensures():
    model = model_at("canonical")
    Smooth()(model)
    assert stage_of(model) is Stage.SMOOTHED


def test_a_pass_that_ensures_nothing_keeps_the_stage():
    model = model_at("canonical")
    Look()(model)
    assert stage_of(model) is Stage.CANONICAL


@pytest.mark.parametrize("stage", [None, *(stage for stage in Stage if stage is not Stage.CANONICAL)])
def test_every_other_stage_raises_and_names_both(stage):
    with pytest.raises(StageError, match=f"smooth takes a model at stage canonical, .* stage {stage or 'raw'}"):
        Smooth()(model_at(stage))


def test_a_pass_that_raises_leaves_the_stage():
    class Fail(Smooth):
        def call(self, model: ir.Model) -> PassResult:
            raise ValueError

    model = model_at("canonical")
    with pytest.raises(ValueError):
        Fail()(model)
    assert stage_of(model) is Stage.CANONICAL


def test_an_unknown_stage_names_the_known_ones():
    with pytest.raises(StageError, match=r"'polished'.*raw, canonical"):
        stage_of(model_at("polished"))


@pytest.mark.parametrize(("edits", "modified"), [(0, False), (2, True)])
def test_modified_means_edits(edits, modified):
    assert Smooth(edits=edits)(model_at("canonical")).modified is modified


def test_edits_are_logged_once(caplog):
    with caplog.at_level(logging.INFO, "mptqc.passes.base"):
        Smooth(edits=3)(model_at("canonical"))
    assert caplog.messages == ["smooth: 3 edits"]


def test_passes_run_in_order():
    model = model_at("canonical")
    assert run_passes(model, [Look(), Smooth()]) is model
    with pytest.raises(StageError):
        run_passes(model_at("canonical"), [Smooth(), Look()])
