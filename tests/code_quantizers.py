"""Quantizers of operators that the tests of kernels share."""

from mptqc.reference.custom_ops import CodeQuantizer

UNIFORM = CodeQuantizer(0.04, 120)
NARROW = CodeQuantizer(0.31, 240, 237, 252)
TWO_REGIONS = CodeQuantizer(0.02, 9, 0, 9 + 64 + 8 * 15, (3,), (64,))
FOUR_REGIONS = CodeQuantizer(0.02, 9, 2, 9 + 128 + 64, (1, 3, 6), (10, 40, 128))
QUANTIZERS = [UNIFORM, NARROW, TWO_REGIONS, FOUR_REGIONS]
PROBABILITIES = [
    CodeQuantizer(1 / 255, 0),
    CodeQuantizer(1 / 128, 0, 2),
    CodeQuantizer(0.004, 0, 0, 16 + 4 * 50, (2,), (16,)),
    CodeQuantizer(0.004, 3, 1, 3 + 16 + 4 * 50, (2,), (16,)),
    CodeQuantizer(0.005, 3, 1, 3 + 128 + 16 * 4, (2, 4), (16, 128)),
]
