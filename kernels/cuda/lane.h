// One value in the place of a CPU's vector: what the quantizer of kernels/cpu is instantiated with, so that a code is the
// same bits on every device; and GELU without a table.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../cpu/quantizer.h"

namespace mptqc {

// The bits of kShifter, which rounds: the device's own conversions take four times as long as an addition.
constexpr int32_t kShifterBits = 0x4B400000;

MPTQC_INLINE int32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_int(x);
#else
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

MPTQC_INLINE float float_of(int32_t bits) {
#if defined(__CUDA_ARCH__)
  return __int_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// A whole number of less than 2^22.
MPTQC_INLINE float small_to_float(int32_t x) { return float_of(kShifterBits + x) - kShifter; }

struct Lane {
  using F = float;
  using I = int32_t;

  static MPTQC_INLINE F set(float x) { return x; }
  static MPTQC_INLINE F add(F a, F b) { return a + b; }
  static MPTQC_INLINE F subtract(F a, F b) { return a - b; }
  static MPTQC_INLINE F multiply(F a, F b) { return a * b; }
  static MPTQC_INLINE F multiply_add(F a, F b, F c) { return fmaf(a, b, c); }
  static MPTQC_INLINE F subtract_product(F c, F a, F b) { return fmaf(-a, b, c); }
  static MPTQC_INLINE F minimum(F a, F b) { return fminf(a, b); }
  // a < 2^22; what is below -2^22, or not a number, counts as that.
  static MPTQC_INLINE I to_int(F a) { return bits_of(fmaxf(a, -4194304.0f) + kShifter) - kShifterBits; }
  static MPTQC_INLINE F where_at_least(F x, F bound, F a, F b) { return x >= bound ? a : b; }
};

MPTQC_INLINE uint8_t code_of(const QuantizerConstants& q, int32_t steps) {
  const int32_t code = steps + q.zero_point;
  return static_cast<uint8_t>(code > q.minimum ? code : q.minimum);
}

// x/2 * (1 + erf(x/sqrt 2)), absolute error under 2^-21 * max(1, |x|).
//
// erf(x/sqrt 2)/x is a polynomial of degree 12 in x^2 (a Chebyshev fit), mapped to [-1, 1], up to |x| = 5; beyond, erf is that
// of 5. Even and odd powers are two chains, which halves the wait.
MPTQC_INLINE float gelu(float x) {
  constexpr float coefficients[] = {0.00147075276f, -0.00335346186f, 0.0027491923f, -0.00505383359f, 0.0135330549f,
                                    -0.02261425f, 0.0324721783f, -0.0464262553f, 0.0629535168f, -0.0809025615f,
                                    0.10303586f, -0.140591815f, 0.282727629f};
  const float bounded = fmaxf(fminf(x, 5.0f), -5.0f);
  const float mapped = fmaf(bounded * bounded, 2.0f / 25.0f, -1.0f), square = mapped * mapped;
  float even = coefficients[0], odd = coefficients[1];
  MPTQC_UNROLL
  for (int i = 2; i < 12; i += 2) {
    even = fmaf(even, square, coefficients[i]);
    odd = fmaf(odd, square, coefficients[i + 1]);
  }
  even = fmaf(even, square, coefficients[12]);
  const float error_function = fmaf(odd, mapped, even) * bounded, half = x * 0.5f;
  return fmaf(half, error_function, half);
}

// An activation of mptqc_activation; e^-y may be infinite. x/2 * (1 + tanh y) is x / (1 + e^-2y).
MPTQC_INLINE float activated(int32_t activation, float x) {
  if (activation == MPTQC_GELU) return gelu(x);
  const float y = activation == MPTQC_GELU_TANH ? 1.59576912f * fmaf(0.044715f * x * x, x, x) : 1.702f * x;
  return x / (1.0f + expf(-y));
}

}  // namespace mptqc
