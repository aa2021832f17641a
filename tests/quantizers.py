"""Quantizers that tests share."""

from mptqc.plan import MultiRegion, Region


def opt_m(*, bits: int, scale: float, zero_point: int, m: int, low_codes: int) -> MultiRegion:
    """OPT-m as in the paper."""
    upper = (Region(m, 2**bits - low_codes),)
    return MultiRegion(bits=bits, scale=scale, zero_point=zero_point, low_codes=low_codes, upper=upper)


THREE_REGIONS = MultiRegion(bits=4, scale=0.05, zero_point=2, low_codes=7, upper=(Region(1, 6), Region(4, 3)))
FOUR_REGIONS = MultiRegion(
    bits=4, scale=0.03, zero_point=1, low_codes=4, upper=(Region(1, 3), Region(2, 4), Region(3, 5))
)
