import pytest

from mptqc.graph.shapes import equal_when_sizes_match


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((2, 3), (2, 3)),
        (("n", 3, 4), ("n", 3, 4)),
        (("n", 3), ("m", 3)),
        ((None, 3), (None, 3)),
        (("n", "t", 4), ("n", None, 4)),
        ((None, 3), (2, 3)),
    ],
)
def test_surely_equal(one, other):
    assert equal_when_sizes_match(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((2, 6), (3, 4)),
        (("n", 3), ("n", 4)),
        ((None, None), (None, None)),
        (("n", "t"), ("m", "s")),
        (("n", 3), ("n", 3, 1)),
        ((0, "n"), (0, "m")),
        (None, ("n",)),
    ],
)
def test_not_surely_equal(one, other):
    assert not equal_when_sizes_match(one, other)
