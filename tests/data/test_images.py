import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mptqc.data.images import list_images, read_image
from mptqc.data.preprocess import Preprocessing
from mptqc.errors import DataError

AS_IS = Preprocessing(image_size=(4, 6), crop="center")


def save(path: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path)
    return path


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels)).astype(np.uint8)


def test_pixels_come_channels_first(tmp_path: Path):
    pixels = noise(4, 6)
    assert np.array_equal(read_image(save(tmp_path / "a.png", pixels), AS_IS, 3), pixels.transpose(2, 0, 1))


def test_grey_model_reads_luminance(tmp_path: Path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[..., 1] = 100
    read = read_image(save(tmp_path / "a.png", pixels), AS_IS, 1)
    assert read.shape == (1, 4, 6)
    assert set(read.ravel()) == {59}  # ITU-R 601: 0.587 of green, rounded as Pillow does


def test_grey_picture_fills_three_channels(tmp_path: Path):
    pixels = noise(4, 6)[..., 0]
    read = read_image(save(tmp_path / "a.png", pixels), AS_IS, 3)
    assert all(np.array_equal(plane, pixels) for plane in read)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(tmp_path: Path, mode: str):
    pixels = np.full((4, 6, 4), (10, 10, 10, 255), np.uint8)
    pixels[0, 0] = (0, 0, 0, 0)
    read = read_image(save(tmp_path / "a.png", pixels, None if mode == "RGBA" else mode), AS_IS, 3)
    assert list(read[:, 0, 0]) == [255, 255, 255]
    assert list(read[:, 1, 1]) == [10, 10, 10]


def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path: Path):
    pixels = np.full((4, 6), 0x1234, np.uint16)
    assert set(read_image(save(tmp_path / "a.png", pixels), AS_IS, 1).ravel()) == {0x12}


def test_float_pixels_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="32-bit pixels"):
        read_image(save(tmp_path / "a.tiff", np.ones((4, 6), np.float32)), AS_IS, 1)


def test_shorter_side_is_resized_and_the_center_cropped(tmp_path: Path):
    """8 × 24 → 4 × 12 → the middle 4 × 6: the left and right quarters go."""
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 6:18] = 255
    read = read_image(save(tmp_path / "a.png", pixels), AS_IS.model_copy(update={"resize": 4}), 3)
    assert read.shape == (3, 4, 6)
    inner = read[:, :, 1:-1]  # the outermost columns mix both sides of the edge
    assert set(inner.ravel()) == {255}


def test_stretch_ignores_the_aspect(tmp_path: Path):
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 12:] = 255
    stretched = Preprocessing(image_size=(4, 6), interpolation="nearest")
    read = read_image(save(tmp_path / "a.png", pixels), stretched, 3)
    assert np.array_equal(read[0], np.repeat([[0, 0, 0, 255, 255, 255]], 4, axis=0))


def test_picture_smaller_than_the_crop_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"a\.png is 3 x 6 before the center crop to 4 x 6: too small"):
        read_image(save(tmp_path / "a.png", noise(3, 6)), AS_IS, 3)


def test_resize_without_crop_has_to_fit(tmp_path: Path):
    uncropped = Preprocessing(image_size=(4, 6), resize=4, crop="none")
    with pytest.raises(DataError, match=r"4 x 12, but the model takes 4 x 6"):
        read_image(save(tmp_path / "a.png", noise(8, 24)), uncropped, 3)


def test_truncated_picture_is_named(tmp_path: Path):
    path = save(tmp_path / "a.png", noise(64, 64))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"a\.png cannot be read as an image"):
        read_image(path, AS_IS.model_copy(update={"resize": 6}), 3)


def test_folder_is_sorted_and_only_pictures_count(tmp_path: Path):
    for name in ("b.png", "a.jpg", "sub.png"):
        save(tmp_path / name, noise(4, 6))
    for name in ("notes.txt", ".hidden.png"):
        (tmp_path / name).write_text("x")
    found = list_images(tmp_path)
    assert [path.name for path in found.paths] == ["a.jpg", "b.png", "sub.png"]
    assert found.labels is None


def test_sub_folders_are_labels_in_sorted_order(tmp_path: Path):
    for name in ("dog/1.png", "cat/2.png", "cat/deep/3.png"):
        save(tmp_path / name, noise(4, 6))
    found = list_images(tmp_path)
    assert found.labels is not None
    assert found.labels.dtype == np.int64
    assert [path.name for path in found.paths] == ["2.png", "3.png", "1.png"]
    assert list(found.labels) == [0, 0, 1]
    assert found.label_names == {0: "cat", 1: "dog"}


def test_numbered_sub_folders_are_their_own_labels(tmp_path: Path):
    for name in ("10/a.png", "9/b.png"):
        save(tmp_path / name, noise(4, 6))
    found = list_images(tmp_path)
    assert found.labels is not None
    assert list(found.labels) == [10, 9]


def test_loose_pictures_beside_sub_folders_leave_no_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for name in ("a.png", "cat/b.png"):
        save(tmp_path / name, noise(4, 6))
    with caplog.at_level(logging.WARNING):
        assert list_images(tmp_path).labels is None
    assert "not taken as labels" in caplog.text


def test_folder_without_pictures_is_an_error(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"no image in .*1 file"):
        list_images(tmp_path)
