"""Write the Attention op of opsets 23 and 24 as the products and the softmax it stands for.

    y = softmax(scale·q·kᵀ + mask)·v      q [B, H, S, d], k [B, H, T, d], v [B, H, T, e]; y [B, H, S, e]

With 3-D inputs [B, S, H·d] the heads are parted before and joined after. A boolean mask says what to keep.
"""

import logging
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mptqc.errors import ModelError
from mptqc.graph.edit import Builder, is_op, replace_value
from mptqc.graph.shapes import dims_of, last_dim, rank_of
from mptqc.passes.base import Pass, PassResult

logger = logging.getLogger(__name__)

_MASKED = np.finfo(np.float32).min
_INPUT_NAMES = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
_OUTPUT_NAMES = ("Y", "present_key", "present_value", "qk_matmul_output")


@dataclass(frozen=True)
class AttentionMatch:
    """One Attention node that can be decomposed. `heads` is None if the inputs are 4-D already."""

    node: ir.Node
    heads: int | None
    scale: float


@dataclass(frozen=True)
class DecomposeAttention(Pass):
    """Replace each Attention by Mul, MatMul, Softmax, MatMul (Add or Where for the mask). One run is a fixpoint.

    y = Attention(q, k, v, mask)    →    y = MatMul(Softmax(Add(MatMul(q·scale, kᵀ), mask)), v)
    """

    name: ClassVar[str] = "decompose-attention"

    def call(self, model: ir.Model) -> PassResult:
        """Find all, then replace all.

        Raises:
            ModelError: a node is causal, capped, grouped, cached, or of unknown shape; the node is named.
        """
        matches = find_attentions(model.graph)
        for match in matches:
            _replace(match)
            logger.debug("decomposed %s", match.node.name)
            model.graph.remove(match.node, safe=True)
        return PassResult(model, len(matches))


def find_attentions(graph: ir.Graph) -> list[AttentionMatch]:
    """Return every Attention node, in graph order; pure.

    Raises:
        ModelError: a node cannot be decomposed.
    """
    return [_match(node) for node in graph if is_op(node, "Attention")]


def _refuse(node: ir.Node, found: str) -> ModelError:
    return ModelError(
        f"Attention node {node.name or node.outputs[0].name} {found}, which mptqc does not compile: it takes the plain "
        "attention of vision transformers; export the model without it or with opset 20"
    )


def _match(node: ir.Node) -> AttentionMatch:
    inputs = [*node.inputs, *[None] * (len(_INPUT_NAMES) - len(node.inputs))]
    for name, value in zip(_INPUT_NAMES[4:], inputs[4:], strict=True):
        if value is not None:
            raise _refuse(node, f"has the input {name}")
    for name, output in zip(_OUTPUT_NAMES[1:], node.outputs[1:], strict=False):
        if output.uses() or output.is_graph_output():
            raise _refuse(node, f"has the output {name} read")
    attributes = node.attributes
    if attributes.get_int("is_causal", 0):
        raise _refuse(node, "is causal (is_causal=1)")
    if attributes.get_float("softcap", 0.0):
        raise _refuse(node, f"caps its scores (softcap={attributes.get_float('softcap')})")
    if attributes.get_int("softmax_precision", ir.DataType.FLOAT) != ir.DataType.FLOAT:
        raise _refuse(node, f"asks for softmax_precision={attributes.get_int('softmax_precision')}")
    q, k, v, mask = inputs[:4]
    if q is None or k is None or v is None:
        raise _refuse(node, "lacks Q, K or V")
    rank = rank_of(q)
    if rank not in (3, 4) or rank_of(k) != rank or rank_of(v) != rank:
        raise _refuse(node, f"has inputs of shapes {q.shape}, {k.shape}, {v.shape}, not all 3-D or all 4-D")
    heads, key_heads = _head_counts(node, q, k)
    if isinstance(heads, int) and isinstance(key_heads, int) and heads != key_heads:
        raise _refuse(node, f"groups its heads ({heads} for q, {key_heads} for k and v)")
    _check_mask(node, k, mask, rank)
    width = last_dim(q)
    parted = heads if rank == 3 and isinstance(heads, int) else None
    scale = attributes.get_float("scale", None)
    if scale is None:
        if width is None:
            raise _refuse(node, "has no scale and q's head size is unknown")
        scale = 1 / math.sqrt(width // (parted or 1))
    return AttentionMatch(node, parted, scale)


def _head_counts(node: ir.Node, q: ir.Value, k: ir.Value) -> tuple[int | str | None, int | str | None]:
    q_dims, k_dims = dims_of(q), dims_of(k)
    assert q_dims is not None and k_dims is not None
    if len(q_dims) == 4:
        return q_dims[1], k_dims[1]
    heads, key_heads = node.attributes.get_int("q_num_heads", None), node.attributes.get_int("kv_num_heads", None)
    if heads is None or key_heads is None:
        raise _refuse(node, "has 3-D inputs and no q_num_heads or kv_num_heads")
    return heads, key_heads


def _check_mask(node: ir.Node, k: ir.Value, mask: ir.Value | None, rank: int) -> None:
    """A mask shorter than the keys means masked keys, which broadcasting would not do."""
    if mask is None:
        return
    key_dims = dims_of(k)
    assert key_dims is not None
    keys, columns = key_dims[rank - 2], last_dim(mask)
    if isinstance(keys, int) and columns is not None and keys != columns:
        raise _refuse(node, f"has a mask of {columns} columns for {keys} keys")
    if mask.dtype not in (ir.DataType.FLOAT, ir.DataType.BOOL):
        raise _refuse(node, f"has a mask of type {mask.dtype}")


def _replace(match: AttentionMatch) -> None:
    build = Builder(
        match.node, (match.node.name or match.node.outputs[0].name or "attention").removesuffix("/Attention")
    )
    # The node is asked again: an Attention replaced before may have made these values.
    q, k, v = match.node.inputs[:3]
    mask = match.node.inputs[3] if len(match.node.inputs) > 3 else None
    assert q is not None and k is not None and v is not None
    q = _part_heads(build, "q", q, match.heads, (0, 2, 1, 3))
    k = _part_heads(build, "k", k, match.heads, (0, 2, 3, 1))
    v = _part_heads(build, "v", v, match.heads, (0, 2, 1, 3))
    if match.heads is None:
        k = build.op("Transpose", [k], {"perm": [0, 1, 3, 2]}, name="k_transpose")
    scaled = build.op("Mul", [q, build.constant("scale", np.array(match.scale, np.float32))], name="q_scaled")
    scores = build.op("MatMul", [scaled, k], name="scores")
    if mask is not None and mask.dtype is ir.DataType.BOOL:
        masked = build.constant("masked", np.array(_MASKED, np.float32))
        scores = build.op("Where", [mask, scores, masked], name="scores_masked")
    elif mask is not None:
        scores = build.op("Add", [scores, mask], name="scores_masked")
    probabilities = build.op("Softmax", [scores], {"axis": -1}, name="probabilities")
    result = build.op("MatMul", [probabilities, v], name="context")
    if match.heads is not None:
        result = build.op("Transpose", [result], {"perm": [0, 2, 1, 3]}, name="context_transpose")
        result = build.op("Reshape", [result, build.constant("joined", np.array([0, 0, -1], np.int64))], name="join")
    replace_value(match.node.outputs[0], result)


def _part_heads(build: Builder, name: str, value: ir.Value, heads: int | None, perm: tuple[int, ...]) -> ir.Value:
    """[B, S, H·d] → [B, S, H, d] → transposed by `perm`; 4-D values stay."""
    if heads is None:
        return value
    width = last_dim(value)
    size = -1 if width is None else width // heads
    target = build.constant(f"{name}_heads", np.array([0, 0, heads, size], np.int64))
    parted = build.op("Reshape", [value, target], name=f"{name}_part")
    return build.op("Transpose", [parted], {"perm": perm}, name=f"{name}_transpose")
