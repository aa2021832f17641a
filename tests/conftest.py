"""Small models at stage smoothed, as the passes that emit integers take them."""

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from mptqc.graph.match import SITE_KEY
from mptqc.passes.base import STAGE_KEY, Stage

Arrays = Mapping[str, NDArray[np.generic]]
MakeSmoothed = Callable[[str, str, str, Mapping[str, str], Arrays], ir.Model]


@pytest.fixture(scope="session")
def smoothed() -> MakeSmoothed:
    """smoothed(inputs, outputs, body, sites, arrays): a model from ONNX text at stage smoothed.

    `sites` are stamped by the name of a node's first output, which also becomes the node's name; `arrays` are the
    initializers.
    """

    def make(inputs: str, outputs: str, body: str, sites: Mapping[str, str], arrays: Arrays) -> ir.Model:
        declared = ", ".join([inputs, *(f"float[] {name}" for name in arrays)])
        model = ir.from_onnx_text(
            f'<ir_version: 10, opset_import: ["": 21]>\ng ({declared}) => ({outputs}) {{\n{body}\n}}'
        )
        by_name = {value.name: value for value in model.graph.inputs}
        for name, array in arrays.items():
            value = by_name[name]
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(array, name=name)
            value.dtype, value.shape = value.const_value.dtype, ir.Shape(array.shape)
            model.graph.register_initializer(value)
        for node in model.graph:
            node.name = str(node.outputs[0].name)
            if node.name in sites:
                node.metadata_props[SITE_KEY] = sites[node.name]
        model.metadata_props[STAGE_KEY] = Stage.SMOOTHED
        return model

    return make
