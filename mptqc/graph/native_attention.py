"""Which attentions `Attention` and `AttentionQuantize` of `ai.mptqc` can take the place of; finding never edits."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.errors import RefusalError
from mptqc.graph.batch_shapes import Batches, divisors
from mptqc.graph.edit import constant_of, is_op, only_consumer
from mptqc.graph.integer_products import IntegerProduct
from mptqc.graph.layout import Reader, readers, trace
from mptqc.graph.match import match_scaled_rows
from mptqc.graph.quantizer_match import FoundQuantizer, match_quantizer, quantizers_of
from mptqc.reference.custom_ops import MOST_TERMS

# Movement that keeps the order of the elements.
_RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")
_MOST_ADDITIONS = 2
# How an exporter may lay out the codes of q, k and v, as axes of [B, T, H, d].
SIDE_BY_SIDE = (0, 1, 2, 3)
_CODE_ORDERS = (SIDE_BY_SIDE, (0, 2, 1, 3), (0, 2, 3, 1))


@dataclass(frozen=True)
class Operand:
    """The quantizer of q, k or v; its codes are `order` of [B, T, H, d], (0, 1, 2, 3) where heads lie side by side."""

    found: FoundQuantizer
    order: tuple[int, ...]


@dataclass(frozen=True)
class AttentionPattern:
    """Both products of an attention, from the codes of q, k and v to `targets`, where the heads lie side by side.

    `added` are what is added to the scores, [W, 1 or H, 1 or T, S] each; `output` quantizes the context, if all
    that reads it is quantized alike. `row_scale`: the probabilities are quantized relative to their row's largest,
    which `result` gives back to the context; else `result` is the second product's output.
    """

    scores: IntegerProduct
    context: IntegerProduct
    heads: int
    q: Operand
    k: Operand
    v: Operand
    p: FoundQuantizer
    added: tuple[NDArray[np.float32], ...]
    row_scale: bool
    result: ir.Value
    output: FoundQuantizer | None
    targets: tuple[ir.Value, ...]


def match_attention(scores: IntegerProduct, context: IntegerProduct, shapes: Batches) -> AttentionPattern:
    """Read the attention around two products.

    Raises:
        RefusalError: it is not what the operator computes.
    """
    shape = shapes.of(scores.output)
    if len(shape) != 4 or (shapes.target(scores.output)[1:] == -1).any():
        raise RefusalError(f"its scores have shape {shape}, not [batch, heads, tokens, tokens]")
    if max(shape[3], shapes.of(scores.left)[3]) > MOST_TERMS:
        raise RefusalError(f"it sums more than {MOST_TERMS} products")
    added, softmax = _score_path(scores, shapes)
    divided = match_scaled_rows(softmax.outputs[0])
    quantizers = quantizers_of(softmax.outputs[0] if divided is None else divided)
    if quantizers is None or len(quantizers) != 1 or shapes.of(softmax.outputs[0]) != shape:
        raise RefusalError(f"{softmax.name} is not read by one quantizer alone")
    p = quantizers[0]
    if p.signed or context.left is not p.codes or only_consumer(p.codes) is not context.node:
        raise RefusalError(f"the codes of {softmax.name} are not read by the product with v alone")
    if not p.agrees(context.left_scale, context.left_zero):
        raise RefusalError(f"the product with v does not take the codes of {softmax.name} as they are made")
    q = _operand("q", scores.left, (0, 2, 1, 3), shapes)
    k = _operand("k", scores.right, (0, 3, 1, 2), shapes)
    v = _operand("v", context.right, (0, 2, 1, 3), shapes)
    for letter, operand, scale, zero_point in (
        ("q", q, scores.left_scale, scores.left_zero),
        ("k", k, scores.right_scale, scores.right_zero),
        ("v", v, context.right_scale, context.right_zero),
    ):
        if not operand.found.agrees(scale, zero_point):
            raise RefusalError(f"its product does not take the codes of {letter} as they are made")
    result = context.output if divided is None else _restored(context.output, divided)
    output, targets = _joined_heads(result, shapes)
    return AttentionPattern(scores, context, shape[1], q, k, v, p, added, divided is not None, result, output, targets)


def _restored(context: ir.Value, divided: ir.Value) -> ir.Value:
    """The context multiplied by what its rows of probabilities were divided by."""
    divide, restore = divided.producer(), only_consumer(context)
    if divide is None or not is_op(restore, "Mul") or restore is None or divide.inputs[1] not in restore.inputs:
        raise RefusalError(f"{context.name} is not multiplied by what {divided.name} was divided by")
    return restore.outputs[0]


def _score_path(scores: IntegerProduct, shapes: Batches) -> tuple[tuple[NDArray[np.float32], ...], ir.Node]:
    """What is added to the scores, in order, and the Softmax that reads them."""
    added: list[NDArray[np.float32]] = []
    value = scores.output
    while True:
        node = only_consumer(value)
        if node is None:
            raise RefusalError(f"{value.name}, on the way to its softmax, has another reader")
        if is_op(node, "Softmax"):
            break
        if is_op(node, "Add"):
            other = constant_of(node.inputs[1] if node.inputs[0] is value else node.inputs[0])
            if other is None or shapes.of(node.outputs[0]) != shapes.of(value):
                raise RefusalError(f"Add {node.name} adds something to its scores that is computed")
            added.append(_window_bias(other, shapes.of(value), scores.output, shapes))
        elif not is_op(node, *_RESHAPES):
            raise RefusalError(f"{node.op_type} {node.name} lies between its scores and their softmax")
        value = node.outputs[0]
    if node.attributes.get_int("axis", -1) != -1:
        raise RefusalError(f"{node.name} is not over the last axis")
    return _joined_additions(added), node


def _joined_additions(added: list[NDArray[np.float32]]) -> tuple[NDArray[np.float32], ...]:
    """As many as the operator takes: those of one shape are added up.

    Raises:
        RefusalError: there are more.
    """
    joined: list[NDArray[np.float32]] = []
    for each in added:
        alike = [i for i, other in enumerate(joined) if other.shape == each.shape]
        if len(added) > _MOST_ADDITIONS and alike:
            joined[alike[0]] = joined[alike[0]] + each
        else:
            joined.append(each)
    if len(joined) > _MOST_ADDITIONS:
        raise RefusalError(f"{len(joined)} constants of several shapes are added to its scores, not {_MOST_ADDITIONS}")
    return tuple(joined)


def _window_bias(
    constant: NDArray[np.generic], shape: tuple[int, ...], scores: ir.Value, shapes: Batches
) -> NDArray[np.float32]:
    """What is added to scores [B, H, T, S] while they have `shape`, as [W, 1 or H, 1 or T, S] with W dividing B."""
    whole = np.broadcast_to(constant.astype(np.float32, copy=False), shape).reshape(shapes.of(scores))
    for windows in divisors(shapes.one[str(scores.name)][0]):
        if np.array_equal(whole.reshape(-1, windows, *whole.shape[1:]), _repeated(whole[:windows], whole)):
            break
    else:
        raise RefusalError(f"what is added to {scores.name} differs from image to image")
    kept = whole[:windows]
    for axis in (1, 2):
        first = kept.take([0], axis)
        if np.array_equal(np.broadcast_to(first, kept.shape), kept):
            kept = first
    return np.ascontiguousarray(kept)


def _repeated(part: NDArray[np.float32], whole: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.broadcast_to(part, (len(whole) // len(part), *part.shape))


def _operand(letter: str, value: ir.Value, to_rows: tuple[int, ...], shapes: Batches) -> Operand:
    """The quantizer of an operand [B, H, T, d] or [B, H, d, T], `to_rows` of which is [B, T, H, d]."""
    moved = trace(value, shapes.two)
    found = match_quantizer(moved.source)
    if found is None:
        raise RefusalError(f"{letter} is moved in a way that cannot be followed to its quantizer")
    index = moved.index.transpose(to_rows) if moved.index.ndim == 4 else np.zeros((0, 0, 0, 0), np.int64)
    straight = np.arange(int(np.prod(shapes.of(moved.source))))
    for order in _CODE_ORDERS:
        if np.array_equal(index.transpose(order).reshape(-1), straight):
            break
    else:
        raise RefusalError(f"the heads of {letter} lie in {moved.source.name} in a way that cannot be followed")
    if found.signed and found.quantizer.m:
        raise RefusalError(f"{letter} has a quantizer of several regions in an int8 container")
    return Operand(found, order)


def _joined_heads(context: ir.Value, shapes: Batches) -> tuple[FoundQuantizer | None, tuple[ir.Value, ...]]:
    """The quantizer that alone reads the context, if there is one, and where its heads have come side by side."""
    quantizers = quantizers_of(context)
    one = quantizers[0] if quantizers is not None and len(quantizers) == 1 else None
    output = None if one is None or one.signed else one
    read = readers(context if output is None else output.codes, shapes.two)
    batch, heads, tokens, size = shapes.of(context)
    straight = np.arange(batch * heads * tokens * size).reshape(batch, heads, tokens, size).transpose(0, 2, 1, 3)
    for reader in read:
        if reader.node is None or not np.array_equal(reader.trace.index.reshape(-1), straight.reshape(-1)):
            raise RefusalError(f"its heads are not side by side where {_named(reader)} reads them")
        shapes.target(reader.value)
    return output, tuple(dict.fromkeys(reader.value for reader in read))


def _named(reader: Reader) -> str:
    return "the model's output" if reader.node is None else f"{reader.node.op_type} {reader.node.name}"
