"""Models as torch and transformers write them today: everything in integers, every attention fused, near to float."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from mptqc import api
from mptqc.export.onnx_writer import OnnxForm, export_module
from mptqc.export.packages import import_torch, import_transformers
from mptqc.export.random_weights import randomise_constant_parameters
from mptqc.graph.io import serialize
from mptqc.graph.native_nodes import ATTENTION_OPS, LINEAR_OPS, is_native, lowering_report
from mptqc.runtime.fused_ops import matmul_counts, optimized_op_counts
from mptqc.runtime.library import find_library
from mptqc.runtime.session import create_session

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("torch")
pytest.importorskip("transformers", reason="optional; pip install transformers")
torch = import_torch()
transformers = import_transformers()

SIDE, BLOCKS = 32, 2
LEAST_SQNR = 20.0
"""dB, at 8 bits with ranges from a few images of noise; random weights give 24 to 45."""
QUICK = {"range_method": "min-max", "smoothing": False, "attention_folds": False, "compensation": False, "samples": 8}
PLAIN = {
    "image_size": SIDE, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 2,
    "intermediate_size": 64,
}  # fmt: skip
WINDOWS = {
    "image_size": SIDE, "patch_size": 4, "embed_dim": 32, "depths": [2], "num_heads": [2], "window_size": 4
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ViTForImageClassification", PLAIN),
    "Dinov2": ("Dinov2ForImageClassification", PLAIN),
    "Dinov2 gated": ("Dinov2ForImageClassification", PLAIN | {"use_swiglu_ffn": True}),
    "DINOv3ViT": ("DINOv3ViTModel", PLAIN),
    "DINOv3ViT gated": ("DINOv3ViTModel", PLAIN | {"use_gated_mlp": True, "hidden_act": "silu"}),
    "Beit": ("BeitForImageClassification", PLAIN | {"use_relative_position_bias": True}),
    "CLIPVision": ("CLIPVisionModel", PLAIN),
    "SiglipVision": ("SiglipVisionModel", PLAIN | {"vision_use_head": False}),
    "Swin": ("SwinForImageClassification", WINDOWS),
    "Swinv2": ("Swinv2ForImageClassification", WINDOWS),
}
FORMS = [(name, "sdpa") for name in MODELS if name != "Swinv2"] + [
    (name, "eager") for name in ("ViT", "DINOv3ViT", "Swin", "Swinv2")
]


def transformers_model(name: str, attention: str) -> Any:
    kind, options = MODELS[name]
    config = getattr(transformers, f"{name.split()[0]}Config")(**options)
    config._attn_implementation = attention
    return getattr(transformers, kind)(config)


class FirstOutput(torch.nn.Module):  # type: ignore[misc,name-defined] # torch is imported by name
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Any) -> Any:
        return self.model(pixel_values=images)[0]


class TokensFirst(torch.nn.Module):  # type: ignore[misc,name-defined]
    """Blocks around torch's MultiheadAttention, [T, B, C], as open_clip has them."""

    def __init__(self, *, with_weights: bool) -> None:
        super().__init__()
        self.with_weights = with_weights
        self.patches = torch.nn.Conv2d(3, 32, 8, 8)
        self.position = torch.nn.Parameter(torch.randn(16, 1, 32))
        self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(32) for _ in range(BLOCKS)])
        self.attentions = torch.nn.ModuleList([torch.nn.MultiheadAttention(32, 2) for _ in range(BLOCKS)])
        self.head = torch.nn.Linear(32, 10)

    def forward(self, images: Any) -> Any:
        x = self.patches(images).flatten(2).permute(2, 0, 1) + self.position
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            y = norm(x)
            x = x + attention(y, y, y, need_weights=self.with_weights)[0]
        return self.head(x.mean(0))


def encoder() -> Any:
    """torch's TransformerEncoder, as torchvision's ViT uses its MultiheadAttention: batch first outside, not inside."""
    layer = torch.nn.TransformerEncoderLayer(32, 2, 64, activation="gelu", batch_first=True, norm_first=True)

    class Encoder(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.patches = torch.nn.Conv2d(3, 32, 8, 8)
            self.blocks = torch.nn.TransformerEncoder(layer, BLOCKS, enable_nested_tensor=False)
            self.head = torch.nn.Linear(32, 10)

        def forward(self, images: Any) -> Any:
            return self.head(self.blocks(self.patches(images).flatten(2).transpose(1, 2))[:, 0])

    return Encoder()


CASES: dict[str, Callable[[], Any]] = {
    f"{name}, {attention}": lambda name=name, attention=attention: FirstOutput(transformers_model(name, attention))  # type: ignore[misc]
    for name, attention in FORMS
} | {
    "MultiheadAttention": lambda: TokensFirst(with_weights=False),
    "MultiheadAttention with weights": lambda: TokensFirst(with_weights=True),
    "TransformerEncoder": encoder,
}


def compiled(case: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write float.onnx and portable.onnx; images, and the float model's output."""
    torch.manual_seed(0)
    module = CASES[case]()
    randomise_constant_parameters(module, 0)
    export_module(module, (3, SIDE, SIDE), folder / "float.onnx", OnnxForm(), {})
    images = np.random.default_rng(0).standard_normal((8, 3, SIDE, SIDE)).astype(np.float32)
    np.savez(folder / "images.npz", images=images)
    result = api.compile(folder / "float.onnx", folder / "images.npz", preset="w8a8", options=QUICK)
    result.save(folder / "portable.onnx")
    return images, create_session(folder / "float.onnx").run(None, {"images": images})[0]


@pytest.mark.parametrize("case", CASES)
def test_every_attention_is_fused_and_near_to_float(tmp_path: Path, case: str) -> None:
    images, expected = compiled(case, tmp_path)
    assert matmul_counts(optimized_op_counts(tmp_path / "portable.onnx")).float_matmuls == 0
    native = api.lower(tmp_path / "portable.onnx").model
    assert sum(is_native(node, *ATTENTION_OPS) for node in native.graph) == BLOCKS
    assert not [each for each in lowering_report(native) if each.reason and each.op.startswith(("Attention", "Linear"))]
    assert not [each for each in lowering_report(native) if "are read by Add" in each.reason]  # SwinV2's norms
    assert sqnr(expected, create_session(tmp_path / "portable.onnx").run(None, {"images": images})[0]) > LEAST_SQNR
    if find_library() is not None:
        assert sqnr(expected, create_session(serialize(native)).run(None, {"images": images})[0]) > LEAST_SQNR


@pytest.mark.parametrize("case", ["Dinov2 gated, sdpa", "DINOv3ViT gated, sdpa"])
def test_gates_are_part_of_their_linears(tmp_path: Path, case: str) -> None:
    compiled(case, tmp_path)
    native = api.lower(tmp_path / "portable.onnx").model
    linears = {node.metadata_props["mptqc.site"]: node for node in native.graph if is_native(node, *LINEAR_OPS)}
    for block in range(BLOCKS):
        gate, fc1 = linears[f"block{block:02d}.gate"], linears[f"block{block:02d}.fc1"]
        assert gate.attributes["activation"].as_string() == "silu"
        assert fc1.op_type == "LinearQuantize"
        assert fc1.inputs[-1] is gate.outputs[0]


@pytest.mark.parametrize("float16", [False, True])
@pytest.mark.parametrize("case", ["DINOv3ViT gated, sdpa", "Swinv2, eager", "MultiheadAttention"])
def test_the_cuda_form_is_near_to_float(tmp_path: Path, emulated_library: Path, case: str, float16: bool) -> None:
    images, expected = compiled(case, tmp_path)
    lowered = api.lower(tmp_path / "portable.onnx", target="cuda", float16=float16).model
    assert sum(is_native(node, *ATTENTION_OPS) for node in lowered.graph) == BLOCKS
    rotations = [each for each in lowering_report(lowered) if each.op == "Linear with rotation"]
    assert len(rotations) == (2 * BLOCKS if "DINOv3" in case else 0)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(emulated_library))
    session = ort.InferenceSession(serialize(lowered), options, providers=["CPUExecutionProvider"])  # noqa: TID251 - a library that create_session does not know
    assert sqnr(expected, session.run(None, {"images": images})[0]) > LEAST_SQNR


def sqnr(expected: np.ndarray, found: np.ndarray) -> float:
    return 10 * float(np.log10(np.square(expected).sum() / np.square(expected - found).sum()))
