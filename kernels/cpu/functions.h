// Powers and GELU, a vector of values at a time (V is a Wide or a Lanes type): short polynomials whose coefficients, or whose
// factor, a table holds for each small part of the range.
#pragma once

#include "wide.h"

namespace mptqc {

// 2^(i/16), less i in the bits of 1/16, which the sum of power_of_e adds.
constexpr float kRoots[16] = {
    1.0f, 0.990886867f, 0.982753873f, 0.97564429f, 0.969603539f, 0.964678884f,
    0.960919797f, 0.958377779f, 0.957106769f, 0.957163095f, 0.958605409f, 0.961495161f,
    0.965896428f, 0.971876085f, 0.979504049f, 0.988853276f};

// factor * e^x for x <= 0, relative error under 2^-20 down to x = -20, where a power no longer counts; x below -86 count as
// that, so that no power is a denormal.
//
// e^x = 2^(w + part), w being x / ln 2 to the nearest 1/16. A parabola gives 2^part. A shifter of 2^-4 the weight leaves
// sixteenths in the low bits of its sum: the last four of them name a root of 2, the others are added to its exponent.
template <class V>
MPTQC_INLINE typename V::F power_of_e(typename V::F x, float factor) {
  const auto inverse_ln2 = V::set(1.44269504f), shifter = V::set(kShifter / 16);
  x = V::maximum(x, V::set(-86.0f));
  const auto shifted = V::multiply_add(x, inverse_ln2, shifter);
  const auto back = V::subtract_product(V::subtract(shifted, shifter), x, inverse_ln2);  // -part
  auto power = V::multiply_add(back, V::set(0.240226254f * factor), V::set(-0.693187952f * factor));
  power = V::multiply_add(back, power, V::set(factor));
  const auto bits = V::as_int(shifted);
  return V::multiply(power, V::as_float(V::add(V::as_int(V::look_up(kRoots, bits)), V::shift_left(bits, 19))));
}

// -u * (1 - Phi(u)) for u >= 0 in 16 segments, the middle of segment i being u = i / kSegmentsPerUnit: coefficients for powers
// of the way back to it, in segments, the highest first. Fits at Chebyshev's nodes, within 2^-22 up to 15.5 segments, where
// u = 5.
constexpr int kGeluDegree = 4;
constexpr float kSegmentsPerUnit = 3.1f, kLastTail = 4.99f;
constexpr float kGeluSegments[kGeluDegree + 1][16] = {
    {-0.000708864594f, -0.000558004191f, -0.000184219258f, 0.0001867471f, 0.000379503326f, 0.000363291067f,
     0.000226447941f, 8.08171826e-05f, -1.03976618e-05f, -4.22456324e-05f, -3.89271263e-05f, -2.47354747e-05f,
     -1.24723583e-05f, -5.24449024e-06f, -1.88376475e-06f, -5.85997043e-07f},
    {6.23805136e-06f, 0.00264407392f, 0.00416505523f, 0.0041238945f, 0.00292004272f, 0.00137715205f, 0.000178391274f,
     -0.000424933532f, -0.000544736919f, -0.000423605525f, -0.00025443596f, -0.000126399449f, -5.35078834e-05f,
     -1.96128913e-05f, -6.28537919e-06f, -1.77241952e-06f},
    {0.0415144116f, 0.0373579115f, 0.0266971085f, 0.0138206221f, 0.00302545563f, -0.00339972391f, -0.00556890899f,
     -0.00502529647f, -0.00346245873f, -0.00197249954f, -0.000959722325f, -0.000405490078f, -0.000150224514f,
     -4.91053033e-05f, -1.42228146e-05f, -3.66126278e-06f},
    {0.161290392f, 0.0810785368f, 0.0162558425f, -0.0242341999f, -0.0404643156f, -0.0393073373f, -0.0297355391f,
     -0.0188418813f, -0.010298362f, -0.00492708292f, -0.00208078511f, -0.000779729045f, -0.000260160043f,
     -7.74752771e-05f, -2.06284967e-05f, -4.91720493e-06f},
    {0.0f, -0.120485939f, -0.167362154f, -0.161212876f, -0.12705721f, -0.0861012414f, -0.0512234978f, -0.0270308796f,
     -0.0127246296f, -0.00536138983f, -0.00202610111f, -0.000687674154f, -0.000209814549f, -5.75826125e-05f,
     -1.42213903e-05f, -3.16174169e-06f},
};

// x/2 * (1 + erf(x/sqrt 2)), absolute error under 2^-21 * max(1, |x|): max(x, 0), less what falls off to both sides alike.
template <class V>
MPTQC_INLINE typename V::F gelu(typename V::F x) {
  const auto size = V::minimum(V::absolute(x), V::set(kLastTail));
  const auto shifted = V::multiply_add(size, V::set(kSegmentsPerUnit), V::set(kShifter));
  const auto segment = V::as_int(shifted);
  const auto back = V::subtract_product(V::subtract(shifted, V::set(kShifter)), size, V::set(kSegmentsPerUnit));
  auto tail = V::look_up(kGeluSegments[0], segment);
  MPTQC_UNROLL
  for (int i = 1; i <= kGeluDegree; ++i) tail = V::multiply_add(tail, back, V::look_up(kGeluSegments[i], segment));
  return V::add(V::maximum(x, V::set(0.0f)), tail);
}

}  // namespace mptqc
