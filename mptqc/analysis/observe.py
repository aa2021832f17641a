"""One run of the calibration data through the float model, keeping bounded, stratified samples of what sites see.

Rows (token vectors) of a Linear's input: random rows, evenly from all images, weighted to stand for all rows, and the
rows with the largest values of all, each with weight 1: random samples alone miss massive activations.
Attention operands: (window, head) slices, spread evenly over the images, all keys and some of the queries of each.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.data.samples import Samples
from mptqc.graph.layout import trace
from mptqc.graph.match import Attention
from mptqc.runtime.session import create_session, run_arrays

Array = NDArray[np.float32]
Progress = Callable[[str, int, int], None]

RANDOM_ROWS = 1024
EXTREME_ROWS = 128
SLICE_ELEMENTS = 1_250_000
LEAST_SLICES, MOST_SLICES = 8, 512
MOST_QUERIES = 64
BATCH_BYTES = 400_000_000


@dataclass(frozen=True)
class Rows:
    """Sampled rows of one value: `rows` [n, C], `weights` [n] (how many rows of the data each stands for).

    `low`, `high` [C]: smallest and largest value per channel over all the data, not only the sample.
    """

    rows: Array
    weights: Array
    low: Array
    high: Array


@dataclass(frozen=True)
class Slices:
    """Sampled operands of one attention: q [n, T, d], k [n, S, d], p [n, T, S], v [n, S, d]; `heads` [n].

    T: as many of the queries as `MOST_QUERIES`, chosen for each slice anew.
    `scores` [n, T, S], what its softmax reads, if they were asked for.
    """

    q: Array
    k: Array
    p: Array
    v: Array
    heads: NDArray[np.int64]
    scores: Array | None = None


@dataclass(frozen=True)
class Observations:
    """Samples by value name (rows) and by attention site (slices)."""

    rows: dict[str, Rows]
    slices: dict[str, Slices]


@dataclass
class _RowCollector:
    """Grows while batches arrive; see Rows."""

    total_images: int
    random: np.random.Generator
    kept: list[Array] = field(default_factory=list)
    seen_images: int = 0
    seen_rows: int = 0
    extreme: Array | None = None
    low: Array | None = None
    high: Array | None = None

    def add(self, value: Array, images: int) -> None:
        rows = value.reshape(-1, value.shape[-1])
        low, high = rows.min(axis=0), rows.max(axis=0)
        self.low = low if self.low is None else np.minimum(self.low, low)
        self.high = high if self.high is None else np.maximum(self.high, high)
        self.seen_images += images
        self.seen_rows += len(rows)
        due = -(-RANDOM_ROWS * self.seen_images // self.total_images) - sum(len(part) for part in self.kept)
        chosen = self.random.choice(len(rows), min(max(due, 0), len(rows)), replace=False)
        self.kept.append(rows[chosen])
        pool = rows if self.extreme is None else np.concatenate([self.extreme, rows])
        size = np.abs(pool).max(axis=1)
        keep = np.argsort(-size, kind="stable")[:EXTREME_ROWS]
        self.extreme = pool[keep]

    def rows(self) -> Rows:
        assert self.extreme is not None
        assert self.low is not None
        assert self.high is not None
        kept = np.concatenate(self.kept)
        weights = np.full(len(kept), self.seen_rows / len(kept), np.float32)
        return Rows(
            np.concatenate([kept, self.extreme]),
            np.concatenate([weights, np.ones(len(self.extreme), np.float32)]),
            self.low,
            self.high,
        )


@dataclass
class _SliceCollector:
    """Takes an even share of each batch's (window, head) slices; see Slices."""

    wanted: int
    total_images: int
    random: np.random.Generator
    parts: list[tuple[Array, ...]] = field(default_factory=list)
    heads: list[NDArray[np.int64]] = field(default_factory=list)
    seen: int = 0

    def add(self, operands: Sequence[Array], images: int) -> None:
        q = operands[0]
        self.seen += images
        due = round(self.wanted * self.seen / self.total_images) - sum(len(heads) for heads in self.heads)
        slices = int(np.prod(q.shape[:-2]))
        chosen = np.sort(self.random.choice(slices, min(due, slices), replace=False))
        flat = [value.reshape(slices, *value.shape[-2:])[chosen] for value in operands]
        flat[1] = np.ascontiguousarray(np.swapaxes(flat[1], 1, 2))
        queries = flat[0].shape[1]
        if queries > MOST_QUERIES:
            order = self.random.permuted(np.tile(np.arange(queries), (len(chosen), 1)), axis=1)[:, :MOST_QUERIES]
            for index in (0, 2, *range(4, len(flat))):
                flat[index] = np.take_along_axis(flat[index], order[:, :, None], axis=1)
        self.parts.append(tuple(flat))
        self.heads.append(chosen % q.shape[-3])

    def slices(self) -> Slices:
        q, k, p, v, *scores = (np.concatenate(parts) for parts in zip(*self.parts, strict=True))
        return Slices(q, k, p, v, np.concatenate(self.heads), *scores)


def observe(
    model: ir.Model,
    samples: Samples,
    values: Sequence[ir.Value],
    attentions: Sequence[Attention],
    shapes: dict[str, tuple[int, ...]],
    seed: int,
    report: Progress,
    *,
    scores: bool = False,
) -> Observations:
    """Run all samples once and collect what the searches need; memory does not grow with their number.

    Args:
        model: the float model.
        samples: calibration images.
        values: values whose rows are sampled (inputs of Linears, outputs of norms); names must be unique.
        attentions: attentions whose operands are sampled.
        shapes: concrete shapes at batch 1.
        seed: seed of the choice of rows and slices.
        report: called with (step, done, total) as images pass.
        scores: whether what the attentions' softmaxes read is sampled too.
    """
    names = list(dict.fromkeys(str(value.name) for value in values))
    operands = {
        attention.site: [str(value.name) for value in _sampled(attention, scores=scores)] for attention in attentions
    }
    outputs = list(dict.fromkeys([*names, *(name for those in operands.values() for name in those)]))
    random = np.random.default_rng(seed)
    row_collectors = {name: _RowCollector(samples.count, random) for name in names}
    slice_collectors = {
        site: _SliceCollector(_slices_wanted(shapes[those[2]], samples.count), samples.count, random)
        for site, those in operands.items()
    }
    image_bytes = 4 * sum(int(np.prod(shapes[name])) for name in outputs)
    done = 0
    for found, images in run_batches(model, samples, outputs, max(1, min(16, BATCH_BYTES // max(image_bytes, 1)))):
        for name, row_collector in row_collectors.items():
            row_collector.add(found[name], images)
        for site, slice_collector in slice_collectors.items():
            slice_collector.add([found[name] for name in operands[site]], images)
        done = min(done + images, samples.count)
        report("observe", done, samples.count)
    return Observations(
        {name: collector.rows() for name, collector in row_collectors.items()},
        {site: collector.slices() for site, collector in slice_collectors.items()},
    )


def _sampled(attention: Attention, *, scores: bool) -> list[ir.Value]:
    """q, k, p, v and, if asked for, the scores."""
    return [attention.q, attention.k, attention.p, attention.v, *([attention.masked_scores] if scores else [])]


def _slices_wanted(probabilities: tuple[int, ...], images: int) -> int:
    """How many (window, head) slices to keep, within the memory set for one attention."""
    rows, columns = probabilities[-2:]
    available = images * int(np.prod(probabilities[:-2]))
    elements = min(rows, MOST_QUERIES) * columns
    return min(available, max(LEAST_SLICES, min(MOST_SLICES, SLICE_ELEMENTS // elements)))


def run_batches(
    model: ir.Model, samples: Samples, outputs: Sequence[str], batch: int
) -> Iterator[tuple[dict[str, Array], int]]:
    """Yield (values by name, images in the batch) for each of `fitting_batches`."""
    session = create_session(with_outputs(model, outputs))
    for images in fitting_batches(model, samples, batch):
        found = run_arrays(session, outputs, {str(model.graph.inputs[0].name): images})
        yield dict(zip(outputs, found, strict=True)), len(images)


def fitting_batches(model: ir.Model, samples: Samples, batch: int) -> Iterator[Array]:
    """Yield the images in batches that the model takes, [B, C, H, W].

    A fixed batch in the model wins over `batch`; its last batch is filled up by repeating its images.
    """
    shape = model.graph.inputs[0].shape
    assert shape is not None
    fixed = shape[0]
    for images in samples.batches(fixed if isinstance(fixed, int) else batch):
        yield np.resize(images, (fixed, *images.shape[1:])) if isinstance(fixed, int) else images


def with_outputs(model: ir.Model, names: Sequence[str]) -> bytes:
    """The model's bytes with these values as its only outputs."""
    proto = ir.to_proto(model)
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    serialized: bytes = proto.SerializeToString()  # type: ignore[no-untyped-call] # protobuf has no types
    return serialized


def origin(value: ir.Value, shapes: dict[str, tuple[int, ...]]) -> ir.Value:
    """The computed value that `value` was moved from."""
    return trace(value, shapes).source
