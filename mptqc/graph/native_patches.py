"""What `QuantizePatches` of `ai.mptqc` replaces in a quantized model; finding never edits.

Movement is never matched op by op: indices are pushed through it (`mptqc.graph.layout`). Linears, attentions and norms
are in `native_linear`, `native_attention` and `native_norms`: there a candidate that the operator cannot express raises
`RefusalError`, which says what was found where, and keeps its portable form.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mptqc.graph.batch_shapes import Batches, divisors
from mptqc.graph.integer_products import IntegerProduct
from mptqc.graph.layout import readers, trace
from mptqc.graph.quantizer_match import FoundQuantizer, match_quantizer
from mptqc.reference.custom_ops import patches


@dataclass(frozen=True)
class PatchesPattern:
    """Images quantized and cut into disjoint patches, `target` [B, .., C·P·Q]."""

    site: str
    quantizer: FoundQuantizer
    patch: tuple[int, int]
    target: ir.Value


def match_patches(product: IntegerProduct, shapes: Batches) -> PatchesPattern | None:
    """The patches that a Linear reads, or None if it reads something else.

    Patches of one row are no patches: heads are joined so too, which ONNX Runtime's Transpose does faster.

    Raises:
        RefusalError: their shape depends on the batch in more than one dimension.
    """
    moved = trace(product.left, shapes.two)
    quantizer = match_quantizer(moved.source)
    if quantizer is None or quantizer.signed or moved.source is product.left:
        return None
    shape = shapes.of(quantizer.x)
    if len(shape) != 4 or {reader.value for reader in readers(moved.source, shapes.two)} != {product.left}:
        return None
    _, channels, height, width = shape
    size = moved.index.shape[-1]
    positions = np.arange(moved.index.size).reshape(shape) if moved.index.size == np.prod(shape) else None
    for columns in divisors(width):
        rows = size // (channels * columns)
        if positions is None or rows * channels * columns != size or rows < 2 or height % rows:
            continue
        if np.array_equal(patches(positions, rows, columns).reshape(-1), moved.index.reshape(-1)):
            shapes.target(product.left)
            return PatchesPattern(product.site, quantizer, (rows, columns), product.left)
    return None
