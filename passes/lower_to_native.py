"""Write a quantized model with the fused operators of the kernel library (docs/custom-ops.md).

    quantizers -> scores -> (+ bias) -> Softmax -> quantizer -> context (-> quantizer)  =>  Attention(Quantize)
    movement of rows -> LayerNormalization -> Add(residual) (-> quantizer -> movement)  =>  LayerNormAdd(Quantize)
    LayerNormalization -> quantizer -> movement of rows                                 =>  LayerNormQuantize
    quantizer -> unfolded patches                                                       =>  QuantizePatches
    integer product -> Gelu (-> Mul) -> quantizer, or -> movement of rows -> Add(residual)       =>  Linear(Quantize)
    integer product -> heads -> ·cos + swapped halves·sin -> quantizer                  =>  LinearQuantize
    integer product -> heads -> over their lengths (-> Mul) -> quantizer                =>  LinearQuantize
    integer product -> Mul(another branch) (-> quantizer)                               =>  Linear(Quantize)

Each is found in the graph that the one before leaves. What an operator cannot express keeps its portable form, and the
model's metadata says why (`lowering_report`). A second run is refused by its stage.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
import onnx_ir as ir

from mptqc.errors import RefusalError
from mptqc.graph.batch_shapes import Batches
from mptqc.graph.edit import (
    AttributeValue,
    Builder,
    add_initializer,
    constant_of,
    is_op,
    only_consumer,
    remove_dead,
)
from mptqc.graph.emission import WEIGHT_BITS_KEY
from mptqc.graph.integer_products import IntegerProduct, find_integer_products, stored_weight
from mptqc.graph.layout import Shapes
from mptqc.graph.match import Norm, find_norms, find_rms_norms
from mptqc.graph.native_attention import SIDE_BY_SIDE, AttentionPattern, Operand, match_attention
from mptqc.graph.native_linear import (
    LinearPattern,
    match_linear,
    rotated_heads,
    unit_heads,
    why_not_rotated,
    why_not_unit,
)
from mptqc.graph.native_nodes import WEIGHT_INPUTS_KEY, Lowering, emit_blocks, emit_native, record_lowering, take_place
from mptqc.graph.native_norms import NormPattern, NormSumPattern, match_norm, match_norm_sum
from mptqc.graph.native_patches import PatchesPattern, match_patches
from mptqc.graph.quantizer_match import emit_unsigned
from mptqc.passes.base import Pass, PassResult, Stage
from mptqc.reference.custom_ops import DOMAIN, DOMAIN_VERSION, PANEL, CodeAttribute

Candidate = TypeVar("Candidate")
Pattern = TypeVar("Pattern")


@dataclass(frozen=True)
class LowerToNative(Pass):
    """Replace what the operators of `ai.mptqc` express.

    Attributes:
        one: the shape of every value at batch 1 (or at the model's own batch).
        two: the same at batch 2, at which it is seen that no row moves from image to image.
        whole: whether the target's library has all of docs/custom-ops.md: CUDA's rotates no heads, takes no
            factor and adds no norms.
    """

    name: ClassVar[str] = "lower-to-native"
    requires: ClassVar[tuple[Stage, ...]] = (Stage.QUANTIZED,)
    ensures: ClassVar[Stage | None] = Stage.LOWERED
    one: Shapes
    two: Shapes
    whole: bool = True

    def call(self, model: ir.Model) -> PassResult:
        """Lower attentions, norms, patches and Linears, in this order.

        Raises:
            VerifyError: an integer product is not in the form that the quantize passes write.
        """
        shapes = Batches(self.one, self.two)
        refused: list[Lowering] = []
        claimed: set[ir.Node] = set()
        attentions = _matches("Attention", _attentions(model), lambda pair: match_attention(*pair, shapes), refused)
        for attention in attentions:
            _lower_attention(attention, shapes)
        remove_dead(model)  # the int8 quantizers of k and v, which else would be further readers of their Linears
        summed = _norms(model) if self.whole else []
        # A norm that is refused here is refused below once more, and reported there.
        sums = _matches("LayerNormAdd", summed, lambda norm: match_norm_sum(norm, shapes), [])
        for total in reversed(sums):  # the last first: what a norm reads and adds may be the sum of one before it
            _lower_norm_sum(total, shapes)
        remove_dead(model)
        norms = _matches("LayerNormQuantize", _norms(model), lambda norm: match_norm(norm, shapes), refused)
        for norm in norms:
            _lower_norm(norm, shapes)
        patches = _matches("QuantizePatches", _linears(model), lambda linear: match_patches(linear, shapes), refused)
        for each in patches:
            _lower_patches(each, shapes)
        linears = _matches(
            "Linear",
            _linears(model),
            lambda linear: match_linear(linear, shapes, claimed, whole=self.whole),
            refused,
        )
        refused += _gelus_apart(linears) + _heads_apart(linears, shapes) + _rms_norms(model)
        for linear in linears:
            _lower_linear(linear, shapes)
        remove_dead(model)
        record_lowering(model, refused)
        edits = len(attentions) + len(sums) + len(norms) + len(patches) + len(linears)
        if edits:
            model.opset_imports[DOMAIN] = DOMAIN_VERSION
        return PassResult(model, edits)


def _matches(
    op: str,
    candidates: Iterable[tuple[str, Candidate]],
    match: Callable[[Candidate], Pattern | None],
    refused: list[Lowering],
) -> list[Pattern]:
    """What matched of the candidates (site, …); what was refused is appended to the report."""
    found = []
    for site, candidate in candidates:
        try:
            pattern = match(candidate)
        except RefusalError as refusal:
            refused.append(Lowering(site, op, str(refusal)))
            continue
        if pattern is not None:
            found.append(pattern)
    return found


def _attentions(model: ir.Model) -> list[tuple[str, tuple[IntegerProduct, IntegerProduct]]]:
    """Site and both products of every integer attention."""
    products = [product for product in find_integer_products(model) if not product.is_linear]
    sites = dict.fromkeys(product.site for product in products)
    pairs = [(site, [product for product in products if product.site == site]) for site in sites]
    return [(site, (pair[0], pair[1])) for site, pair in pairs if len(pair) == 2]


def _norms(model: ir.Model) -> list[tuple[str, Norm]]:
    return [(norm.site, norm) for norm in find_norms(model)]


def _linears(model: ir.Model) -> list[tuple[str, IntegerProduct]]:
    return [(product.site, product) for product in find_integer_products(model) if product.is_linear]


def _gelus_apart(linears: Iterable[LinearPattern]) -> list[Lowering]:
    """The Linears whose GELU stays portable, because what it reads is quantized (full coverage)."""
    found = []
    for linear in linears:
        opened = only_consumer(linear.output) if linear.quantizer is not None else None
        after = only_consumer(opened.outputs[0]) if is_op(opened, "DequantizeLinear") and opened is not None else None
        if is_op(after, "Gelu"):
            found.append(Lowering(linear.product.site, "Linear with GELU", "what its GELU reads is quantized"))
    return found


def _rms_norms(model: ir.Model) -> list[Lowering]:
    """The norms that no operator computes; q and k that are normed per head are among them."""
    reason = "it is an RMSNorm; the kernels compute LayerNorms"
    return [Lowering(str(node.name), "LayerNormQuantize", reason) for node in find_rms_norms(model)]


def _heads_apart(linears: Iterable[LinearPattern], shapes: Batches) -> list[Lowering]:
    """The Linears whose heads are rotated, or brought to length 1, behind them, in portable form."""
    found = []
    for linear in linears:
        site, output = linear.product.site, linear.product.output
        if linear.rotated is None and (rotated := rotated_heads(output)) is not None:
            reason = why_not_rotated(rotated, shapes) or "the target's kernels rotate no heads"
            found.append(Lowering(site, "Linear with rotation", reason))
        if linear.unit is None and (unit := unit_heads(output)) is not None:
            reason = why_not_unit(unit, shapes) or "the target's kernels bring no heads to length 1"
            found.append(Lowering(site, "Linear with unit heads", reason))
    return found


def _lower_attention(found: AttentionPattern, shapes: Batches) -> None:
    site = found.scores.site
    anchor = _maker(found.result if found.output is None else found.output.codes)
    build = Builder(anchor, site)
    attributes: dict[str, CodeAttribute] = {
        "heads": found.heads,
        "row_scale": int(found.row_scale),
        **found.p.quantizer.attributes("p"),
    }
    inputs: list[ir.Value | None] = []
    for letter, operand, axis in (("q", found.q, 2), ("k", found.k, 3), ("v", found.v, 3)):
        inputs.append(_side_by_side(operand, found, axis, Builder(anchor, f"{site}/{letter}"), shapes))
        quantizer = operand.found.quantizer
        attributes |= {f"{letter}_scale": quantizer.scale, f"{letter}_zero_point": quantizer.zero_point}
    for name, added in zip(("bias", "mask"), found.added, strict=False):
        inputs.append(build.constant(f"scores_{name}", added))
    op_type = "Attention"
    if found.output is not None:
        op_type = "AttentionQuantize"
        attributes |= found.output.quantizer.attributes("output")
    output = emit_native(op_type, inputs, attributes, site, build).outputs[0]
    batch, heads, tokens, size = shapes.of(found.result)
    for target in found.targets:
        _put(output, (batch, tokens, heads * size), target, build, shapes)


def _side_by_side(operand: Operand, found: AttentionPattern, axis: int, build: Builder, shapes: Batches) -> ir.Value:
    """The operand's codes as uint8 [batch, tokens, heads·size]; `axis` of the scores has as many tokens."""
    codes = emit_unsigned(operand.found, build) if operand.found.signed else operand.found.codes
    scores, shape = shapes.of(found.scores.output), shapes.of(operand.found.codes)
    batch, tokens = scores[0], scores[axis]
    wanted = (batch, tokens, int(np.prod(shape)) // (batch * tokens))
    if shape == wanted and operand.order == SIDE_BY_SIDE:
        return codes
    images = shapes.target(found.scores.output)[0]
    if operand.order != SIDE_BY_SIDE:
        parted = np.array([images, tokens, found.heads, wanted[2] // found.heads], np.int64)[list(operand.order)]
        codes = build.op("Reshape", [codes, build.constant("parted", parted)], name="parted")
        codes = build.op("Transpose", [codes], {"perm": np.argsort(operand.order).tolist()}, name="together")
    target = np.array([images, *wanted[1:]], np.int64)
    return build.op("Reshape", [codes, build.constant("rows", target)], name="side_by_side")


def _lower_norm(found: NormPattern, shapes: Batches) -> None:
    norm = found.norm
    for path in found.paths:
        build = Builder(norm.node, norm.site)
        rows = build.constant("rows", path.rows) if path.rows.size > 1 else None
        attributes = {"epsilon": found.epsilon, **path.quantizer.quantizer.attributes("output")}
        node = emit_native("LayerNormQuantize", [*norm.node.inputs[:3], rows], attributes, norm.site, build)
        codes = node.outputs[0]
        if not path.moves:
            _put(codes, shapes.of(norm.output), path.target, build, shapes)
            continue
        codes.shape = norm.output.shape
        path.moves[0].replace_input_with(0, codes)
        for move in path.moves:
            moved = move.outputs[0]
            moved.name, moved.dtype = f"{moved.name}/codes", ir.DataType.UINT8
        take_place(path.moves[-1].outputs[0], path.target)


def _lower_norm_sum(found: NormSumPattern, shapes: Batches) -> None:
    norm = found.norm
    build = Builder(_maker(found.sum), norm.site)
    rows = build.constant("rows", found.rows) if found.rows.size > 1 else None
    operands = [found.x, *norm.node.inputs[1:3], found.residual, rows]
    attributes: dict[str, AttributeValue] = {"epsilon": found.epsilon}
    if found.codes is None:
        node = emit_native("LayerNormAdd", operands, attributes, norm.site, build)
    else:
        attributes |= found.codes.quantizer.quantizer.attributes("output")
        operands.append(build.constant("code_rows", found.codes.rows) if found.codes.rows.size > 1 else None)
        node = emit_native("LayerNormAddQuantize", operands, attributes, norm.site, build)
        _put(node.outputs[1], shapes.of(found.sum), found.codes.target, build, shapes)
    take_place(node.outputs[0], found.sum)


def _lower_patches(found: PatchesPattern, shapes: Batches) -> None:
    x = found.quantizer.x
    build = Builder(_maker(found.quantizer.codes), found.site)
    height, width = found.patch
    attributes = {"patch_height": height, "patch_width": width, **found.quantizer.quantizer.attributes("output")}
    codes = emit_native("QuantizePatches", [x], attributes, found.site, build).outputs[0]
    batch, channels, rows, columns = shapes.of(x)
    shape = (batch, rows // height, columns // width, channels * height * width)
    _put(codes, shape, found.target, build, shapes)


def _lower_linear(found: LinearPattern, shapes: Batches) -> None:
    product = found.product
    anchor = _maker(found.output)
    build = Builder(anchor, product.site)
    weight = stored_weight(product)
    inputs, outputs = weight.integers.shape
    bias = build.constant("bias", np.zeros(outputs, np.float32)) if product.bias is None else product.bias
    blocks = emit_blocks(weight, Builder(anchor, f"{product.site}/unpack"))
    operands: list[ir.Value | None] = [product.left, blocks, product.right_scale, bias, None, None, None, None]
    factor = None if found.factor is None else found.factor[0].inputs[found.factor[1]]
    attributes: dict[str, AttributeValue] = {
        "input_scale": found.input_scale,
        "input_zero_point": found.input_zero_point,
        "activation": found.activation,
    }
    op_type = "Linear"
    if found.quantizer is not None:
        op_type = "LinearQuantize"
        attributes |= found.quantizer.quantizer.attributes("output")
        operands[4], operands[7] = found.multiplier, factor
        if found.unit is not None:
            width = shapes.of(found.unit.x)[3]
            attributes |= {"head_width": width, "head_epsilon": found.unit.epsilon}
            if found.unit.factor is not None:
                by_output = np.broadcast_to(found.unit.factor, (outputs // width, width)).reshape(-1)
                operands[4] = build.constant("multiplier", np.ascontiguousarray(by_output))
        if found.rotated is not None:
            operands[5:7] = [_in_panels(table, build.graph) for table in (found.rotated.cosine, found.rotated.sine)]
    else:
        operands[6] = factor
        if found.residual is not None:
            add, index = found.residual
            operands[4] = add.inputs[index]
            operands[5] = build.constant("rows", found.rows) if found.rows.size > 1 else None
    node = emit_native(op_type, operands, attributes, product.site, build)
    node.metadata_props[WEIGHT_BITS_KEY] = str(weight.bits)
    node.metadata_props[WEIGHT_INPUTS_KEY] = str(inputs)
    made = node.outputs[0]
    heads = found.rotated or found.unit
    if heads is not None and found.quantizer is not None and found.output is found.quantizer.codes:
        made = build.op("Reshape", [made, build.constant("heads", shapes.target(heads.x))], name="heads")
        made.dtype = ir.DataType.UINT8
    take_place(made, found.output)


def _in_panels(table: ir.Value, graph: ir.Graph) -> ir.Value:
    """A table of a rotation [T, 1 or h, d]; one that all heads share fills a panel, [T, PANEL/d, d], made once."""
    array = constant_of(table)
    assert array is not None, "tables are constants"
    if array.shape[1] != 1 or array.shape[2] == PANEL:
        return table
    name = f"{table.name}/panel"
    known = graph.initializers.get(name)
    return known or add_initializer(graph, name, np.tile(array, (1, PANEL // array.shape[2], 1)))


def _put(made: ir.Value, shape: tuple[int, ...], target: ir.Value, build: Builder, shapes: Batches) -> None:
    """Let `made`, of `shape` at the larger batch, be read where `target` was; a Reshape between them if need be."""
    if shape != shapes.of(target):
        made = build.op("Reshape", [made, build.constant("shape", shapes.target(target))], name="shaped")
        made.type = target.type
    take_place(made, target)


def _maker(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None, "codes and sums are made by nodes"
    return node
