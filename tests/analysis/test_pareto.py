"""Points of a path, and which one a number of bits means."""

import pytest

from mptqc.analysis.pareto import path_points, point_at
from mptqc.errors import PlanError
from mptqc.plan import BitPath, QuantPlan, Step
from mptqc.recipe import Loss, Recipe

ELEMENTS = {"a/weight": 100, "b/weight": 300, "a/input": 10}
NO_STEPS = BitPath(
    variables=tuple(ELEMENTS), start=(8, 8, 8), loss=0.1, accuracy=1, bytes=900, end_bytes=700, loss_kind=Loss.OUTPUT
)
STEPS = (Step(1, 6, 0.2, 0.9, 850), Step(2, 4, None, None, 850), Step(0, 4, 0.4, 0.7, 700))


def plan_of(steps):
    path = NO_STEPS.model_copy(update={"steps": steps})
    return QuantPlan(model_digest="0", recipe=Recipe(), elements=ELEMENTS, path=path)


def test_points_have_the_averages_after_each_step():
    points = path_points(plan_of(STEPS))
    assert [point.average_weight_bits for point in points] == [8, 6.5, 6.5, 5.5]
    assert [point.average_activation_bits for point in points] == [8, 8, 4, 4]
    assert [point.variable for point in points] == ["", "b/weight", "a/input", "a/weight"]
    assert [point.loss for point in points] == [0.1, 0.2, None, 0.4]
    assert [point.bytes for point in points] == [900, 850, 850, 700]


@pytest.mark.parametrize(("bits", "step"), [(8, 0), (7, 2), (6.5, 2), (6, 3)])
def test_the_first_point_that_keeps_both_averages_is_meant(bits, step):
    assert point_at(plan_of(STEPS), bits).step == step


def test_a_kind_that_no_step_lowers_does_not_count():
    assert point_at(plan_of(STEPS[:1]), 7).step == 1


def test_beyond_the_end_is_an_error_that_says_where_the_end_is():
    with pytest.raises(PlanError, match=r"no point of 5 bits: it ends at 5\.50 weight bits and 4\.00 activation bits"):
        point_at(plan_of(STEPS), 5)


@pytest.mark.parametrize("plan", [QuantPlan(model_digest="0", recipe=Recipe()), plan_of(())])
def test_a_plan_without_a_path_says_so(plan):
    with pytest.raises(PlanError, match="the plan has no path"):
        path_points(plan)
