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

// factor * e^(x * unit) for x <= 0 as a product of two, given the table of kRoots. Its relative error is under 2^-19 down to
// e^-20, where a power no longer counts; those below e^-86 count as that, so that no power is a denormal.
//
// e^(x * unit) = 2^(w + part), w being x * unit / ln 2 to the nearest 1/16. A parabola gives 2^part. A shifter of 2^-4 the
// weight leaves sixteenths in the low bits of its sum: the last four of them name a root of 2, the others are added to its
// exponent.
template <class V>
struct PowerOfE {
  typename V::F of_part, of_rest;

  MPTQC_INLINE PowerOfE(const typename V::Table& roots, typename V::F x, float unit, float factor) {
    const auto octaves = V::set(1.44269504f * unit), shifter = V::set(kShifter / 16);
    x = V::maximum(x, V::set(-86.0f / unit));
    const auto shifted = V::multiply_add(x, octaves, shifter);
    const auto back = V::subtract_product(V::subtract(shifted, shifter), x, octaves);  // -part
    of_part = V::multiply_add(back, V::set(0.240226254f * factor), V::set(-0.693187952f * factor));
    of_part = V::multiply_add(back, of_part, V::set(factor));
    const auto bits = V::as_int(shifted);
    of_rest = V::as_float(V::add(V::as_int(V::look_up(roots, bits)), V::shift_left(bits, 19)));
  }
};

// What a GELU, or SiLU, is short of max(x, 0), for u = |x|, in 16 segments, the middle of segment i being
// u = i / segments_per_unit: coefficients of powers of u, the highest first. Fits at Chebyshev's nodes; from `last` on there
// is as good as nothing left.
constexpr int kTailDegree = 3;
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

// -u * (1 - Phi(u)), within 2^-17.8: that of x/2 * (1 + erf(x/sqrt 2)).
constexpr Tail kGeluTail = {3.2f, 4.84f, {
    {-0.0206550043f, -0.0768120363f, -0.122804321f, -0.124921918f, -0.0926001146f, -0.0478787869f, -0.0106293531f,
     0.0102469036f, 0.0163285099f, 0.013979651f, 0.00908689294f, 0.0048749866f, 0.00223391363f, 0.000890053809f,
     0.000311608135f, 9.71962872e-05f},
    {0.400953948f, 0.43210879f, 0.493851811f, 0.495802909f, 0.388036817f, 0.199307114f, 0.00823992305f, -0.117774323f,
     -0.159698188f, -0.14062421f, -0.0970195606f, -0.0556607246f, -0.0272952598f, -0.0116189998f, -0.00433513848f,
     -0.0014365341f},
    {-0.500062764f, -0.50616765f, -0.534290135f, -0.53349179f, -0.413367838f, -0.147343218f, 0.179785326f, 0.433569193f,
     0.529942811f, 0.478304505f, 0.348710179f, 0.213285461f, 0.111704975f, 0.0507345684f, 0.0201550275f, 0.00709079159f},
    {3.06513527e-07f, 0.000411589106f, 0.00476248236f, 0.00395561755f, -0.0408028476f, -0.166045859f, -0.352994353f,
     -0.523521781f, -0.597400486f, -0.550794244f, -0.422350585f, -0.274484545f, -0.15318957f, -0.0741244182f,
     -0.0313216671f, -0.0116910012f},
}};

// -u/2 * (1 - tanh(sqrt(2/pi) * (u + 0.044715 u^3))), within 2^-17.8.
constexpr Tail kTanhGeluTail = {3.2f, 4.84f, {
    {-0.0207550395f, -0.077085346f, -0.122789808f, -0.124310397f, -0.0919547975f, -0.0480096526f, -0.0114986273f,
     0.00946886931f, 0.0162435379f, 0.0144335227f, 0.00957221352f, 0.00509528723f, 0.00221990841f, 0.000793543586f,
     0.000231723359f, 5.53402169e-05f},
    {0.400963604f, 0.432202607f, 0.493496984f, 0.494056672f, 0.386244267f, 0.2008259f, 0.0135249067f, -0.113109268f,
     -0.159921601f, -0.145109341f, -0.101751566f, -0.0577762574f, -0.0268943161f, -0.0102612255f, -0.00319160172f,
     -0.00080957805f},
    {-0.500063062f, -0.506182492f, -0.534070671f, -0.532184541f, -0.412080318f, -0.150773078f, 0.169944569f, 0.425118536f,
     0.532993615f, 0.492596418f, 0.363636881f, 0.219598576f, 0.109006286f, 0.0443363748f, 0.0146769378f, 0.00395221822f},
    {3.07975256e-07f, 0.000412470545f, 0.00472244853f, 0.00363035151f, -0.0410953388f, -0.164094314f, -0.347400665f,
     -0.518958628f, -0.601863623f, -0.565146029f, -0.437233925f, -0.279912502f, -0.147856861f, -0.0640229359f,
     -0.0225372277f, -0.00643900549f},
}};

// -u / (1 + e^(1.702 u)), within 2^-16 up to `last`, 2^-17 u beyond.
constexpr Tail kQuickGeluTail = {2.2f, 7.04f, {
    {-0.0455731638f, -0.136903822f, -0.121175602f, -0.0506320558f, -0.0086701652f, 0.00494911242f, 0.00652164035f,
     0.00489244238f, 0.00309033901f, 0.00179828354f, 0.000998128904f, 0.000537318294f, 0.000283107511f, 0.000146800914f,
     7.51813132e-05f, 3.82720282e-05f},
    {0.431902468f, 0.500263631f, 0.454998434f, 0.215376064f, 0.0188407898f, -0.0627655312f, -0.0739319324f, -0.0593882129f,
     -0.0409975871f, -0.0260781217f, -0.0157552436f, -0.00918435585f, -0.0052136695f, -0.00289905188f, -0.00158534234f,
     -0.000858134299f},
    {-0.500289559f, -0.51850605f, -0.478448391f, -0.205389559f, 0.102427289f, 0.265695065f, 0.292090386f, 0.248776034f,
     0.186170921f, 0.128712922f, 0.0843006819f, 0.0530568697f, 0.0323769525f, 0.0192720946f, 0.0112379175f, 0.00646106061f},
    {2.05459969e-06f, 0.00169558974f, -0.00957771577f, -0.113957398f, -0.275194317f, -0.384269893f, -0.405038089f,
     -0.362001747f, -0.290909767f, -0.217106611f, -0.153385818f, -0.103847176f, -0.0679347664f, -0.0431960486f,
     -0.0268143583f, -0.016353026f},
}};

// The tail of factor * f(x / factor), given that of f.
constexpr Tail widened(Tail tail, float factor) {
  tail.segments_per_unit /= factor;
  tail.last *= factor;
  float power = factor;  // factor^(1 - degree)
  for (int degree = 0; degree <= kTailDegree; ++degree, power /= factor)
    for (float& each : tail.segments[kTailDegree - degree]) each *= power;
  return tail;
}

// -u / (1 + e^u), within 2^-15 u.
constexpr Tail kSiluTail = widened(kQuickGeluTail, 1.702f);

// Null: there is no activation.
constexpr const Tail* tail_of(int32_t activation) {
  return activation == MPTQC_GELU         ? &kGeluTail
         : activation == MPTQC_GELU_TANH  ? &kTanhGeluTail
         : activation == MPTQC_QUICK_GELU ? &kQuickGeluTail
         : activation == MPTQC_SILU       ? &kSiluTail
                                          : nullptr;
}

// No activation falls below this.
constexpr float kLowestActivation = -0.28f;

// A GELU, or SiLU: max(x, 0), less what falls off to both sides alike.
template <class V>
MPTQC_INLINE typename V::F gelu(const Tail& t, const typename V::Table (&tables)[kTailDegree + 1], typename V::F x) {
  const auto size = V::least_magnitude(x, V::set(t.last));
  const auto segment = V::as_int(V::multiply_add(size, V::set(t.segments_per_unit), V::set(kShifter)));
  auto tail = V::look_up(tables[0], segment);
  MPTQC_UNROLL
  for (int i = 1; i <= kTailDegree; ++i) tail = V::multiply_add(tail, size, V::look_up(tables[i], segment));
  return V::add_positive(tail, x);
}

}  // namespace mptqc
