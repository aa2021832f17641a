"""What is known of a value's shape, and what follows from it; unknown never counts as equal."""

import math

import onnx_ir as ir

Dim = int | str | None


def dims_of(value: ir.Value | None) -> tuple[Dim, ...] | None:
    """Return the dimensions: a number, a name, or None where nothing is known; None if even the rank is unknown."""
    if value is None:
        return None
    shape = value.shape
    if shape is None and value.const_value is not None:
        shape = value.const_value.shape  # type: ignore[assignment]  # the protocol's shape is an ir.Shape in practice
    if shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in shape)


def rank_of(value: ir.Value | None) -> int | None:
    """Return the number of dimensions, or None if it is unknown."""
    dims = dims_of(value)
    return None if dims is None else len(dims)


def last_dim(value: ir.Value | None) -> int | None:
    """Return the size of the last axis, or None if it is unknown or symbolic."""
    dims = dims_of(value)
    return dims[-1] if dims and isinstance(dims[-1], int) else None


def is_last_axis(axis: int, value: ir.Value | None) -> bool:
    """True if `axis` is surely the last axis of `value`."""
    rank = rank_of(value)
    return axis == -1 or (rank is not None and axis == rank - 1)


def equal_when_sizes_match(one: tuple[Dim, ...] | None, other: tuple[Dim, ...] | None) -> bool:
    """True if two shapes of the same number of elements are surely equal.

    Every axis must agree by number or by name, save one: as the numbers of elements agree, so does that one.
    """
    if one is None or other is None or len(one) != len(other):
        return False
    open_axes = 0
    for left, right in zip(one, other, strict=True):
        if left is not None and left == right:
            if left == 0:
                return False
            continue
        if isinstance(left, int) and isinstance(right, int):
            return False
        open_axes += 1
    return open_axes <= 1


def static_size(dims: tuple[Dim, ...] | None) -> int | None:
    """Return the number of elements, or None if a dimension is unknown."""
    if dims is None:
        return None
    numbers = [dim for dim in dims if isinstance(dim, int)]
    return math.prod(numbers) if len(numbers) == len(dims) else None
