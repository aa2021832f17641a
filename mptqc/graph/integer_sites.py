"""Every Linear and attention that runs in integers, whichever operators it was written with."""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from mptqc.errors import VerifyError
from mptqc.graph.edit import is_op, scalar_of
from mptqc.graph.integer_products import IntegerProduct, find_integer_products, find_sources, stored_weight
from mptqc.graph.layout import MOVEMENT_OPS
from mptqc.graph.match import site_of
from mptqc.graph.native_nodes import ATTENTION_OPS, LINEAR_OPS, is_native, native_nodes, native_weight
from mptqc.graph.stored_weight import StoredWeight

PRODUCTS_OF_AN_ATTENTION = 2
RESIDUAL = 3
"""Input of a LayerNormAddQuantize."""
_LETTERS = (("q", "k"), ("p", "v"))


@dataclass(frozen=True)
class IntegerSite:
    """A Linear or an attention.

    Attributes:
        site: site id.
        products: 1 for a Linear, 2 for a whole attention.
        scales: Δ of each operand: "input" of a Linear; "q", "k", "p" and "v" of an attention.
        weight: of a Linear; None for an attention.
        norm: site of the norm whose output a Linear quantizes, or an empty string.
    """

    site: str
    products: int
    scales: Mapping[str, float]
    weight: StoredWeight | None = None
    norm: str = ""


def find_integer_sites(model: ir.Model) -> list[IntegerSite]:
    """Every site with an integer product, in graph order.

    Raises:
        VerifyError: a product, its weight or its scales are not in a form that mptqc writes.
    """
    products: dict[str, list[IntegerProduct]] = {}
    for product in find_integer_products(model):
        products.setdefault(product.site, []).append(product)
    native = {site_of(node): node for node in native_nodes(model) if is_native(node, *LINEAR_OPS, *ATTENTION_OPS)}
    order = dict.fromkeys(site_of(node) for node in model.graph)
    return [
        _native_site(native[site]) if site in native else _written_site(products[site])
        for site in order
        if site in native or site in products
    ]


def _written_site(products: list[IntegerProduct]) -> IntegerSite:
    first = products[0]
    if first.is_linear:
        norm = _norm_above(first.left)
        scales = {"input": _scale(first.left_scale, first.site)}
        return IntegerSite(first.site, len(products), scales, stored_weight(first), norm)
    scales = {}
    for letters, product in zip(_LETTERS, products, strict=False):
        values = (product.left_scale, product.right_scale)
        scales |= {letter: _scale(value, first.site) for letter, value in zip(letters, values, strict=True)}
    return IntegerSite(first.site, len(products), scales)


def _native_site(node: ir.Node) -> IntegerSite:
    site, attributes = site_of(node), node.attributes
    if not is_native(node, *LINEAR_OPS):
        scales = {letter: attributes[f"{letter}_scale"].as_float() for letter in "qkpv"}
        return IntegerSite(site, PRODUCTS_OF_AN_ATTENTION, scales)
    codes = node.inputs[0]
    assert codes is not None, "a Linear has an input"
    return IntegerSite(
        site, 1, {"input": attributes["input_scale"].as_float()}, native_weight(node), _norm_above(codes)
    )


def _scale(value: ir.Value, site: str) -> float:
    number = scalar_of(value)
    if number is None:
        raise VerifyError(f"{site}: the scale {value.name} is not one constant; the file was edited")
    return number


def _norm_above(codes: ir.Value) -> str:
    """The site of the norm whose quantized output `codes` are, or an empty string."""
    source = find_sources(codes)[0]
    node = source.codes.producer() if source.x is None else source.x.producer()
    while node is not None and is_op(node, *MOVEMENT_OPS):
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    is_norm = is_op(node, "LayerNormalization") or is_native(node, "LayerNormQuantize", "LayerNormAddQuantize")
    return site_of(node) if node is not None and is_norm and not _adds_residual(node) else ""


def _adds_residual(node: ir.Node) -> bool:
    """True if what is quantized is no norm's output, but its sum with a residual."""
    return is_native(node, "LayerNormAddQuantize") and len(node.inputs) > RESIDUAL and node.inputs[RESIDUAL] is not None
