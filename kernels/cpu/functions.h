// 2^x and GELU, kPanel values at a time (V is a Wide). Coefficients are Chebyshev fits, rounded to float;
// even and odd powers are two chains, which halves the wait.
#pragma once

#include "wide.h"

namespace mptqc {

// Floats from 2^23 to 2^24 are whole numbers. Adding 1.5 * 2^23 rounds a float of less than 2^22 to the nearest, ties to
// even, and leaves it in the low bits.
constexpr float kShifter = 12582912.0f;

// 2^x for x up to 1, relative error under 2^-22; x below -126 counts as -126, so that no denormal appears. The polynomial
// gives some 0.7 to 1.4, to whose exponent the whole part is added.
template <class V>
MPTQC_INLINE typename V::F power_of_2(typename V::F x) {
  x = V::maximum(x, V::set(-126.0f));
  const auto shifted = V::add(x, V::set(kShifter));
  const auto whole = V::subtract(shifted, V::set(kShifter));
  const auto part = V::subtract(x, whole);  // exact, in [-1/2, 1/2]
  const auto square = V::multiply(part, part);
  auto even = V::multiply_add(square, V::set(0.00967603736f), V::set(0.240221068f));
  auto odd = V::multiply_add(square, V::set(0.00134004327f), V::set(0.0555032715f));
  even = V::multiply_add(square, even, V::set(1.00000012f));
  odd = V::multiply_add(square, odd, V::set(0.693147182f));
  const auto power = V::multiply_add(part, odd, even);
  return V::as_float(V::add(V::as_int(power), V::shift_left(V::as_int(shifted), 23)));
}

// x/2 * (1 + erf(x/sqrt 2)), absolute error under 2^-21 * max(1, |x|).
//
// erf(x/sqrt 2)/x is a polynomial of degree 12 in x^2, mapped to [-1, 1], up to |x| = 5; beyond, erf is that of 5.
template <class V>
MPTQC_INLINE typename V::F gelu(typename V::F x) {
  constexpr float coefficients[] = {0.00147075276f, -0.00335346186f, 0.0027491923f, -0.00505383359f, 0.0135330549f,
                                    -0.02261425f, 0.0324721783f, -0.0464262553f, 0.0629535168f, -0.0809025615f,
                                    0.10303586f, -0.140591815f, 0.282727629f};
  const auto bounded = V::maximum(V::minimum(x, V::set(5.0f)), V::set(-5.0f));
  const auto mapped = V::multiply_add(V::multiply(bounded, bounded), V::set(2.0f / 25.0f), V::set(-1.0f));
  const auto square = V::multiply(mapped, mapped);
  auto even = V::set(coefficients[0]), odd = V::set(coefficients[1]);
  MPTQC_UNROLL
  for (int i = 2; i < 12; i += 2) {
    even = V::multiply_add(even, square, V::set(coefficients[i]));
    odd = V::multiply_add(odd, square, V::set(coefficients[i + 1]));
  }
  even = V::multiply_add(even, square, V::set(coefficients[12]));
  const auto ratio = V::multiply_add(odd, mapped, even);
  const auto error_function = V::multiply(ratio, bounded);
  const auto half = V::multiply(x, V::set(0.5f));
  return V::multiply_add(half, error_function, half);
}

}  // namespace mptqc
