"""A Linear that makes a gate and what it gates becomes two, with the same numbers."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from mptqc.analysis.shapes import concrete_shapes
from mptqc.graph.match import find_linears
from mptqc.passes.base import STAGE_KEY
from mptqc.passes.part_gates import PartGates
from mptqc.runtime.session import create_session, run_arrays

SPLIT = "g, v = Split <axis = -1, num_outputs = 2> (j)"
SLICES = "g = Slice (j, zero, six, last)\n  v = Slice (j, six, end, last)"
GATE = "u = Sigmoid (g)\n  a = Mul (g, u)\n  h = Mul (a, v)"
BODY = "p = MatMul (x, w)\n  j = Add (p, b)\n  {}\n  q = MatMul (h, w2)\n  y = Add (q, b2)"
ARRAYS = {name: np.array([number], np.int64) for name, number in (("zero", 0), ("six", 6), ("end", 99), ("last", -1))}


@pytest.fixture
def make(smoothed: Callable[..., ir.Model]) -> Callable[[str], ir.Model]:
    def of(middle: str) -> ir.Model:
        random = np.random.default_rng(0)
        shapes = {"w": (8, 12), "b": (12,), "w2": (6, 8), "b2": (8,)}
        arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        used = {name: array for name, array in ARRAYS.items() if name in middle}
        model = smoothed("float[n, 5, 8] x", "float[n, 5, 8] y", BODY.format(middle), {}, arrays | used)
        del model.metadata_props[STAGE_KEY]
        return model

    return of


def run(model: ir.Model) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((3, 5, 8)).astype(np.float32)
    return run_arrays(create_session(ir.to_proto(model).SerializeToString()), ["y"], {"x": x})[0]


def part(model: ir.Model) -> int:
    return int(PartGates(concrete_shapes(model))(model).edits)


@pytest.mark.parametrize("split", [SPLIT, SLICES])
def test_both_halves_get_a_linear(make: Callable[[str], ir.Model], split: str) -> None:
    model = make(f"{split}\n  {GATE}")
    expected = run(model)
    assert part(model) == 1
    assert [linear.weight.shape for linear in find_linears(model)] == [(8, 6), (8, 6), (6, 8)]
    assert not [node for node in model.graph if node.op_type in ("Split", "Slice")]
    np.testing.assert_allclose(run(model), expected, atol=1e-6 * np.abs(expected).max())
    assert part(model) == 0


@pytest.mark.parametrize(
    "middle",
    [
        f"{SPLIT}\n  h = Add (g, v)",
        f"{SLICES}\n  s = Sigmoid (j)\n  t = Slice (s, zero, six, last)\n  m = Mul (g, v)\n  h = Mul (m, t)",
    ],
    ids=["nothing multiplies", "all of it is read"],
)
def test_other_readers_keep_it_whole(make: Callable[[str], ir.Model], middle: str) -> None:
    model = make(middle)
    assert part(model) == 0
    assert len(find_linears(model)) == 2
