// One value in the place of a CPU's vector: what the quantizer and GELU of kernels/cpu are instantiated with, so that
// a code or a GELU is the same bits on every device.
#pragma once

#include <cmath>
#include <cstdint>

#include "../cpu/functions.h"
#include "../cpu/quantizer.h"

namespace mptqc {

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
  static MPTQC_INLINE I to_int(F a) { return static_cast<int32_t>(rintf(a)); }
  static MPTQC_INLINE I shift_left(I a, int bits) { return static_cast<I>(static_cast<uint32_t>(a) << bits); }
};

}  // namespace mptqc
