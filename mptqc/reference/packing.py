"""Weights of 2 to 8 bits, packed: k/8 bytes a weight.

A code is cut into planes of 4, 2 and 1 bits, low bits first: k = 5 gives a 4-bit plane (bits 0 to 3) and a 1-bit plane
(bit 4). A plane stores 8/width neighbouring codes per byte, the first one in the lowest bits; the last byte is filled
with zeros. Codes are two's complement, so the highest plane holds the sign.

Why not eight 1-bit planes: a 256-entry table turns one byte of a plane into its codes, and fewer planes are fewer
look-ups when the model is loaded (4 bits: one instead of four; measured 10 to 30 % less time at equal size).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_BITS, MAX_BITS = 2, 8
_BYTE_VALUES = 256


@dataclass(frozen=True)
class Plane:
    """Bits `shift` to `shift + width - 1` of each code; `signed` if the highest of them is the code's sign."""

    shift: int
    width: int
    signed: bool

    @property
    def codes_per_byte(self) -> int:
        """8/width."""
        return 8 // self.width

    def table(self) -> NDArray[np.int8]:
        """What each byte contributes to its codes: [256, codes_per_byte], int8; the planes' contributions add up."""
        fields = np.arange(_BYTE_VALUES)[:, None] >> (self.width * np.arange(self.codes_per_byte))
        fields &= (1 << self.width) - 1
        if self.signed:
            fields = np.where(fields >= 1 << (self.width - 1), fields - (1 << self.width), fields)
        return (fields << self.shift).astype(np.int8)


def planes_of(bits: int) -> tuple[Plane, ...]:
    """The planes of a k-bit code, lowest bits first.

    Raises:
        ValueError: bits outside 2..8.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"codes have {MIN_BITS} to {MAX_BITS} bits, not {bits}")
    planes: list[Plane] = []
    shift = 0
    for width in (4, 4, 2, 1):
        if shift + width <= bits:
            planes.append(Plane(shift, width, signed=shift + width == bits))
            shift += width
    return tuple(planes)


def pack(codes: NDArray[np.int8], bits: int) -> list[NDArray[np.uint8]]:
    """Pack signed codes of any shape, in row-major order, into one byte array [ceil(size·width/8)] per plane.

    Raises:
        ValueError: bits outside 2..8, or a code outside −2^(bits−1) .. 2^(bits−1) − 1.
    """
    planes = planes_of(bits)
    limit = 1 << (bits - 1)
    flat = codes.reshape(-1).astype(np.int16)
    if flat.size and (flat.min() < -limit or flat.max() >= limit):
        raise ValueError(f"codes {flat.min()} to {flat.max()} do not fit {bits} bits")
    packed = []
    for plane in planes:
        fields = ((flat >> plane.shift) & ((1 << plane.width) - 1)).astype(np.uint8)
        padded = np.zeros((-(-fields.size // plane.codes_per_byte), plane.codes_per_byte), np.uint8)
        padded.reshape(-1)[: fields.size] = fields
        packed.append(
            np.bitwise_or.reduce(padded << (plane.width * np.arange(plane.codes_per_byte, dtype=np.uint8)), axis=1)
        )
    return packed


def packed_bytes(size: int, bits: int) -> int:
    """Bytes of so many codes: k/8 each, every plane rounded up to whole bytes."""
    return sum(-(-size * plane.width // 8) for plane in planes_of(bits))


def unpack(packed: Sequence[NDArray[np.uint8]], bits: int, shape: Sequence[int]) -> NDArray[np.int8]:
    """The codes of `pack`, int8, `shape`.

    Raises:
        ValueError: bits outside 2..8, or the planes do not hold `shape`.
    """
    planes = planes_of(bits)
    size = int(np.prod(shape))
    if [each.size for each in packed] != [-(-size * plane.width // 8) for plane in planes]:
        raise ValueError(f"planes of {[each.size for each in packed]} bytes do not hold {size} codes of {bits} bits")
    total = np.zeros(size, np.int8)
    for plane, content in zip(planes, packed, strict=True):
        total += plane.table()[content].reshape(-1)[:size]
    return total.reshape(tuple(shape))
