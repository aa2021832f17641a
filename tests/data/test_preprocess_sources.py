import json
import logging
from pathlib import Path

import pytest

from mptqc.data.preprocess import METADATA_KEY, Preprocessing, preset
from mptqc.data.preprocess_sources import choose_preprocessing, load_preprocessing
from mptqc.errors import DataError

HALF = [0.5, 0.5, 0.5]
TIMM = {"input_size": [3, 224, 224], "mean": HALF, "std": HALF, "interpolation": "bicubic", "crop_pct": 0.9}
TRANSFORMERS = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 0.00392156862745098,
    "do_normalize": True,
    "image_mean": HALF,
    "image_std": HALF,
}


@pytest.fixture
def config(tmp_path: Path):
    def write(content: object) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        return path

    return write


def choose(*, source=None, mean=None, std=None, metadata=None, image_size=(224, 224)) -> Preprocessing | None:
    return choose_preprocessing(source=source, mean=mean, std=std, metadata=metadata or {}, image_size=image_size)


def test_timm_config(config):
    expected = Preprocessing(
        image_size=(224, 224), resize=248, crop="center", interpolation="bicubic", mean=tuple(HALF), std=tuple(HALF)
    )
    assert load_preprocessing(config({"architecture": "vit", "pretrained_cfg": TIMM})) == expected
    assert load_preprocessing(config(TIMM)) == expected


def test_timm_squash_resizes_both_sides(config):
    chosen = load_preprocessing(config({**TIMM, "crop_mode": "squash", "crop_pct": 1.0}))
    assert chosen.resize == (224, 224)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"crop_mode": "border"}, "crop_mode 'border'"),
        ({"input_size": [3, 224, 192]}, "224 x 192"),
        ({"mean": None}, "no 'mean'"),
        ({"interpolation": "random"}, "interpolation"),
    ],
)
def test_timm_config_that_cannot_be_followed(config, change: dict, problem: str):
    with pytest.raises(DataError, match=problem):
        load_preprocessing(config({**TIMM, **change}))


def test_transformers_config_that_stretches(config):
    assert load_preprocessing(config(TRANSFORMERS)) == Preprocessing(
        image_size=(224, 224),
        resize=(224, 224),
        crop="none",
        interpolation="bilinear",
        mean=tuple(HALF),
        std=tuple(HALF),
        scale=0.00392156862745098,
    )


def test_transformers_old_style_sizes(config):
    old = {**TRANSFORMERS, "size": 256, "do_center_crop": True, "crop_size": 224}
    chosen = load_preprocessing(config(old))
    assert (chosen.resize, chosen.crop, chosen.image_size) == ((256, 256), "center", (224, 224))


def test_transformers_shortest_edge_and_crop(config):
    crop = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
    chosen = load_preprocessing(config({**TRANSFORMERS, "size": {"shortest_edge": 256}, **crop, "resample": 3}))
    assert (chosen.resize, chosen.crop, chosen.interpolation) == (256, "center", "bicubic")


def test_transformers_without_normalisation(config):
    chosen = load_preprocessing(config({**TRANSFORMERS, "do_normalize": False, "do_rescale": False}))
    assert (chosen.mean, chosen.std, chosen.scale) == ((0.0,), (1.0,), 1.0)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"do_pad": True}, "do_pad"),
        ({"size": {"longest_edge": 224}}, "longest_edge"),
        ({"size": {"shortest_edge": 224}}, "do_center_crop is off"),
        ({"resample": 5}, "resample 5"),
        ({"image_std": None}, "image_std"),
    ],
)
def test_transformers_config_that_cannot_be_followed(config, change: dict, problem: str):
    with pytest.raises(DataError, match=problem):
        load_preprocessing(config({**TRANSFORMERS, **change}))


def test_own_json(config):
    chosen = preset("clip", (224, 224))
    assert load_preprocessing(config(json.loads(chosen.to_json()))) == chosen


@pytest.mark.parametrize(("content", "problem"), [([1], "JSON list"), ({"meen": [1]}, "meen")])
def test_json_that_is_no_preprocessing(config, content: object, problem: str):
    with pytest.raises(DataError, match=problem):
        load_preprocessing(config(content))


def test_text_that_is_no_json(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text("mean: 0.5")
    with pytest.raises(DataError, match="is not JSON"):
        load_preprocessing(path)


def test_neither_preset_nor_file():
    with pytest.raises(DataError, match=r"neither a preset .*imagenet.* nor a JSON file"):
        load_preprocessing("imagnet")


def test_nothing_said_means_none():
    assert choose() is None


def test_metadata_is_used_without_flags():
    stored = preset("clip", (224, 224))
    assert choose(metadata={METADATA_KEY: stored.to_json()}) == stored


def test_flag_wins_over_metadata_and_says_so(caplog: pytest.LogCaptureFixture):
    stored = preset("clip", (224, 224))
    with caplog.at_level(logging.WARNING):
        assert choose(source="imagenet", metadata={METADATA_KEY: stored.to_json()}) == preset("imagenet", (224, 224))
    assert "override the preprocessing stored in the model" in caplog.text


def test_same_flag_as_metadata_is_silent(caplog: pytest.LogCaptureFixture):
    choose(source="clip", metadata={METADATA_KEY: preset("clip", (224, 224)).to_json()})
    assert caplog.text == ""


def test_mean_alone_keeps_the_stored_geometry():
    stored = preset("clip", (224, 224))
    chosen = choose(mean=(0.0,), metadata={METADATA_KEY: stored.to_json()})
    assert chosen == stored.model_copy(update={"mean": (0.0,)})


def test_mean_and_std_alone_crop_to_the_model():
    chosen = choose(mean=(0.5,), std=(0.25,), image_size=(32, 32))
    assert chosen == Preprocessing(image_size=(32, 32), resize=32, crop="center", mean=(0.5,), std=(0.25,))


def test_std_of_zero_is_refused():
    with pytest.raises(DataError, match="std"):
        choose(std=(0.0,))
