"""Quantizers at every width that a variable may get, kept as arrays of the plan; and the plan at any choice of bits.

<variable>/quantizers    float32 [widths, 10]: bits, scale, zero point, low codes, then m and codes of three upper
                         regions; 0 where there is none
<site>/weight_scale/<k>  float32 [N]
<site>/weight_codes/<k>  int8 [K, N], during a search: of weights by a trellis, and where weights are scored as GPTQ
                         rounds them
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mptqc.analysis.bit_variables import OPERANDS, TENSOR, BitVariable, Kind
from mptqc.errors import PlanError
from mptqc.plan import (
    UPPER_REGIONS,
    ActivationQuantizer,
    AttentionPlan,
    LayerPlan,
    MultiRegion,
    QuantPlan,
    Region,
    Uniform,
)
from mptqc.recipe import Recipe
from mptqc.reference.trellis import TAPS

Arrays = Mapping[str, NDArray[np.generic]]
QuantizersByBits = Mapping[int, ActivationQuantizer]

COMPENSATED = ("weight_codes", "bias")
"""Arrays of a site that hold for one choice of bits only."""


def quantizer_array(quantizers: QuantizersByBits) -> NDArray[np.float32]:
    """The quantizers of one variable as rows, see above."""
    rows = np.zeros((len(quantizers), 4 + 2 * UPPER_REGIONS), np.float32)
    for row, one in zip(rows, quantizers.values(), strict=True):
        row[:3] = one.bits, one.scale, one.zero_point
        if isinstance(one, MultiRegion):
            row[3] = one.low_codes
            row[4 : 4 + 2 * len(one.upper)] = np.array(one.upper).reshape(-1)
    return rows


def quantizers_of(array: NDArray[np.float32]) -> dict[int, ActivationQuantizer]:
    """What `quantizer_array` was made of."""
    found: dict[int, ActivationQuantizer] = {}
    for row in array:
        bits, zero_point, low_codes = (int(row[column]) for column in (0, 2, 3))
        scale = float(row[1])
        upper = tuple(Region(int(m), int(codes)) for m, codes in row[4:].reshape(-1, 2) if m)
        if upper:
            found[bits] = MultiRegion(bits=bits, scale=scale, zero_point=zero_point, low_codes=low_codes, upper=upper)
        else:
            found[bits] = Uniform(bits=bits, scale=scale, zero_point=zero_point)
    return found


def at_bits(plan: QuantPlan, variables: Sequence[BitVariable], bits: Mapping[str, int]) -> QuantPlan:
    """The plan with these bits, its weights rounded at the scales found for them, or to the codes where it has them.

    Args:
        plan: holds the arrays named above, and a tensor of any width for each variable that is one.
        variables: every choice of bits of the model.
        bits: of every variable, by name.

    Raises:
        PlanError: the plan holds no quantizer or scale of such bits.
    """
    quantizers: dict[str, ActivationQuantizer] = {}
    for variable in variables:
        if variable.kind is Kind.ACTIVATION:
            one = _quantizer(plan, variable.name, bits[variable.name])
            if variable.name.endswith("/input"):
                quantizers |= {f"{site}/input": one for site in variable.sites}
            else:
                quantizers[variable.name] = one
    layers, attentions, arrays = [], [], {**plan.arrays}
    tensors = {tensor.site: tensor for tensor in plan.tensors}
    chosen = []
    for variable in variables:
        site = variable.sites[0]
        if variable.kind is Kind.WEIGHT:
            weight_bits = bits[variable.name]
            layers.append(
                LayerPlan(
                    site=site,
                    weight_bits=weight_bits,
                    input=quantizers[f"{site}/input"],
                    trellis=is_by_trellis(plan.recipe, weight_bits),
                )
            )
            arrays[f"{site}/weight_scale"] = plan.array(f"{site}/weight_scale/{weight_bits}")
            for what in COMPENSATED:
                arrays.pop(f"{site}/{what}", None)
            if (codes := plan.arrays.get(f"{site}/weight_codes/{weight_bits}")) is not None:
                arrays[f"{site}/weight_codes"] = codes
        elif variable.name.endswith(f"/{OPERANDS[0]}"):
            q, k, p, v = (quantizers[f"{site}/{operand}"] for operand in OPERANDS)
            attentions.append(AttentionPlan(site=site, q=q, k=k, p=p, v=v))
        elif variable.name.endswith(f"/{TENSOR}"):
            chosen.append(tensors[site].model_copy(update={"quantizer": quantizers[variable.name]}))
    parts = {"layers": tuple(layers), "attentions": tuple(attentions), "tensors": tuple(chosen)}
    return plan.model_copy(update={**parts, "arrays": arrays})


def is_by_trellis(recipe: Recipe, weight_bits: int) -> bool:
    """Whether weights of so many bits are coded by a trellis."""
    return recipe.trellis and weight_bits in TAPS


def _quantizer(plan: QuantPlan, name: str, bits: int) -> ActivationQuantizer:
    found = quantizers_of(plan.array(f"{name}/quantizers"))
    if bits not in found:
        raise PlanError(f"the plan has no quantizer of {bits} bits for {name}; it has {', '.join(map(str, found))}")
    return found[bits]


def without(plan: QuantPlan, keys: Collection[str]) -> QuantPlan:
    """The plan without some of its arrays."""
    return plan.model_copy(update={"arrays": {key: array for key, array in plan.arrays.items() if key not in keys}})


def without_trials(plan: QuantPlan) -> QuantPlan:
    """The plan without the weight codes of every width, which only a search needs."""
    return without(plan, [key for key in plan.arrays if "/weight_codes/" in key])


def bits_of(plan: QuantPlan, variables: Sequence[BitVariable]) -> dict[str, int]:
    """The bits that the plan gives to each variable."""
    layers = {layer.site: layer for layer in plan.layers}
    attentions = {attention.site: attention for attention in plan.attentions}
    tensors = {tensor.site: tensor for tensor in plan.tensors}
    found = {}
    for variable in variables:
        site, what = variable.sites[0], variable.name.rpartition("/")[2]
        if variable.kind is Kind.WEIGHT:
            found[variable.name] = layers[site].weight_bits
        elif what == "input":
            found[variable.name] = layers[site].input.bits
        elif what == TENSOR:
            found[variable.name] = tensors[site].quantizer.bits
        else:
            operand: ActivationQuantizer = getattr(attentions[site], what)
            found[variable.name] = operand.bits
    return found
