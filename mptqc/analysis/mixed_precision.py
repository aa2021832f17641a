"""Greedy MP: bits for every variable, within the recipe's budget (METHOD, Greedy MP)."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mptqc.analysis.allocate import Score, check_attainable, exact, greedy, greedy_in_place, measure_table
from mptqc.analysis.bit_variables import Bits, BitVariable, Kind, find_products, find_variables
from mptqc.analysis.budget import FileBytes, Measure, measures_of
from mptqc.analysis.observe import Progress
from mptqc.analysis.scoring import Scorer
from mptqc.analysis.sensitivity import Measured, Problem, Quantize, make_problem
from mptqc.analysis.widths import at_bits, bits_of, is_by_trellis, quantizers_of, without_trials
from mptqc.data.samples import Samples
from mptqc.errors import BudgetError, RecipeError
from mptqc.plan import BitPath, MultiRegion, QuantPlan, Step
from mptqc.recipe import Allocator, Budget, Recipe
from mptqc.reference.packing import MAX_BITS
from mptqc.runtime.executors import open_executor

Shapes = dict[str, tuple[int, ...]]
SizeOf = Callable[[QuantPlan], int]
"""Bytes of the file that a plan would be emitted to."""

POINTS = 32
"""Points of the path, about, whose loss is measured."""

logger = logging.getLogger(__name__)


def allocate(
    model: ir.Model,
    marked: ir.Model,
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
        marked: the same with a mark behind each tensor that full coverage quantizes; it is run in pieces.
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
    problem = make_problem(marked, images, plan, variables, quantize, search_digest(plan, images))
    empty = _path(variables, start, problem)
    plan = plan.model_copy(update={"path": empty})
    file_bytes = _fitted_bytes(variables, start, plan, size_of)
    products = find_products(model, shapes, variables)
    with open_executor(executor) as place:
        search = Search(recipe, variables, start, Scorer(problem, place, checkpoint), report)
        first = search.measured(start)
        while True:
            measures = measures_of(recipe.budget, variables, products, file_bytes)
            check_attainable(variables, measures)
            states = search.states(measures)
            if recipe.budget.max_accuracy_drop is not None:
                states = _longest(states, search, _least_accuracy(recipe.budget, problem, first))
            end = states[-1] if states else start
            chosen = at_bits(plan, variables, _named(variables, end))
            written = size_of(chosen)
            file_bytes = file_bytes.fitted(end, written)
            if recipe.budget.max_bytes is None or written <= recipe.budget.max_bytes:
                break
        steps = _steps(states, start, search, file_bytes, report)
    logger.info("allocated bits in %d steps", len(steps))
    figures = {"loss": first.loss, "accuracy": first.accuracy}
    sizes = {"bytes": file_bytes(start), "end_bytes": file_bytes(end)}
    path = empty.model_copy(update={**figures, **sizes, "steps": steps})
    return without_trials(chosen).model_copy(update={"path": path})


def _fitted_bytes(variables: Sequence[BitVariable], start: Bits, plan: QuantPlan, size_of: SizeOf) -> FileBytes:
    """The arithmetic of the file's size, fitted to three files: the start, activations one and four bits narrower."""
    upper = tuple(_upper_regions(plan, variable) for variable in variables)
    by_trellis = frozenset(bits for bits in range(MAX_BITS) if is_by_trellis(plan.recipe, bits))
    in_blocks = plan.recipe.target.is_native
    plain = FileBytes(tuple(variables), upper=upper, trellis=by_trellis, in_blocks=in_blocks)
    found = plain.fitted(start, size_of(plan))
    trials = []
    for fewer in (1, 4):
        narrow = tuple(
            variable.widths[max(len(variable.widths) - 1 - fewer, 0)] if variable.kind is Kind.ACTIVATION else bits
            for variable, bits in zip(variables, start, strict=True)
        )
        if narrow != start:
            trials.append((narrow, size_of(at_bits(plan, variables, _named(variables, narrow)))))
    return found.fitted_activations(trials) if trials else found


def _upper_regions(plan: QuantPlan, variable: BitVariable) -> dict[int, int]:
    """How many regions above the lowest an activation's quantizer has at each width."""
    if variable.kind is Kind.WEIGHT:
        return {}
    quantizers = quantizers_of(plan.array(f"{variable.name}/quantizers"))
    return {bits: len(one.upper) for bits, one in quantizers.items() if isinstance(one, MultiRegion)}


@dataclass(frozen=True)
class Search:
    """The recipe's allocator, at work from one start with one scorer."""

    recipe: Recipe
    variables: Sequence[BitVariable]
    start: Bits
    score: Score
    report: Progress

    def states(self, measures: Sequence[Measure]) -> list[Bits]:
        """Bits after each step to the limits."""
        if self.recipe.allocator is Allocator.GREEDY_IN_PLACE:
            return greedy_in_place(self.variables, self.start, measures, self.score, self.report)
        if self.recipe.allocator is Allocator.EXACT:
            assert self.recipe.budget is not None
            _check_exact(self.recipe.budget)
        to_the_letter = self.recipe.allocator is Allocator.EXACT
        table = measure_table(self.variables, self.start, self.score, self.report, every=to_the_letter)
        return (exact if to_the_letter else greedy)(self.variables, self.start, measures, table)

    def measured(self, bits: Bits) -> Measured:
        """What the model does at these bits."""
        return self.score(bits, [bits])[0]


def _steps(
    states: Sequence[Bits], start: Bits, search: Search, file_bytes: FileBytes, report: Progress
) -> tuple[Step, ...]:
    """The steps between states; about `POINTS` of them, the last included, are measured."""
    every = max(1, len(states) // POINTS)
    steps = []
    for number, (before, after) in enumerate(pairwise([start, *states])):
        report("measure the path", number, len(states))
        found = search.measured(after) if (len(states) - 1 - number) % every == 0 else None
        at = next(at for at, (one, other) in enumerate(zip(before, after, strict=True)) if one != other)
        loss, accuracy = (None, None) if found is None else (found.loss, found.accuracy)
        steps.append(Step(at, after[at], loss, accuracy, file_bytes(after)))
    return tuple(steps)


def _longest(states: list[Bits], search: Search, least: float) -> list[Bits]:
    """The states up to the last that still has the accuracy, found by bisection: accuracy falls along the path."""
    holds, fails = 0, len(states) + 1
    while fails - holds > 1:
        middle = (holds + fails) // 2
        accuracy = search.measured(states[middle - 1]).accuracy
        assert accuracy is not None
        holds, fails = (middle, fails) if accuracy >= least else (holds, middle)
    return states[:holds]


def search_digest(plan: QuantPlan, images: Samples) -> str:
    """What a search depends on: model, recipe and images."""
    parts = (plan.model_digest, plan.recipe.model_dump_json(), images.digest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _path(variables: Sequence[BitVariable], start: Bits, problem: Problem) -> BitPath:
    """A path without steps, not measured yet."""
    names = tuple(variable.name for variable in variables)
    return BitPath(variables=names, start=start, loss=0, accuracy=None, bytes=0, end_bytes=0, loss_kind=problem.loss)


def _named(variables: Sequence[BitVariable], bits: Bits) -> dict[str, int]:
    return {variable.name: number for variable, number in zip(variables, bits, strict=True)}


def _least_accuracy(budget: Budget, problem: Problem, first: Measured) -> float:
    """The accuracy that must be left.

    Raises:
        BudgetError: with the most bits more is lost already, or the model has no classes.
    """
    drop = budget.max_accuracy_drop
    assert drop is not None
    if problem.targets is None or first.accuracy is None:
        raise BudgetError("max_accuracy_drop needs a model whose first output is logits [N, classes]")
    answers = np.concatenate([outputs[0].argmax(axis=1) for outputs in problem.reference])[: problem.count]
    of_float = float(np.mean(answers == problem.targets))
    if first.accuracy < of_float - drop:
        raise BudgetError(
            f"the budget max accuracy drop = {drop:g} cannot be kept: the least, with the most bits everywhere, is "
            f"{of_float - first.accuracy:.4g} on {problem.count} scoring images"
        )
    return of_float - drop


def _check_exact(budget: Budget) -> None:
    """Raise RecipeError for limits that are no sum over variables."""
    if budget.max_bops is not None or budget.max_accuracy_drop is not None:
        raise RecipeError(
            "allocator 'exact' needs costs that add up over tensors: max_bops and max_accuracy_drop do not; use "
            "allocator 'greedy'"
        )
