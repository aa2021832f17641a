// System headers come first: what they define must not be compiled for this file's instruction set.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "implementation.h"

#if defined(MPTQC_NEON)
#include <arm_neon.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#include "implement.h"
#include "lanes_neon.h"

namespace mptqc {
namespace {

// Codes become signed on the way: 128 is taken off them.
struct LanesNeonDotprod : LanesNeon {
  static constexpr int32_t kTaken = 128;

  struct Inputs {
    int8x16_t codes;
  };

  static Inputs spread(const uint8_t* codes) {
    return {vreinterpretq_s8_u32(veorq_u32(four_codes(codes), vdupq_n_u32(0x80808080)))};
  }
  static I dot(I sum, Inputs a, Weights w) {
    return parts<I>([&](int i) { return vdotq_s32(sum.part[i], a.codes, w.part[i]); });
  }
};

}  // namespace

const Implementation kNeonDotprod = Kernels<LanesNeonDotprod>::table();
}  // namespace mptqc

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
