"""The block of conftest with rotary position embedding."""

import numpy as np
import onnx_ir as ir

from mptqc.graph.edit import Builder


def rotated(model: ir.Model, heads: int, *, own_tables: bool = False) -> ir.Model:
    """The block with `heads` heads whose q and k are rotated, as CanonicaliseRotary writes it."""
    tokens, width = 7, 12 // heads
    parts = _node(model, "qs").inputs[1]
    assert parts is not None
    parts.const_value = ir.tensor(np.array([0, 0, heads, width], np.int64), name="heads")
    angles = np.random.default_rng(2).uniform(-3, 3, (tokens, heads if own_tables else 1, width // 2))
    whole = np.concatenate([angles, angles], -1)
    for name in ("qs", "ks"):
        x, transpose = _node(model, name).outputs[0], _node(model, name[0])
        build = Builder(transpose, f"{name}/rotary")
        halves = build.constant("halves", np.array([width // 2] * 2, np.int64))
        split = build.node("Split", [x, halves], {"axis": -1}, num_outputs=2)
        swapped = build.op("Concat", [split.outputs[1], split.outputs[0]], {"axis": -1})
        tables = [build.constant(each.__name__, each(whole).astype(np.float32)) for each in (np.cos, np.sin)]
        terms = [build.op("Mul", [one, table]) for one, table in zip((x, swapped), tables, strict=True)]
        transpose.replace_input_with(0, build.op("Add", terms))
    return model


def _node(model: ir.Model, name: str) -> ir.Node:
    return next(each for each in model.graph if each.name == name)
