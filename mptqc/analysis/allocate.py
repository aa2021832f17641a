"""Allocators: from all variables at their most bits to a choice of bits that keeps every limit, step by step.

The change of a choice is what it does to the outputs (`sensitivity`), a mean over images. A table holds the change of
every variable at every width, all others at their most bits.

greedy           Each step lowers one variable, the one with the least  Δchange/Δcost  by the table, cost in the measure
                 farthest from its limit. A step goes over several bits where that has the least price.
greedy-compensated  The same by a table whose weights GPTQ rounded, as compensation will, not to the nearest codes.
greedy-in-place  The paper's: one bit a step, its change measured with all earlier choices in place. A change is kept
                 until the variable comes to the head of the queue and is then measured anew (lazy). Prices that
                 differ by less than their noise (the standard error of the paired difference over images) are ties;
                 the largest saving wins.
exact            The sum of the table's changes is minimised under the limits by an integer program (scipy's HiGHS).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mptqc.analysis.bit_variables import Bits, BitVariable
from mptqc.analysis.budget import Measure
from mptqc.analysis.observe import Progress
from mptqc.analysis.sensitivity import Measured
from mptqc.errors import BudgetError, RecipeError

Score = Callable[[Bits, Sequence[Bits]], list[Measured]]
Changes = NDArray[np.float64]
Table = Sequence[Mapping[int, float]]
"""For each variable the mean change at each width, 0 at the most bits; never less with fewer bits."""

MEASURED_AT_ONCE = 16
GROWTH_A_BIT = 4.0
HEAD = 4
"""Variables at the head of the queue that are measured anew before a step in place."""

VARIABLES_A_STEP = 32
"""Of so many variables one is lowered at a time: in place, large models take several steps between measurements."""

GROWTH = 2.0
"""A variable's next bit is expected to cost so many times the last until it is measured in place: less than the 4 of
rounding noise, so that it comes to the head too early rather than too late."""


@dataclass(frozen=True)
class Guess:
    """What a variable's next bit changes in each image's outputs, as it was in `state` (None: never measured)."""

    changes: Changes
    state: Bits | None


def check_attainable(variables: Sequence[BitVariable], measures: Sequence[Measure]) -> None:
    """Raise BudgetError, with the least that can be had, if no choice of bits keeps a limit."""
    fewest = tuple(variable.widths[0] for variable in variables)
    for measure in measures:
        least = measure.cost(fewest)
        if least > measure.limit:
            raise BudgetError(
                f"the budget {measure.option} = {measure.limit:g} cannot be kept: the least is {least:.6g} "
                f"{measure.unit}, with every tensor at the fewest bits of the recipe's bit_limits and sites"
            )


def measure_table(
    variables: Sequence[BitVariable], start: Bits, score: Score, report: Progress, *, every: bool = False
) -> Table:
    """The change of every variable at every width, all others as in `start`.

    Unless `every` width is to be measured, only every second one below the start is, and the two fewest. Rounding noise
    grows fourfold a bit: a width between two measured ones gets the geometric mean of their changes, one right below
    the start a quarter of the next.
    """
    options = [
        (at, width)
        for at, one in enumerate(variables)
        for width in one.widths
        if width < start[at] and (every or (start[at] - width) % 2 == 0 or width in one.widths[:2])
    ]
    changes: dict[tuple[int, int], float] = {}
    for done in range(0, len(options), MEASURED_AT_ONCE):
        report("measure widths", done, len(options))
        part = options[done : done + MEASURED_AT_ONCE]
        found = score(start, [with_bits(start, at, width) for at, width in part])
        changes |= {option: float(measured.changes.mean()) for option, measured in zip(part, found, strict=True)}
    table = []
    for at, variable in enumerate(variables):
        row, most = {}, 0.0
        for width in reversed(variable.widths):
            change = 0.0 if width == start[at] else changes.get((at, width), -1.0)
            if change < 0:
                below = changes[at, width - 1]
                above = changes.get((at, width + 1))
                change = below / GROWTH_A_BIT if above is None else float(np.sqrt(below * above))
            most = max(most, change)  # fewer bits do no good: what says so is noise
            row[width] = most
        table.append(row)
    return table


def greedy(variables: Sequence[BitVariable], start: Bits, measures: Sequence[Measure], table: Table) -> list[Bits]:
    """States after each step, by the table; the last keeps every limit, or nothing more can be lowered."""
    state, states = start, []
    while (measure := farthest(measures, state, start)) is not None:
        before = measure.price(state)
        prices = []
        for at, variable in enumerate(variables):
            for width in variable.widths:
                bits = with_bits(state, at, width)
                saving = before - measure.price(bits) if width < state[at] else 0.0
                if saving > 0:
                    prices.append(((table[at][width] - table[at][state[at]]) / saving, -width, bits))
        if not prices:
            break
        state = min(prices)[2]
        states.append(state)
    return states


def greedy_in_place(
    variables: Sequence[BitVariable], start: Bits, measures: Sequence[Measure], score: Score, report: Progress
) -> list[Bits]:
    """States after each step, every step measured with the earlier ones in place; ends as `greedy` does."""
    queue = _Queue(start, score)
    states: list[Bits] = []
    at_once = max(1, len(variables) // VARIABLES_A_STEP)
    while (measure := farthest(measures, queue.state, start)) is not None:
        report("allocate bits", round(1000 * (1 - measure.missing(queue.state, start))), 1000)
        before = measure.price(queue.state)
        savings = {
            at: saving
            for at, variable in enumerate(variables)
            if queue.state[at] > variable.widths[0] and (saving := before - measure.price(queue.lowered(at))) > 0
        }
        if not savings:
            break
        for variable in queue.next_steps(savings, at_once):
            if measure.missing(queue.state, start) > 0:
                queue.take(variable)
                states.append(queue.state)
    return states


class _Queue:
    """Variables by the price of their next bit, in a state."""

    def __init__(self, start: Bits, score: Score) -> None:
        self.state = start
        self._score = score
        self._guesses: dict[int, Guess] = {}

    def next_steps(self, savings: Mapping[int, float], at_once: int) -> list[int]:
        """The best step by fresh measurements, and up to `at_once` − 1 that are as clear."""
        self._measure([at for at in savings if at not in self._guesses])
        head = max(HEAD, 2 * at_once)
        while True:
            ranked = sorted(savings, key=lambda at: (self._price(at, savings), at))
            stale = [at for at in ranked[:head] if self._guesses[at].state != self.state]
            if not stale:
                break
            self._measure(stale)
        fresh, others = ranked[:head], ranked[head:]
        first = self._best_of_ties(fresh, savings)
        bound = self._price(others[0], savings) if others else np.inf
        clear = [at for at in fresh if at != first and self._price(at, savings) <= bound]
        return [first, *clear[: at_once - 1]]

    def take(self, variable: int) -> None:
        """Lower a variable by one bit."""
        self.state = self.lowered(variable)
        self._guesses[variable] = Guess(GROWTH * self._guesses[variable].changes, None)

    def lowered(self, variable: int) -> Bits:
        """The state with one bit less for a variable."""
        return with_bits(self.state, variable, self.state[variable] - 1)

    def _measure(self, chosen: Sequence[int]) -> None:
        found = self._score(self.state, [self.lowered(at) for at in chosen])
        self._guesses |= {at: Guess(measured.changes, self.state) for at, measured in zip(chosen, found, strict=True)}

    def _best_of_ties(self, fresh: Sequence[int], savings: Mapping[int, float]) -> int:
        reference = self._guesses[fresh[0]].changes / savings[fresh[0]]
        ties = [at for at in fresh if within_noise(self._guesses[at].changes / savings[at] - reference)]
        return max(ties, key=lambda at: (savings[at], -at))

    def _price(self, variable: int, savings: Mapping[int, float]) -> float:
        return float(self._guesses[variable].changes.mean()) / savings[variable]


def exact(variables: Sequence[BitVariable], start: Bits, measures: Sequence[Measure], table: Table) -> list[Bits]:
    """States on the way to the choice with the least sum of the table's changes, cheapest variables first.

    Args:
        variables: what bits are given to.
        start: their bits.
        measures: limits; each cost must be a sum over variables.
        table: changes.

    Raises:
        RecipeError: scipy is not installed.
        BudgetError: no choice of bits keeps all limits together.
    """
    options = [(at, width) for at, variable in enumerate(variables) for width in variable.widths]
    changes = np.array([table[at][width] for at, width in options])
    savings = [
        np.array([measure.cost(start) - measure.cost(with_bits(start, at, width)) for at, width in options])
        for measure in measures
    ]
    needed = [max(measure.cost(start) - measure.limit, 0.0) for measure in measures]
    chosen = _solve(changes, options, savings, needed)
    least = np.finfo(np.float64).tiny
    relative = np.sum([saving / max(way, least) for saving, way in zip(savings, needed, strict=True)], axis=0)
    chosen.sort(key=lambda option: float(changes[option]) / max(float(relative[option]), least))
    state, states = start, []
    for at, width in (options[option] for option in chosen):
        if width != state[at]:
            state = with_bits(state, at, width)
            states.append(state)
    return states


def _solve(
    changes: Changes, options: Sequence[tuple[int, int]], savings: Sequence[Changes], needed: Sequence[float]
) -> list[int]:
    """The options of the integer program: one a variable, Σ savings ≥ what is needed of each, Σ changes least."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise RecipeError("allocator 'exact' needs scipy: pip install 'mptqc[exact]'") from error
    owners = np.array([at for at, _ in options])
    one_each = (owners == np.arange(owners.max() + 1)[:, None]).astype(float)
    constraints = [LinearConstraint(one_each, 1, 1)]
    constraints += [LinearConstraint(saving[None], way, np.inf) for saving, way in zip(savings, needed, strict=True)]
    solved = milp(changes, integrality=np.ones(len(options)), bounds=Bounds(0, 1), constraints=constraints)
    if solved.x is None:
        raise BudgetError(f"no choice of bits keeps all limits of the budget together ({solved.message})")
    return [int(option) for option in np.flatnonzero(solved.x > 0.5)]


def within_noise(differences: Changes) -> bool:
    """True if the mean of paired differences over images is no larger than its standard error."""
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    return bool(differences.mean() <= error)


def farthest(measures: Sequence[Measure], bits: Bits, start: Bits) -> Measure | None:
    """The measure with most of its way still to go, or None if every limit holds."""
    measure = max(measures, key=lambda one: one.missing(bits, start))
    return measure if measure.missing(bits, start) > 0 else None


def with_bits(bits: Bits, variable: int, width: int) -> Bits:
    """The same bits but for one variable."""
    return (*bits[:variable], width, *bits[variable + 1 :])
