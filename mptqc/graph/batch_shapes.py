"""Concrete shapes at two batch sizes, and what they tell of movement and of Reshapes."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.errors import RefusalError
from mptqc.graph.layout import Shapes


@dataclass(frozen=True)
class Batches:
    """Concrete shapes at two batch sizes; the same where the model's batch is fixed."""

    one: Shapes
    two: Shapes

    def of(self, value: ir.Value) -> tuple[int, ...]:
        """The shape at the larger batch, at which movement is traced."""
        return self.two[str(value.name)]

    def target(self, value: ir.Value) -> NDArray[np.int64]:
        """What a Reshape is given to make the shape of `value` at any batch.

        Raises:
            RefusalError: more than one dimension grows with the batch.
        """
        small, large = self.one[str(value.name)], self.two[str(value.name)]
        target = np.array([-1 if one != two else two for one, two in zip(small, large, strict=True)], np.int64)
        if (target == -1).sum() > 1:
            raise RefusalError(f"more than one dimension of {value.name} {small} grows with the batch")
        return target

    def row_table(self, index: NDArray[np.int64], value: ir.Value) -> NDArray[np.int64]:
        """Which row of each group of R a movement puts where: row r comes from row table[r], [R], the smallest R.

        `index` are the positions in `value` [.., C] that its elements come from; R is 1 if no row moves.

        Raises:
            RefusalError: rows are split, dropped or repeated, or move from one image to another.
        """
        width = self.of(value)[-1]
        if index.shape[-1:] != (width,) or (index % width != np.arange(width)).any():
            raise RefusalError(f"the movement behind {value.name} does not keep its channels together")
        rows = index.reshape(-1, width)[:, 0] // width
        if not np.array_equal(np.sort(rows), np.arange(np.prod(self.of(value)[:-1], dtype=np.int64))):
            raise RefusalError(f"the movement behind {value.name} drops or repeats rows")
        for size in divisors(int(np.prod(self.one[str(value.name)][:-1]))):
            grouped = rows.reshape(-1, size)
            table: NDArray[np.int64] = grouped[0]
            if np.array_equal(grouped, table + size * np.arange(len(grouped))[:, None]):
                return table
        raise RefusalError(f"the movement behind {value.name} mixes images")


def divisors(number: int) -> list[int]:
    """The whole numbers that divide a positive one, smallest first."""
    return [size for size in range(1, number + 1) if number % size == 0]
