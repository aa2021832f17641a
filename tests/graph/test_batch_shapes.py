import numpy as np
import onnx_ir as ir
import pytest

from mptqc.errors import RefusalError
from mptqc.graph.batch_shapes import Batches

ROWS = np.array([2, 0, 3, 1])
SHAPES = Batches({"x": (1, 8, 3)}, {"x": (2, 8, 3)})
X = ir.val("x")
INDEX = np.arange(2 * 8 * 3).reshape(2, 8, 3)


def test_the_smallest_table_is_found() -> None:
    moved = INDEX.reshape(4, 4, 3)[:, ROWS]
    assert np.array_equal(SHAPES.row_table(moved, X), ROWS)


def test_rows_that_stay_give_a_table_of_one() -> None:
    assert np.array_equal(SHAPES.row_table(INDEX.reshape(4, 2, 2, 3), X), [0])


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (INDEX[::-1], "mixes images"),
        (INDEX.reshape(16, 3)[np.random.default_rng(0).permutation(16)], "mixes images"),
        (INDEX[:, :7], "drops or repeats rows"),
        (np.concatenate([INDEX, INDEX]), "drops or repeats rows"),
        (INDEX[..., ::-1], "keep its channels together"),
        (INDEX.swapaxes(1, 2), "keep its channels together"),
        (INDEX.reshape(2, 4, 6), "keep its channels together"),
    ],
)
def test_other_movement_is_refused(index: np.ndarray, reason: str) -> None:
    with pytest.raises(RefusalError, match=reason):
        SHAPES.row_table(index, X)


def test_a_target_is_open_where_the_batch_is() -> None:
    assert SHAPES.target(X).tolist() == [-1, 8, 3]
    fixed = Batches({"x": (4, 8, 3)}, {"x": (4, 8, 3)})
    assert fixed.target(X).tolist() == [4, 8, 3]
    with pytest.raises(RefusalError, match="more than one dimension"):
        Batches({"x": (1, 8)}, {"x": (2, 16)}).target(X)
