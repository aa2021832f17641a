"""What a choice of bits costs at the model's outputs: the quantized model itself is run, segment by segment.

A segment is quantized by the very passes that emit the compiled model, so its values are the emitted ones, weights
rounded at searched scales. Values at the cuts are kept for one choice of bits (the search's present state): what
differs from it from segment i on is run from segment i on only.

    output loss   ‖y − ŷ‖² of an image over the mean of ‖y‖²; of logits [N, classes] each image's mean is removed first
    KL loss       KL(softmax(y) ‖ softmax(ŷ))
    change        the same between ŷ of the search's present state and ŷ: the noise that a step adds, without what it
                  happens to cancel on the few scoring images
    hit           the label is first; without labels: float's answer is
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.analysis.bit_variables import Bits, BitVariable
from mptqc.analysis.observe import fitting_batches, with_outputs
from mptqc.analysis.widths import at_bits
from mptqc.data.samples import Samples
from mptqc.graph.segments import Segment, split
from mptqc.plan import QuantPlan
from mptqc.recipe import Loss
from mptqc.runtime.evaluate import usable_labels
from mptqc.runtime.session import Session, create_session, run_arrays

Array = NDArray[np.generic]
Outputs = Sequence[Sequence[Array]]
"""The graph's outputs, of each batch."""
Quantize = Callable[[ir.Model, QuantPlan], None]

BATCH = 8
SESSIONS_PER_SEGMENT = 2


@dataclass(frozen=True)
class Measured:
    """What one choice of bits does to each scoring image.

    Attributes:
        losses: against float, [n].
        changes: against the state that the search was in, [n].
        hits: [n], or None for outputs without classes.
    """

    losses: NDArray[np.float64]
    changes: NDArray[np.float64]
    hits: NDArray[np.bool_] | None

    @property
    def loss(self) -> float:
        """The mean loss."""
        return float(self.losses.mean())

    @property
    def accuracy(self) -> float | None:
        """The share of hits."""
        return None if self.hits is None else float(self.hits.mean())


@dataclass(frozen=True)
class Part:
    """A segment, the variables in it (positions in the whole list), and its part of the plan with all widths."""

    segment: Segment
    variables: tuple[tuple[int, BitVariable], ...]
    plan: QuantPlan


@dataclass(frozen=True)
class Problem:
    """All that scoring needs; immutable, and picklable for workers in other processes.

    Attributes:
        digest: of what it was made of; names the problem in caches and checkpoints.
        parts: segments in order.
        loss: how outputs are compared.
        quantize: makes what a plan names run in integers.
        image: the graph input's name.
        batches: scoring images.
        count: how many they are; what the last batch has beyond it is filling.
        outputs: the graph's outputs, by name.
        reference: the float outputs of each batch.
        targets: the class that counts as a hit for each image, or None.
    """

    digest: str
    loss: Loss
    parts: tuple[Part, ...]
    quantize: Quantize
    image: str
    batches: tuple[Array, ...]
    count: int
    outputs: tuple[str, ...]
    reference: tuple[tuple[Array, ...], ...]
    targets: NDArray[np.int64] | None


def make_problem(
    model: ir.Model,
    samples: Samples,
    plan: QuantPlan,
    variables: Sequence[BitVariable],
    quantize: Quantize,
    digest: str,
) -> Problem:
    """Cut the model and run it in float.

    Args:
        model: the smoothed float model, its tensors marked.
        samples: scoring images.
        plan: holds the quantizers of all widths.
        variables: every choice of bits.
        quantize: see Problem.
        digest: see Problem.
    """
    parts = tuple(_part(segment, plan, variables) for segment in split(model))
    image = str(model.graph.inputs[0].name)
    outputs = tuple(str(value.name) for value in model.graph.outputs)
    batches = tuple(fitting_batches(model, samples, BATCH))
    session = create_session(with_outputs(model, outputs))
    reference = tuple(tuple(run_arrays(session, outputs, {image: images})) for images in batches)
    targets = None
    if is_logits(reference[0][0]):
        answers = np.concatenate([found[0].argmax(axis=1) for found in reference])[: samples.count]
        labels = usable_labels(samples, reference[0][0].shape[1])
        targets = answers if labels is None else labels
    loss = plan.recipe.loss if is_logits(reference[0][0]) else Loss.OUTPUT
    return Problem(digest, loss, parts, quantize, image, batches, samples.count, outputs, reference, targets)


def _part(segment: Segment, plan: QuantPlan, variables: Sequence[BitVariable]) -> Part:
    here = tuple((at, one) for at, one in enumerate(variables) if set(one.sites) & set(segment.sites))
    names = tuple(f"{one.name}/" for _, one in here) + tuple(f"{site}/" for site in segment.sites)
    arrays = {key: array for key, array in plan.arrays.items() if key.startswith(names)}
    return Part(segment, here, plan.model_copy(update={"arrays": arrays}))


def is_logits(output: Array) -> bool:
    """True for [N, classes]."""
    return output.ndim == 2 and output.shape[1] > 1


class Simulator:
    """Runs a problem at any choice of bits; one a process, used by several threads at once."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._cuts_lock, self._sessions_lock = Lock(), Lock()
        start: list[dict[str, Array]] = [{problem.image: images} for images in problem.batches]
        self._cuts = [start]
        self._cut_bits: list[Bits] = []
        self._sessions: OrderedDict[tuple[int, Bits], Session] = OrderedDict()
        self._state: Bits | None = None
        self._state_outputs: Outputs = []
        self._power = _power(problem)

    def measure(self, state: Bits, bits: Bits) -> Measured:
        """Run at `bits`, keeping the values at the cuts for `state`, the search's present one."""
        parts = self._problem.parts
        first = next((at for at, part in enumerate(parts) if _of(part, state) != _of(part, bits)), len(parts) - 1)
        with self._cuts_lock:
            values = self._values_before(first, state)
            before = self._outputs_of(state)
        outputs = self._run_from(first, bits, values)
        problem = self._problem
        hits = None
        if problem.targets is not None:
            hits = np.concatenate([made[0].argmax(axis=1) for made in outputs])[: problem.count] == problem.targets
        return Measured(self._compare(problem.reference, outputs), self._compare(before, outputs), hits)

    def _outputs_of(self, state: Bits) -> Outputs:
        """The outputs of the search's present state, run once."""
        if self._state != state:
            last = len(self._problem.parts) - 1
            self._state_outputs = self._run_from(last, state, self._values_before(last, state))
            self._state = state
        return self._state_outputs

    def _run_from(self, first: int, bits: Bits, values: Sequence[Mapping[str, Array]]) -> Outputs:
        """The graph's outputs, from values at a cut."""
        outputs = []
        for batch in values:
            current = batch
            for position in range(first, len(self._problem.parts)):
                current = self._run(position, bits, current)
            outputs.append([current[name] for name in self._problem.outputs])
        return outputs

    def _compare(self, exact: Outputs, made: Outputs) -> NDArray[np.float64]:
        """The loss of each image, [n]."""
        compare = _divergence if self._problem.loss is Loss.KL else _squared_error
        losses = np.concatenate([compare(one, other) for one, other in zip(exact, made, strict=True)])
        return losses[: self._problem.count] / self._power

    def _values_before(self, segment: int, state: Bits) -> list[dict[str, Array]]:
        """Values at the cut before a segment, of each batch."""
        parts = self._problem.parts
        valid = 0
        while valid < len(self._cut_bits) and self._cut_bits[valid] == _of(parts[valid], state):
            valid += 1
        del self._cut_bits[valid:], self._cuts[valid + 1 :]
        for position in range(valid, segment):
            self._cuts.append([self._run(position, state, batch) for batch in self._cuts[position]])
            self._cut_bits.append(_of(parts[position], state))
        return self._cuts[segment]

    def _run(self, position: int, bits: Bits, values: Mapping[str, Array]) -> dict[str, Array]:
        """Values after a segment that something still needs."""
        segment = self._problem.parts[position].segment
        session = self._session(position, _of(self._problem.parts[position], bits))
        made = run_arrays(session, segment.outputs, {name: values[name] for name in segment.inputs})
        after = {name for part in self._problem.parts[position + 1 :] for name in part.segment.inputs}
        kept = {name: array for name, array in values.items() if name in after or name in self._problem.outputs}
        return kept | dict(zip(segment.outputs, made, strict=True))

    def _session(self, position: int, bits: Bits) -> Session:
        key = position, bits
        with self._sessions_lock:
            session = self._sessions.pop(key, None)
        if session is None:
            session = create_session(quantized_segment(self._problem, position, bits), threads=1, keep_memory=False)
        with self._sessions_lock:
            self._sessions[key] = session  # the latest used is the last
            while len(self._sessions) > SESSIONS_PER_SEGMENT * len(self._problem.parts):
                self._sessions.popitem(last=False)
        return session


def quantized_segment(problem: Problem, position: int, bits: Bits) -> bytes:
    """A segment with its variables (in the order of its part) at these bits, as ONNX bytes."""
    part = problem.parts[position]
    variables = [variable for _, variable in part.variables]
    chosen = {variable.name: number for variable, number in zip(variables, bits, strict=True)}
    model = ir.from_proto(onnx.load_model_from_string(part.segment.model))
    problem.quantize(model, at_bits(part.plan, variables, chosen))
    return with_outputs(model, part.segment.outputs)


def _of(part: Part, bits: Bits) -> Bits:
    return tuple(bits[at] for at, _ in part.variables)


def _power(problem: Problem) -> float:
    """What losses are divided by: the mean over images of ‖y‖², 1 for KL."""
    if problem.loss is Loss.KL:
        return 1.0
    zeros = [[np.zeros_like(output) for output in batch] for batch in problem.reference]
    powers = [_squared_error(one, other) for one, other in zip(problem.reference, zeros, strict=True)]
    return max(float(np.concatenate(powers)[: problem.count].mean()), np.finfo(np.float64).tiny)


def _squared_error(exact: Sequence[Array], made: Sequence[Array]) -> NDArray[np.float64]:
    """‖y − ŷ‖² of each image, [B]."""
    total = np.zeros(len(exact[0]))
    for one, other in zip(exact, made, strict=True):
        error = (one.astype(np.float64) - other.astype(np.float64)).reshape(len(one), -1)
        if is_logits(one):
            error -= error.mean(axis=1, keepdims=True)
        total += np.square(error).sum(axis=1)
    return total


def _divergence(exact: Sequence[Array], made: Sequence[Array]) -> NDArray[np.float64]:
    """KL(softmax(y) ‖ softmax(ŷ)) of each image, [B]; never negative by rounding."""
    true, found = _log_softmax(exact[0]), _log_softmax(made[0])
    divergence: NDArray[np.float64] = (np.exp(true) * (true - found)).sum(axis=1)
    return np.maximum(divergence, 0)


def _log_softmax(logits: Array) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    normal: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return normal


_SIMULATORS: dict[str, Simulator] = {}
_MAKING = Lock()


def measure(problem: Problem, state: Bits, bits: Bits) -> Measured:
    """Run a problem at a choice of bits with this process's simulator of it; `state` as in `Simulator.measure`."""
    with _MAKING:
        if problem.digest not in _SIMULATORS:
            _SIMULATORS.clear()
            _SIMULATORS[problem.digest] = Simulator(problem)
        simulator = _SIMULATORS[problem.digest]
    return simulator.measure(state, bits)
