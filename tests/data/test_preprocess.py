import numpy as np
import pytest

from mptqc.data.preprocess import METADATA_KEY, PRESETS, Preprocessing, from_json, from_metadata, preset
from mptqc.errors import DataError

# (p·s − m)/d in float32: three roundings of 2⁻²⁴ each, on intermediate values that stay below 1/0.224 < 8
NORMALIZE_TOLERANCE = 3 * 8 * 2**-24


def test_normalize_is_scale_mean_std():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5)).astype(np.uint8)
    chosen = preset("imagenet")
    mean, std = (np.array(values).reshape(1, 3, 1, 1) for values in (chosen.mean, chosen.std))
    result = chosen.normalize(pixels)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, (pixels / 255 - mean) / std, atol=NORMALIZE_TOLERANCE, rtol=0)


def test_one_value_serves_all_channels():
    pixels = np.full((1, 4, 2, 2), 255, np.uint8)
    assert np.array_equal(Preprocessing(mean=(0.5,), std=(0.5,)).normalize(pixels), np.ones((1, 4, 2, 2)))


def test_mean_of_other_channel_count_is_refused():
    with pytest.raises(DataError, match="3 mean values, but the model takes 1 channel"):
        preset("imagenet").normalize(np.zeros((1, 1, 2, 2), np.uint8))


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name: str):
    chosen = preset(name, (96, 64))
    assert from_json(chosen.to_json(), where="test") == chosen
    assert from_metadata({METADATA_KEY: chosen.to_json(), "other": "x"}) == chosen


def test_two_sided_resize_round_trips():
    chosen = Preprocessing(image_size=(224, 224), resize=(256, 256), crop="center")
    assert from_json(chosen.to_json(), where="test") == chosen


def test_model_without_metadata_has_no_preprocessing():
    assert from_metadata({"mptqc.stage": "canonical"}) is None


def test_broken_metadata_is_an_error():
    with pytest.raises(DataError, match=r"mptqc\.preprocess"):
        from_metadata({METADATA_KEY: "{"})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"men": [0.5]}', "men: .*known fields: .*mean"),
        ('{"std": [0.0]}', "std"),
        ('{"mean": [NaN]}', "mean"),
        ('{"mean": [0.1, 0.2], "std": [1, 1, 1]}', "mean has 2 values and std 3"),
        ('{"mean": []}', "at least one"),
        ('{"image_size": [0, 224]}', "image_size"),
        ('{"interpolation": "magic"}', "interpolation"),
        ("[]", "object"),
    ],
)
def test_bad_values_are_named(text: str, problem: str):
    with pytest.raises(DataError, match=problem):
        from_json(text, where="test")


@pytest.mark.parametrize(
    ("name", "size", "resize", "crop"),
    [
        ("imagenet", (224, 224), 256, "center"),
        ("inception", (224, 224), 248, "center"),
        ("inception", (384, 384), 426, "center"),
        ("clip", (224, 224), 224, "center"),
        ("none", (28, 28), None, "none"),
    ],
)
def test_preset_geometry(name: str, size: tuple[int, int], resize: int | None, crop: str):
    chosen = preset(name, size)
    assert (chosen.image_size, chosen.resize, chosen.crop) == (size, resize, crop)


def test_unknown_preset_lists_the_known():
    with pytest.raises(DataError, match="imagenet, inception, clip, none"):
        preset("cifar")
