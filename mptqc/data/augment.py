"""Augmented views of calibration images: what more images would give, from the few at hand.

View 0 is the image; the others are random crops (60 to 100 % of the area, resized back), half of them mirrored, with a
contrast of 0.9 to 1.1 around the image's own mean. Statistics stay those of real images.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from mptqc.data.samples import FloatImages, Hash, Samples, Source

SMALLEST_AREA = 0.6
CONTRAST = 0.1


class AugmentedSource:
    """A source with `views` numbers for each of another's: number i·views + v is view v of image i."""

    def __init__(self, source: Source, views: int, seed: int) -> None:
        self._source = source
        self._views = views
        self._seed = seed

    def read(self, indices: Sequence[int]) -> FloatImages:
        """Views of the images, float32 [len(indices), C, H, W]; raises DataError as the source does."""
        images = self._source.read([index // self._views for index in indices])
        return np.stack([self._view(image, index) for image, index in zip(images, indices, strict=True)])

    def check(self, indices: Sequence[int]) -> None:
        """Check the images behind the views."""
        self._source.check(sorted({index // self._views for index in indices}))

    def name(self, index: int) -> str:
        """The image's name and the view's number."""
        image, view = divmod(index, self._views)
        return f"{self._source.name(image)} (view {view})" if view else self._source.name(image)

    def hash_into(self, digest: Hash, indices: Sequence[int]) -> None:
        """The images' content, and how the views were made."""
        digest.update(f"views {self._views} seed {self._seed}".encode())
        self._source.hash_into(digest, [index // self._views for index in indices])

    def _view(self, image: FloatImages, index: int) -> FloatImages:
        """View of one image [C, H, W]; the image itself for view 0, or where a crop shows a single colour."""
        if index % self._views == 0:
            return image
        random = np.random.default_rng((self._seed, index))
        height, width = image.shape[1:]
        share = np.sqrt(random.uniform(SMALLEST_AREA, 1.0))
        left, top = random.uniform(0, width * (1 - share)), random.uniform(0, height * (1 - share))
        box = (left, top, left + width * share, top + height * share)
        view = np.stack(
            [
                np.asarray(Image.fromarray(channel).resize((width, height), Image.Resampling.BILINEAR, box=box))
                for channel in image
            ]
        )
        if random.random() < 0.5:
            view = view[:, :, ::-1]
        mean = view.mean(axis=(1, 2), keepdims=True)
        view = (view - mean) * np.float32(random.uniform(1 - CONTRAST, 1 + CONTRAST)) + mean
        return image if view.min() == view.max() else np.ascontiguousarray(view, np.float32)


def augmented(samples: Samples, views: int, seed: int) -> Samples:
    """`views` views of every sample, without labels; the samples themselves if `views` is 1."""
    if views == 1:
        return samples
    numbers = [index * views + view for index in samples.indices for view in range(views)]
    return Samples(AugmentedSource(samples.source, views, seed), numbers, None)
