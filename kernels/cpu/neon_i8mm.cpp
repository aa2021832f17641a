// System headers come first: what they define must not be compiled for this file's instruction set.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "implementation.h"

#if defined(MPTQC_NEON)
#include <arm_neon.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("i8mm"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")
#endif

#include "implement.h"
#include "lanes_neon.h"

namespace mptqc {
namespace {

struct LanesNeonI8mm : LanesNeon {
  struct Inputs {
    uint8x16_t codes;
  };

  static Inputs spread(const uint8_t* codes) { return {vreinterpretq_u8_u32(four_codes(codes))}; }
  static I dot(I sum, Inputs a, Weights w) {
    return parts<I>([&](int i) { return vusdotq_s32(sum.part[i], a.codes, w.part[i]); });
  }
};

}  // namespace

const Implementation kNeonI8mm = Kernels<LanesNeonI8mm>::table();
}  // namespace mptqc

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
