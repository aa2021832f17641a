"""What bits are given to: the weight of each Linear, each activation that a product reads, each tensor; their cost.

A Linear's weight is `<site>/weight`; the input that Linears share is `<first site>/input`; an attention has
`<site>/q`, `/k`, `/p` and `/v`; with full coverage each of its tensors is `<site>/tensor`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import onnx_ir as ir

from mptqc.graph.match import Attention, Linear, find_attentions, find_linears
from mptqc.graph.tensors import find_tensors
from mptqc.recipe import Coverage, Recipe

OPERANDS = ("q", "k", "p", "v")
WEIGHT, INPUT, TENSOR = "weight", "input", "tensor"

RIGHT_OPERANDS = (WEIGHT, "k", "v")
"""Of the products, of int8 codes: `Recipe.reduce_range` gives them REDUCED_BITS at most."""

REDUCED_BITS = 7
"""255 · 64 · 2 = 32640: two products of a uint8 code and one of 7 bits fit 16 bits together."""

Shapes = Mapping[str, tuple[int, ...]]
Bits = tuple[int, ...]
"""Bits of every variable, in the order of the variables."""


class Kind(StrEnum):
    """What a variable's bits are averaged with."""

    WEIGHT = "weight"
    ACTIVATION = "activation"


@dataclass(frozen=True)
class BitVariable:
    """One choice of bits.

    Attributes:
        name: as in `QuantPlan.elements`.
        kind: weight or activation.
        sites: the Linears, the attention or the tensor that it belongs to.
        elements: weights, or elements of the activation per image.
        widths: bits that it may get, fewest first.
    """

    name: str
    kind: Kind
    sites: tuple[str, ...]
    elements: int
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Product:
    """A matrix product of two variables, by their names: `multiplications` an image."""

    left: str
    right: str
    multiplications: int


def find_variables(model: ir.Model, shapes: Shapes, recipe: Recipe) -> list[BitVariable]:
    """Every choice of bits in the model, in graph order; one width each unless the recipe's budget asks for a search.

    Args:
        model: the smoothed float model.
        shapes: its concrete shapes at batch 1.
        recipe: its bits, limits and overrides.
    """
    found = []
    groups = input_groups(model, recipe)
    for linear in find_linears(model):
        widths = _widths(recipe, linear.site, WEIGHT)
        found.append(BitVariable(f"{linear.site}/weight", Kind.WEIGHT, (linear.site,), int(linear.weight.size), widths))
        if (group := groups.get(linear.site)) is not None:
            sites = tuple(member.site for member in group)
            elements = int(np.prod(shapes[str(linear.input.name)]))
            widths = _widths(recipe, linear.site, INPUT)
            found.append(BitVariable(f"{linear.site}/input", Kind.ACTIVATION, sites, elements, widths))
    for attention in find_attentions(model):
        for operand, value in zip(OPERANDS, operands_of(attention), strict=True):
            elements = int(np.prod(shapes[str(value.name)]))
            name, widths = f"{attention.site}/{operand}", _widths(recipe, attention.site, operand)
            found.append(BitVariable(name, Kind.ACTIVATION, (attention.site,), elements, widths))
    for tensor in find_tensors(model).found if recipe.coverage is Coverage.FULL else ():
        widths = _widths(recipe, tensor.site, tensor.kind)
        elements = int(np.prod(shapes[str(tensor.value.name)]))
        found.append(BitVariable(f"{tensor.site}/{TENSOR}", Kind.ACTIVATION, (tensor.site,), elements, widths))
    return found


def input_groups(model: ir.Model, recipe: Recipe) -> dict[str, list[Linear]]:
    """The Linears that read one value with the same choice of bits, by the site of the first."""
    groups: dict[tuple[str, tuple[int, ...]], list[Linear]] = {}
    for linear in find_linears(model):
        key = str(linear.input.name), _widths(recipe, linear.site, INPUT)
        groups.setdefault(key, []).append(linear)
    return {group[0].site: group for group in groups.values()}


def operands_of(attention: Attention) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    """q, k, p, v."""
    return attention.q, attention.k, attention.p, attention.v


def find_products(model: ir.Model, shapes: Shapes, variables: list[BitVariable]) -> list[Product]:
    """Every product of two variables."""
    inputs = {
        site: variable.name for variable in variables if variable.name.endswith("/input") for site in variable.sites
    }
    products = []
    for linear in find_linears(model):
        outputs = linear.weight.shape[1]
        multiplications = int(np.prod(shapes[str(linear.input.name)])) * outputs
        products.append(Product(inputs[linear.site], f"{linear.site}/weight", multiplications))
    for attention in find_attentions(model):
        site = attention.site
        q, _, p, v = (shapes[str(value.name)] for value in operands_of(attention))
        products.append(Product(f"{site}/q", f"{site}/k", int(np.prod(q)) * p[-1]))
        products.append(Product(f"{site}/p", f"{site}/v", int(np.prod(p)) * v[-1]))
    return products


def _widths(recipe: Recipe, site: str, what: str) -> tuple[int, ...]:
    """Of a weight, or of an activation of some kind (`recipe.ACTIVATION_KINDS`)."""
    widths = _wanted_widths(recipe, site, what)
    if recipe.reduce_range and what in RIGHT_OPERANDS:
        return tuple(sorted({min(width, REDUCED_BITS) for width in widths}))
    return widths


def _wanted_widths(recipe: Recipe, site: str, what: str) -> tuple[int, ...]:
    """The same, before `reduce_range`."""
    kind = Kind.WEIGHT if what == WEIGHT else Kind.ACTIVATION
    fixed = recipe.fixed_bits_of(site)
    pinned = fixed.weight_bits if kind is Kind.WEIGHT else fixed.activation_bits
    if pinned is not None:
        return (pinned,)
    if recipe.budget is None or not is_limited(recipe, kind):
        weight_bits, activation_bits = recipe.bits_of(site)
        return (weight_bits if kind is Kind.WEIGHT else activation_bits,)
    limits = recipe.bit_limits
    least, most = limits.weight if kind is Kind.WEIGHT else limits.of_activation(what)
    return tuple(range(least, most + 1))


def is_limited(recipe: Recipe, kind: Kind) -> bool:
    """True if the budget limits what bits of this kind cost."""
    budget = recipe.budget
    if budget is None:
        return False
    if budget.max_bops is not None:
        return True
    if kind is Kind.WEIGHT:
        return any(limit is not None for limit in (budget.weight_average, budget.max_bytes, budget.max_accuracy_drop))
    return budget.activation_average is not None
