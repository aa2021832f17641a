"""Greedy MP: bits for every variable, within the recipe's budget (METHOD, Greedy MP)."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mptqc.analysis.allocate import Holds, Taken, check_attainable, exact, greedy
from mptqc.analysis.bit_variables import Bits, BitVariable, find_products, find_variables
from mptqc.analysis.budget import FileBytes, measures_of
from mptqc.analysis.observe import Progress
from mptqc.analysis.scoring import Scorer
from mptqc.analysis.sensitivity import Measured, Problem, Quantize, make_problem
from mptqc.analysis.widths import at_bits, bits_of
from mptqc.data.samples import Samples
from mptqc.errors import BudgetError, RecipeError
from mptqc.plan import BitPath, QuantPlan, Step
from mptqc.recipe import Allocator, Budget
from mptqc.runtime.executors import open_executor

Shapes = dict[str, tuple[int, ...]]
SizeOf = Callable[[QuantPlan], int]
"""Bytes of the file that a plan would be emitted to."""

logger = logging.getLogger(__name__)


def allocate(
    model: ir.Model,
    shapes: Shapes,
    samples: Samples,
    plan: QuantPlan,
    quantize: Quantize,
    size_of: SizeOf,
    report: Progress,
    *,
    executor: str = "in-process",
    checkpoint: Path | None = None,
) -> QuantPlan:
    """Return the plan with bits that keep the recipe's budget, and the path that led to them.

    Args:
        model: the smoothed float model; not changed.
        shapes: its concrete shapes at batch 1.
        samples: calibration images, of which `scoring_images` are used.
        plan: with the quantizers of all widths.
        quantize: makes what a plan names run in integers; applied to private copies.
        size_of: bytes of the emitted file.
        report: called with (step, done, total).
        executor: where losses are measured, see `mptqc.runtime.executors`.
        checkpoint: a file that keeps what was measured, so that an interrupted search goes on.

    Raises:
        BudgetError: the budget cannot be kept; names the least.
    """
    recipe = plan.recipe
    assert recipe.budget is not None
    variables = find_variables(model, shapes, recipe)
    start = tuple(bits_of(plan, variables)[variable.name] for variable in variables)
    images = samples.take(recipe.scoring_images, recipe.seed)
    problem = make_problem(model, images, plan, variables, quantize, search_digest(plan, images))
    plan = plan.model_copy(update={"path": _path(variables, start, None, problem)})
    file_bytes = FileBytes(tuple(variables)).fitted(start, size_of(plan))
    products = find_products(model, shapes, variables)
    with open_executor(executor) as place:
        score = Scorer(problem, place, checkpoint)
        first = score(start, [start])[0]
        holds = _holds(recipe.budget, problem, first)
        taken: list[Taken] = []
        while True:
            measures = measures_of(recipe.budget, variables, products, file_bytes)
            check_attainable(variables, measures)
            state = taken[-1].bits if taken else start
            if recipe.allocator is Allocator.EXACT:
                _check_exact(recipe.budget)
                taken = exact(variables, start, measures, score, report)
            else:
                taken += greedy(variables, state, measures, score, report, holds)
            state = taken[-1].bits if taken else start
            chosen = at_bits(plan, variables, _named(variables, state))
            written = size_of(chosen)
            file_bytes = file_bytes.fitted(state, written)
            if recipe.budget.max_bytes is None or written <= recipe.budget.max_bytes:
                break
    logger.info("allocated bits in %d steps, %d choices measured", len(taken), score.measured)
    steps = tuple(
        Step(step.variable, step.bits[step.variable], step.measured.loss, step.measured.accuracy, file_bytes(step.bits))
        for step in taken
    )
    path = _path(variables, start, first, problem)
    return chosen.model_copy(update={"path": path.model_copy(update={"bytes": file_bytes(start), "steps": steps})})


def search_digest(plan: QuantPlan, images: Samples) -> str:
    """What a search depends on: model, recipe and images."""
    parts = (plan.model_digest, plan.recipe.model_dump_json(), images.digest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _path(variables: Sequence[BitVariable], start: Bits, first: Measured | None, problem: Problem) -> BitPath:
    return BitPath(
        variables=tuple(variable.name for variable in variables),
        start=start,
        loss=0.0 if first is None else first.loss,
        accuracy=None if first is None else first.accuracy,
        bytes=0,
        loss_kind=problem.loss,
    )


def _named(variables: Sequence[BitVariable], bits: Bits) -> dict[str, int]:
    return {variable.name: number for variable, number in zip(variables, bits, strict=True)}


def _holds(budget: Budget, problem: Problem, first: Measured) -> Holds | None:
    """Whether a model loses no more accuracy than the budget allows; None if the budget does not ask.

    Raises:
        BudgetError: with the most bits more is lost already, or the model has no classes.
    """
    drop = budget.max_accuracy_drop
    if drop is None:
        return None
    if problem.targets is None:
        raise BudgetError("max_accuracy_drop needs a model whose first output is logits [N, classes]")
    answers = np.concatenate([outputs[0].argmax(axis=1) for outputs in problem.reference])[: problem.count]
    least = float(np.mean(answers == problem.targets)) - drop

    def holds(measured: Measured) -> bool:
        assert measured.accuracy is not None
        return measured.accuracy >= least

    if not holds(first):
        assert first.accuracy is not None
        raise BudgetError(
            f"the budget max accuracy drop = {drop:g} cannot be kept: the least, with the most bits everywhere, is "
            f"{least + drop - first.accuracy:.4g} on {problem.count} scoring images"
        )
    return holds


def _check_exact(budget: Budget) -> None:
    """Raise RecipeError for limits that are no sum over variables."""
    if budget.max_bops is not None or budget.max_accuracy_drop is not None:
        raise RecipeError(
            "allocator 'exact' needs costs that add up over tensors: max_bops and max_accuracy_drop do not; use "
            "allocator 'greedy'"
        )
