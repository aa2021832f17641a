"""Allocators: from all variables at their most bits to a choice of bits that keeps every limit.

greedy   Each step lowers one variable by one bit: the one with the least change/Δcost, where the change of the outputs
         (`sensitivity`) is measured with all earlier choices in place and the cost is the one farthest from its limit.
         A change is kept until the variable comes to the head of the queue and is then measured anew (lazy), so only
         few are measured a step. Prices that differ by less than their noise (the standard error of the paired
         difference over images) are ties; the largest saving wins.
exact    Every variable is measured at every width with all others at their most bits; the sum of these losses is
         minimised under the limits as an integer program (scipy's HiGHS). Exact for losses that add up.
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
Holds = Callable[[Measured], bool]
Changes = NDArray[np.float64]

HEAD = 4
"""Variables at the head of the queue that are measured anew before a step."""

VARIABLES_A_STEP = 32
"""Of so many variables one is lowered at a time: large models take several steps between two measurements."""

GROWTH = 2.0
"""A variable's next bit is expected to cost so many times the last until it is measured: less than the 4 of rounding
noise, so that it comes to the head too early rather than too late."""


@dataclass(frozen=True)
class Taken:
    """A step: a variable (its position) got these bits; `bits` and `measured` are of the whole model after it."""

    variable: int
    bits: Bits
    measured: Measured


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


def greedy(
    variables: Sequence[BitVariable],
    start: Bits,
    measures: Sequence[Measure],
    score: Score,
    report: Progress,
    holds: Holds | None = None,
) -> list[Taken]:
    """Lower bits one by one until every limit holds, or nothing more can be lowered.

    Args:
        variables: what bits are given to.
        start: their bits.
        measures: limits.
        score: measures choices of bits.
        report: called with (step, done, total).
        holds: if given, steps after which it is false are not taken, and their variables stay as they are.
    """
    search = _Greedy(variables, start, score)
    at_once = 1 if holds is not None else max(1, len(variables) // VARIABLES_A_STEP)
    while (measure := _farthest(measures, search.state, start)) is not None:
        report("allocate bits", round(1000 * (1 - measure.missing(search.state, start))), 1000)
        savings = search.savings(measure)
        if not savings:
            break
        for variable in search.next_steps(savings, at_once):
            if measure.missing(search.state, start) > 0:
                search.take(variable, holds)
    return search.taken


class _Greedy:
    """The state of a greedy search."""

    def __init__(self, variables: Sequence[BitVariable], start: Bits, score: Score) -> None:
        self.state = start
        self.taken: list[Taken] = []
        self._variables = variables
        self._score = score
        self._guesses: dict[int, Guess] = {}
        self._stuck: set[int] = set()

    def savings(self, measure: Measure) -> dict[int, float]:
        """What the next bit of each variable saves, for those that can be lowered and save something."""
        found = {}
        before = measure.cost(self.state)
        for at, variable in enumerate(self._variables):
            if self.state[at] > variable.widths[0] and at not in self._stuck:
                saving = before - measure.cost(self._lowered(at))
                if saving > 0:
                    found[at] = saving
        return found

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

    def take(self, variable: int, holds: Holds | None) -> None:
        """Lower a variable, unless the model then no longer holds what it must."""
        bits = self._lowered(variable)
        measured = self._score(self.state, [bits])[0]
        if holds is not None and not holds(measured):
            self._stuck.add(variable)
            return
        self.taken.append(Taken(variable, bits, measured))
        self.state = bits
        self._guesses[variable] = Guess(GROWTH * self._guesses[variable].changes, None)

    def _measure(self, chosen: Sequence[int]) -> None:
        found = self._score(self.state, [self._lowered(at) for at in chosen])
        for at, measured in zip(chosen, found, strict=True):
            self._guesses[at] = Guess(measured.changes, self.state)

    def _best_of_ties(self, fresh: Sequence[int], savings: Mapping[int, float]) -> int:
        best = fresh[0]
        reference = self._guesses[best].changes / savings[best]
        ties = [at for at in fresh if within_noise(self._guesses[at].changes / savings[at] - reference)]
        return max(ties, key=lambda at: (savings[at], -at))

    def _price(self, variable: int, savings: Mapping[int, float]) -> float:
        return float(self._guesses[variable].changes.mean()) / savings[variable]

    def _lowered(self, variable: int) -> Bits:
        return (*self.state[:variable], self.state[variable] - 1, *self.state[variable + 1 :])


def within_noise(differences: Changes) -> bool:
    """True if the mean of paired differences over images is no larger than its standard error."""
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    return bool(differences.mean() <= error)


def _farthest(measures: Sequence[Measure], bits: Bits, start: Bits) -> Measure | None:
    """The measure with most of its way still to go, or None if every limit holds."""
    measure = max(measures, key=lambda one: one.missing(bits, start))
    return measure if measure.missing(bits, start) > 0 else None


def exact(
    variables: Sequence[BitVariable], start: Bits, measures: Sequence[Measure], score: Score, report: Progress
) -> list[Taken]:
    """The choice of bits with the least sum of single losses that keeps every limit, as steps in order of their price.

    Args:
        variables: what bits are given to.
        start: their bits.
        measures: limits; each cost must be a sum over variables.
        score: measures choices of bits.
        report: called with (step, done, total).

    Raises:
        RecipeError: scipy is not installed.
        BudgetError: no choice of bits keeps all limits together.
    """
    options = [(at, width) for at, variable in enumerate(variables) for width in variable.widths]
    choices = [(*start[:at], width, *start[at + 1 :]) for at, width in options]
    losses = np.empty(len(options))
    for done in range(0, len(options), HEAD):
        report("measure every width", done, len(options))
        part = choices[done : done + HEAD]
        losses[done : done + HEAD] = [measured.changes.mean() for measured in score(start, part)]
    losses = _falling(losses, options)
    costs = [np.array([measure.cost(bits) for bits in choices]) for measure in measures]
    rooms = [measure.limit - measure.cost(start) for measure in measures]
    savings = [measure.cost(start) - cost for measure, cost in zip(measures, costs, strict=True)]
    picked = _solve(losses, options, savings, rooms)
    steps = [option for option in picked if options[option][1] != start[options[option][0]]]
    relative = sum(saving / max(-room, np.finfo(float).eps) for saving, room in zip(savings, rooms, strict=True))
    steps.sort(key=lambda option: losses[option] / max(relative[option], np.finfo(float).eps))
    state, taken = start, []
    for option in steps:
        at, width = options[option]
        bits = (*state[:at], width, *state[at + 1 :])
        taken.append(Taken(at, bits, score(state, [bits])[0]))
        state = bits
    return taken


def _falling(losses: NDArray[np.float64], options: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
    """Losses that never fall with fewer bits: what does is noise. Options of a variable are in order of their bits."""
    found = losses.copy()
    for option in range(len(options) - 2, -1, -1):
        if options[option][0] == options[option + 1][0]:
            found[option] = max(found[option], found[option + 1])
    return found


def _solve(
    losses: NDArray[np.float64],
    options: Sequence[tuple[int, int]],
    savings: Sequence[NDArray[np.float64]],
    rooms: Sequence[float],
) -> list[int]:
    """The options of the integer program: one a variable, Σ savings ≥ −room of each measure, Σ losses least."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise RecipeError(
            "allocator 'exact' needs scipy, which is not installed: pip install 'mptqc[exact]'"
        ) from error
    owners = np.array([at for at, _ in options])
    one_each = (owners == np.arange(owners.max() + 1)[:, None]).astype(float)
    constraints = [LinearConstraint(one_each, 1, 1)]
    constraints += [LinearConstraint(saving[None], -room, np.inf) for saving, room in zip(savings, rooms, strict=True)]
    solved = milp(losses, integrality=np.ones(len(options)), bounds=Bounds(0, 1), constraints=constraints)
    if solved.x is None:
        raise BudgetError(f"no choice of bits keeps all limits of the budget together ({solved.message})")
    return [int(option) for option in np.flatnonzero(solved.x > 0.5)]
