"""Quantizers of all widths as arrays, and the plan at any bits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantizers import FOUR_REGIONS, opt_m

from mptqc.analysis.candidates import uniform
from mptqc.analysis.widths import at_bits, bits_of, quantizer_array, quantizers_of, without
from mptqc.errors import PlanError


@given(st.floats(-5, -0.125, width=32), st.floats(0.125, 100, width=32))
def test_quantizers_survive_the_array(low, high):
    quantizers = {bits: uniform(bits, low, high) for bits in range(2, 9)}
    quantizers[4] = opt_m(bits=4, scale=quantizers[4].scale, zero_point=1, m=3, low_codes=10)
    quantizers[5] = FOUR_REGIONS.model_copy(update={"bits": 5, "scale": quantizers[5].scale})
    assert quantizers_of(quantizer_array(quantizers)) == quantizers


def test_the_plan_has_the_bits_that_are_asked_for(bench):
    made = bench()
    bits = {variable.name: variable.widths[at % 2] for at, variable in enumerate(made.variables)}
    plan = at_bits(made.plan, made.variables, bits)
    assert bits_of(plan, made.variables) == bits
    site = plan.layers[0].site
    scale = plan.arrays[f"{site}/weight_scale/{plan.layers[0].weight_bits}"]
    assert plan.arrays[f"{site}/weight_scale"].tobytes() == scale.tobytes()


def test_linears_that_share_an_input_get_one_quantizer(bench):
    plan = bench().plan
    inputs = {layer.site: layer.input for layer in plan.layers}
    assert inputs["block00.q"] == inputs["block00.k"] == inputs["block00.v"]


def test_compensated_arrays_do_not_outlive_their_bits(bench):
    made = bench()
    site = made.plan.layers[0].site
    plan = made.plan.with_arrays({f"{site}/bias": made.plan.arrays[f"{site}/weight_scale"]})
    assert f"{site}/bias" not in at_bits(plan, made.variables, bits_of(plan, made.variables)).arrays


def test_a_width_that_was_not_searched_is_an_error(bench):
    made = bench()
    bits = bits_of(made.plan, made.variables) | {"block00.attention/q": 7}
    with pytest.raises(PlanError, match=r"no quantizer of 7 bits for block00\.attention/q; it has 3, 4"):
        at_bits(made.plan, made.variables, bits)


def test_without_leaves_the_other_arrays(bench):
    plan = bench().plan
    assert without(plan, ["block00.q/weight_scale"]).arrays.keys() == plan.arrays.keys() - {"block00.q/weight_scale"}
