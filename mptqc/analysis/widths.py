"""Quantizers at every width that a variable may get, kept as arrays of the plan; and the plan at any choice of bits.

<variable>/quantizers    float32 [widths, 5]: bits, scale, zero point, m, low codes; m = 0 is uniform
<site>/weight_scale/<k>  float32 [N]
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mptqc.analysis.bit_variables import OPERANDS, TENSOR, BitVariable, Kind
from mptqc.errors import PlanError
from mptqc.plan import ActivationQuantizer, AttentionPlan, LayerPlan, QuantPlan, TwoRegion, Uniform

Arrays = Mapping[str, NDArray[np.generic]]
QuantizersByBits = Mapping[int, ActivationQuantizer]

COMPENSATED = ("weight_codes", "bias")
"""Arrays of a site that hold for one choice of bits only."""


def quantizer_array(quantizers: QuantizersByBits) -> NDArray[np.float32]:
    """The quantizers of one variable as rows, see above."""
    rows = [
        (one.bits, one.scale, one.zero_point, one.m, one.low_codes)
        if isinstance(one, TwoRegion)
        else (one.bits, one.scale, one.zero_point, 0, 0)
        for one in quantizers.values()
    ]
    return np.array(rows, np.float32)


def quantizers_of(array: NDArray[np.float32]) -> dict[int, ActivationQuantizer]:
    """What `quantizer_array` was made of."""
    found: dict[int, ActivationQuantizer] = {}
    for row in array:
        bits, zero_point, m, low_codes = (int(row[column]) for column in (0, 2, 3, 4))
        scale = float(row[1])
        if m:
            found[bits] = TwoRegion(bits=bits, scale=scale, zero_point=zero_point, m=m, low_codes=low_codes)
        else:
            found[bits] = Uniform(bits=bits, scale=scale, zero_point=zero_point)
    return found


def at_bits(plan: QuantPlan, variables: Sequence[BitVariable], bits: Mapping[str, int]) -> QuantPlan:
    """The plan with these bits, its weights rounded at the scales found for them.

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
            layers.append(LayerPlan(site=site, weight_bits=weight_bits, input=quantizers[f"{site}/input"]))
            arrays[f"{site}/weight_scale"] = plan.array(f"{site}/weight_scale/{weight_bits}")
            for what in COMPENSATED:
                arrays.pop(f"{site}/{what}", None)
        elif variable.name.endswith(f"/{OPERANDS[0]}"):
            q, k, p, v = (quantizers[f"{site}/{operand}"] for operand in OPERANDS)
            attentions.append(AttentionPlan(site=site, q=q, k=k, p=p, v=v))
        elif variable.name.endswith(f"/{TENSOR}"):
            chosen.append(tensors[site].model_copy(update={"quantizer": quantizers[variable.name]}))
    parts = {"layers": tuple(layers), "attentions": tuple(attentions), "tensors": tuple(chosen)}
    return plan.model_copy(update={**parts, "arrays": arrays})


def _quantizer(plan: QuantPlan, name: str, bits: int) -> ActivationQuantizer:
    found = quantizers_of(plan.array(f"{name}/quantizers"))
    if bits not in found:
        raise PlanError(f"the plan has no quantizer of {bits} bits for {name}; it has {', '.join(map(str, found))}")
    return found[bits]


def without(plan: QuantPlan, keys: Collection[str]) -> QuantPlan:
    """The plan without some of its arrays."""
    return plan.model_copy(update={"arrays": {key: array for key, array in plan.arrays.items() if key not in keys}})


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
