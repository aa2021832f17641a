"""How well a model does on samples, and how near it stays to its float reference.

top1, top5    share of images whose label is first, or among the first five, of the first output [N, classes]
agreement     share of images whose largest logit is the reference's
sqnr_db       10 log10( Σ ref² / Σ (ref − out)² )       over all elements of all float outputs and all images
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mptqc.data.samples import FloatImages, Labels, Samples
from mptqc.errors import DataError, ModelError, RecipeError, VerifyError
from mptqc.runtime.model_io import ModelInput, image_input, run_batch
from mptqc.runtime.session import Session, create_session

logger = logging.getLogger(__name__)

MAX_SQNR_DB = 200.0
"""sqnr_db of identical outputs, above what float32 outputs reach otherwise; keeps the figure a finite number."""

TOP = 5

Progress = Callable[[str, int, int], None]
"""Called with the step's name, what is done, and the total."""


@dataclass(frozen=True)
class Evaluation:
    """Fractions, not percents; None where a figure is not defined.

    `top1`, `top5`: without labels, or without a first output [N, classes] (`top5` also below five classes).
    `agreement`: without a reference, or without a first output [N, classes]. `sqnr_db`: without a reference, or when
    the reference's outputs are all zero. Models with dense outputs have `sqnr_db` only.
    """

    top1: float | None
    top5: float | None
    agreement: float | None
    sqnr_db: float | None
    images: int


def evaluate(
    model: bytes | str | Path | Session,
    samples: Samples,
    *,
    reference: bytes | str | Path | Session | None = None,
    provider: str = "cpu",
    threads: int = 0,
    batch: int = 8,
    progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Run the samples through a model, and through a reference if given, in one pass and constant memory.

    Args:
        model: an ONNX file, its bytes, or a session (whose provider and threads then count).
        samples: already fit to the model's input.
        reference: the float model, likewise.
        provider: "cpu" or "cuda".
        threads: per session, 0 for every core.
        batch: images a run; a model with a fixed batch gets that instead, the last one padded.
        progress: called after each batch.

    Raises:
        DataError: a sample cannot be used, or a label is no class of the model.
        ModelError: a model has no single image input, or the two models' outputs differ in number or shape.
        RecipeError: batch is not positive.
        VerifyError: an output is NaN or infinite.
    """
    if batch < 1:
        raise RecipeError(f"batch is {batch}; give a positive number.")
    run_model = _Runner.open(model, provider=provider, threads=threads)
    run_reference = None if reference is None else _Runner.open(reference, provider=provider, threads=threads)
    batch = run_model.value.fixed_batch or batch
    sums = _Sums(samples)
    for images in samples.batches(batch):
        outputs = run_model(images)
        sums.add(len(images), outputs, None if run_reference is None else run_reference(images))
        if progress is not None:
            progress("evaluate", sums.images, samples.count)
    return sums.result()


class _Runner:
    """A session with its image input; cuts batches to the size the model takes."""

    def __init__(self, session: Session, value: ModelInput) -> None:
        self.session = session
        self.value = value

    @classmethod
    def open(cls, model: bytes | str | Path | Session, *, provider: str, threads: int) -> "_Runner":
        session = model if isinstance(model, Session) else create_session(model, provider=provider, threads=threads)
        return cls(session, image_input(session))

    def __call__(self, images: FloatImages) -> list[FloatImages]:
        parts = [run_batch(self.session, self.value, part) for part in self._parts(images)]
        outputs = parts[0] if len(parts) == 1 else [np.concatenate(column) for column in zip(*parts, strict=True)]
        for output in outputs:
            if not np.isfinite(output).all():
                raise VerifyError("the model's output holds NaN or infinite values, so no figure of it means anything.")
        return outputs

    def _parts(self, images: FloatImages) -> Iterator[FloatImages]:
        size = self.value.fixed_batch or len(images)
        for start in range(0, len(images), size):
            yield images[start : start + size]


class _Sums:
    """Running sums over batches."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self._labels: Labels | None = None
        self._first: int | None = None
        self._among_top: int | None = None
        self._agreeing: int | None = None
        self._signal = 0.0
        self._noise: float | None = None
        self.images = 0

    def add(self, count: int, outputs: list[FloatImages], reference: list[FloatImages] | None) -> None:
        """Take in the outputs for the next `count` images, and the reference's for the same images."""
        logits = _logits(outputs)
        if self.images == 0:
            self._labels = None if logits is None else usable_labels(self._samples, logits.shape[1])
        if logits is not None and self._labels is not None:
            self._add_ranks(logits, self._labels[self.images : self.images + count])
        if reference is not None:
            self._add_reference(outputs, reference, logits)
        self.images += count

    def result(self) -> Evaluation:
        """Return the figures over everything added."""
        return Evaluation(
            top1=self._share(self._first),
            top5=self._share(self._among_top),
            agreement=self._share(self._agreeing),
            sqnr_db=None if self._noise is None else sqnr_db(self._signal, self._noise),
            images=self.images,
        )

    def _share(self, hits: int | None) -> float | None:
        return None if hits is None else hits / self.images

    def _add_ranks(self, logits: FloatImages, labels: Labels) -> None:
        ranked = np.argsort(-logits, axis=1, kind="stable")
        hits = ranked[:, :TOP] == labels[:, None]
        self._first = (self._first or 0) + int(hits[:, 0].sum())
        if logits.shape[1] >= TOP:
            self._among_top = (self._among_top or 0) + int(hits.sum())

    def _add_reference(
        self, outputs: list[FloatImages], reference: list[FloatImages], logits: FloatImages | None
    ) -> None:
        shapes, wanted = [[output.shape for output in values] for values in (outputs, reference)]
        if shapes != wanted:
            raise ModelError(
                f"the model's outputs have shapes {shapes}, the reference's {wanted}; give the float model that it was "
                "compiled from as the reference."
            )
        for output, expected in zip(outputs, reference, strict=True):
            exact = expected.astype(np.float64)
            self._signal += float(np.square(exact).sum())
            self._noise = (self._noise or 0.0) + float(np.square(exact - output).sum())
        if logits is not None:
            same = logits.argmax(axis=1) == reference[0].argmax(axis=1)
            self._agreeing = (self._agreeing or 0) + int(same.sum())


def _logits(outputs: list[FloatImages]) -> FloatImages | None:
    """Return the first output if it is [N, classes] with at least two classes."""
    if not outputs:
        raise ModelError("the model has no floating point output to evaluate.")
    first: npt.NDArray[np.float32] = outputs[0]
    return first if first.ndim == 2 and first.shape[1] >= 2 else None


def usable_labels(samples: Samples, classes: int) -> Labels | None:
    """Return the samples' labels where they are classes of a model with `classes` of them.

    Sub-folders with names that are no numbers are numbered by their order; that is the model's numbering only if there
    are as many as classes. Otherwise a warning is logged and there are no labels.

    Raises:
        DataError: a label is no class of the model.
    """
    labels, names = samples.labels, samples.label_names
    if labels is None:
        return None
    if names is not None and len(names) != classes and not all(name.isdecimal() for name in names.values()):
        logger.warning(
            "the folder has %d sub-folders and the model %d classes, so which is which is not known and there is no "
            "top1 or top5; name the sub-folders by class number",
            len(names),
            classes,
        )
        return None
    if labels.max() >= classes:
        raise DataError(f"label {labels.max()} is no class of the model, which has {classes} (the first is 0).")
    return labels


def sqnr_db(signal: float, noise: float) -> float | None:
    """Return 10 log10(signal / noise) in dB for sums of squares; None without signal, NaN for NaN.

    At most MAX_SQNR_DB.
    """
    if signal == 0:
        return None
    if noise == 0:
        return MAX_SQNR_DB
    decibels = 10 * math.log10(signal / noise)
    return MAX_SQNR_DB if decibels > MAX_SQNR_DB else decibels
