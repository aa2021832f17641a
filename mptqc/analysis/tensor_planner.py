"""From observations to the quantizers of the tensors that full coverage adds (METHOD, Full coverage)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.analysis.bit_variables import TENSOR
from mptqc.analysis.observe import Observations, Progress
from mptqc.analysis.tensor_ranges import (
    NormInputSearch,
    NormReader,
    search_gelu_input,
    search_rows,
    search_scores,
)
from mptqc.analysis.widths import quantizer_array
from mptqc.graph.edit import is_op
from mptqc.graph.match import find_linears, find_norms
from mptqc.graph.tensors import Tensor, readers_of
from mptqc.plan import ActivationQuantizer, TensorPlan
from mptqc.recipe import Recipe, TensorKind

Array = NDArray[np.float32]


@dataclass(frozen=True)
class PlannedTensors:
    """What was found: tensors with the quantizer of their most bits; arrays of every width; exponents [C] int8."""

    tensors: tuple[TensorPlan, ...]
    quantizers: Mapping[str, NDArray[np.generic]]
    exponents: Mapping[str, NDArray[np.generic]]


def plan_tensors(
    model: ir.Model,
    tensors: Sequence[Tensor],
    seen: Observations,
    widths: Mapping[str, Sequence[int]],
    recipe: Recipe,
    report: Progress,
) -> PlannedTensors:
    """Search quantizers of every width for each tensor.

    Args:
        model: the smoothed float model.
        tensors: found in it.
        seen: rows of every tensor but the scores; slices, with scores, of every attention whose scores are one.
        widths: of each tensor's variable, fewest bits first.
        recipe: says how.
        report: called with (step, done, total).
    """
    search = _Search(model, seen, recipe)
    planned = []
    quantizers: dict[str, NDArray[np.generic]] = {}
    exponents: dict[str, NDArray[np.generic]] = {}
    for done, tensor in enumerate(tensors):
        report("search tensors", done, len(tensors))
        name = f"{tensor.site}/{TENSOR}"
        found = search.quantizers(tensor, widths[name])
        quantizers[f"{name}/quantizers"] = quantizer_array(found.by_bits)
        if found.exponents is not None:
            exponents[f"{tensor.site}/exponents"] = found.exponents
        most = found.by_bits[widths[name][-1]]
        with_exponents = found.exponents is not None
        planned.append(TensorPlan(site=tensor.site, kind=tensor.kind, quantizer=most, exponents=with_exponents))
    return PlannedTensors(tuple(planned), quantizers, exponents)


@dataclass(frozen=True)
class _Found:
    """The quantizers of one tensor, and the exponents that all of them have."""

    by_bits: Mapping[int, ActivationQuantizer]
    exponents: NDArray[np.int8] | None = None


class _Search:
    """The search that fits a tensor's kind, with what its readers are."""

    def __init__(self, model: ir.Model, seen: Observations, recipe: Recipe) -> None:
        self._seen = seen
        self._recipe = recipe
        self._norms = {norm.node: norm for norm in find_norms(model)}
        self._linears = {linear.matmul: linear for linear in find_linears(model)}

    def quantizers(self, tensor: Tensor, widths: Sequence[int]) -> _Found:
        """Search by the tensor's kind; exponents are chosen at the width in the middle."""
        method, seed = self._recipe.range_method, self._recipe.seed
        if tensor.kind is TensorKind.SCORES:
            slices = self._seen.slices[tensor.site.removesuffix(".scores")]
            return _Found({bits: search_scores(slices, bits, method, seed=seed) for bits in widths})
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
                search = NormInputSearch(rows, readers, method, seed)
                chosen = search.best_exponents(widths[len(widths) // 2]) if self._recipe.stream_exponents else None
                return _Found({bits: search.quantizer(bits, chosen) for bits in widths}, chosen)
        if tensor.kind is TensorKind.GELU_INPUT:
            gelus = [node for node in readers_of(tensor.value) if is_op(node, "Gelu")]
            weights = [weight for node in gelus for weight in self._read_by(node.outputs[0], channels)]
            return _Found({bits: search_gelu_input(rows, weights, bits, method, seed=seed) for bits in widths})
        return _Found({bits: search_rows(rows, bits, method, seed=seed) for bits in widths})

    def _read_by(self, value: ir.Value, channels: int) -> list[Array]:
        """W [channels, N] of the Linears that read `value`; none of those that read it cut into other channels."""
        weights = [self._linears[node].weight for node in readers_of(value) if node in self._linears]
        return [weight for weight in weights if len(weight) == channels]
