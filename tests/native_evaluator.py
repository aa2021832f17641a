"""Models with operators of `ai.mptqc`, run in numpy, and compared with the portable model that they were made from."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from mptqc.graph.quantizer_match import SIGNED_OFFSET, UNSIGNED_SUFFIX
from mptqc.reference.custom_op_bounds import Bounds, output_bounds
from mptqc.reference.custom_ops import DOMAIN
from mptqc.runtime.session import create_session

OPERATORS = (
    "LayerNormQuantize", "LayerNormAdd", "LayerNormAddQuantize", "Linear", "LinearQuantize", "Attention",
    "AttentionQuantize", "QuantizePatches",
)  # fmt: skip
Arrays = Mapping[str, NDArray[Any]]


def run_native(model: ir.Model, feeds: Arrays) -> list[NDArray[Any]]:
    """The model's outputs in numpy."""
    evaluator = ReferenceEvaluator(ir.to_proto(model), new_ops=[_operator(op_type) for op_type in OPERATORS])
    return list(evaluator.run(None, dict(feeds)))


def compare_with_portable(native: ir.Model, portable: ir.Model, feeds: Arrays) -> Counter[str]:
    """Run every node of the native model on the portable model's values; how many were compared, by operator.

    Fed so, a code that flips at a rounding boundary stays alone. Each output must be one that the contract allows, and
    is exactly the portable one where nothing is approximated. Codes that the portable model moves as floats, or before
    they are codes, are compared where the two meet again.

    Raises:
        AssertionError: a node gives another shape or other values; it is named.
    """
    seen = _all_values(portable, feeds)
    here: dict[str, Bounds] = {name: (array, array) for name, array in feeds.items()}
    for name, value in native.graph.initializers.items():
        assert value.const_value is not None
        here[name] = (value.const_value.numpy(),) * 2
    waiting: dict[str, str] = {}  # values that are not compared yet, and the operator that made them
    compared: Counter[str] = Counter()
    for node in native.graph:
        read = [None if value is None else str(value.name) for value in node.inputs]
        maker = node.op_type if node.domain == DOMAIN else next((waiting[name] for name in read if name in waiting), "")
        sides = [[None if name is None else here[name][side] for name in read] for side in (0, 1)]
        names = [str(value.name) for value in node.outputs]
        expected = [_portable_value(name, seen) for name in names]
        if not maker and all(value is not None for value in expected):
            here |= {name: (value, value) for name, value in zip(names, expected, strict=True)}
            continue
        for name, value, bounds in zip(names, expected, _outputs(node, sides), strict=True):
            here[name] = bounds if value is None else (value, value)
            if value is None:
                waiting[name] = maker
            else:
                _assert_between(*bounds, value, f"{node.op_type} {node.name}")
                compared[maker] += 1
    return compared


def _outputs(node: ir.Node, sides: list[list[NDArray[Any] | None]]) -> list[Bounds]:
    """The bounds of each output; of an operator of `ai.mptqc` from one side, as its inputs are the portable ones."""
    if node.domain == DOMAIN:
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        return list(output_bounds(node.op_type, attributes, sides[0]))
    proto = ir.to_proto(node)
    low, high = (
        ReferenceEvaluator(proto).run(
            None, {name: array for name, array in zip(proto.input, side, strict=True) if name}
        )
        for side in sides
    )
    return list(zip(low, high, strict=True))


def _assert_between(low: NDArray[Any], high: NDArray[Any], value: NDArray[Any], label: str) -> None:
    assert low.shape == high.shape == value.shape, f"{label}: {low.shape}, not {value.shape}"
    wrong = int(((value < low) | (value > high)).sum())
    assert wrong == 0, f"{label}: {wrong} of {value.size} values are not allowed"


def _portable_value(name: str, seen: Arrays) -> NDArray[Any] | None:
    if name.endswith(UNSIGNED_SUFFIX):
        return (seen[name.removesuffix(UNSIGNED_SUFFIX)].astype(np.int16) + SIGNED_OFFSET).astype(np.uint8)
    return seen.get(name)


def _all_values(model: ir.Model, feeds: Arrays) -> Arrays:
    proto = ir.to_proto(model)
    names = [name for node in proto.graph.node for name in node.output if name]
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = create_session(proto.SerializeToString(), threads=1, graph_optimization=False)
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def _operator(op_type: str) -> type[OpRun]:
    def run(self: OpRun, *inputs: NDArray[Any] | None, **_: object) -> tuple[NDArray[Any], ...]:
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in self.onnx_node.attribute}
        texts = {name: value.decode() if isinstance(value, bytes) else value for name, value in attributes.items()}
        return tuple(low for low, _ in output_bounds(op_type, texts, inputs, slack=0))

    return type(op_type, (OpRun,), {"op_domain": DOMAIN, "_run": run})
