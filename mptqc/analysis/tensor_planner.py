"""From observations to the quantizers of the tensors that full coverage adds (METHOD, Full coverage)."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.analysis.observe import Observations, Progress
from mptqc.analysis.tensor_ranges import (
    NormReader,
    Scaled,
    search_gelu_input,
    search_norm_input,
    search_rows,
    search_scores,
)
from mptqc.graph.edit import is_op
from mptqc.graph.match import find_linears, find_norms
from mptqc.graph.tensors import Tensor, readers_of
from mptqc.plan import QuantPlan, TensorKind, TensorPlan
from mptqc.recipe import Recipe

Array = NDArray[np.float32]


def plan_tensors(
    model: ir.Model, tensors: Sequence[Tensor], seen: Observations, plan: QuantPlan, report: Progress
) -> QuantPlan:
    """Add a quantizer for each tensor to the plan.

    Args:
        model: the smoothed float model.
        tensors: found in it.
        seen: rows of every tensor but the scores; slices, with scores, of every attention whose scores are one.
        plan: its recipe says how.
        report: called with (step, done, total).
    """
    search = _Search(model, seen, plan.recipe)
    planned = []
    arrays: dict[str, NDArray[np.generic]] = {}
    for done, tensor in enumerate(tensors):
        report("search tensors", done, len(tensors))
        found = search.quantizer(tensor)
        if found.exponents is not None:
            arrays[f"{tensor.site}/exponents"] = found.exponents
        planned.append(
            TensorPlan(
                site=tensor.site,
                kind=tensor.kind,
                quantizer=found.quantizer,
                exponents=found.exponents is not None,
            )
        )
    return plan.model_copy(update={"tensors": tuple(planned)}).with_arrays(arrays)


class _Search:
    """The search that fits a tensor's kind, with what its readers are."""

    def __init__(self, model: ir.Model, seen: Observations, recipe: Recipe) -> None:
        self._seen = seen
        self._recipe = recipe
        self._norms = {norm.node: norm for norm in find_norms(model)}
        self._linears = {linear.matmul: linear for linear in find_linears(model)}

    def quantizer(self, tensor: Tensor) -> Scaled:
        """Search by the tensor's kind."""
        bits, method, seed = self._recipe.bits_of(tensor.site)[1], self._recipe.range_method, self._recipe.seed
        if tensor.kind is TensorKind.SCORES:
            site = tensor.site.removesuffix(".scores")
            return Scaled(search_scores(self._seen.slices[site], bits, method, seed=seed))
        rows = self._seen.rows[str(tensor.value.name)]
        channels = rows.rows.shape[1]
        if tensor.kind is TensorKind.NORM_INPUT:
            norms = [self._norms[node] for node in readers_of(tensor.value) if node in self._norms]
            readers = [
                NormReader(norm.gamma, self._read_by(norm.output, channels))
                for norm in norms
                if len(norm.gamma) == channels
            ]
            if readers:
                exponents = self._recipe.stream_exponents
                return search_norm_input(rows, readers, bits, method, exponents=exponents, seed=seed)
        if tensor.kind is TensorKind.GELU_INPUT:
            gelus = [node for node in readers_of(tensor.value) if is_op(node, "Gelu")]
            weights = [weight for node in gelus for weight in self._read_by(node.outputs[0], channels)]
            return Scaled(search_gelu_input(rows, weights, bits, method, seed=seed))
        return Scaled(search_rows(rows, bits, method, seed=seed))

    def _read_by(self, value: ir.Value, channels: int) -> list[Array]:
        """W [channels, N] of the Linears that read `value`; none of those that read it cut into other channels."""
        weights = [self._linears[node].weight for node in readers_of(value) if node in self._linears]
        return [weight for weight in weights if len(weight) == channels]
