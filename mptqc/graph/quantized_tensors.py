"""The quantized tensors of a compiled model, read back from the nodes that `QuantizeTensors` writes.

(Mul(2^−e)) -> quantizer -> DequantizeLinear, which bears the site (-> Mul(Δ·2^e))
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.errors import VerifyError
from mptqc.graph.edit import constant_of, is_op, only_consumer, producer
from mptqc.graph.integer_products import find_sources
from mptqc.graph.match import site_of


@dataclass(frozen=True)
class QuantizedTensor:
    """`codes` stand for `result` = (codes − zero_point)·scale.

    Attributes:
        site: site id.
        x: the tensor, before any division by 2^e; None if an operator of `ai.mptqc` makes the codes.
        codes: uint8.
        zero_point: of the codes.
        result: float32, what the readers of the tensor read.
        scale: Δ, or Δ·2^e [C].
    """

    site: str
    x: ir.Value | None
    codes: ir.Value
    zero_point: int
    result: ir.Value
    scale: NDArray[np.float32]


def find_quantized_tensors(model: ir.Model) -> list[QuantizedTensor]:
    """Every quantized tensor, in graph order.

    Raises:
        VerifyError: one is not in the form that mptqc writes.
    """
    return [_read(node) for node in model.graph if site_of(node) and is_op(node, "DequantizeLinear")]


def _read(node: ir.Node) -> QuantizedTensor:
    site = site_of(node)
    codes, unit, zero = node.inputs[:3]
    result, scale, zero_point = node.outputs[0], constant_of(unit), constant_of(zero)
    after = only_consumer(result)
    if scale is not None and scale.size == 1 and scale == 1 and is_op(after, "Mul") and after is not None:
        result, scale = after.outputs[0], constant_of(after.inputs[1])
    if codes is None or scale is None or zero_point is None or zero_point.size != 1:
        raise VerifyError(f"{site}: {node.name} has no constant scale and zero point; the file was edited")
    (source,) = find_sources(codes)
    divided = producer(source.x, "Mul") if scale.size > 1 else None
    x = source.x if divided is None else divided.inputs[0]
    return QuantizedTensor(site, x, codes, int(zero_point.reshape(-1)[0]), result, scale.astype(np.float32, copy=False))
