"""Augmented views: seeded, of the image's own size and range, the image itself among them."""

import numpy as np

from mptqc.data.arrays import Arrays, ArraySource
from mptqc.data.augment import augmented
from mptqc.data.samples import Samples

RESAMPLING = 1.0 + 0.1 + 1e-5
"""Bilinear weights sum to 1, so values leave the image's range only by the contrast, 10 %, and rounding."""


def samples(count: int) -> Samples:
    images = np.random.default_rng(0).uniform(-1, 1, (count, 3, 12, 10)).astype(np.float32)
    return Samples(ArraySource(Arrays(images, None, "test"), None), range(count), None)


def read(source: Samples) -> np.ndarray:
    return np.concatenate(list(source.batches(5)))


def test_first_view_is_the_image_and_the_others_are_not() -> None:
    views = read(augmented(samples(4), 3, seed=0))
    assert views.shape == (12, 3, 12, 10)
    np.testing.assert_array_equal(views[::3], read(samples(4)))
    assert all(not np.array_equal(views[3 * k + v], views[3 * k]) for k in range(4) for v in (1, 2))


def test_views_depend_on_the_seed_alone() -> None:
    first, again, other = (read(augmented(samples(3), 4, seed)) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_view_does_not_depend_on_the_batch_it_is_read_in() -> None:
    views = augmented(samples(3), 4, seed=1)
    np.testing.assert_array_equal(np.concatenate(list(views.batches(1))), np.concatenate(list(views.batches(12))))


def test_views_stay_in_the_images_range() -> None:
    assert np.abs(read(augmented(samples(6), 4, seed=2))).max() <= RESAMPLING * 1.1


def test_a_crop_of_a_single_colour_gives_the_image() -> None:
    images = np.zeros((1, 1, 40, 40), np.float32)
    images[0, 0, 0, 0] = 1.0
    source = Samples(ArraySource(Arrays(images, None, "test"), None), range(1), None)
    views = read(augmented(source, 16, seed=0))
    assert (views.reshape(16, -1).max(axis=1) > views.reshape(16, -1).min(axis=1)).all()


def test_one_view_is_the_samples_themselves() -> None:
    source = samples(2)
    assert augmented(source, 1, seed=0) is source
