// Values in the place of a CPU's vector: what the quantizer of kernels/cpu is instantiated with, so that a code is the
// same bits on every device; and GELU without a table.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../cpu/quantizer.h"

namespace mptqc {

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

// Values that take each step together, so that what is asked of a quantizer is asked once for all of them.
template <int kCount>
struct Lanes {
  struct F {
    float value[kCount];
  };
  struct I {
    int32_t value[kCount];
  };

  template <class To, class Step>
  static MPTQC_INLINE To each(Step step) {
    To out;
    MPTQC_UNROLL
    for (int i = 0; i < kCount; ++i) out.value[i] = step(i);
    return out;
  }

  static MPTQC_INLINE F set(float x) {
    return each<F>([=](int) { return x; });
  }
  static MPTQC_INLINE F add(const F& a, const F& b) {
    return each<F>([&](int i) { return a.value[i] + b.value[i]; });
  }
  static MPTQC_INLINE F subtract(const F& a, const F& b) {
    return each<F>([&](int i) { return a.value[i] - b.value[i]; });
  }
  static MPTQC_INLINE F multiply(const F& a, const F& b) {
    return each<F>([&](int i) { return a.value[i] * b.value[i]; });
  }
  static MPTQC_INLINE F multiply_add(const F& a, const F& b, const F& c) {
    return each<F>([&](int i) { return fmaf(a.value[i], b.value[i], c.value[i]); });
  }
  static MPTQC_INLINE F subtract_product(const F& c, const F& a, const F& b) {
    return each<F>([&](int i) { return fmaf(-a.value[i], b.value[i], c.value[i]); });
  }
  static MPTQC_INLINE F minimum(const F& a, const F& b) {
    return each<F>([&](int i) { return fminf(a.value[i], b.value[i]); });
  }
  // By kShifter: the device's own conversions take four times as long as an addition.
  // a < 2^22; what is below -2^22, or not a number, counts as that.
  static MPTQC_INLINE I to_int(const F& a) {
    return each<I>([&](int i) { return bits_of(fmaxf(a.value[i], -4194304.0f) + kShifter) - kShifterBits; });
  }
  static MPTQC_INLINE F where_at_least(const F& x, const F& bound, const F& a, const F& b) {
    return each<F>([&](int i) { return x.value[i] >= bound.value[i] ? a.value[i] : b.value[i]; });
  }
};

MPTQC_INLINE uint8_t code_of(const QuantizerConstants& q, int32_t steps) {
  const int32_t code = steps + q.zero_point;
  return static_cast<uint8_t>(code > q.minimum ? code : q.minimum);
}

// x/2 * (1 + erf(x/sqrt 2)), absolute error under 2^-21 * max(1, |x|); times `factor`.
//
// erf(x/sqrt 2)/x is a polynomial of degree 12 in x^2 (a Chebyshev fit), mapped to [-1, 1], up to |x| = 5; beyond, erf is that
// of 5. Even and odd powers are two chains, which halves the wait.
MPTQC_INLINE float gelu(float x, float factor = 1) {
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
  const float error_function = fmaf(odd, mapped, even) * bounded, half = x * (0.5f * factor);
  return fmaf(half, error_function, half);
}

// The others of mptqc_activation; e^-y may be infinite. x/2 * (1 + tanh y) is x / (1 + e^-2y).
MPTQC_INLINE float logistic_gelu(int32_t activation, float x) {
  const float y = activation == MPTQC_GELU_TANH ? 1.59576912f * fmaf(0.044715f * x * x, x, x)
                  : activation == MPTQC_SILU    ? x
                                                : 1.702f * x;
  return x / (1.0f + expf(-y));
}

template <int kCount>
MPTQC_INLINE void activate(int32_t activation, float (&x)[kCount]) {
  if (activation == MPTQC_NO_ACTIVATION) return;
  if (activation == MPTQC_GELU) {
    MPTQC_UNROLL
    for (int i = 0; i < kCount; ++i) x[i] = gelu(x[i]);
    return;
  }
  MPTQC_UNROLL
  for (int i = 0; i < kCount; ++i) x[i] = logistic_gelu(activation, x[i]);
}

}  // namespace mptqc
