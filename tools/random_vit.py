"""A vision transformer of any size with random weights, without torch: right for speed and size, not for accuracy."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

OPSET, IR_VERSION = 20, 10
WEIGHT_SPREAD = 0.02  # standard deviation of timm's initial weights
BIAS_SPREAD = 0.02  # not zero, so that nothing can drop the biases
CALIBRATION_IMAGES = 8

HEAD = """<ir_version: {ir_version}, opset_import: ["" : {opset}]>
vit (float[batch,3,{image},{image}] images) => (float[batch,{classes}] logits)
<int64[3] flat = {{0, {width}, -1}}, int64[5] heads = {{0, -1, 3, {heads}, {head_width}}},
 int64[3] joined = {{0, -1, {width}}}, float scale = {{{scale}}}, int64[1] first = {{0}}, int64 token = {{0}}> {{
    patches = Conv <kernel_shape = [{patch}, {patch}], strides = [{patch}, {patch}]> (images, patch_w, patch_b)
    flattened = Reshape(patches, flat)
    tokens = Transpose <perm = [0, 2, 1]> (flattened)
    image_shape = Shape <start = 0, end = 1> (images)
    class_shape = Concat <axis = 0> (image_shape, class_size)
    class_tokens = Expand(class_token, class_shape)
    sequence = Concat <axis = 1> (class_tokens, tokens)
    x0 = Add(sequence, position)
"""
BLOCK = """
    n1_{i} = LayerNormalization <epsilon = 1e-6> (x{i}, g1_{i}, h1_{i})
    qkv_m_{i} = MatMul(n1_{i}, qkv_w_{i})
    qkv_a_{i} = Add(qkv_m_{i}, qkv_b_{i})
    qkv_r_{i} = Reshape(qkv_a_{i}, heads)
    qkv_t_{i} = Transpose <perm = [2, 0, 3, 1, 4]> (qkv_r_{i})
    q0_{i}, k0_{i}, v0_{i} = Split <axis = 0, num_outputs = 3> (qkv_t_{i})
    q1_{i} = Squeeze(q0_{i}, first)
    k1_{i} = Squeeze(k0_{i}, first)
    v_{i} = Squeeze(v0_{i}, first)
    q_{i} = Mul(q1_{i}, scale)
    k_{i} = Transpose <perm = [0, 1, 3, 2]> (k1_{i})
    s_{i} = MatMul(q_{i}, k_{i})
    p_{i} = Softmax <axis = -1> (s_{i})
    c_{i} = MatMul(p_{i}, v_{i})
    t_{i} = Transpose <perm = [0, 2, 1, 3]> (c_{i})
    j_{i} = Reshape(t_{i}, joined)
    o_m_{i} = MatMul(j_{i}, proj_w_{i})
    o_{i} = Add(o_m_{i}, proj_b_{i})
    y{i} = Add(x{i}, o_{i})
    n2_{i} = LayerNormalization <epsilon = 1e-6> (y{i}, g2_{i}, h2_{i})
    f_m_{i} = MatMul(n2_{i}, fc1_w_{i})
    f_{i} = Add(f_m_{i}, fc1_b_{i})
    a_{i} = Gelu(f_{i})
    z_m_{i} = MatMul(a_{i}, fc2_w_{i})
    z_{i} = Add(z_m_{i}, fc2_b_{i})
    x{next} = Add(y{i}, z_{i})
"""
TAIL = """
    n = LayerNormalization <epsilon = 1e-6> (x{depth}, g, h)
    chosen = Gather <axis = 1> (n, token)
    logits_m = MatMul(chosen, head_w)
    logits = Add(logits_m, head_b)
}}
"""


@dataclass(frozen=True)
class VitShape:
    """Sizes of a ViT; the default is ViT-S/16 at 224."""

    image: int = 224
    patch: int = 16
    width: int = 384
    depth: int = 12
    heads: int = 6
    classes: int = 1000


def write_random_vit(path: Path, shape: VitShape, seed: int = 0) -> None:
    """Write a float32 ONNX file with a dynamic batch; the same seed gives the same bytes."""
    sizes = {
        **vars(shape),
        "ir_version": IR_VERSION,
        "opset": OPSET,
        "head_width": shape.width // shape.heads,
        "scale": (shape.width // shape.heads) ** -0.5,
    }
    blocks = "".join(BLOCK.format(i=block, next=block + 1) for block in range(shape.depth))
    weights = random_weights(shape, np.random.default_rng(seed))
    declared = ", ".join(f"{kind_of(array)} {name}" for name, array in weights.items())
    text = HEAD.format(**sizes) + blocks + TAIL.format(**sizes)
    model = ir.from_onnx_text(text.replace("images) =>", f"images, {declared}) =>", 1))
    for value in list(model.graph.inputs)[1:]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(weights[str(value.name)], name=value.name)
        model.graph.register_initializer(value)
    ir.save(model, path)


def write_random_images(path: Path, shape: VitShape, seed: int = 0) -> None:
    """Write CALIBRATION_IMAGES images of float32 noise as `images` of an .npz."""
    size = (CALIBRATION_IMAGES, 3, shape.image, shape.image)
    np.savez(path, images=np.random.default_rng(seed).standard_normal(size, dtype=np.float32))


def random_weights(shape: VitShape, generator: np.random.Generator) -> dict[str, NDArray[np.generic]]:
    """Every weight by name; matrices are [inputs, outputs]."""
    width, hidden, tokens = shape.width, 4 * shape.width, (shape.image // shape.patch) ** 2 + 1
    weights: dict[str, NDArray[np.generic]] = {"class_size": np.array([1, width], np.int64)}

    def normal(name: str, *size: int, spread: float = WEIGHT_SPREAD) -> None:
        weights[name] = generator.standard_normal(size, dtype=np.float32) * np.float32(spread)

    def linear(name: str, suffix: str, inputs: int, outputs: int) -> None:
        normal(f"{name}_w{suffix}", inputs, outputs)
        normal(f"{name}_b{suffix}", outputs, spread=BIAS_SPREAD)

    def norm(number: str) -> None:
        weights[f"g{number}"] = np.ones(width, np.float32)
        normal(f"h{number}", width, spread=BIAS_SPREAD)

    normal("patch_w", width, 3, shape.patch, shape.patch)
    normal("patch_b", width)
    normal("class_token", 1, 1, width)
    normal("position", 1, tokens, width)
    for block in range(shape.depth):
        norm(f"1_{block}")
        linear("qkv", f"_{block}", width, 3 * width)
        linear("proj", f"_{block}", width, width)
        norm(f"2_{block}")
        linear("fc1", f"_{block}", width, hidden)
        linear("fc2", f"_{block}", hidden, width)
    norm("")
    linear("head", "", width, shape.classes)
    return weights


def kind_of(array: NDArray[np.generic]) -> str:
    """The array's type as ONNX text writes it."""
    name = "int64" if array.dtype == np.int64 else "float"
    return f"{name}[{','.join(str(size) for size in array.shape)}]"
