"""The points of a plan's path, from many bits to few: what each costs, and where one asks for a point by its bits."""

from dataclasses import dataclass

from mptqc.analysis.bit_variables import Kind
from mptqc.analysis.budget import average_of
from mptqc.errors import PlanError
from mptqc.plan import BitPath, QuantPlan


@dataclass(frozen=True)
class PathPoint:
    """The model after so many steps of the path.

    Attributes:
        step: how many steps were taken.
        variable: what the last one lowered; empty at the start.
        bits: what it got; None at the start.
        average_weight_bits: over weights.
        average_activation_bits: over elements of the quantized activations.
        bytes: of the file.
        loss: on the scoring images, weights rounded, not compensated; None where it was not measured.
        accuracy: likewise.
    """

    step: int
    variable: str
    bits: int | None
    average_weight_bits: float
    average_activation_bits: float
    bytes: int
    loss: float | None
    accuracy: float | None


def path_of(plan: QuantPlan) -> BitPath:
    """The plan's path.

    Raises:
        PlanError: the plan was compiled without a budget, or comes from a compiled file, which has no steps.
    """
    if plan.path is None or not plan.path.steps:
        raise PlanError("the plan has no path: its bits were not searched; compile with a budget and --plan-out")
    return plan.path


def path_points(plan: QuantPlan) -> list[PathPoint]:
    """Every point of the plan's path, the start first.

    Raises:
        PlanError: the plan has none.
    """
    path = path_of(plan)
    points = [PathPoint(0, "", None, *_averages(plan, path.bits_after(0)), path.bytes, path.loss, path.accuracy)]
    for number, step in enumerate(path.steps, start=1):
        averages = _averages(plan, path.bits_after(number))
        name = path.variables[step.variable]
        points.append(PathPoint(number, name, step.bits, *averages, step.bytes, step.loss, step.accuracy))
    return points


def point_at(plan: QuantPlan, average_bits: float) -> PathPoint:
    """The first point whose averages are no more than `average_bits`; kinds that no step lowers do not count.

    Raises:
        PlanError: the plan has no path, or it ends before.
    """
    path = path_of(plan)
    lowered = {path.variables[step.variable].endswith("/weight") for step in path.steps}
    points = path_points(plan)
    for point in points:
        averages = {True: point.average_weight_bits, False: point.average_activation_bits}
        if max(averages[weights] for weights in lowered) <= average_bits:
            return point
    end = points[-1]
    raise PlanError(
        f"the plan's path has no point of {average_bits:g} bits: it ends at {end.average_weight_bits:.2f} weight bits "
        f"and {end.average_activation_bits:.2f} activation bits; compile with a smaller budget"
    )


def _averages(plan: QuantPlan, bits: dict[str, int]) -> tuple[float, float]:
    return average_of(plan.elements, bits, Kind.WEIGHT), average_of(plan.elements, bits, Kind.ACTIVATION)
