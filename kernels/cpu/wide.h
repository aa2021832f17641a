// Four vectors that take each step together. A chain of dependent operations waits for each result some four cycles;
// four chains side by side fill those, which the processor's own reordering is too short-sighted to do.
#pragma once

#include "sizes.h"

namespace mptqc {

// Full unrolling and inlining are a must: arrays of vectors would otherwise live in memory.
#define MPTQC_UNROLL _Pragma("GCC unroll 16")
#define MPTQC_INLINE inline __attribute__((always_inline))

// Has the lane-wise members of a Lanes type, for kPanel values.
template <class L>
struct Wide {
  static constexpr int kParts = kPanelBlocks;

  struct F {
    typename L::F part[kParts];
  };
  struct I {
    typename L::I part[kParts];
  };

  static F set(float x) {
    F out;
    MPTQC_UNROLL
    for (int i = 0; i < kParts; ++i) out.part[i] = L::set(x);
    return out;
  }
  static I set(int32_t x) {
    I out;
    MPTQC_UNROLL
    for (int i = 0; i < kParts; ++i) out.part[i] = L::set(x);
    return out;
  }
  static F load(const float* from) {
    F out;
    MPTQC_UNROLL
    for (int i = 0; i < kParts; ++i) out.part[i] = L::load(from + 16 * i);
    return out;
  }
  static I load(const int32_t* from) {
    I out;
    MPTQC_UNROLL
    for (int i = 0; i < kParts; ++i) out.part[i] = L::load(from + 16 * i);
    return out;
  }
  static void store(float* to, F a) {
    MPTQC_UNROLL
    for (int i = 0; i < kParts; ++i) L::store(to + 16 * i, a.part[i]);
  }
  static void store_codes(uint8_t* to, I a) { L::store_codes(to, a.part); }

#define MPTQC_WIDE_1(Result, name, A)                                 \
  static Result name(A a) {                                           \
    Result out;                                                       \
    MPTQC_UNROLL                                                      \
    for (int i = 0; i < kParts; ++i) out.part[i] = L::name(a.part[i]); \
    return out;                                                       \
  }
#define MPTQC_WIDE_2(Result, name)                                                 \
  static Result name(Result a, Result b) {                                         \
    Result out;                                                                    \
    MPTQC_UNROLL                                                                   \
    for (int i = 0; i < kParts; ++i) out.part[i] = L::name(a.part[i], b.part[i]);   \
    return out;                                                                    \
  }
#define MPTQC_WIDE_3(Result, name)                                                            \
  static Result name(Result a, Result b, Result c) {                                          \
    Result out;                                                                               \
    MPTQC_UNROLL                                                                              \
    for (int i = 0; i < kParts; ++i) out.part[i] = L::name(a.part[i], b.part[i], c.part[i]);   \
    return out;                                                                               \
  }
  MPTQC_WIDE_1(F, absolute, F)
  MPTQC_WIDE_1(F, round, F)
  MPTQC_WIDE_1(I, to_int, F)
  MPTQC_WIDE_1(F, to_float, I)
  MPTQC_WIDE_1(F, as_float, I)
  MPTQC_WIDE_2(F, add)
  MPTQC_WIDE_2(I, add)
  MPTQC_WIDE_2(F, subtract)
  MPTQC_WIDE_2(F, multiply)
  MPTQC_WIDE_2(F, minimum)
  MPTQC_WIDE_2(F, maximum)
  MPTQC_WIDE_3(F, multiply_add)
  MPTQC_WIDE_3(F, subtract_product)
#undef MPTQC_WIDE_1
#undef MPTQC_WIDE_2
#undef MPTQC_WIDE_3

  static I shift_left(I a, int bits) {
    I out;
    MPTQC_UNROLL
    for (int i = 0; i < kParts; ++i) out.part[i] = L::shift_left(a.part[i], bits);
    return out;
  }
};

}  // namespace mptqc
