"""Integer weights read back from a compiled file: int8, or bit planes and what widens them, a trellis' too."""

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.errors import VerifyError
from mptqc.graph.edit import constant_of, is_op, producer
from mptqc.graph.packed_weights import PAIRED
from mptqc.reference.packing import MAX_BITS, unpack
from mptqc.reference.trellis import decode


@dataclass(frozen=True)
class StoredWeight:
    """A Linear's weight as the file holds it.

    Attributes:
        integers: what the product multiplies by, int8.
        bits: bits of its codes.
        stored_bytes: bytes of the initializers they come from.
        trellis_codes: the codes, of the integers' shape, if a trellis makes those of them; else None.
    """

    integers: NDArray[np.int8]
    bits: int
    stored_bytes: int
    trellis_codes: NDArray[np.int8] | None = None


def read_weight(value: ir.Value | None, site: str) -> StoredWeight:
    """The weight that `value` holds or is made to, of its shape.

    Raises:
        VerifyError: the weight is computed in a way that mptqc does not write.
    """
    plain = constant_of(value)
    if plain is not None:
        return StoredWeight(plain.astype(np.int8, copy=False), MAX_BITS, plain.nbytes)
    if (units := _trellis_units(value)) is None:
        return _read_packed(value, site)
    pairs = constant_of(units)
    packed = _read_packed(units, site) if pairs is None else _read_pairs(pairs, odd=is_op(_producer(value), "Slice"))
    rows = packed.integers.reshape(packed.integers.shape[0], -1)
    return replace(packed, integers=decode(rows, packed.bits), trellis_codes=rows)


def _trellis_units(value: ir.Value | None) -> ir.Value | None:
    """What `emit_trellis` makes a weight of, codes or bytes of two; None if `value` is made by other ops."""
    if (cut := producer(value, "Slice")) is not None:
        value = cut.inputs[0]
    for op_type, position in (("Reshape", 0), ("Gather", 1), ("Cast", 0), ("Conv", 0), ("Cast", 0)):
        node = producer(value, op_type)
        if node is None:
            return None
        value = node.inputs[position]
    return value


def _read_pairs(pairs: NDArray[np.generic], *, odd: bool) -> StoredWeight:
    """The codes in bytes [K, 1, N/2] of two; `odd` if the last of each row is none."""
    codes = unpack([pairs.reshape(-1).astype(np.uint8, copy=False)], PAIRED, (len(pairs), 2 * pairs.shape[-1]))
    return StoredWeight(codes[:, : codes.shape[1] - odd], PAIRED, pairs.nbytes)


def _read_packed(value: ir.Value | None, site: str) -> StoredWeight:
    """The codes that planes are widened to."""
    last = _producer(value)
    while is_op(last, "Add") and last is not None:
        last = _producer(last.inputs[1])
    shape = constant_of(last.inputs[1]) if is_op(last, "Reshape") and last is not None else None
    if shape is None or shape.min() < 0:
        raise VerifyError(f"{site}: its weight is neither int8 nor packed as mptqc packs it; compile again")
    gathers, frontier = [], [value]
    while frontier:
        node = _producer(frontier.pop())
        if is_op(node, "Add") and node is not None:
            frontier.extend(node.inputs)
        elif is_op(node, "Reshape", "Slice") and node is not None:
            frontier.append(node.inputs[0])
        elif is_op(node, "Gather") and node is not None:
            gathers.append(node)
    return _unpacked(site, gathers, tuple(int(size) for size in shape))


def _unpacked(site: str, gathers: list[ir.Node], shape: tuple[int, ...]) -> StoredWeight:
    size = int(np.prod(shape))
    total = np.zeros(size, np.int8)
    bits = stored_bytes = 0
    for gather in gathers:
        table = constant_of(gather.inputs[0])
        cast = producer(gather.inputs[1], "Cast")
        plane = constant_of(cast.inputs[0]) if cast is not None else None
        if table is None or plane is None:
            raise VerifyError(f"{site}: its packed weight is not read from a table by constant bytes; compile again")
        total += table.astype(np.int8)[plane].reshape(-1)[:size]
        bits += 8 // table.shape[1]
        stored_bytes += plane.nbytes
    return StoredWeight(total.reshape(shape), bits, stored_bytes)


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()
