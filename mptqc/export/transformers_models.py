"""Export a transformers image model, from a local folder or the hub, with its preprocessing in the file."""

import logging
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from mptqc.data.preprocess import METADATA_KEY
from mptqc.data.preprocess_sources import load_preprocessing
from mptqc.errors import ModelError
from mptqc.export.onnx_writer import Exporter, OnnxForm, export_module
from mptqc.export.packages import import_torch, import_transformers, stay_offline_without_a_hub
from mptqc.export.random_weights import randomise_constant_parameters

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

# The model type in config.json → the class that classifies or encodes images, and which of its outputs that is.
MODELS: Mapping[str, tuple[str, str]] = {
    "vit": ("ViTForImageClassification", "logits"),
    "deit": ("DeiTForImageClassificationWithTeacher", "logits"),
    "swin": ("SwinForImageClassification", "logits"),
    "swinv2": ("Swinv2ForImageClassification", "logits"),
    "beit": ("BeitForImageClassification", "logits"),
    "data2vec-vision": ("Data2VecVisionForImageClassification", "logits"),
    "dinov2": ("Dinov2ForImageClassification", "logits"),
    "dinov2_with_registers": ("Dinov2WithRegistersForImageClassification", "logits"),
    "dinov3_vit": ("DINOv3ViTModel", "pooler_output"),
    "vit_msn": ("ViTMSNForImageClassification", "logits"),
    "ijepa": ("IJepaForImageClassification", "logits"),
    "clip": ("CLIPVisionModelWithProjection", "image_embeds"),
    "siglip": ("SiglipVisionModel", "pooler_output"),
}
PREPROCESSOR_FILE = "preprocessor_config.json"


def export_transformers(
    name: str,
    output: Path,
    *,
    pretrained: bool,
    opset: int | None = None,
    exporter: Exporter = "dynamo",
    batch: int | None = None,
    seed: int = 0,
) -> None:
    """Write the transformers model `name` to `output` as float32 ONNX: `images` [N, C, H, W] → `logits` [N, classes].

    Of a model without classes (CLIP, SigLIP, DINOv3) `logits` are the image's features, [N, width].
    The file carries its preprocessing, read from preprocessor_config.json, in the metadata entry `mptqc.preprocess`.

    Args:
        name: a folder with config.json (as `save_pretrained` writes it), or a hub name such as
            google/vit-base-patch16-224; the model type has to be one of MODELS.
        output: the ONNX file; it is written beside and renamed, so it never holds half a model.
        pretrained: the saved weights; False builds the config with seeded random ones (structure only).
        opset: ONNX opset; None: 20 for dynamo, 17 for torchscript.
        exporter: "dynamo" or "torchscript".
        batch: a fixed batch size; None: dynamic.
        seed: of the random weights.

    Raises:
        ModelError: config or weights that cannot be had, another kind of model, missing packages, a failed export.
        DataError: the preprocessor's configuration has no equivalent in mptqc.
        OutputError: `output` cannot be written.
    """
    form = OnnxForm(exporter=exporter, opset=opset, batch=batch)
    stay_offline_without_a_hub()
    transformers = import_transformers()
    config = _configuration(transformers, name)
    model = _create(transformers, name, config, pretrained=pretrained, seed=seed)
    vision = _vision_config(config)
    height, width = _pair(vision.image_size)
    metadata = {}
    preprocessor = _preprocessor_file(name)
    if preprocessor is None:
        logger.warning("%s has no %s: the file will carry no preprocessing", name, PREPROCESSOR_FILE)
    else:
        metadata[METADATA_KEY] = load_preprocessing(preprocessor).to_json()
    module = _one_output(model, MODELS[config.model_type][1])
    export_module(module, (vision.num_channels, height, width), output, form, metadata)


def _vision_config(config: Any) -> Any:
    """The configuration of the part that sees images."""
    return getattr(config, "vision_config", config)


def _configuration(transformers: ModuleType, name: str) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the transformers configuration of {name!r} cannot be had: {' '.join(str(error).split())} Give a folder "
            "with config.json, or a hub name where huggingface.co can be reached."
        ) from error
    if config.model_type not in MODELS:
        raise ModelError(
            f"{name!r} is a transformers model of type {config.model_type!r}; mptqc exports the types "
            f"{', '.join(MODELS)}."
        )
    return config


def _create(
    transformers: ModuleType,
    name: str,
    config: Any,
    *,
    pretrained: bool,
    seed: int,
) -> "nn.Module":
    torch = import_torch()
    made = getattr(transformers, MODELS[config.model_type][0])
    config = _vision_config(config)
    config._attn_implementation = "eager"
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if pretrained:
                return cast("nn.Module", made.from_pretrained(name, config=config))
            model = cast("nn.Module", made(config))
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"the weights of {name!r} cannot be had: {' '.join(str(error).split())} --random exports the model's "
            "structure with random weights."
        ) from error
    changed = randomise_constant_parameters(model, seed)
    logger.info("%s has random weights (seed %d, %d constant parameters randomised)", name, seed, changed)
    return model


def _one_output(model: "nn.Module", output: str) -> "nn.Module":
    torch = import_torch()

    class OneOutput(torch.nn.Module):  # type: ignore[name-defined,misc]  # torch is imported by name
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: object) -> object:
            return getattr(self.model(pixel_values=images), output)

    return cast("nn.Module", OneOutput())


def _preprocessor_file(name: str) -> Path | None:
    from huggingface_hub import hf_hub_download  # it comes with transformers
    from huggingface_hub.errors import EntryNotFoundError

    if Path(name).is_dir():
        file = Path(name) / PREPROCESSOR_FILE
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(name, PREPROCESSOR_FILE))
    except EntryNotFoundError:
        return None


def _pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width
