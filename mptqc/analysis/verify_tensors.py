"""Are the quantized tensors of a compiled model what the plan says? Codes and floats are compared exactly."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.analysis.site_check import SiteCheck, Values
from mptqc.errors import VerifyError
from mptqc.graph.quantized_tensors import QuantizedTensor, find_quantized_tensors
from mptqc.plan import QuantPlan, TensorPlan
from mptqc.reference.quantizers import quantize

GROUP_TENSORS = 16


def check_tensors(model: ir.Model, plan: QuantPlan, run: Callable[[Sequence[str]], Values]) -> list[SiteCheck]:
    """Compare each tensor with the reference; `run` gives values of the model by name.

    Raises:
        VerifyError: a tensor's scales are not those of the plan.
    """
    planned = {each.site: each for each in plan.tensors}
    pairs = [(tensor, planned[tensor.site]) for tensor in find_quantized_tensors(model)]
    for tensor, each in pairs:
        if not np.array_equal(tensor.scale.reshape(-1), _scale(each, plan)):
            raise VerifyError(f"{tensor.site}: the scales in the model are not those of the plan; compile again")
    checks: list[SiteCheck] = []
    for start in range(0, len(pairs), GROUP_TENSORS):
        group = pairs[start : start + GROUP_TENSORS]
        seen = run([str(value.name) for tensor, _ in group for value in _values(tensor)])
        checks += [_check(tensor, each, plan, seen) for tensor, each in group]
    return checks


def _values(tensor: QuantizedTensor) -> list[ir.Value]:
    values = [tensor.codes, tensor.result]
    return values if tensor.x is None else [tensor.x, *values]


def _check(tensor: QuantizedTensor, planned: TensorPlan, plan: QuantPlan, seen: Values) -> SiteCheck:
    codes = seen[str(tensor.codes.name)].astype(np.int32) - tensor.zero_point
    wrong = seen[str(tensor.result.name)] != codes.astype(np.float32) * tensor.scale
    if tensor.x is not None:  # else made by an operator of ai.mptqc, which is checked by itself
        x = seen[str(tensor.x.name)].astype(np.float32, copy=False) / _factor(planned, plan)
        wrong |= codes != quantize(planned.quantizer, x) - planned.quantizer.zero_point
    return SiteCheck(tensor.site, str(tensor.codes.name), int(wrong.sum()), codes.size, 0.0, fused=True)


def _factor(planned: TensorPlan, plan: QuantPlan) -> NDArray[np.float32]:
    """2^e, [C] or []."""
    if not planned.exponents:
        return np.array(1, np.float32)
    factor: NDArray[np.float32] = np.exp2(plan.array(f"{planned.site}/exponents"))
    return factor


def _scale(planned: TensorPlan, plan: QuantPlan) -> NDArray[np.float32]:
    """Δ·2^e, [C] or [1]."""
    scale: NDArray[np.float32] = np.float32(planned.quantizer.scale) * _factor(planned, plan).reshape(-1)
    return scale
