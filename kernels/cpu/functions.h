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

// factor * e^x for x <= 0, given the table of kRoots. Its relative error is under 2^-20 down to x = -20, where a power no
// longer counts; x below -86 count as that, so that no power is a denormal.
//
// e^x = 2^(w + part), w being x / ln 2 to the nearest 1/16. A parabola gives 2^part. A shifter of 2^-4 the weight leaves
// sixteenths in the low bits of its sum: the last four of them name a root of 2, the others are added to its exponent.
template <class V>
MPTQC_INLINE typename V::F power_of_e(const typename V::Table& roots, typename V::F x, float factor) {
  const auto inverse_ln2 = V::set(1.44269504f), shifter = V::set(kShifter / 16);
  x = V::maximum(x, V::set(-86.0f));
  const auto shifted = V::multiply_add(x, inverse_ln2, shifter);
  const auto back = V::subtract_product(V::subtract(shifted, shifter), x, inverse_ln2);  // -part
  auto power = V::multiply_add(back, V::set(0.240226254f * factor), V::set(-0.693187952f * factor));
  power = V::multiply_add(back, power, V::set(factor));
  const auto bits = V::as_int(shifted);
  return V::multiply(power, V::as_float(V::add(V::as_int(V::look_up(roots, bits)), V::shift_left(bits, 19))));
}

// What a GELU, or SiLU, is short of max(x, 0), for u = |x|, in 16 segments, the middle of segment i being
// u = i / segments_per_unit: coefficients for powers of the way back to it, in segments, the highest first. Fits at
// Chebyshev's nodes; from `last` on there is as good as nothing left.
constexpr int kTailDegree = 4;
struct Tail {
  float segments_per_unit, last, segments[kTailDegree + 1][16];
};

// Its tables, as a Lanes type wants them.
template <class L>
struct TailTables {
  typename L::Table segments[kTailDegree + 1];

  // Of no use if there is no tail.
  explicit TailTables(const Tail* tail) {
    for (int i = 0; tail != nullptr && i <= kTailDegree; ++i) segments[i] = typename L::Table(tail->segments[i]);
  }
};

// -u * (1 - Phi(u)), within 2^-22: that of x/2 * (1 + erf(x/sqrt 2)).
constexpr Tail kGeluTail = {3.1f, 4.99f, {
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
}};

// -u/2 * (1 - tanh(sqrt(2/pi) * (u + 0.044715 u^3))), within 2^-22.
constexpr Tail kTanhGeluTail = {3.1f, 4.99f, {
    {-0.000712175737f, -0.000558133353f, -0.000179111594f, 0.000190113016f, 0.000374709314f, 0.000355299155f,
     0.000224785297f, 8.632549e-05f, -4.71310477e-06f, -4.11484398e-05f, -4.11386027e-05f, -2.69731408e-05f,
     -1.33065714e-05f, -5.11030703e-06f, -1.53948258e-06f, -3.63061531e-07f},
    {6.37970697e-06f, 0.00265318505f, 0.00416326802f, 0.00410209456f, 0.00290065352f, 0.00138658879f, 0.000209289588f,
     -0.000403255603f, -0.00054787274f, -0.00044077207f, -0.000268313044f, -0.000130514687f, -5.14078129e-05f,
     -1.63846798e-05f, -4.19859407e-06f, -8.57253497e-07f},
    {0.0415144414f, 0.0373402014f, 0.0266620461f, 0.01382301f, 0.00309950765f, -0.00330687221f, -0.00554422243f,
     -0.00508811185f, -0.00355325267f, -0.00202729669f, -0.000963999773f, -0.000382780214f, -0.000126185812f,
     -3.42115563e-05f, -7.54390567e-06f, -1.3367528e-06f},
    {0.161290392f, 0.081091322f, 0.0163270384f, -0.024119718f, -0.0404273942f, -0.0394523703f, -0.0300092679f,
     -0.019072568f, -0.0103625553f, -0.0048385784f, -0.00193505955f, -0.000657486788f, -0.000187787839f,
     -4.45460028e-05f, -8.66491337e-06f, -1.36396761e-06f},
    {0.0f, -0.120489255f, -0.167404354f, -0.161354229f, -0.127286538f, -0.0862797573f, -0.0511810258f, -0.0267213397f,
     -0.0122629832f, -0.00491807703f, -0.00170844863f, -0.000508501893f, -0.000128116546f, -2.69749344e-05f,
     -4.68374856e-06f, -6.61649835e-07f},
}};

// -u / (1 + e^(1.702 u)), within 2^-17.
constexpr Tail kQuickGeluTail = {1.8f, 8.6f, {
    {-0.00894819759f, -0.00107354042f, 0.00387541926f, 0.00186434377f, 0.000357994897f, -5.86589231e-05f,
     -9.85457518e-05f, -6.59461948e-05f, -3.58647703e-05f, -1.7803919e-05f, -8.39891163e-06f, -3.83472525e-06f,
     -1.71117142e-06f, -7.5065833e-07f, -3.24963452e-07f, -1.3919211e-07f},
    {0.000466948812f, 0.0246595666f, 0.0152604906f, 0.00326445629f, -0.000709337066f, -0.00109479658f,
     -0.000729578896f, -0.000396136806f, -0.000196359193f, -9.25096392e-05f, -4.21910263e-05f, -1.88100785e-05f,
     -8.24564813e-06f, -3.56747432e-06f, -1.52731945e-06f, -6.4826213e-07f},
    {0.131414264f, 0.0838194862f, 0.0181059912f, -0.00718023488f, -0.00922867842f, -0.00603835145f, -0.00325804972f,
     -0.00160898385f, -0.000756029156f, -0.000344114582f, -0.000153178975f, -6.70655136e-05f, -2.89870768e-05f,
     -1.2399948e-05f, -5.25951691e-06f, -2.21504774e-06f},
    {0.277782589f, 0.0496240258f, -0.0468510985f, -0.0516790748f, -0.0333760977f, -0.0179581475f, -0.00885429233f,
     -0.00415484281f, -0.00188896095f, -0.000840056688f, -0.000367512635f, -0.000158745403f, -6.78715296e-05f,
     -2.87754283e-05f, -1.21142448e-05f, -5.06954666e-06f},
    {0.0f, -0.155433193f, -0.145686597f, -0.0922910497f, -0.0494777858f, -0.0243570488f, -0.0114154099f,
     -0.00518440921f, -0.00230354071f, -0.0010070164f, -0.000434708345f, -0.000185764147f, -7.87243334e-05f,
     -3.31302472e-05f, -1.38599298e-05f, -5.76866296e-06f},
}};

// The tail of factor * f(x / factor), given that of f.
constexpr Tail widened(Tail tail, float factor) {
  tail.segments_per_unit /= factor;
  tail.last *= factor;
  for (auto& coefficients : tail.segments)
    for (float& each : coefficients) each *= factor;
  return tail;
}

// -u / (1 + e^u), within 2^-16.
constexpr Tail kSiluTail = widened(kQuickGeluTail, 1.702f);

// Null: there is no activation.
constexpr const Tail* tail_of(int32_t activation) {
  return activation == MPTQC_GELU         ? &kGeluTail
         : activation == MPTQC_GELU_TANH  ? &kTanhGeluTail
         : activation == MPTQC_QUICK_GELU ? &kQuickGeluTail
         : activation == MPTQC_SILU       ? &kSiluTail
                                          : nullptr;
}

// A GELU, or SiLU: max(x, 0), less what falls off to both sides alike.
template <class V>
MPTQC_INLINE typename V::F gelu(const Tail& t, const typename V::Table (&tables)[kTailDegree + 1], typename V::F x) {
  const auto size = V::minimum(V::absolute(x), V::set(t.last)), per_unit = V::set(t.segments_per_unit);
  const auto shifted = V::multiply_add(size, per_unit, V::set(kShifter));
  const auto segment = V::as_int(shifted);
  const auto back = V::subtract_product(V::subtract(shifted, V::set(kShifter)), size, per_unit);
  auto tail = V::look_up(tables[0], segment);
  MPTQC_UNROLL
  for (int i = 1; i <= kTailDegree; ++i) tail = V::multiply_add(tail, back, V::look_up(tables[i], segment));
  return V::add(V::maximum(x, V::set(0.0f)), tail);
}

}  // namespace mptqc
