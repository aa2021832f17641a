// Powers and GELU, a vector of values at a time (V is a Wide or a Lanes type): short polynomials whose coefficients, or whose
// factor, a table holds for each small part of the range.
#pragma once

#include "wide.h"

namespace mptqc {

// Floats from 2^23 to 2^24 are whole numbers. Adding 1.5 * 2^23 rounds a float of less than 2^22 to the nearest, ties to
// even, and leaves it in the low bits.
constexpr float kShifter = 12582912.0f;

// Of 2, 2^(0/16) to 2^(15/16) as bits, less what whole sixteenths put into the mantissa when they are added.
constexpr int32_t kRoots[16] = {0x3F800000, 0x3F7DAAC3, 0x3F7B95C2, 0x3F79C3D3, 0x3F7837F0, 0x3F76F532, 0x3F75FED7, 0x3F75583F,
                                0x3F7504F3, 0x3F7508A4, 0x3F75672A, 0x3F76248C, 0x3F7744FD, 0x3F78CCDF, 0x3F7AC0C7, 0x3F7D257D};

// factor * e^x for x <= 0, relative error under 2^-20; x below -86 count as that, so that no denormal appears.
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
  return V::multiply(power, V::as_float(V::add(V::look_up(kRoots, bits), V::shift_left(bits, 19))));
}

// -u * (1 - Phi(u)) for u >= 0: 32 cubics, segment i about u = i / kSegmentsPerUnit; powers of the way back to its middle
// in segments, the highest first. Minimax to 2^-21 up to 31.5 segments, where u = 5.
constexpr float kSegmentsPerUnit = 6.3f, kLastSegment = 4.99f;
constexpr float kGeluSegments[4][32] = {
    {4.06371546e-05f, 0.000165378515f, 0.000312448858f, 0.000425880804f, 0.000495669607f, 0.00051838567f,
    0.000497136614f, 0.000440359232f, 0.000359812402f, 0.0002682755f, 0.000177450376f, 9.64401406e-05f,
    3.09845964e-05f, -1.65652073e-05f, -4.67026948e-05f, -6.18984777e-05f, -6.56584452e-05f, -6.17010373e-05f,
    -5.33654493e-05f, -4.32810302e-05f, -3.32664313e-05f, -2.43931427e-05f, -1.71402389e-05f, -1.15776857e-05f,
    -7.53511313e-06f, -4.73355067e-06f, -2.87416378e-06f, -1.68865279e-06f, -9.60862394e-07f, -5.29900262e-07f,
    -2.83404574e-07f, -1.47070637e-07f},
    {0.010063299f, 0.00979063287f, 0.00906761643f, 0.00795079768f, 0.00655754656f, 0.00502552977f, 0.00349273859f,
    0.00207945192f, 0.000875126105f, -6.8124471e-05f, -0.0007353439f, -0.0011430548f, -0.00133013213f,
    -0.00134751655f, -0.00124875852f, -0.00108274049f, -0.000889166491f, -0.000696735631f, -0.000523452531f,
    -0.000378320809f, -0.000263670954f, -0.000177526876f, -0.000115628536f, -7.2935014e-05f, -4.45917649e-05f,
    -2.6444075e-05f, -1.521989e-05f, -8.50583274e-06f, -4.61768695e-06f, -2.43606269e-06f, -1.24922701e-06f,
    -6.22871596e-07f},
    {0.0793660656f, 0.0594300665f, 0.040479809f, 0.0233904403f, 0.00883845985f, -0.0027587954f, -0.0112637328f,
    -0.0168003682f, -0.01970453f, -0.020454254f, -0.0195939671f, -0.0176649038f, -0.0151507938f, -0.0124434307f,
    -0.00982833374f, -0.00748735853f, -0.00551312324f, -0.00392971374f, -0.00271475036f, -0.00181929022f,
    -0.00118356361f, -0.000747914193f, -0.000459292147f, -0.000274204125f, -0.000159202304f, -8.99156948e-05f,
    -4.94122942e-05f, -2.64262781e-05f, -1.37567094e-05f, -6.97167434e-06f, -3.44002547e-06f, -1.65287292e-06f},
    {0.0f, -0.0693553612f, -0.119189322f, -0.150937602f, -0.166819021f, -0.169602677f, -0.162335232f, -0.148067102f,
    -0.129613623f, -0.10937693f, -0.0892417207f, -0.0705445707f, -0.0541058518f, -0.0403061621f, -0.029187033f,
    -0.0205570944f, -0.0140892845f, -0.00940004364f, -0.00610674405f, -0.00386392465f, -0.00238159299f,
    -0.00143018528f, -0.000836868014f, -0.000477206428f, -0.000265202369f, -0.00014364862f, -7.58411188e-05f,
    -3.90309724e-05f, -1.95809753e-05f, -9.57625343e-06f, -4.56569796e-06f, -2.12217356e-06f},
};

// x/2 * (1 + erf(x/sqrt 2)), absolute error under 2^-20 * max(1, |x|): max(x, 0), less what falls off to both sides alike.
template <class V>
MPTQC_INLINE typename V::F gelu(typename V::F x) {
  const auto size = V::minimum(V::absolute(x), V::set(kLastSegment));
  const auto shifted = V::multiply_add(size, V::set(kSegmentsPerUnit), V::set(kShifter));
  const auto segment = V::as_int(shifted);
  const auto back = V::subtract_product(V::subtract(shifted, V::set(kShifter)), size, V::set(kSegmentsPerUnit));
  auto tail = V::look_up(kGeluSegments[0], segment);
  MPTQC_UNROLL
  for (int i = 1; i < 4; ++i) tail = V::multiply_add(tail, back, V::look_up(kGeluSegments[i], segment));
  return V::add(V::maximum(x, V::set(0.0f)), tail);
}

}  // namespace mptqc
