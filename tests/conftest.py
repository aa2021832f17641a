"""Small models: at stage smoothed, as the passes that emit integers take them, and a whole ViT at stage raw."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from cuda_kernels import GLUE, KERNELS, build_emulated
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass
from quantizers import opt_m

from mptqc.analysis.bit_variables import find_variables
from mptqc.analysis.shapes import concrete_shapes
from mptqc.graph.match import SITE_KEY, find_linears
from mptqc.passes.base import STAGE_KEY, Stage
from mptqc.plan import (
    ActivationQuantizer,
    AttentionPlan,
    LayerPlan,
    NormFold,
    QuantPlan,
    Uniform,
)
from mptqc.recipe import Recipe, Target

Arrays = Mapping[str, NDArray[np.generic]]
MakeSmoothed = Callable[[str, str, str, Mapping[str, str], Arrays], ir.Model]
MakeViT = Callable[..., ir.Model]


@pytest.fixture(scope="session")
def smoothed() -> MakeSmoothed:
    """smoothed(inputs, outputs, body, sites, arrays): a model from ONNX text at stage smoothed.

    `sites` are stamped by the name of a node's first output, which also becomes the node's name; `arrays` are the
    initializers.
    """

    def make(inputs: str, outputs: str, body: str, sites: Mapping[str, str], arrays: Arrays) -> ir.Model:
        declared = ", ".join([inputs, *(f"float[] {name}" for name in arrays)])
        model = ir.from_onnx_text(
            f'<ir_version: 10, opset_import: ["": 21]>\ng ({declared}) => ({outputs}) {{\n{body}\n}}'
        )
        by_name = {value.name: value for value in model.graph.inputs}
        for name, array in arrays.items():
            value = by_name[name]
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(array, name=name)
            value.dtype, value.shape = value.const_value.dtype, ir.Shape(array.shape)
            model.graph.register_initializer(value)
        for node in model.graph:
            node.name = str(node.outputs[0].name)
            if node.name in sites:
                node.metadata_props[SITE_KEY] = sites[node.name]
        model.metadata_props[STAGE_KEY] = Stage.SMOOTHED
        return model

    return make


BLOCK_BODY = """
  n = LayerNormalization <axis = -1> (x, gamma, beta)
  qp = MatMul (n, wq)
  ql = Add (qp, bq)
  qs = Reshape (ql, heads)
  q = Transpose <perm = [0, 2, 1, 3]> (qs)
  kp = MatMul (n, wk)
  kl = Add (kp, bk)
  ks = Reshape (kl, heads)
  k = Transpose <perm = [0, 2, 3, 1]> (ks)
  vp = MatMul (n, wv)
  vl = Add (vp, bv)
  vs = Reshape (vl, heads)
  v = Transpose <perm = [0, 2, 1, 3]> (vs)
  s = MatMul (q, k)
  sm = Add (s, mask)
  a = Softmax <axis = -1> (sm)
  c = MatMul (a, v)
  ct = Transpose <perm = [0, 2, 1, 3]> (c)
  cr = Reshape (ct, joined)
  op = MatMul (cr, wo)
  o = Add (op, bo)
  fp = MatMul (o, w1)
  f = Add (fp, b1)
  g = Gelu (f)
  yp = MatMul (g, w2)
  y = Add (yp, b2)
"""
BLOCK_SITES = {
    "n": "block00.norm1",
    "qp": "block00.q",
    "kp": "block00.k",
    "vp": "block00.v",
    "a": "block00.attention",
    "op": "block00.proj",
    "fp": "block00.fc1",
    "yp": "block00.fc2",
}
TOKENS, CHANNELS, HIDDEN, HEADS = 7, 12, 20, 2


@pytest.fixture(scope="session")
def block(smoothed: MakeSmoothed) -> Callable[[], ir.Model]:
    """block(): a transformer block of 2 heads without residuals, x [n, 7, 12] to y [n, 7, 12], with a mask."""

    def make() -> ir.Model:
        generator = np.random.default_rng(11)
        shapes = {f"w{letter}": (CHANNELS, CHANNELS) for letter in "qkvo"}
        shapes |= {f"b{letter}": (CHANNELS,) for letter in "qkvo"}
        shapes |= {"w1": (CHANNELS, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, CHANNELS), "b2": (CHANNELS,)}
        shapes |= {"gamma": (CHANNELS,), "beta": (CHANNELS,), "mask": (1, 1, TOKENS, TOKENS)}
        arrays: dict[str, NDArray[np.generic]] = {
            name: (generator.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)
            for name, shape in shapes.items()
        }
        arrays["heads"] = np.array([0, 0, HEADS, CHANNELS // HEADS], np.int64)
        arrays["joined"] = np.array([0, 0, CHANNELS], np.int64)
        io = f"float[n, {TOKENS}, {CHANNELS}]"
        return smoothed(f"{io} x", f"{io} y", BLOCK_BODY, BLOCK_SITES, arrays)

    return make


@pytest.fixture(scope="session")
def block_plan(block: Callable[[], ir.Model]) -> Callable[..., QuantPlan]:
    """block_plan(weight_bits=4, activation_bits=4, two_region=True, target): every site of `block` quantized."""

    def make(
        weight_bits: int = 4, activation_bits: int = 4, *, two_region: bool = True, target: Target = Target.PORTABLE
    ) -> QuantPlan:
        model = block()
        middle = Uniform(bits=activation_bits, scale=6 / 2**activation_bits, zero_point=2 ** (activation_bits - 1))
        softmax: ActivationQuantizer = Uniform(bits=activation_bits, scale=1 / (2**activation_bits - 1), zero_point=0)
        gelu: ActivationQuantizer = Uniform(bits=activation_bits, scale=3 / 2**activation_bits, zero_point=1)
        if two_region:
            softmax = opt_m(bits=activation_bits, scale=0.02, zero_point=0, m=2, low_codes=5)
            gelu = opt_m(bits=activation_bits, scale=0.05, zero_point=1, m=2, low_codes=6)
        layers = tuple(
            LayerPlan(site=linear.site, weight_bits=weight_bits, input=gelu if "fc2" in linear.site else middle)
            for linear in find_linears(model)
        )
        arrays = {
            f"{linear.site}/weight_scale": np.abs(linear.weight).max(axis=0) / np.float32(2 ** (weight_bits - 1) - 1)
            for linear in find_linears(model)
        }
        attention = AttentionPlan(site="block00.attention", q=middle, k=middle, p=softmax, v=middle)
        return QuantPlan(
            model_digest="0",
            recipe=Recipe(target=target),
            norm_folds=(NormFold(site="block00.norm1", alpha=0.85),),
            layers=layers,
            attentions=(attention,),
            elements={one.name: one.elements for one in find_variables(model, concrete_shapes(model), Recipe())},
            arrays=arrays,
        )

    return make


VIT_HEADS = {
    "class": "first = Gather<axis=1>(last_norm, zero)\n  head = MatMul(first, W_head)\n  logits = Add(head, b_head)",
    "distilled": (
        "first = Gather<axis=1>(last_norm, zero)\n  head = MatMul(first, W_head)\n  one_head = Add(head, b_head)\n"
        "  second = Gather<axis=1>(last_norm, one)\n  other = MatMul(second, W_head2)\n"
        "  two_head = Add(other, b_head)\n  both = Add(one_head, two_head)\n  logits = Div(both, half)"
    ),
    "mean": (
        "mean = ReduceMean<keepdims=0>(last_norm, axes)\n  head = MatMul(mean, W_head)\n  logits = Add(head, b_head)"
    ),
    "dense": "head = MatMul(last_norm, W_head)\n  logits = Add(head, b_head)",
}


@pytest.fixture(scope="session")
def tiny_vit(smoothed: MakeSmoothed) -> MakeViT:
    """tiny_vit(head="class", batch="b", blocks=2, layer_scale=False, seed=0): a float ViT as exporters write it.

    Images [batch, 3, 8, 8], patches of 4, a class token (5 tokens), 2 heads of 4 channels, LayerNorm and Gelu whole,
    one Linear for q, k and v, a scalar Mul on q. Heads: "class" (token 0), "distilled" (tokens 0 and 1), "mean",
    "dense" (all tokens). Weights are random, so that no two values of a tensor agree.
    """

    def make(
        head: str = "class", batch: str = "b", blocks: int = 2, *, layer_scale: bool = False, seed: int = 0
    ) -> ir.Model:
        random = np.random.default_rng(seed)
        width, tokens = 8, 5
        arrays: dict[str, NDArray[np.generic]] = {
            "zero": np.array(0, np.int64),
            "one": np.array(1, np.int64),
            "axes": np.array([1], np.int64),
            "half": np.array(2, np.float32),
            "patch_shape": np.array([0, width, 4], np.int64),
            "pads": np.array([0, 1, 0, 0, 0, 0], np.int64),
            "qkv_shape": np.array([-1, tokens, 3, 2, 4], np.int64),
            "joined_shape": np.array([-1, tokens, width], np.int64),
            "scale": np.array(0.5, np.float32),
        }

        def draw(name: str, *shape: int) -> str:
            arrays[name] = (random.normal(size=shape) / np.sqrt(shape[0] if len(shape) > 1 else 4)).astype(np.float32)
            return name

        def linear(source: str, name: str, inputs: int, outputs: int) -> str:
            weight, bias = draw(f"W_{name}", inputs, outputs), draw(f"b_{name}", outputs)
            return f"  {name}_product = MatMul({source}, {weight})\n  {name} = Add({name}_product, {bias})\n"

        def norm(source: str, name: str) -> str:
            gamma, beta = draw(f"gamma_{name}", width), draw(f"beta_{name}", width)
            return f"  {name} = LayerNormalization<axis=-1, epsilon=1e-6>({source}, {gamma}, {beta})\n"

        draw("W_conv", width, 3, 4, 4), draw("b_conv", width), draw("position", 1, tokens, width)
        body = (
            "  patches = Conv<kernel_shape=[4,4], strides=[4,4]>(images, W_conv, b_conv)\n"
            "  flat = Reshape(patches, patch_shape)\n  moved = Transpose<perm=[0,2,1]>(flat)\n"
            "  padded = Pad(moved, pads)\n  x0 = Add(padded, position)\n"
        )
        for i in range(blocks):
            scaled = f"proj{i}"
            body += norm(f"x{i}", f"norm_a{i}") + linear(f"norm_a{i}", f"qkv{i}", width, 3 * width)
            body += f"  parted{i} = Reshape(qkv{i}, qkv_shape)\n  turned{i} = Transpose<perm=[2,0,3,1,4]>(parted{i})\n"
            for position, letter in enumerate("qkv"):
                arrays[f"index_{letter}"] = np.array(position, np.int64)
                body += f"  {letter}{i} = Gather<axis=0>(turned{i}, index_{letter})\n"
            body += (
                f"  scaled_q{i} = Mul(q{i}, scale)\n  kt{i} = Transpose<perm=[0,1,3,2]>(k{i})\n"
                f"  scores{i} = MatMul(scaled_q{i}, kt{i})\n  p{i} = Softmax<axis=-1>(scores{i})\n"
                f"  context{i} = MatMul(p{i}, v{i})\n  back{i} = Transpose<perm=[0,2,1,3]>(context{i})\n"
                f"  joined{i} = Reshape(back{i}, joined_shape)\n"
            )
            body += linear(f"joined{i}", f"proj{i}", width, width)
            if layer_scale:
                body += f"  layer_scale{i} = Mul(proj{i}, {draw(f'ls{i}', width)})\n"
                scaled = f"layer_scale{i}"
            body += f"  half{i} = Add(x{i}, {scaled})\n" + norm(f"half{i}", f"norm_b{i}")
            body += linear(f"norm_b{i}", f"fc1_{i}", width, 16) + f"  gelu{i} = Gelu(fc1_{i})\n"
            body += linear(f"gelu{i}", f"fc2_{i}", 16, width) + f"  x{i + 1} = Add(half{i}, fc2_{i})\n"
        body += norm(f"x{blocks}", "last_norm")
        for name, shape in (("W_head", (width, 10)), ("W_head2", (width, 10)), ("b_head", (10,))):
            draw(name, *shape)
        body += f"  {VIT_HEADS[head]}"
        output = f"float[{batch},{tokens},10] logits" if head == "dense" else f"float[{batch},10] logits"
        model = smoothed(f"float[{batch},3,8,8] images", output, body, {}, arrays)
        del model.metadata_props[STAGE_KEY]
        RemoveUnusedNodesPass()(model)
        return model

    return make


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA kernels and their operators for the emulated device; ONNX Runtime's CPU provider takes them."""
    path = tmp_path_factory.mktemp("emulated") / "libmptqc_cuda.so"
    try:
        build_emulated(path, [*KERNELS, *GLUE])
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return path
