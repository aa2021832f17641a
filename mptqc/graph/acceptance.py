"""What mptqc compiles: each refusal says what was found, where, and what to do."""

import collections
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from mptqc.errors import ModelError

MIN_OPSET, MAX_OPSET = 13, 24
STAGE_KEY = "mptqc.stage"  # mptqc.passes.base writes it
_DOMAINS = ("", "ai.onnx")
_CONTROL_FLOW = ("If", "Loop", "Scan", "SequenceMap")
_RANDOM_OPS = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")
_QUANTIZED_OPS = (
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "ConvInteger",
    "QLinearMatMul",
    "QLinearConv",
)
_QUANTIZED_PREFIXES = ("QLinear", "QGemm", "QAttention", "DynamicQuantize", "MatMulInteger", "MatMulNBits", "QMoE")
_NAMED_AT_MOST = 3


def check_proto(proto: onnx.ModelProto, path: Path) -> None:
    """Refuse what onnx_ir would drop in silence, and opsets out of range.

    Raises:
        ModelError: compiled already, sparse weights, training graph, or opset below 13 or above 24.
    """
    if any(entry.key == STAGE_KEY for entry in proto.metadata_props):
        raise ModelError(
            f"{path.name} was already compiled by mptqc (metadata {STAGE_KEY}); compile from the original float model"
        )
    _check_sparse(proto, path)
    if proto.training_info:
        raise ModelError(f"{path.name} holds a training graph (training_info); export it for inference")
    if proto.graph.quantization_annotation:
        raise ModelError(
            f"{path.name} is already quantized (it carries quantization annotations); compile from the original float "
            "model"
        )
    opset = next((entry.version for entry in proto.opset_import if entry.domain in _DOMAINS), None)
    if opset is None:
        raise ModelError(
            f"{path.name} does not use the ONNX operators (no opset of the default domain); export it again"
        )
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise ModelError(
            f"{path.name} uses opset {opset}; mptqc reads opsets {MIN_OPSET} to {MAX_OPSET}: export it again with an "
            f"opset in that range"
        )


def check_graph(model: ir.Model, path: Path) -> None:
    """Refuse quantized models, ops outside the ONNX domain, control flow, chance, and more than one float input.

    Raises:
        ModelError: as above; ops and inputs are named.
    """
    _check_quantized(model, path)
    _check_ops(model, path)
    _check_chance(model, path)
    _check_inputs(model, path)


def _check_sparse(proto: onnx.ModelProto, path: Path) -> None:
    names = [tensor.values.name for tensor in proto.graph.sparse_initializer]
    sparse_types = (onnx.AttributeProto.SPARSE_TENSOR, onnx.AttributeProto.SPARSE_TENSORS)
    names += [
        node.name or node.output[0]
        for node in proto.graph.node
        if any(attribute.type in sparse_types for attribute in node.attribute)
    ]
    if names:
        raise ModelError(
            f"{path.name} holds sparse weights (the first of {len(names)}: {names[0]}), which mptqc does not read; "
            "export it with dense weights"
        )


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from ir.traversal.RecursiveGraphIterator(model.graph)


def _label(node: ir.Node) -> str:
    return node.name or ", ".join(output.name or "?" for output in node.outputs)


def _check_quantized(model: ir.Model, path: Path) -> None:
    found = [
        node for node in _nodes(model) if node.op_type in _QUANTIZED_OPS or node.op_type.startswith(_QUANTIZED_PREFIXES)
    ]
    if found:
        raise ModelError(
            f"{path.name} is already quantized: it has {len(found)} quantization ops, the first is {found[0].op_type} "
            f"({_label(found[0])}); compile from the original float model"
        )


def _check_ops(model: ir.Model, path: Path) -> None:
    unknown: collections.Counter[str] = collections.Counter()
    where: dict[str, str] = {}
    for node in _nodes(model):
        if node.domain not in _DOMAINS:
            op = f"{node.domain}::{node.op_type}"
        elif node.op_type in _CONTROL_FLOW:
            op = node.op_type
        else:
            continue
        unknown[op] += 1
        where.setdefault(op, _label(node))
    if unknown:
        named = ", ".join(f"{op} (×{count}, at {where[op]})" for op, count in unknown.most_common(_NAMED_AT_MOST))
        more = "" if len(unknown) <= _NAMED_AT_MOST else f" and {len(unknown) - _NAMED_AT_MOST} more"
        raise ModelError(
            f"{path.name} uses ops that mptqc does not compile: {named}{more}; export the float model with standard "
            "ONNX ops and without control flow or runtime-specific optimization"
        )


def _check_chance(model: ir.Model, path: Path) -> None:
    """A model that draws random numbers, as masked autoencoders do, has no outputs that codes could be near to."""
    found = [node for node in _nodes(model) if node.op_type in _RANDOM_OPS]
    if found:
        raise ModelError(
            f"{path.name} draws random numbers (the first of {len(found)}: {found[0].op_type} at {_label(found[0])}), "
            "so one image gives other outputs in every run; export the part without them, such as a masked "
            "autoencoder's encoder without its masking"
        )


def _check_inputs(model: ir.Model, path: Path) -> None:
    inputs = [value for value in model.graph.inputs if value.dtype is not None and value.dtype.is_floating_point()]
    if len(inputs) == 1 and inputs[0].dtype is not ir.DataType.FLOAT:
        raise ModelError(f"{path.name}: the input {inputs[0].name} is {inputs[0].dtype}; export the model in float32")
    if len(inputs) > 1:
        names = ", ".join(f"{value.name} {value.shape}" for value in inputs)
        raise ModelError(
            f"{path.name} has {len(inputs)} float inputs ({names}); mptqc compiles models with one: the image batch"
        )
    if not inputs:
        found = ", ".join(f"{value.name} ({value.dtype})" for value in model.graph.inputs) or "none at all"
        raise ModelError(
            f"{path.name} has no float input (found: {found}); mptqc compiles models that take an image batch"
        )
