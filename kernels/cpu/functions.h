// exp and GELU, sixteen values at a time; the coefficients are Chebyshev fits, rounded to float.
#pragma once

#include "sizes.h"

namespace mptqc {

// e^x for x <= 0, relative error under 2^-21; x below -87 counts as -87, so that no denormal appears.
template <class L>
typename L::F exponential(typename L::F x) {
  using F = typename L::F;
  const F inverse_ln2 = L::set(1.44269504f);
  x = L::maximum(x, L::set(-87.0f));
  const F whole = L::round(L::multiply(x, inverse_ln2));
  F part = L::subtract_product(x, whole, L::set(0.693147182f));  // ln 2 in two floats
  part = L::subtract_product(part, whole, L::set(-1.90465421e-9f));
  const F f = L::multiply(part, inverse_ln2);  // 2^f on [-1/2, 1/2]
  F power = L::set(0.00134004327f);
  power = L::multiply_add(power, f, L::set(0.00967603736f));
  power = L::multiply_add(power, f, L::set(0.0555032715f));
  power = L::multiply_add(power, f, L::set(0.240221068f));
  power = L::multiply_add(power, f, L::set(0.693147182f));
  power = L::multiply_add(power, f, L::set(1.00000012f));
  const auto exponent = L::shift_left(L::add(L::to_int(whole), L::set(int32_t{127})), 23);
  return L::multiply(power, L::as_float(exponent));
}

// x/2 * (1 + erf(x/sqrt 2)), absolute error under 2^-20 * max(1, |x|).
//
// erf(z)/z is a polynomial of degree 12 in z^2, mapped to [-1, 1], up to z = 3.6; beyond, 1 - erf is under 4e-7.
template <class L>
typename L::F gelu(typename L::F x) {
  using F = typename L::F;
  constexpr float coefficients[] = {0.00272940146f, -0.00603127806f, 0.00430272426f, -0.00758090382f, 0.0215221848f,
                                    -0.0350145064f, 0.0481643155f,   -0.0673001111f, 0.0898386762f,   -0.11388649f,
                                    0.143808916f,   -0.195487157f,   0.392712146f};
  const F z = L::minimum(L::multiply(L::absolute(x), L::set(0.707106781f)), L::set(3.6f));
  const F mapped = L::multiply_add(L::multiply(z, z), L::set(2.0f / 12.96f), L::set(-1.0f));
  F ratio = L::set(coefficients[0]);
  for (int i = 1; i < 13; ++i) ratio = L::multiply_add(ratio, mapped, L::set(coefficients[i]));
  const F error_function = L::minimum(L::multiply(ratio, z), L::set(1.0f));
  const F half = L::multiply(x, L::set(0.5f));
  return L::multiply_add(L::absolute(half), error_function, half);
}

}  // namespace mptqc
