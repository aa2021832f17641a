"""Compile one model of each family at 8 bits, as its library exports it; print how it runs, as a Markdown table.

    python tools/bench_models.py [--models vit,dinov3] [--output bench-models]

Weights are random and nothing is searched: how fast a model runs, and what of it runs in integers, depends on its
graph. Each form is timed in turn, batch 1, one thread. Needs the `export` extra, and transformers. Models are kept in
the output folder and made only where they are not there.
"""

import argparse
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnxruntime
from bench_cpu import CALIBRATION_IMAGES, QUICK, used_isa

import mptqc
from mptqc import api
from mptqc.export.onnx_writer import OnnxForm, export_module
from mptqc.export.packages import import_torch, import_transformers
from mptqc.export.random_weights import randomise_constant_parameters
from mptqc.export.timm_models import export_timm
from mptqc.graph.io import save_model
from mptqc.graph.native_nodes import lowering_report
from mptqc.runtime.benchmark import BenchmarkRow, benchmark
from mptqc.runtime.machine import cpu_info, processor_name
from mptqc.runtime.model_io import image_input
from mptqc.runtime.session import create_session

TIMM: Mapping[str, tuple[str, int | None]] = MappingProxyType(
    {
        "vit": ("vit_small_patch16_224", None),
        "deit3": ("deit3_small_patch16_224", None),
        "dinov2": ("vit_small_patch14_reg4_dinov2", 224),
        "dinov3": ("vit_small_patch16_dinov3", 224),
        "clip": ("vit_base_patch32_clip_224", None),
        "siglip": ("vit_base_patch16_siglip_224", None),
        "beit": ("beitv2_base_patch16_224", None),
        "eva02": ("eva02_small_patch14_224", None),
        "perception-encoder": ("vit_pe_core_tiny_patch16_384", None),
        "swin": ("swin_tiny_patch4_window7_224", None),
        "swinv2": ("swinv2_tiny_window8_256", None),
        "pit": ("pit_s_224", None),
        "cait": ("cait_xxs24_224", None),
    }
)
"""timm's name, and the image's side if it is not the model's own."""

SMALL = MappingProxyType(
    {
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
        "image_size": 224,
    }
)
TRANSFORMERS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = MappingProxyType(
    {
        "hf-vit": ("ViTConfig", "ViTForImageClassification", {**SMALL, "patch_size": 16}),
        "hf-dinov2": ("Dinov2Config", "Dinov2ForImageClassification", {**SMALL, "patch_size": 14}),
        "hf-dinov3": ("DINOv3ViTConfig", "DINOv3ViTModel", {**SMALL, "patch_size": 16}),
        "hf-clip": ("CLIPVisionConfig", "CLIPVisionModel", {**SMALL, "patch_size": 16}),
        "hf-beit": ("BeitConfig", "BeitForImageClassification", {**SMALL, "use_relative_position_bias": True}),
        "hf-swin": ("SwinConfig", "SwinForImageClassification", {}),
        "hf-swinv2": ("Swinv2Config", "Swinv2ForImageClassification", {"image_size": 256, "window_size": 8}),
    }
)
"""Configuration and class of transformers, at the size of ViT-S (Swin's own: tiny)."""


@dataclass(frozen=True)
class Result:
    """Rows of the float model, the portable and the native file; how many sites of the last stay portable, by op."""

    model: str
    rows: tuple[BenchmarkRow, BenchmarkRow, BenchmarkRow]
    portable: Mapping[str, int]


def main() -> None:
    """Make what is missing, time it, print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join([*TIMM, *TRANSFORMERS]), help="names separated by commas")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each form, and at least 10 rounds")
    parser.add_argument("--output", type=Path, default=Path("bench-models"))
    arguments = parser.parse_args()
    unknown = [name for name in arguments.models.split(",") if name not in TIMM and name not in TRANSFORMERS]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; the models are {', '.join([*TIMM, *TRANSFORMERS])}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    print("| model | float32, ms | products int / float | portable | cpu-native | stays portable |")
    print("|--|--:|--:|--:|--:|--|")
    for name in arguments.models.split(","):
        print(as_markdown(measure(name, arguments.output, arguments.seconds)), flush=True)
    print(f"\n{processor_name(cpu_info())}, onnxruntime {onnxruntime.__version__}, kernel library: {used_isa()}")


def measure(name: str, folder: Path, seconds: float) -> Result:
    """Export, compile, lower and time one model."""
    original, portable, native = (folder / f"{name}.{form}.onnx" for form in ("float32", "w8a8", "native"))
    label = TIMM[name][0] if name in TIMM else f"transformers {TRANSFORMERS[name][1]}"
    if not original.is_file():
        export = export_from_timm if name in TIMM else export_from_transformers
        export(name, original)
    if not portable.is_file():
        value = image_input(create_session(original, threads=1))
        shape = [CALIBRATION_IMAGES, *(int(size) for size in value.shape[1:] if size is not None)]
        images = folder / f"{name}.npz"
        np.savez(images, images=np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
        mptqc.compile(original, images, preset="w8a8", options=dict(QUICK)).save(portable)
    lowered = api.lower(portable, target="cpu-native").model
    save_model(lowered, native)
    first, second, third = benchmark([original, portable, native], min_seconds=seconds)
    kept = Counter(each.op for each in lowering_report(lowered) if each.reason)
    return Result(label, (first, second, third), kept)


def export_from_timm(name: str, output: Path) -> None:
    """The timm model as `mptqc export` writes it."""
    architecture, side = TIMM[name]
    export_timm(architecture, output, pretrained=False, image_size=side)


def export_from_transformers(name: str, output: Path) -> None:
    """The transformers model with the attention that it takes by itself (sdpa where there is one)."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch, transformers = import_torch(), import_transformers()
    config_name, class_name, options = TRANSFORMERS[name]
    config = getattr(transformers, config_name)(**options)
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(config)
    randomise_constant_parameters(model, 0)

    class FirstOutput(torch.nn.Module):  # type: ignore[name-defined,misc]  # torch is imported by name
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: object) -> object:
            return self.model(pixel_values=images)[0]

    export_module(FirstOutput(), (3, config.image_size, config.image_size), output, OnnxForm(), {})


def as_markdown(result: Result) -> str:
    """One line of the table."""
    original, portable, native = result.rows
    kept = ", ".join(f"{count} {op}" for op, count in result.portable.items()) or "–"
    return (
        f"| {result.model} | {original.median_ms:.0f} | {native.integer_matmuls} / {native.float_matmuls} "
        f"| {portable.speedup:.2f} | {native.speedup:.2f} | {kept} |"
    )


if __name__ == "__main__":
    main()
