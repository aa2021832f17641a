// One value in the place of a CPU's vector: what the quantizer and GELU of kernels/cpu are instantiated with, so that
// a code or a GELU is the same bits on every device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../cpu/functions.h"
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
  static MPTQC_INLINE I set(int32_t x) { return x; }
  static MPTQC_INLINE F add(F a, F b) { return a + b; }
  static MPTQC_INLINE I add(I a, I b) { return a + b; }
  static MPTQC_INLINE F subtract(F a, F b) { return a - b; }
  static MPTQC_INLINE F multiply(F a, F b) { return a * b; }
  static MPTQC_INLINE F multiply_add(F a, F b, F c) { return fmaf(a, b, c); }
  static MPTQC_INLINE F subtract_product(F c, F a, F b) { return fmaf(-a, b, c); }
  static MPTQC_INLINE F minimum(F a, F b) { return fminf(a, b); }
  static MPTQC_INLINE F maximum(F a, F b) { return fmaxf(a, b); }
  static MPTQC_INLINE I to_int(F a) { return bits_of(a + kShifter) - kShifterBits; }
  static MPTQC_INLINE I subtract(I a, I b) { return a - b; }
  static MPTQC_INLINE I shift_right(I a, int bits) { return a >> bits; }
  static MPTQC_INLINE I where_at_least(F x, F bound, I a, I b) { return x >= bound ? a : b; }
  static MPTQC_INLINE F as_float(I a) { return float_of(a); }
  static MPTQC_INLINE I shift_left(I a, int bits) { return static_cast<I>(static_cast<uint32_t>(a) << bits); }
};

}  // namespace mptqc
