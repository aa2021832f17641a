"""Calibration and evaluation samples: read lazily, in batches, checked as they are read."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mptqc.errors import DataError

FloatImages = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


class Hash(Protocol):
    """What a source feeds its content to; hashlib's objects are."""

    def update(self, data: bytes, /) -> None:
        """Take more bytes in."""


class Source(Protocol):
    """Where samples come from; samples are numbered from 0."""

    def read(self, indices: Sequence[int]) -> FloatImages:
        """Return float32 [len(indices), C, H, W]; raise DataError on what cannot be read."""

    def check(self, indices: Sequence[int]) -> None:
        """Raise DataError on what a quick look shows to be unreadable; decodes nothing."""

    def name(self, index: int) -> str:
        """Name a sample for messages."""

    def hash_into(self, digest: Hash, indices: Sequence[int]) -> None:
        """Feed `digest` with all that the samples' values depend on, in order."""


class Samples:
    """Images for one model input, with labels where known. Immutable; only one batch is in memory at a time.

    (A .npz file's array is held whole, because zip members cannot be mapped; folders and .npy files are not.)
    """

    def __init__(
        self,
        source: Source,
        indices: Sequence[int],
        labels: Labels | None,
        label_names: Mapping[int, str] | None = None,
    ) -> None:
        self._source = source
        self._indices = tuple(indices)
        self._labels = labels
        self.label_names = label_names
        """Names of a folder's labels by label; None where labels are plain numbers or unknown."""

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self._indices)

    def __len__(self) -> int:
        return self.count

    @property
    def labels(self) -> Labels | None:
        """Class of each sample, int64 [count], or None."""
        return None if self._labels is None else self._labels[list(self._indices)]

    def batches(self, batch_size: int) -> Iterator[FloatImages]:
        """Yield float32 [B, C, H, W] in order, B = batch_size but for the last.

        Raises:
            DataError: a sample cannot be read, has the wrong shape, holds NaN or Inf, or is constant.
        """
        if batch_size < 1:
            raise DataError(f"batch size is {batch_size}; give a positive number.")
        for start in range(0, self.count, batch_size):
            chosen = self._indices[start : start + batch_size]
            images = self._source.read(chosen)
            self._check(images, chosen)
            yield images

    def take(self, n: int, seed: int) -> "Samples":
        """Return n samples drawn without replacement, in their old order; all of them if there are no more than n."""
        if n < 1:
            raise DataError(f"{n} samples were asked for; give a positive number.")
        if n >= self.count:
            return self
        drawn = np.sort(np.random.default_rng(seed).permutation(self.count)[:n])
        return Samples(self._source, [self._indices[k] for k in drawn], self._labels, self.label_names)

    @property
    def source(self) -> Source:
        """Where the samples are read from."""
        return self._source

    @property
    def indices(self) -> tuple[int, ...]:
        """The source's numbers of the samples, in order."""
        return self._indices

    def check_headers(self) -> None:
        """Raise DataError on a sample that a quick look shows to be unreadable; decodes nothing."""
        self._source.check(self._indices)

    def digest(self) -> str:
        """Return the sha256 (hex) of all that the samples' values and labels depend on; file names do not count."""
        digest = hashlib.sha256()
        self._source.hash_into(digest, self._indices)
        labels = self.labels
        digest.update(b"no labels" if labels is None else labels.tobytes())
        return digest.hexdigest()

    def _check(self, images: FloatImages, indices: Sequence[int]) -> None:
        flat = images.reshape(len(images), -1)
        for k, index in enumerate(indices):
            low, high = flat[k].min(), flat[k].max()
            if not (np.isfinite(low) and np.isfinite(high)):
                raise DataError(f"{self._source.name(index)} holds NaN or infinite values; remove or mend it.")
            if low == high:
                raise DataError(
                    f"{self._source.name(index)} is constant (every value is {low}), so it tells nothing about the "
                    "model's activations; remove it."
                )


def shape_text(shape: Sequence[int | None]) -> str:
    """Write a shape for a message, with ? for dynamic dimensions."""
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"
