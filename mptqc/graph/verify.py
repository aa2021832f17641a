"""Is a compiled model legal ONNX, does it use no more than its target allows, and is every planned site in integers?"""

import logging
from collections import Counter

import onnx
import onnx_ir as ir

from mptqc.errors import VerifyError
from mptqc.graph.integer_products import LOWERED_DOMAIN
from mptqc.graph.integer_sites import PRODUCTS_OF_AN_ATTENTION, find_integer_sites
from mptqc.graph.match import find_attentions, find_linears
from mptqc.graph.quantized_tensors import find_quantized_tensors
from mptqc.plan import QuantPlan
from mptqc.recipe import Target
from mptqc.reference.custom_ops import DOMAIN

logger = logging.getLogger(__name__)

_ALLOWED_DOMAINS = {
    Target.PORTABLE: {""},
    Target.CPU: {"", LOWERED_DOMAIN},
    Target.CPU_NATIVE: {"", DOMAIN},
    Target.CUDA: {"", DOMAIN},
    Target.TENSORRT: {""},
}
# Protocol buffers stop at 2 GiB, and so does the checker when it is given a model in memory.
_CHECKER_BYTES = 1_900_000_000


def check_structure(model: ir.Model, plan: QuantPlan) -> None:
    """Check a compiled model without running it.

    Raises:
        VerifyError: onnx.checker refuses it; it uses a domain its target does not allow; a planned Linear is not one
            integer product, or a planned attention not two, or a planned tensor not quantized; the sites at fault
            are named.
    """
    check_onnx(model)
    _check_domains(model, plan.recipe.target)
    _check_sites(model, plan)
    _check_tensors(model, plan)


def check_onnx(model: ir.Model) -> None:
    """Let onnx.checker see the model, unless it is too large for it.

    Raises:
        VerifyError: the checker refuses it.
    """
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size > _CHECKER_BYTES:
        logger.warning(
            "the model holds %.1f GB of weights: onnx.checker takes 2 GB at most, so it was not run", size / 1e9
        )
        return
    try:
        onnx.checker.check_model(ir.to_proto(model))
    except onnx.checker.ValidationError as error:
        raise VerifyError(
            f"the compiled model is not legal ONNX: {' '.join(str(error).split())}: a bug of mptqc"
        ) from error


def _check_domains(model: ir.Model, target: Target) -> None:
    allowed = _ALLOWED_DOMAINS[target]
    foreign = Counter(
        f"{node.domain}::{node.op_type}"
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        if node.domain not in allowed
    )
    if foreign:
        named = ", ".join(f"{op} (×{count})" for op, count in foreign.most_common(3))
        raise VerifyError(f"the compiled model uses {named}, which target {target.value!r} does not allow")


def _check_sites(model: ir.Model, plan: QuantPlan) -> None:
    expected = Counter({layer.site: 1 for layer in plan.layers})
    expected.update({attention.site: PRODUCTS_OF_AN_ATTENTION for attention in plan.attentions})
    found = Counter({each.site: each.products for each in find_integer_sites(model)})
    wrong = [site for site in expected | found if expected[site] != found[site]]
    floats = [linear.site for linear in find_linears(model)] + [each.site for each in find_attentions(model)]
    wrong += [site for site in floats if site in expected and site not in wrong]
    if wrong:
        named = ", ".join(f"{site} ({found[site]} of {expected[site]})" for site in sorted(wrong)[:5])
        raise VerifyError(
            f"{len(wrong)} planned sites do not run in integers as planned (integer products found of planned): {named}"
        )


def _check_tensors(model: ir.Model, plan: QuantPlan) -> None:
    planned = Counter(each.site for each in plan.tensors)
    found = Counter(each.site for each in find_quantized_tensors(model))
    wrong = sorted(site for site in planned | found if planned[site] != found[site])
    if wrong:
        named = ", ".join(f"{site} ({found[site]} of {planned[site]})" for site in wrong[:5])
        raise VerifyError(f"{len(wrong)} tensors are not quantized as planned (quantizers found of planned): {named}")
