"""The measures of a budget, against figures worked out by hand."""

import pytest

from mptqc.analysis.bit_variables import BitVariable, Kind, Product
from mptqc.analysis.budget import FileBytes, average_bits, average_of, bit_operations, measures_of
from mptqc.graph.packed_weights import table_bytes, trellis_bytes, unpacking_bytes
from mptqc.recipe import Budget
from mptqc.reference.packing import planes_of

VARIABLES = (
    BitVariable("a/weight", Kind.WEIGHT, ("a",), 300, (2, 3, 4, 5, 6, 7, 8)),
    BitVariable("a/input", Kind.ACTIVATION, ("a",), 10, (3, 8)),
    BitVariable("b/weight", Kind.WEIGHT, ("b",), 100, (2, 8)),
    BitVariable("c/q", Kind.ACTIVATION, ("c",), 30, (3, 8)),
)
PRODUCTS = [Product("a/input", "a/weight", 1000), Product("c/q", "c/q", 7)]
BITS = (4, 8, 8, 3)


def test_averages_count_by_elements():
    assert average_bits(VARIABLES, Kind.WEIGHT)(BITS) == (300 * 4 + 100 * 8) / 400
    assert average_bits(VARIABLES, Kind.ACTIVATION)(BITS) == (10 * 8 + 30 * 3) / 40


def test_averages_of_a_plan_are_the_same():
    elements = {variable.name: variable.elements for variable in VARIABLES}
    named = dict(zip(elements, BITS, strict=True))
    for kind in Kind:
        assert average_of(elements, named, kind) == average_bits(VARIABLES, kind)(BITS)


def test_bit_operations_are_multiplications_times_both_bits():
    assert bit_operations(VARIABLES, PRODUCTS)(BITS) == 1000 * 8 * 4 + 7 * 3 * 3


def test_bytes_follow_the_bits_of_weights():
    count = FileBytes(VARIABLES, rest=5000)
    eight = (8, 8, 8, 8)
    assert count(eight) == 5000 + 400
    assert count((8, 3, 8, 3)) == count(eight)
    (plane,) = planes_of(4)
    assert count((4, 8, 8, 8)) - count(eight) == -150 + unpacking_bytes(4) + table_bytes(plane)


def test_weights_that_a_trellis_codes_take_its_ops_and_one_table_for_all():
    plain = FileBytes(VARIABLES, rest=5000)
    count = FileBytes(VARIABLES, rest=5000, trellis=frozenset({2, 4}))
    more = unpacking_bytes(2, by_trellis=True) - unpacking_bytes(2)
    assert more > 0
    assert count((2, 8, 2, 8)) - plain((2, 8, 2, 8)) == 2 * more + trellis_bytes(2)
    assert count((6, 8, 8, 8)) == plain((6, 8, 8, 8))
    added = unpacking_bytes(4, by_trellis=True) + trellis_bytes(4)  # bytes of two codes need no table of codes
    assert count((4, 8, 8, 8)) - count((8, 8, 8, 8)) == -150 + added


def test_bytes_are_fitted_to_a_written_file():
    count = FileBytes(VARIABLES).fitted(BITS, 9999)
    assert count(BITS) == 9999


def test_narrow_activations_take_their_clip_and_each_upper_region_its_nodes():
    upper = ({}, {3: 2}, {}, {3: 1})
    plain = FileBytes(VARIABLES, rest=5000, upper=upper)
    both, one = (8, 3, 8, 3), (8, 8, 8, 3)
    fitted = plain.fitted_activations([(both, plain(both) + 2 * 40 + 3 * 700), (one, plain(one) + 40 + 700)])
    assert (fitted.clipping, fitted.region) == (40, 700)
    assert fitted((8, 3, 8, 8)) - plain((8, 3, 8, 8)) == 40 + 2 * 700


def test_a_measure_is_missing_its_share_of_the_way():
    (measure,) = measures_of(Budget(average_weight_bits=5), VARIABLES, PRODUCTS, FileBytes(VARIABLES))
    start, half, end = (8, 8, 8, 8), (6, 8, 8, 8), (4, 8, 8, 8)
    assert measure.missing(start, start) == 1
    assert measure.missing(half, start) == pytest.approx(0.5)
    assert measure.missing(end, start) == 0


@pytest.mark.parametrize(
    ("budget", "options"),
    [
        ({"average_bits": 4}, ["average weight bits", "average activation bits"]),
        ({"average_bits": 4, "average_activation_bits": 5}, ["average weight bits", "average activation bits"]),
        ({"max_bytes": 10, "max_bops": 1e9}, ["max bytes", "max bops"]),
        ({"max_accuracy_drop": 0.01}, ["weights"]),
    ],
)
def test_each_limit_is_a_measure(budget, options):
    found = measures_of(Budget(**budget), VARIABLES, PRODUCTS, FileBytes(VARIABLES))
    assert [measure.option for measure in found] == options


def test_the_smaller_of_two_averages_counts():
    found = measures_of(Budget(average_bits=4, average_activation_bits=5), VARIABLES, PRODUCTS, FileBytes(VARIABLES))
    assert [measure.limit for measure in found] == [4, 4]
