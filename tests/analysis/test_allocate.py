"""Allocators on made-up models whose changes add up, where the best choice is known."""

import dataclasses
from itertools import product

import numpy as np
import pytest

from mptqc.analysis.allocate import (
    check_attainable,
    exact,
    greedy,
    greedy_in_place,
    measure_table,
    within_noise,
)
from mptqc.analysis.bit_variables import BitVariable, Kind
from mptqc.analysis.budget import Measure, average_bits
from mptqc.analysis.sensitivity import Measured
from mptqc.compiler import silent
from mptqc.errors import BudgetError

WIDTHS = (2, 3, 4, 5)
IMAGES = 6


class Additive:
    """A model whose change is Σ c_v·4^−b over variables, the same on every image."""

    def __init__(self, weights):
        self.weights = np.array(weights, np.float64)
        self.asked = 0

    def loss(self, bits):
        return float(self.weights @ 4.0 ** -np.array(bits))

    def __call__(self, state, choices):
        self.asked += len(choices)
        changes = [abs(self.loss(bits) - self.loss(state)) for bits in choices]
        losses = [self.loss(bits) for bits in choices]
        return [
            Measured(np.full(IMAGES, loss), np.full(IMAGES, change), None)
            for loss, change in zip(losses, changes, strict=True)
        ]


def variables_of(elements, widths=WIDTHS):
    return [BitVariable(f"v{at}/weight", Kind.WEIGHT, (f"v{at}",), size, widths) for at, size in enumerate(elements)]


def average(variables, limit):
    return Measure("average weight bits", "bits", limit, average_bits(variables, Kind.WEIGHT))


@pytest.fixture(params=range(5))
def problem(request):
    random = np.random.default_rng(request.param)
    variables = variables_of(random.integers(1, 50, 5))
    return variables, Additive(random.lognormal(0, 2, 5)), average(variables, 3.4)


START = (5, 5, 5, 5, 5)


def best_loss(variables, model, measure):
    choices = product(*(variable.widths for variable in variables))
    return min(model.loss(bits) for bits in choices if measure.cost(bits) <= measure.limit)


def test_exact_finds_the_best_of_all_choices(problem):
    pytest.importorskip("scipy")
    variables, model, measure = problem
    end = exact(variables, START, [measure], measure_table(variables, START, model, silent, every=True))[-1]
    assert measure.cost(end) <= measure.limit
    assert model.loss(end) == pytest.approx(best_loss(variables, model, measure), rel=1e-9)


def test_greedy_keeps_the_limit_with_no_bit_to_spare(problem):
    variables, model, measure = problem
    states = greedy(variables, START, [measure], measure_table(variables, START, model, silent))
    assert measure.cost(states[-1]) <= measure.limit < measure.cost(states[-2])


def test_greedy_is_best_among_equal_sizes():
    """With equal costs and convex changes the cheapest bit first is optimal."""
    variables, model = variables_of([7] * 5), Additive([1, 3, 9, 27, 500])
    measure = average(variables, 3.4)
    end = greedy(variables, START, [measure], measure_table(variables, START, model, silent))[-1]
    assert model.loss(end) == pytest.approx(best_loss(variables, model, measure))


def test_in_place_takes_the_same_way_where_changes_add_up():
    variables, model = variables_of([7] * 5), Additive([1, 3, 9, 27, 500])
    measure = average(variables, 3.4)
    states = greedy_in_place(variables, START, [measure], model, silent)
    assert states == greedy(variables, START, [measure], measure_table(variables, START, model, silent))


def test_in_place_measures_few_of_all(problem):
    variables, model, measure = variables_of([3] * 30), Additive(np.geomspace(1, 1e6, 30)), None
    measure = average(variables, 3.0)
    states = greedy_in_place(variables, (5,) * 30, [measure], model, silent)
    assert model.asked < 0.35 * len(states) * len(variables)


def test_a_step_may_go_over_a_width_that_is_worse():
    """4 bits do more harm than 3 here, so nobody stops at 4."""
    variables = variables_of([1, 1])
    table = [{5: 0.0, 4: 1.0, 3: 1.0, 2: 9.0}, {5: 0.0, 4: 2.0, 3: 4.0, 2: 8.0}]
    assert greedy(variables, (5, 5), [average(variables, 4.5)], table) == [(3, 5)]


def test_ties_within_noise_go_to_the_larger_saving():
    variables = variables_of([1, 10])
    noise = np.array([1.0, -1.0, 1.0, -1.0])

    def score(state, choices):
        changes = {(4, 5): 1.0 + noise, (5, 4): 10.0 + 12 * noise}
        return [Measured(np.zeros(4), changes.get(bits, np.full(4, 1e6)), None) for bits in choices]

    assert greedy_in_place(variables, (5, 5), [average(variables, 4.5)], score, silent)[0] == (5, 4)


def test_a_difference_beyond_its_error_is_no_tie():
    assert within_noise(np.array([0.5, -0.4, 0.2, 0.1]))
    assert not within_noise(np.array([0.5, 0.4, 0.6, 0.5]))


def test_several_limits_are_all_kept():
    variables = [
        *variables_of([4, 4]),
        BitVariable("a/input", Kind.ACTIVATION, ("a",), 5, WIDTHS),
        BitVariable("b/input", Kind.ACTIVATION, ("b",), 9, WIDTHS),
    ]
    measures = [average(variables, 4.0), Measure("a", "bits", 3.0, average_bits(variables, Kind.ACTIVATION))]
    model = Additive([1, 2, 3, 4])
    end = greedy(variables, (5,) * 4, measures, measure_table(variables, (5,) * 4, model, silent))[-1]
    assert all(measure.cost(end) <= measure.limit for measure in measures)
    assert measures[0].cost(end) > 3.5


def test_a_limit_that_holds_takes_no_step():
    variables = variables_of([1, 2])
    assert greedy(variables, (5, 5), [average(variables, 5)], [{}, {}]) == []


def test_an_unattainable_limit_names_the_least():
    variables = variables_of([1, 1])
    with pytest.raises(BudgetError, match=r"average weight bits = 1\.5 cannot be kept: the least is 2 bits"):
        check_attainable(variables, [average(variables, 1.5)])


def test_the_table_never_falls_with_fewer_bits():
    """What says that fewer bits do less harm is noise."""
    variables = variables_of([1])

    def score(state, choices):
        changes = {(4,): 3.0, (3,): 1.0, (2,): 5.0}
        return [Measured(np.zeros(2), np.full(2, changes[bits]), None) for bits in choices]

    assert measure_table(variables, (5,), score, silent, every=True) == [{5: 0.0, 4: 3.0, 3: 3.0, 2: 5.0}]


def test_widths_between_measured_ones_follow_their_neighbours():
    """Of 2 to 8 bits, 2, 3, 4 and 6 are measured; 5 lies between 4 and 6, and 7 is a quarter of 6."""
    variables = [dataclasses.replace(variables_of([1])[0], widths=(2, 3, 4, 5, 6, 7, 8))]
    changes = {6: 0.4, 4: 6.4, 3: 25.0, 2: 90.0}

    def score(state, choices):
        return [Measured(np.zeros(2), np.full(2, changes[bits[0]]), None) for bits in choices]

    (row,) = measure_table(variables, (8,), score, silent)
    assert row == pytest.approx({8: 0.0, 7: 0.1, 6: 0.4, 5: 1.6, 4: 6.4, 3: 25.0, 2: 90.0})
