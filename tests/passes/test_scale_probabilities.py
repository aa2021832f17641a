"""Scaling the rows of probabilities changes no output, fills every row, and is done once."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from mptqc.analysis.observe import with_outputs
from mptqc.graph.match import find_attentions
from mptqc.passes.base import STAGE_KEY, Stage, StageError
from mptqc.passes.scale_probabilities import ScaleProbabilities
from mptqc.runtime.session import create_session, run_arrays

FLOAT32_CHAIN = 1e-5
"""Relative to the largest output: a dozen float32 sums of some twenty terms, 6e-8 each, and their growth."""


@pytest.fixture
def folded(block: Callable[[], ir.Model]) -> ir.Model:
    model = block()
    model.metadata_props[STAGE_KEY] = Stage.SMOOTHED
    return model


def run(model: ir.Model, name: str = "y") -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((2, 7, 12)).astype(np.float32)
    return run_arrays(create_session(with_outputs(model, [name])), [name], {"x": x})[0]


def test_the_output_stays_and_every_row_reaches_one(folded: ir.Model) -> None:
    before = run(folded)
    probabilities = run(folded, str(find_attentions(folded)[0].p.name))
    assert ScaleProbabilities()(folded).edits == 1
    np.testing.assert_allclose(run(folded), before, atol=FLOAT32_CHAIN * np.abs(before).max())
    (attention,) = find_attentions(folded)
    assert attention.row_scale is not None
    scaled = run(folded, str(attention.p.name))
    assert (scaled.max(axis=-1) == 1).all()
    np.testing.assert_allclose(scaled, probabilities / probabilities.max(axis=-1, keepdims=True), rtol=1e-6)


def test_a_second_run_finds_nothing(folded: ir.Model) -> None:
    ScaleProbabilities()(folded)
    before = ir.to_proto(folded).SerializeToString()
    assert not ScaleProbabilities()(folded).modified
    assert ir.to_proto(folded).SerializeToString() == before


def test_a_canonical_model_is_refused(folded: ir.Model) -> None:
    folded.metadata_props[STAGE_KEY] = Stage.CANONICAL
    with pytest.raises(StageError, match="scale-probabilities"):
        ScaleProbabilities()(folded)
