"""Which choices of bits a model has, what they count, and which products they meet in."""

import pytest

from mptqc.analysis.bit_variables import Kind, find_products, find_variables
from mptqc.analysis.shapes import concrete_shapes
from mptqc.recipe import Recipe

BUDGET = {"average_bits": 4}


def variables_of(model, **keys):
    found = find_variables(model, concrete_shapes(model), Recipe.model_validate(keys))
    return {variable.name: variable for variable in found}


def test_elements_of_weights_inputs_and_operands(block):
    found = variables_of(block())
    assert found["block00.fc1/weight"].elements == 12 * 20
    assert found["block00.fc2/input"].elements == 7 * 20
    assert found["block00.attention/q"].elements == found["block00.attention/k"].elements == 7 * 12
    assert found["block00.attention/p"].elements == 2 * 7 * 7
    assert {variable.kind for name, variable in found.items() if name.endswith("weight")} == {Kind.WEIGHT}


def test_linears_that_read_one_value_share_a_variable(block):
    found = variables_of(block())
    assert found["block00.q/input"].sites == ("block00.q", "block00.k", "block00.v")
    assert "block00.k/input" not in found


def test_without_a_budget_there_is_one_width(block):
    assert {variable.widths for variable in variables_of(block(), weight_bits=5, activation_bits=5).values()} == {(5,)}


def test_a_budget_opens_the_limits_and_sites_stay_fixed(block):
    limits = {"weight": (3, 6), "activation": (4, 8)}
    fixed = {"*.fc1": {"weight_bits": 7}}
    found = variables_of(block(), budget=BUDGET, bit_limits=limits, sites=fixed)
    assert found["block00.fc1/weight"].widths == (7,)
    assert found["block00.fc2/weight"].widths == (3, 4, 5, 6)
    assert found["block00.attention/v"].widths == (4, 5, 6, 7)
    assert found["block00.attention/p"].widths == (4, 5, 6, 7, 8)


@pytest.mark.parametrize("reduce_range", [True, False])
def test_a_reduced_range_gives_the_right_operands_of_products_seven_bits(block, reduce_range):
    found = variables_of(block(), reduce_range=reduce_range, sites={"*.fc1": {"weight_bits": 8}})
    reduced = {name for name, variable in found.items() if variable.widths == (7,)}
    right = {name for name in found if name.rpartition("/")[2] in ("weight", "k", "v")}
    assert reduced == (right if reduce_range else set())
    assert {found[name].widths for name in found.keys() - reduced} == {(8,)}


def test_a_kind_of_activation_may_have_limits_of_its_own(block):
    limits = {"activation": (4, 6), "kinds": {"p": (5, 8), "input": (3, 3), "gelu-input": (6, 7)}}
    found = variables_of(block(), budget=BUDGET, bit_limits=limits, coverage="full")
    assert found["block00.attention/p"].widths == (5, 6, 7, 8)
    assert found["block00.attention/q"].widths == (4, 5, 6)
    assert found["block00.fc2/input"].widths == (3,)
    tensors = {name: variable.widths for name, variable in found.items() if name.endswith("/tensor")}
    assert (6, 7) in tensors.values()
    assert set(tensors.values()) == {(6, 7), (4, 5, 6)}


def test_what_the_budget_leaves_free_keeps_the_recipes_bits(block):
    found = variables_of(block(), budget={"average_weight_bits": 4}, activation_bits=6)
    assert {variable.widths for variable in found.values() if variable.kind is Kind.ACTIVATION} == {(6,)}


def test_readers_with_other_fixed_bits_have_a_variable_of_their_own(block):
    found = variables_of(block(), budget=BUDGET, sites={"*.k": {"activation_bits": 8}})
    assert found["block00.q/input"].sites == ("block00.q", "block00.v")
    assert found["block00.k/input"].widths == (8,)


def test_products_count_every_multiplication(block):
    model = block()
    shapes = concrete_shapes(model)
    found = find_products(model, shapes, find_variables(model, shapes, Recipe()))
    counted = {(product.left, product.right): product.multiplications for product in found}
    assert counted["block00.q/input", "block00.v/weight"] == 7 * 12 * 12
    assert counted["block00.fc2/input", "block00.fc2/weight"] == 7 * 20 * 12
    assert counted["block00.attention/q", "block00.attention/k"] == 2 * 7 * 7 * 6
    assert counted["block00.attention/p", "block00.attention/v"] == 2 * 7 * 7 * 6
    assert len(found) == 6 + 2
