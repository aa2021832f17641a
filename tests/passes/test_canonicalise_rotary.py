"""CanonicaliseRotary: whatever an exporter made of rotary embedding, q and k get a Linear each and one form of it."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from mptqc.analysis.shapes import concrete_shapes
from mptqc.graph.edit import constant_of, producer
from mptqc.graph.match import find_attentions, find_linears
from mptqc.graph.rotary import RotatedHeads, match_rotated
from mptqc.passes.base import STAGE_KEY, Stage
from mptqc.passes.canonicalise_rotary import CanonicaliseRotary
from mptqc.passes.separate_projections import SeparateProjections
from mptqc.passes.stamp_sites import StampSites

# Outputs of some 3 in size; the products' columns are the same sums, 1/sqrt(d) is rounded elsewhere.
TOLERANCE = 1e-5
L, T, PREFIX, H, D = 2, 7, 2, 3, 8
C = H * D
RANDOM = np.random.default_rng(3)
ANGLES = RANDOM.uniform(-3, 3, (T - PREFIX, D // 2))
HALF = np.concatenate([ANGLES, ANGLES], -1)
BETWEEN = np.repeat(ANGLES, 2, -1)

SPLIT = """
  m = MatMul(x, W)
  l = Add(m, b)
  r = Reshape(l, parts)
  t = Transpose<perm=[2,0,3,1,4]>(r)
  q0 = Gather<axis=0>(t, i0)
  k0 = Gather<axis=0>(t, i1)
  v = Gather<axis=0>(t, i2)
"""
HALF_FORM = """
  {0}p = Slice({0}0, at0, prefix, axis2)
  {0}i = Slice({0}0, prefix, end, axis2)
  {0}1, {0}2 = Split<axis=-1, num_outputs=2>({0}i)
  {0}n = Neg({0}2)
  {0}s = Concat<axis=-1>({0}n, {0}1)
  {0}c = Mul({0}i, cos)
  {0}d = Mul({0}s, sin)
  {0}e = Add({0}c, {0}d)
  {0}r = Concat<axis=2>({0}p, {0}e)
"""
BETWEEN_FORM = """
  {0}p = Slice({0}0, at0, prefix, axis2)
  {0}i = Slice({0}0, prefix, end, axis2)
  {0}even = Slice({0}i, at0, end, axis3, two)
  {0}odd = Slice({0}i, one, end, axis3, two)
  {0}n = Neg({0}odd)
  {0}u = Unsqueeze({0}n, axis4)
  {0}w = Unsqueeze({0}even, axis4)
  {0}j = Concat<axis=-1>({0}u, {0}w)
  {0}s = Reshape({0}j, image)
  {0}c = Mul({0}i, cos)
  {0}d = Mul({0}s, sin)
  {0}e = Add({0}c, {0}d)
  {0}r = Concat<axis=2>({0}p, {0}e)
"""
HALVES_APART = """
  {0}1, {0}2 = Split<axis=-1, num_outputs=2>({0}0)
  {0}a = Mul({0}1, cos)
  {0}b = Mul({0}2, sin)
  {0}c = Mul({0}2, cos)
  {0}d = Mul({0}1, sin)
  {0}e = Sub({0}a, {0}b)
  {0}f = Add({0}c, {0}d)
  {0}r = Concat<axis=-1>({0}e, {0}f)
"""
ATTEND = """
  qm = Mul(qr, eighth)
  kt = Transpose<perm=[0,1,3,2]>(kr)
  s = MatMul(qm, kt)
  p = Softmax<axis=-1>(s)
  y = MatMul(p, v)
"""
WHOLE = np.concatenate([np.zeros((PREFIX, D // 2)), ANGLES])
FORMS = {
    "halves": (HALF_FORM, HALF),
    "every other channel": (BETWEEN_FORM, BETWEEN),
    "halves apart, all tokens": (HALVES_APART, WHOLE),
}


@pytest.fixture
def make(smoothed) -> Callable[..., ir.Model]:
    def from_form(form: str, angles: np.ndarray, attend: str = ATTEND, k_form: str | None = None) -> ir.Model:
        arrays = {
            "W": RANDOM.normal(size=(C, 3 * C)), "b": RANDOM.normal(size=3 * C), "cos": np.cos(angles),
            "sin": np.sin(angles), "eighth": np.array(1 / 8),
        }  # fmt: skip
        integers = {
            "parts": [0, 0, 3, H, D], "image": [0, 0, 0, D], "at0": [0], "one": [1], "two": [2], "prefix": [PREFIX],
            "end": [2**31], "axis2": [2], "axis3": [3], "axis4": [4], "i0": 0, "i1": 1, "i2": 2,
        }  # fmt: skip
        body = SPLIT + form.format("q") + (k_form or form).format("k") + attend
        every = {name: array.astype(np.float32) for name, array in arrays.items()}
        every |= {name: np.array(numbers, np.int64) for name, numbers in integers.items()}
        used = {name: array for name, array in every.items() if f" {name})" in body or f" {name}," in body}
        model: ir.Model = smoothed(f"float[b,{T},{C}] x", f"float[b,{H},{T},{D}] y", body, {}, used)
        model.metadata_props[STAGE_KEY] = Stage.RAW
        return model

    return from_form


def canonical(model: ir.Model) -> ir.Model:
    for make in (CanonicaliseRotary, SeparateProjections):
        make(concrete_shapes(model))(model)
    return model


def rotation_of(operand: ir.Value) -> RotatedHeads:
    transpose = producer(operand, "Transpose")
    assert transpose is not None and transpose.inputs[0] is not None
    rotated = match_rotated(transpose.inputs[0])
    assert rotated is not None
    return rotated


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_same(make, run_batch, form: str) -> None:
    model = make(*FORMS[form])
    expected = run_batch(model)
    canonical(model)
    np.testing.assert_allclose(run_batch(model), expected, atol=TOLERANCE, rtol=0)
    (attention,) = find_attentions(model)
    q, k = rotation_of(attention.q), rotation_of(attention.k)
    assert (q.cosine, q.sine) == (k.cosine, k.sine), "the factor of the scores is in the Linear, so that tables are one"
    assert q.cosine.const_value is not None and q.sine.const_value is not None
    cosine, sine = q.cosine.const_value.numpy(), q.sine.const_value.numpy()
    assert cosine.shape == sine.shape == (T, 1, D)
    signs = np.repeat([-1, 1], D // 2)
    np.testing.assert_allclose(cosine[:, 0], np.cos(np.concatenate([WHOLE, WHOLE], -1)), atol=1e-6)
    np.testing.assert_allclose(sine[:, 0], signs * np.sin(np.concatenate([WHOLE, WHOLE], -1)), atol=1e-6)
    assert [linear.weight.shape for linear in find_linears(model)] == [(C, C)] * 3


def test_sites_are_named_as_without_rotation(make) -> None:
    model = canonical(make(*FORMS["halves"]))
    StampSites(concrete_shapes(model))(model)
    assert {linear.site for linear in find_linears(model)} == {"block00.q", "block00.k", "block00.v"}


def test_a_second_run_finds_nothing(make) -> None:
    model = canonical(make(*FORMS["every other channel"]))
    assert CanonicaliseRotary(concrete_shapes(model))(model).edits == 0


def test_heads_may_be_rotated_each_in_its_own_way(make, run_batch) -> None:
    angles = np.random.default_rng(5).uniform(-3, 3, (H, T, D // 2))
    model = make(HALVES_APART, angles)
    expected = run_batch(model)
    canonical(model)
    np.testing.assert_allclose(run_batch(model), expected, atol=TOLERANCE, rtol=0)
    (attention,) = find_attentions(model)
    assert rotation_of(attention.q).cosine.shape == (T, H, D)


@pytest.mark.parametrize(
    ("form", "k_form"),
    [
        ("  {0}r = Mul({0}0, {0}0)\n", None),  # no sum of channels
        ("  {0}r = Identity({0}0)\n", None),  # not rotated
        (HALVES_APART, "  {0}r = Identity({0}0)\n"),  # q alone
        (HALF_FORM, BETWEEN_FORM),  # q and k have other pairs
    ],
)
def test_what_is_no_rotation_of_both_alike_is_left(make, form: str, k_form: str | None) -> None:
    model = make(form, HALF if form is HALF_FORM else WHOLE, k_form=k_form)
    assert CanonicaliseRotary(concrete_shapes(model))(model).edits == 0


@pytest.mark.parametrize("joined", ["{0}e, {0}e", "{0}f, {0}e"])
def test_any_pairs_of_channels_keep_their_values(make, run_batch, joined: str) -> None:
    model = make(HALVES_APART.replace("{0}e, {0}f)", f"{joined})"), WHOLE, k_form=HALVES_APART)
    expected = run_batch(model)
    canonical(model)
    np.testing.assert_allclose(run_batch(model), expected, atol=TOLERANCE, rtol=0)
    rotation_of(find_attentions(model)[0].q)


def test_other_readers_of_q_and_k_keep_their_channels(make, run_batch) -> None:
    """Every other channel: q's and k's are put in another order, which only their product does not see."""
    attend = ATTEND.replace("y = MatMul(p, v)", "c = MatMul(p, v)\n  y = Add(c, qm)")
    model = make(BETWEEN_FORM, BETWEEN, attend)
    expected = run_batch(model)
    canonical(model)
    rotation_of(find_attentions(model)[0].q)
    np.testing.assert_allclose(run_batch(model), expected, atol=TOLERANCE, rtol=0)


def test_heads_that_turn_in_opposite_senses_have_tables_of_one_shape(make, run_batch) -> None:
    angles = np.stack([WHOLE, -WHOLE, WHOLE])
    model = make(HALVES_APART, angles)
    expected = run_batch(model)
    canonical(model)
    rotated = rotation_of(find_attentions(model)[0].q)
    assert [table.shape for table in map(constant_of, (rotated.cosine, rotated.sine))] == [(T, H, D)] * 2
    np.testing.assert_allclose(run_batch(model), expected, atol=TOLERANCE, rtol=0)
