// Four vectors that take each step together. A chain of dependent operations waits for each result some four cycles;
// four chains side by side fill those, which the processor's own reordering is too short-sighted to do.
#pragma once

#include "sizes.h"

namespace mptqc {

// Floats from 2^23 to 2^24 are whole numbers. Adding 1.5 * 2^23 rounds a float of less than 2^22 to the nearest, ties to
// even, and leaves it in the low bits.
constexpr float kShifter = 12582912.0f;
constexpr int32_t kShifterBits = 0x4B400000;

// Full unrolling and inlining are a must: arrays of vectors would otherwise live in memory.
#if defined(__CUDACC__)
#define MPTQC_UNROLL _Pragma("unroll")
#define MPTQC_INLINE __host__ __device__ __forceinline__
#else
#define MPTQC_UNROLL _Pragma("GCC unroll 16")
#define MPTQC_INLINE inline __attribute__((always_inline))
#endif

// Has the members of a Lanes type that work on values, for kPanel of them.
template <class L>
struct Wide {
  static constexpr int kParts = kPanelBlocks, kValues = kPanel;
  using Table = typename L::Table;

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
  static void store(int32_t* to, I a) {
    MPTQC_UNROLL
    for (int i = 0; i < kParts; ++i) L::store(to + 16 * i, a.part[i]);
  }

  // The same for the first n <= kPanel values alone.
  static F load(const float* from, int n) {
    if (n == kPanel) return load(from);
    F out;
    MPTQC_UNROLL
    for (int i = 0; i < kParts; ++i) out.part[i] = n > 16 * i ? L::load(from + 16 * i, lanes(n, i)) : L::set(0.0f);
    return out;
  }
  static void store(float* to, F a, int n) {
    if (n == kPanel) return store(to, a);
    MPTQC_UNROLL
    for (int i = 0; i < kParts; ++i) {
      if (n > 16 * i) L::store(to + 16 * i, a.part[i], lanes(n, i));
    }
  }
  static void store_codes(uint8_t* to, I steps, int32_t zero_point, int32_t minimum, int32_t maximum, int n) {
    if (n == kPanel) return L::store_codes(to, steps.part, zero_point, minimum, maximum);
    MPTQC_UNROLL
    for (int i = 0; i < kParts; ++i) {
      if (n > 16 * i) L::store_codes(to + 16 * i, steps.part[i], zero_point, minimum, maximum, lanes(n, i));
    }
  }
  static F first(int n, F a, F b) {
    if (n == kPanel) return a;
    MPTQC_UNROLL
    for (int i = 0; i < kParts; ++i) a.part[i] = L::first(lanes(n, i), a.part[i], b.part[i]);
    return a;
  }
  // How many of the first n values are in part i.
  static int lanes(int n, int i) { return n <= 16 * i ? 0 : n >= 16 * i + 16 ? 16 : n - 16 * i; }

  // Sums fold parts, then lanes: one order for every instruction set.
  static float sum(F a) { return L::sum(L::add(L::add(a.part[0], a.part[1]), L::add(a.part[2], a.part[3]))); }
  static float largest(F a) {
    return L::largest(L::maximum(L::maximum(a.part[0], a.part[1]), L::maximum(a.part[2], a.part[3])));
  }
  static int32_t largest(I a) {
    return L::largest(L::maximum(L::maximum(a.part[0], a.part[1]), L::maximum(a.part[2], a.part[3])));
  }

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
  MPTQC_WIDE_1(I, to_int, F)
  MPTQC_WIDE_1(F, to_float, I)
  MPTQC_WIDE_1(F, as_float, I)
  MPTQC_WIDE_1(I, as_int, F)
  MPTQC_WIDE_2(F, add)
  MPTQC_WIDE_2(I, add)
  MPTQC_WIDE_2(F, subtract)
  MPTQC_WIDE_2(F, multiply)
  MPTQC_WIDE_2(F, minimum)
  MPTQC_WIDE_2(F, maximum)
  MPTQC_WIDE_2(I, maximum)
  MPTQC_WIDE_2(F, least_magnitude)
  MPTQC_WIDE_2(F, add_positive)
  MPTQC_WIDE_3(F, multiply_add)
  MPTQC_WIDE_3(F, subtract_product)
#undef MPTQC_WIDE_1
#undef MPTQC_WIDE_2
#undef MPTQC_WIDE_3

  static F look_up(const Table& table, I index) {
    F out;
    MPTQC_UNROLL
    for (int i = 0; i < kParts; i += 2) {
      if constexpr (L::kLooksUpTwo) {
        L::look_up(table, index.part[i], index.part[i + 1], out.part[i], out.part[i + 1]);
      } else {
        out.part[i] = L::look_up(table, index.part[i]);
        out.part[i + 1] = L::look_up(table, index.part[i + 1]);
      }
    }
    return out;
  }
  static I shift_left(I a, int bits) {
    I out;
    MPTQC_UNROLL
    for (int i = 0; i < kParts; ++i) out.part[i] = L::shift_left(a.part[i], bits);
    return out;
  }
  static F where_at_least(F x, F bound, F a, F b) {
    F out;
    MPTQC_UNROLL
    for (int i = 0; i < kParts; ++i) out.part[i] = L::where_at_least(x.part[i], bound.part[i], a.part[i], b.part[i]);
    return out;
  }
};

}  // namespace mptqc
