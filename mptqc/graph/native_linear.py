"""What `Linear` and `LinearQuantize` of `ai.mptqc` replace in a quantized model; finding never edits."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.errors import RefusalError
from mptqc.graph.batch_shapes import Batches
from mptqc.graph.edit import constant_of, is_op, only_consumer, producer, scalar_of
from mptqc.graph.integer_products import IntegerProduct
from mptqc.graph.layout import Reader, readers
from mptqc.graph.quantizer_match import LEAST_SCALE, MOST_SCALE, FoundQuantizer, quantizers_of
from mptqc.graph.rotary import RotatedHeads, match_rotated
from mptqc.graph.unit_heads import UnitHeads, match_unit_heads
from mptqc.reference.custom_ops import MOST_TERMS, PANEL, QUICK_GELU_FACTOR, ROTATED_WIDTHS, UNIT_HEADS, UNIT_WIDTHS


@dataclass(frozen=True)
class LinearPattern:
    """A Linear and what follows it: GELU, then a quantizer (behind `multiplier` [N]) or the Add of a residual stream.

    `factor` is the Mul by another branch, as SwiGLU has it, and the index of that: then there is no GELU.

    `residual` is the Add and the index of its other input; `rows` as `Linear` takes it, [1] if no row moves; `output`
    is what the operator gives. `rotated`: the quantizer reads its heads rotated, and there is none of the rest; `unit`
    likewise: at length 1.
    """

    product: IntegerProduct
    input_scale: float
    input_zero_point: int
    activation: str
    multiplier: ir.Value | None
    quantizer: FoundQuantizer | None
    residual: tuple[ir.Node, int] | None
    rows: NDArray[np.int64]
    output: ir.Value
    rotated: RotatedHeads | None = None
    factor: tuple[ir.Node, int] | None = None
    unit: UnitHeads | None = None


def match_linear(
    product: IntegerProduct, shapes: Batches, claimed: set[ir.Node], *, whole: bool = True
) -> LinearPattern:
    """Read a Linear and what follows it; an Add or Mul in `claimed` is another Linear's, one found is put there.

    Rotations of heads and factors are read only if the library has the `whole` operator.

    Raises:
        RefusalError: it is not what the operator computes.
    """
    scale = scalar_of(product.left_scale)
    zero_point = 0.0 if product.left_zero is None else scalar_of(product.left_zero)
    if scale is None or not LEAST_SCALE <= scale <= MOST_SCALE or product.left.dtype is not ir.DataType.UINT8:
        raise RefusalError(f"its input is not uint8 codes of one scale from {LEAST_SCALE:.0e} to {MOST_SCALE:.0e}")
    if zero_point is None:
        raise RefusalError("the zero point of its input is not one constant")
    if product.right_zero is not None and scalar_of(product.right_zero) != 0:
        raise RefusalError("its weight has a zero point")
    if shapes.of(product.left)[-1] > MOST_TERMS:
        raise RefusalError(f"it sums {shapes.of(product.left)[-1]} products; the operator sums {MOST_TERMS} at most")
    taken = (product, scale, int(zero_point))
    no_rows = np.zeros(1, np.int64)
    rotated = rotated_heads(product.output)
    if rotated is not None and whole and why_not_rotated(rotated, shapes) is None:
        quantizer, codes = _quantized_heads(rotated.x, rotated.output, shapes)
        return LinearPattern(*taken, "none", None, quantizer, None, no_rows, codes, rotated)
    unit = unit_heads(product.output)
    if unit is not None and whole and why_not_unit(unit, shapes) is None:
        quantizer, codes = _quantized_heads(unit.x, unit.output, shapes)
        return LinearPattern(*taken, UNIT_HEADS, None, quantizer, None, no_rows, codes, unit=unit)
    value, activation = _activation(product.output) or (product.output, "none")
    factor = _factor(value, shapes, claimed) if whole and activation == "none" else None
    if factor is not None:
        claimed.add(factor[0])
        value = factor[0].outputs[0]
    for x, multiplier in ((value, None), *(_scaled(value) if factor is None else ())):
        if (found := _only_quantizer(x)) is not None:
            return LinearPattern(*taken, activation, multiplier, found, None, no_rows, found.codes, factor=factor)
    residual = _residual(value, shapes, claimed)
    if residual is None or (factor is not None and residual[2].size > 1):
        return LinearPattern(*taken, activation, None, None, None, no_rows, value, factor=factor)
    add, index, rows = residual
    claimed.add(add)
    return LinearPattern(*taken, activation, None, None, (add, index), rows, add.outputs[0], factor=factor)


def _activation(value: ir.Value) -> tuple[ir.Value, str] | None:
    """What an activation makes of `value`, and its name in `ACTIVATIONS`, if nothing else reads `value`."""
    after = only_consumer(value)
    if after is not None and is_op(after, "Gelu"):
        return after.outputs[0], "gelu_tanh" if after.attributes.get_string("approximate", "none") == "tanh" else "gelu"
    readers_of_value = set(value.consumers())
    for product in readers_of_value:
        sigmoid = next((made for one in product.inputs if (made := producer(one, "Sigmoid")) is not None), None)
        if not is_op(product, "Mul") or sigmoid is None or only_consumer(sigmoid.outputs[0]) is not product:
            continue
        if readers_of_value == {sigmoid, product} and not value.is_graph_output():
            return product.outputs[0], "silu"
        slope = producer(sigmoid.inputs[0], "Mul")
        if slope is None or value not in slope.inputs or only_consumer(slope.outputs[0]) is not sigmoid:
            continue
        factors = [scalar_of(one) for one in slope.inputs if one is not value]
        close = [one is not None and abs(one - QUICK_GELU_FACTOR) < 2**-20 for one in factors]
        if close == [True] and readers_of_value == {slope, product} and not value.is_graph_output():
            return product.outputs[0], "quick_gelu"
    return None


def _factor(value: ir.Value, shapes: Batches, claimed: set[ir.Node]) -> tuple[ir.Node, int] | None:
    """The Mul that alone reads `value`, and the index of its other input, which is computed and of the same shape."""
    node = only_consumer(value)
    if node is None or not is_op(node, "Mul") or node in claimed:
        return None
    index = 1 if node.inputs[0] is value else 0
    other = node.inputs[index]
    if other is None or other is value or str(other.name) not in shapes.two or shapes.of(other) != shapes.of(value):
        return None
    return (node, index) if constant_of(other) is None else None


def rotated_heads(value: ir.Value) -> RotatedHeads | None:
    """The rotation in mptqc's form that alone reads `value`, parted into heads."""
    reshape = only_consumer(value)
    if not is_op(reshape, "Reshape") or reshape is None:
        return None
    sums = [node.outputs[0] for term in reshape.outputs[0].consumers() for node in term.outputs[0].consumers()]
    found = [rotated for total in sums if (rotated := match_rotated(total)) is not None]
    return found[0] if found and found[0].x is reshape.outputs[0] else None


def why_not_rotated(rotated: RotatedHeads, shapes: Batches) -> str | None:
    """Why `LinearQuantize` cannot rotate these heads; None if it can."""
    if (reason := _why_not_quantized(rotated.output)) is not None:
        return reason
    tokens, heads, width = shapes.of(rotated.x)[1:]
    if width not in ROTATED_WIDTHS:
        return f"its heads are {width} wide, not one of {', '.join(map(str, ROTATED_WIDTHS))}"
    shape, *others = {table.shape for table in map(constant_of, (rotated.cosine, rotated.sine)) if table is not None}
    if others or shape[0] not in (1, tokens) or shape[1] not in (1, heads) or shape[2] != width:
        return f"its cosines and sines have shapes {shape} {others}, not [{tokens}, 1 or {heads}, {width}] both"
    if shape[1] != 1 and heads * width % PANEL:
        return f"each of its {heads} heads is rotated in its own way, and they fill no multiple of {PANEL} columns"
    return None


def unit_heads(value: ir.Value) -> UnitHeads | None:
    """What alone reads `value`, parted into heads, and brings them to length 1."""
    reshape = only_consumer(value)
    if not is_op(reshape, "Reshape") or reshape is None:
        return None
    divided = [node.outputs[0] for node in reshape.outputs[0].consumers() if is_op(node, "Div")]
    scaled = [after.outputs[0] for one in divided if is_op(after := only_consumer(one), "Mul") and after is not None]
    found = [unit for one in scaled + divided if (unit := match_unit_heads(one)) is not None]
    return found[0] if found and found[0].x is reshape.outputs[0] else None


def why_not_unit(unit: UnitHeads, shapes: Batches) -> str | None:
    """Why `LinearQuantize` cannot bring these heads to length 1; None if it can."""
    if (reason := _why_not_quantized(unit.output)) is not None:
        return reason
    shape = shapes.of(unit.x)
    if len(shape) != 4 or shape[3] not in UNIT_WIDTHS:
        return f"its heads have shape {list(shape)}, and are not {', '.join(map(str, UNIT_WIDTHS))} wide"
    if unit.factor is not None and unit.factor.shape not in ((1, 1), (shape[2], 1)):
        return f"they are multiplied by a constant of shape {list(unit.factor.shape)}, not [{shape[2]}, 1]"
    return None


def _why_not_quantized(heads: ir.Value) -> str | None:
    if _only_quantizer(heads) is None:
        return f"{heads.name} is not read by one quantizer of uint8 codes alone"
    return None


def _only_quantizer(x: ir.Value) -> FoundQuantizer | None:
    """The quantizer of uint8 codes that alone reads x."""
    quantizers = quantizers_of(x)
    return quantizers[0] if quantizers is not None and len(quantizers) == 1 and not quantizers[0].signed else None


def _quantized_heads(x: ir.Value, output: ir.Value, shapes: Batches) -> tuple[FoundQuantizer, ir.Value]:
    """The quantizer of `output`, made of heads x, and its codes; where they are only read side by side, those."""
    quantizer = _only_quantizer(output)
    assert quantizer is not None, "it was looked for before"
    codes = quantizer.codes
    _, tokens, heads, width = shapes.of(x)
    reader = only_consumer(codes)
    target = constant_of(reader.inputs[1]) if is_op(reader, "Reshape") and reader is not None else None
    if reader is None or target is None or target.tolist()[1:] != [tokens, heads * width]:
        return quantizer, codes
    return quantizer, reader.outputs[0]


def _scaled(value: ir.Value) -> Iterator[tuple[ir.Value, ir.Value]]:
    """`value` times one constant for each channel, and that constant [N], if nothing else reads `value`."""
    node = only_consumer(value)
    if node is None or not is_op(node, "Mul"):
        return
    multiplier = node.inputs[1 if node.inputs[0] is value else 0]
    array = constant_of(multiplier)
    if multiplier is not None and array is not None and array.ndim == 1 and array.dtype == np.float32:
        yield node.outputs[0], multiplier


def _residual(value: ir.Value, shapes: Batches, claimed: set[ir.Node]) -> tuple[ir.Node, int, NDArray[np.int64]] | None:
    """The Add that alone reads `value`, its rows moved or not, the index of the other input, and the rows' table."""
    found = residual_add(value, shapes)
    if found is None or found[0] in claimed:
        return None
    add, index, moved = found
    try:
        table = shapes.row_table(moved.trace.index, value)
    except RefusalError:
        return None
    return add, index, np.argsort(table)


def residual_add(value: ir.Value, shapes: Batches) -> tuple[ir.Node, int, Reader] | None:
    """The Add of another computed value of the same shape that alone reads `value`, moved or not.

    With it the index of the other input, and the movement that leads there.
    """
    read = readers(value, shapes.two)
    if len(read) != 1 or read[0].node is None or not is_op(read[0].node, "Add"):
        return None
    add, moved = read[0].node, read[0].value
    index = 1 if add.inputs[0] is moved else 0
    other = add.inputs[index]
    if other is None or other is moved or str(other.name) not in shapes.two or shapes.of(other) != shapes.of(moved):
        return None
    return add, index, read[0]
