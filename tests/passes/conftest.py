"""Small models from text, and what ONNX Runtime makes of them."""

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

from mptqc.graph.io import serialize
from mptqc.runtime.session import create_session

Array = NDArray[np.generic]
Parse = Callable[..., ir.Model]
RunModel = Callable[[ir.Model, Mapping[str, Array]], list[Array]]


@pytest.fixture
def parse() -> Parse:
    """parse(body, opset=21): a model from ONNX text, shapes inferred."""

    def from_text(body: str, opset: int = 21, ir_version: int = 10) -> ir.Model:
        model = ir.from_onnx_text(f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>\n{body}')
        ShapeInferencePass(check_type=False, strict_mode=False)(model)
        return model

    return from_text


@pytest.fixture
def run_model() -> RunModel:
    """run_model(model, feeds): the outputs in ONNX Runtime, without its graph optimizations."""

    def run(model: ir.Model, feeds: Mapping[str, Array]) -> list[Array]:
        session = create_session(serialize(model), threads=1, graph_optimization=False)
        return list(session.run(None, dict(feeds)))

    return run


@pytest.fixture
def as_text() -> Callable[[ir.Model], str]:
    """as_text(model): the model as ONNX text, without the spaces that the printer leaves at the ends of lines."""
    return lambda model: "\n".join(line.rstrip() for line in ir.to_onnx_text(model).splitlines()) + "\n"


@pytest.fixture
def run_batch(run_model: RunModel) -> Callable[..., Array]:
    """run_batch(model, batch=3): the first output for so many images of seeded noise."""

    def run(model: ir.Model, batch: int = 3) -> Array:
        (image,) = model.graph.inputs
        assert image.shape is not None
        shape = (batch, *(int(size) for size in list(image.shape)[1:]))
        x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        return run_model(model, {str(image.name): x})[0]

    return run
