"""The operators of `ai.mptqc` in a model: how they are written, found again and reported."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import onnx_ir as ir

from mptqc.errors import VerifyError
from mptqc.graph.edit import AttributeValue, Builder, constant_of, producer, replace_value
from mptqc.graph.match import SITE_KEY, site_of
from mptqc.graph.packed_weights import emit_packed, emit_trellis, to_blocks
from mptqc.graph.stored_weight import StoredWeight, read_weight
from mptqc.reference.custom_ops import DOMAIN, block_weight, unblock_weight
from mptqc.reference.packing import MAX_BITS

LINEAR_OPS = ("Linear", "LinearQuantize")
ATTENTION_OPS = ("Attention", "AttentionQuantize")

WEIGHT_INPUTS_KEY = "mptqc.weight_inputs"
"""Metadata of a native Linear: K, which the blocks of its weight only bound."""

LOWERING_KEY = "mptqc.not_lowered"
"""Metadata of a native model: JSON of the sites that kept their portable form."""


@dataclass(frozen=True)
class Lowering:
    """A site, the operator it became or should have become, and, if it kept its portable form, why."""

    site: str
    op: str
    reason: str = ""


def is_native(node: ir.Node | None, *op_types: str) -> bool:
    """True if `node` is one of the named operators of `ai.mptqc`."""
    return node is not None and node.domain == DOMAIN and node.op_type in op_types


def emit_native(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, AttributeValue],
    site: str,
    build: Builder,
) -> ir.Node:
    """Insert one operator; absent inputs at the end are left off."""
    present = list(inputs)
    while present[-1] is None:
        present.pop()
    types = [ir.DataType.UINT8 if "Quantize" in op_type else ir.DataType.FLOAT]
    if op_type == "LayerNormAddQuantize":
        types = [ir.DataType.FLOAT, ir.DataType.UINT8]
    node = build.node(op_type, present, attributes, domain=DOMAIN, name=op_type, num_outputs=len(types))
    node.metadata_props[SITE_KEY] = site
    for output, dtype in zip(node.outputs, types, strict=True):
        output.dtype = dtype
    return node


def take_place(new: ir.Value, old: ir.Value) -> None:
    """Make every reader of `old` read `new`, which takes its name and shape over."""
    new.shape = old.shape
    is_output = old.is_graph_output()
    replace_value(old, new)
    if not is_output:
        old.name, new.name = f"{old.name}/portable", old.name


def emit_blocks(weight: StoredWeight, build: Builder) -> ir.Value:
    """The weight in blocks, of as many bits as it had."""
    if weight.trellis_codes is not None:
        return to_blocks(emit_trellis(weight.trellis_codes, weight.bits, build), weight.integers.shape, build)
    blocks = block_weight(weight.integers)
    return build.constant("blocks", blocks) if weight.bits == MAX_BITS else emit_packed(blocks, weight.bits, build)


def native_weight(node: ir.Node) -> StoredWeight:
    """The weight of a native Linear, integers [K, N].

    Raises:
        VerifyError: the weight is not stored as mptqc stores it.
    """
    outputs = native_weight_scale(node).size
    inputs = int(node.metadata_props.get(WEIGHT_INPUTS_KEY, "-1"))
    if (transpose := producer(node.inputs[1], "Transpose")) is not None:
        return _weight_before_blocks(transpose, (inputs, outputs), site_of(node))
    stored = read_weight(node.inputs[1], site_of(node))
    expected = block_weight(np.zeros((max(inputs, 0), outputs), np.int8)).shape
    if inputs < 0 or stored.integers.shape != expected:
        raise VerifyError(
            f"{site_of(node)}: its weight has shape {stored.integers.shape}, which is not that of blocks of "
            f"{inputs} × {outputs}; the file was edited after it was compiled"
        )
    return StoredWeight(unblock_weight(stored.integers, inputs, outputs), stored.bits, stored.stored_bytes)


def _weight_before_blocks(transpose: ir.Node, shape: tuple[int, int], site: str) -> StoredWeight:
    """What `to_blocks` was given."""
    reshape = producer(transpose.inputs[0], "Reshape")
    pad = producer(reshape.inputs[0], "Pad") if reshape is not None else None
    stored = read_weight(pad.inputs[0] if pad is not None else None, site)
    if stored.integers.shape != shape:
        raise VerifyError(
            f"{site}: its weight has shape {stored.integers.shape}, not {shape}; the file was edited after it was "
            "compiled"
        )
    return stored


def native_weight_scale(node: ir.Node) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """W_scale of a native Linear, [N] float32.

    Raises:
        VerifyError: it is no constant.
    """
    scale = constant_of(node.inputs[2])
    if scale is None:
        raise VerifyError(f"{site_of(node)}: its weight scales are no constant; compile again")
    return scale.astype(np.float32, copy=False)


def native_nodes(model: ir.Model) -> list[ir.Node]:
    """Every operator of `ai.mptqc`, in graph order."""
    return [node for node in model.graph if node.domain == DOMAIN]


def record_lowering(model: ir.Model, refused: Sequence[Lowering]) -> None:
    """Keep in the model's metadata what was not lowered."""
    model.metadata_props[LOWERING_KEY] = json.dumps([asdict(each) for each in refused], ensure_ascii=False)


def lowering_report(model: ir.Model) -> list[Lowering]:
    """What a native model runs as operators of `ai.mptqc`, in graph order, then what it does not and why."""
    lowered = [Lowering(site_of(node), node.op_type) for node in native_nodes(model)]
    return lowered + [Lowering(**each) for each in json.loads(model.metadata_props.get(LOWERING_KEY, "[]"))]
