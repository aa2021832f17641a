import pytest

from mptqc.errors import ModelError
from mptqc.export.preprocessing import of_timm, of_transformers

SIZE = (224, 224)
TIMM = {"crop_mode": "center", "crop_pct": 0.9, "interpolation": "bicubic", "mean": (0.5,), "std": (0.25,)}
# What google/vit-base-patch16-224 and facebook/deit-base-distilled-patch16-224 publish, shortened.
VIT = {"do_resize": True, "size": {"height": 224, "width": 224}, "resample": 2, "image_mean": [0.5], "image_std": [0.5]}
DEIT = {"do_center_crop": True, "crop_size": 224, "size": 256, "resample": 3, "image_mean": [0.4], "image_std": [0.2]}


def test_timm_crop_fraction_becomes_a_resize() -> None:
    assert of_timm(TIMM, SIZE) == {
        "image_size": [224, 224],
        "resize": 248,  # 224 / 0.9, rounded down
        "crop": "center",
        "interpolation": "bicubic",
        "mean": [0.5],
        "std": [0.25],
        "scale": 1 / 255,
    }


def test_timm_squash_scales_both_sides() -> None:
    fields = of_timm(TIMM | {"crop_mode": "squash"}, SIZE)
    assert (fields["resize"], fields["crop"]) == (None, "none")


def test_transformers_fixed_size_scales_both_sides() -> None:
    assert of_transformers(VIT, SIZE) == {
        "image_size": [224, 224],
        "resize": None,
        "crop": "none",
        "interpolation": "bilinear",
        "mean": [0.5],
        "std": [0.5],
        "scale": 1 / 255,
    }


@pytest.mark.parametrize("size", [256, {"shortest_edge": 256}, {"height": 256, "width": 256}])
def test_transformers_center_crop_keeps_the_resize(size: object) -> None:
    fields = of_transformers(DEIT | {"size": size}, SIZE)
    assert (fields["resize"], fields["crop"], fields["interpolation"]) == (256, "center", "bicubic")


def test_transformers_without_rescale_or_normalisation() -> None:
    fields = of_transformers(VIT | {"do_rescale": False, "do_normalize": False}, SIZE)
    assert (fields["scale"], fields["mean"], fields["std"]) == (1.0, [0.0], [1.0])


def test_transformers_rescale_factor_is_kept() -> None:
    assert of_transformers(VIT | {"rescale_factor": 1 / 127.5}, SIZE)["scale"] == 1 / 127.5


def test_unknown_filter_is_an_error() -> None:
    with pytest.raises(ModelError, match="resample is 9"):
        of_transformers(VIT | {"resample": 9}, SIZE)


def test_missing_mean_is_an_error() -> None:
    with pytest.raises(ModelError, match="no 'image_mean'"):
        of_transformers({"size": 224}, SIZE)
