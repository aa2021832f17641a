import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mptqc.data.load import fit_preprocessing, load_samples
from mptqc.data.preprocess import Preprocessing, preset
from mptqc.data.samples import Samples
from mptqc.errors import DataError

SHAPE = (None, 3, 8, 8)
ZERO_TO_ONE = preset("none", (8, 8))


def load(path: Path, *, shape=SHAPE, preprocessing: Preprocessing | None = ZERO_TO_ONE, limit=None, seed=0) -> Samples:
    return load_samples(path, input_name="x", input_shape=shape, preprocessing=preprocessing, limit=limit, seed=seed)


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 8, 8)).astype(np.uint8)


def everything(samples: Samples, batch_size: int = 4) -> np.ndarray:
    return np.concatenate(list(samples.batches(batch_size)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures in two classes, equal to pixels(10)."""
    for k, picture in enumerate(pixels(10)):
        path = tmp_path / "photos" / f"class{k % 2}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.transpose(1, 2, 0)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def npz(tmp_path: Path):
    def write(**arrays: np.ndarray) -> Path:
        np.savez(tmp_path / "data.npz", **arrays)
        return tmp_path / "data.npz"

    return write


def test_folder_and_array_of_the_same_pixels_agree(folder: Path, npz):
    order = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
    from_folder, from_array = load(folder), load(npz(images=pixels(10)[order]))
    assert np.array_equal(everything(from_folder), everything(from_array))
    assert np.array_equal(everything(from_array), ZERO_TO_ONE.normalize(pixels(10)[order]))


def test_batches_cover_all_with_a_short_last(folder: Path):
    samples = load(folder)
    assert [len(batch) for batch in samples.batches(4)] == [4, 4, 2]
    assert all(batch.dtype == np.float32 for batch in samples.batches(4))
    assert np.array_equal(everything(samples, 4), everything(samples, 3))


def test_folder_labels_follow_the_pictures(folder: Path):
    assert list(load(folder).labels) == [0] * 5 + [1] * 5
    limited = load(folder, limit=4, seed=1)
    assert limited.count == len(limited.labels) == 4


def test_limit_draws_by_seed(folder: Path):
    first, again, other = (load(folder, limit=5, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(everything(first), everything(again))
    assert not np.array_equal(everything(first), everything(other))


def test_take_draws_without_replacement(npz):
    samples = load(npz(images=pixels(20), labels=np.arange(20))).take(15, seed=3)
    assert len(set(samples.labels)) == 15
    assert np.array_equal(everything(samples), ZERO_TO_ONE.normalize(pixels(20)[samples.labels]))


def test_more_than_there_are_uses_all_and_warns(folder: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        assert load(folder, limit=64).count == 10
    assert "64 samples were asked for" in caplog.text


def test_pictures_are_decoded_lazily(folder: Path):
    """Only the batch that is read touches the files: removing the last picture leaves the first batch readable."""
    samples = load(folder)
    (folder / "class1" / "9.png").unlink()
    batches = samples.batches(4)
    assert len(next(batches)) == 4
    assert len(next(batches)) == 4
    with pytest.raises(DataError, match=r"9\.png"):
        next(batches)


def test_float_array_is_taken_as_preprocessed(npz):
    images = np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)
    assert np.array_equal(everything(load(npz(x=images), preprocessing=None)), images)
    assert np.array_equal(everything(load(npz(x=images), preprocessing=preset("imagenet", (8, 8)))), images)


def test_float_pixels_that_nobody_normalised_are_warned_about(npz, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        everything(load(npz(images=pixels(3).astype(np.float32))), batch_size=1)
    assert caplog.text.count("taken as already preprocessed") == 1


def test_inputs_own_name_comes_before_images(npz):
    own, other = pixels(2, seed=1), pixels(2, seed=2)
    assert np.array_equal(everything(load(npz(images=other, x=own))), ZERO_TO_ONE.normalize(own))


def test_npy_file(tmp_path: Path):
    np.save(tmp_path / "data.npy", pixels(3))
    samples = load(tmp_path / "data.npy")
    assert samples.labels is None
    assert np.array_equal(everything(samples), ZERO_TO_ONE.normalize(pixels(3)))


def test_digest_depends_on_content_only(folder: Path):
    before = load(folder).digest()
    (folder / "class1" / "9.png").rename(folder / "class1" / "99.png")
    assert load(folder).digest() == before
    (folder / "class1" / "99.png").write_bytes((folder / "class0" / "0.png").read_bytes())
    assert load(folder).digest() != before


def test_digest_depends_on_preprocessing_labels_and_choice(npz):
    path = npz(images=pixels(6), labels=np.arange(6))
    digests = {
        load(path).digest(),
        load(path, preprocessing=preset("imagenet", (8, 8))).digest(),
        load(path, limit=3).digest(),
        load(npz(images=pixels(6), labels=np.zeros(6, int))).digest(),
        load(npz(images=pixels(6))).digest(),
    }
    assert len(digests) == 5


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_values_are_named(npz, value: float):
    images = np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype(np.float32)
    images[3, 0, 1, 1] = value
    with pytest.raises(DataError, match=r"data\.npz \(images\), row 3 holds NaN or infinite"):
        everything(load(npz(images=images)))


def test_constant_picture_is_named(folder: Path):
    Image.new("RGB", (8, 8)).save(folder / "class0" / "0.png")
    with pytest.raises(DataError, match=r"0\.png is constant"):
        everything(load(folder))


def test_pixels_need_preprocessing(folder: Path, npz):
    for path in (folder, npz(images=pixels(2))):
        with pytest.raises(DataError, match=r"--preprocess .*--mean and --std"):
            load(path, preprocessing=None)


def test_file_that_is_no_picture_is_found_before_work_starts(folder: Path):
    (folder / "class1" / "9.png").write_text("not a picture")
    with pytest.raises(DataError, match=r"9\.png cannot be read"):
        load(folder)


def test_folder_cannot_feed_five_channels(folder: Path):
    with pytest.raises(DataError, match="takes 5 channels"):
        load(folder, shape=(None, 5, 8, 8))


def test_archive_without_the_input_lists_its_keys(npz):
    with pytest.raises(DataError, match=r"neither 'x' .*nor 'images'; it holds: photos, labels"):
        load(npz(photos=pixels(2), labels=np.arange(2)))


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        (np.zeros((2, 1, 8, 8), np.uint8), r"shape \[2, 1, 8, 8\], but the model takes \[N, 3, 8, 8\]"),
        (np.zeros((2, 3, 9, 8), np.uint8), "not resized"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"channels-last.*transpose\(0, 3, 1, 2\)"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \[3, 8, 8\]"),
        (np.zeros((2, 3, 8, 8), np.float64), "is float64"),
        (np.zeros((0, 3, 8, 8), np.uint8), "holds no image"),
    ],
)
def test_images_that_do_not_fit(npz, images: np.ndarray, problem: str):
    with pytest.raises(DataError, match=problem):
        load(npz(images=images))


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (np.arange(3), "2 images but 3 labels"),
        (np.array([0.5, 1.0]), "float64"),
        (np.array([[0], [1]]), r"shape \[2, 1\]"),
        (np.array([0, -1]), "negative"),
    ],
)
def test_labels_that_do_not_fit(npz, labels: np.ndarray, problem: str):
    with pytest.raises(DataError, match=problem):
        load(npz(images=pixels(2), labels=labels))


@pytest.mark.parametrize("name", ["broken.npz", "broken.npy"])
def test_broken_array_file(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"PK\x03\x04 and nothing more")
    with pytest.raises(DataError, match=rf"{name} cannot be read as a NumPy file"):
        load(tmp_path / name)


def test_pickled_objects_are_not_loaded(npz):
    with pytest.raises(DataError, match="cannot be read as a NumPy file"):
        load(npz(images=np.array([{"a": 1}], dtype=object)))


def test_missing_path(tmp_path: Path):
    with pytest.raises(DataError, match="does not exist"):
        load(tmp_path / "nowhere")


def test_other_file_type(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="neither a folder"):
        load(tmp_path / "a.txt")


def test_input_that_takes_no_images(npz):
    with pytest.raises(DataError, match=r"shape \[\?, 10\]"):
        load(npz(images=pixels(2)), shape=(None, 10))


@pytest.mark.parametrize("n", [0, -1])
def test_sample_count_has_to_be_positive(npz, n: int):
    with pytest.raises(DataError, match="positive"):
        load(npz(images=pixels(2)), limit=n)


def test_preprocessing_takes_the_models_size():
    assert fit_preprocessing(Preprocessing(), (None, 3, 24, 32)).image_size == (24, 32)


def test_preprocessing_serves_a_dynamic_model():
    assert fit_preprocessing(ZERO_TO_ONE, (None, 3, None, None)) == ZERO_TO_ONE


def test_preprocessing_for_another_size_is_refused():
    with pytest.raises(DataError, match="images of 8 x 8, but the model takes 16 x 16"):
        fit_preprocessing(ZERO_TO_ONE, (None, 3, 16, 16))


def test_no_size_anywhere_is_refused():
    with pytest.raises(DataError, match="dynamic"):
        fit_preprocessing(Preprocessing(), (None, 3, None, None))
