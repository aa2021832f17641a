"""Export a timm model by name, with its preprocessing in the file."""

import difflib
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from mptqc.data.preprocess import METADATA_KEY, Preprocessing
from mptqc.data.preprocess_sources import load_preprocessing
from mptqc.errors import ModelError
from mptqc.export.onnx_writer import Exporter, OnnxForm, export_module
from mptqc.export.packages import import_timm, import_torch, stay_offline_without_a_hub
from mptqc.export.random_weights import randomise_constant_parameters

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

SUPPORTED_FAMILIES = (
    "vit_",
    "deit_",
    "deit3_",
    "swin_",
    "swinv2_",
    "beit_",
    "beitv2_",
    "eva_",
    "eva02_",
    "pit_",
    "cait_",
)
EXAMPLES = ("vit_small_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224")
MAX_SUGGESTIONS = 5


def export_timm(
    name: str,
    output: Path,
    *,
    pretrained: bool,
    image_size: int | None = None,
    opset: int | None = None,
    exporter: Exporter = "dynamo",
    batch: int | None = None,
    fused_attention: bool = False,
    seed: int = 0,
) -> None:
    """Write the timm model `name` to `output` as float32 ONNX: `images` [N, 3, H, W] → `logits` [N, classes].

    The file carries its preprocessing as JSON in the metadata entry `mptqc.preprocess`.

    Args:
        name: a timm model of SUPPORTED_FAMILIES, such as vit_small_patch16_224; `name.tag` picks weights.
        output: the ONNX file; it is written beside and renamed, so it never holds half a model.
        pretrained: the published weights; False gives seeded random ones, biases and norms too (structure only).
        image_size: side of the square input in pixels; None: the model's own.
        opset: ONNX opset; None: 20 for dynamo, 17 for torchscript.
        exporter: "dynamo" or "torchscript".
        batch: a fixed batch size; None: dynamic.
        fused_attention: keep attention as one call; dynamo writes an `Attention` op for it from opset 23 on.
        seed: of the random weights.

    Raises:
        ModelError: unknown name, weights that cannot be had, missing torch or timm, or a failed export.
        DataError: its preprocessing has no equivalent in mptqc.
        OutputError: `output` cannot be written.
    """
    if image_size is not None and image_size < 1:
        raise ModelError(f"image size is {image_size}; give a positive number of pixels.")
    form = OnnxForm(exporter=exporter, opset=opset, batch=batch)
    if pretrained:
        stay_offline_without_a_hub()
    timm = import_timm()
    _check_name(timm, name)
    model = _create(timm, name, pretrained=pretrained, image_size=image_size, fused=fused_attention, seed=seed)
    config = cast("Mapping[str, Any]", model.pretrained_cfg)
    channels, height, width = config["input_size"]
    if image_size is not None:
        _check_image_size(model, name, image_size)
        height = width = image_size
    preprocessing = _preprocessing(config, (channels, height, width))
    export_module(model, (channels, height, width), output, form, {METADATA_KEY: preprocessing.to_json()})


def _preprocessing(config: Mapping[str, Any], input_size: tuple[int, int, int]) -> Preprocessing:
    """Translate timm's `pretrained_cfg` by writing it the way timm publishes it, as a config.json."""
    published = {key: config[key] for key in ("crop_pct", "crop_mode", "interpolation", "mean", "std")}
    with tempfile.TemporaryDirectory(prefix="mptqc-export-") as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps({"pretrained_cfg": {**published, "input_size": input_size}}), encoding="utf-8")
        return load_preprocessing(file)


def _check_name(timm: ModuleType, name: str) -> None:
    architecture = name.partition(".")[0]
    if timm.is_model(architecture) and architecture.startswith(SUPPORTED_FAMILIES):
        return
    if timm.is_model(architecture):
        raise ModelError(
            f"{name!r} is no plain vision transformer that mptqc compiles; give a timm model of the families "
            f"{', '.join(SUPPORTED_FAMILIES)}."
        )
    known = [model for family in SUPPORTED_FAMILIES for model in timm.list_models(f"{family}*")]
    similar = difflib.get_close_matches(architecture, known, n=MAX_SUGGESTIONS) or EXAMPLES
    raise ModelError(f"timm {timm.__version__} has no model named {name!r}. Names like it: {', '.join(similar)}.")


def _check_image_size(model: "nn.Module", name: str, image_size: int) -> None:
    patch = max(cast("tuple[int, int]", cast("nn.Module", model.patch_embed).patch_size))
    unseen = image_size % patch
    if unseen:
        raise ModelError(
            f"image size {image_size} is not a multiple of the {patch} pixel patches of {name!r}; the model would not "
            f"see the last {unseen} rows and columns. Give {image_size - unseen + patch}, for example."
        )


def _create(
    timm: ModuleType, name: str, *, pretrained: bool, image_size: int | None, fused: bool, seed: int
) -> "nn.Module":
    torch = import_torch()
    overrides = {} if image_size is None else {"img_size": image_size}
    fused_before = timm.layers.config.use_fused_attn()
    timm.layers.config.set_fused_attn(fused)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = timm.create_model(name, pretrained=pretrained, **overrides)
    except Exception as error:
        if pretrained:
            raise ModelError(_no_weights(name, error)) from error
        raise ModelError(f"timm cannot build {name!r}: {type(error).__name__}: {error}") from error
    finally:
        timm.layers.config.set_fused_attn(fused_before)
    if not pretrained:
        changed = randomise_constant_parameters(model, seed)
        logger.info("%s has random weights (seed %d, %d constant parameters randomised)", name, seed, changed)
    return model.eval()


def _no_weights(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return (
        f"the pretrained weights of {name!r} cannot be had: {reason} With access to huggingface.co, or with the "
        "weights in its local cache, the same command works; --random exports the structure with random weights."
    )
