// Sixteen lanes in four NEON registers; products by the dot products of later processors: of unsigned with signed bytes
// (i8mm), or of signed bytes alone (dotprod). See lanes_portable.h for what each member means.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "wide.h"

namespace mptqc {
namespace {

struct LanesNeon {
  static constexpr int kValues = 16;
  static constexpr int kRows = 5, kVectors = 1;  // 20 registers of sums, of 32; GCC loads the codes of all rows first
  static constexpr int32_t kTaken = 0;
  static constexpr bool kLooksUpTwo = false, kBlocksWholeTiles = false;
  static constexpr int kParts = 4;

  struct F {
    float32x4_t part[kParts];
  };
  struct I {
    int32x4_t part[kParts];
  };
  struct Table {
    uint8x16x4_t bytes;

    Table() = default;
    explicit Table(const float (&entries)[16]) : bytes(vld1q_u8_x4(reinterpret_cast<const uint8_t*>(entries))) {}
  };
  struct Weights {
    int8x16_t part[kParts];
  };

  template <class Result, class Work>
  static MPTQC_INLINE Result parts(const Work& work) {
    Result out;
    MPTQC_UNROLL
    for (int i = 0; i < kParts; ++i) out.part[i] = work(i);
    return out;
  }

  static F set(float x) {
    return parts<F>([&](int) { return vdupq_n_f32(x); });
  }
  static I set(int32_t x) {
    return parts<I>([&](int) { return vdupq_n_s32(x); });
  }
  static F load(const float* from) {
    return parts<F>([&](int i) { return vld1q_f32(from + 4 * i); });
  }
  static I load(const int32_t* from) {
    return parts<I>([&](int i) { return vld1q_s32(from + 4 * i); });
  }
  static F load(const float* from, int n) {
    if (n == 16) return load(from);
    float lane[16] = {};
    std::memcpy(lane, from, sizeof(float) * n);
    return load(lane);
  }
  static void store(float* to, F a) {
    MPTQC_UNROLL
    for (int i = 0; i < kParts; ++i) vst1q_f32(to + 4 * i, a.part[i]);
  }
  static void store(float* to, F a, int n) {
    if (n == 16) return store(to, a);
    float lane[16];
    store(lane, a);
    std::memcpy(to, lane, sizeof(float) * n);
  }
  static void store(int32_t* to, I a) {
    MPTQC_UNROLL
    for (int i = 0; i < kParts; ++i) vst1q_s32(to + 4 * i, a.part[i]);
  }

  static uint8x16_t codes_of(I steps, int32_t zero_point, int32_t minimum, int32_t maximum) {
    const int16x8_t zero = vdupq_n_s16(static_cast<int16_t>(zero_point));
    const int16x8_t low = vcombine_s16(vqmovn_s32(steps.part[0]), vqmovn_s32(steps.part[1]));
    const int16x8_t high = vcombine_s16(vqmovn_s32(steps.part[2]), vqmovn_s32(steps.part[3]));
    const uint8x16_t codes = vcombine_u8(vqmovun_s16(vqaddq_s16(low, zero)), vqmovun_s16(vqaddq_s16(high, zero)));
    const uint8x16_t least = vmaxq_u8(codes, vdupq_n_u8(static_cast<uint8_t>(minimum)));
    return vminq_u8(least, vdupq_n_u8(static_cast<uint8_t>(maximum)));
  }
  static void store_codes(uint8_t* to, I steps, int32_t zero_point, int32_t minimum, int32_t maximum, int n) {
    const uint8x16_t codes = codes_of(steps, zero_point, minimum, maximum);
    if (n == 16) return vst1q_u8(to, codes);
    uint8_t code[16];
    vst1q_u8(code, codes);
    std::memcpy(to, code, n);
  }
  static void store_codes(uint8_t* to, const I (&steps)[4], int32_t zero_point, int32_t minimum, int32_t maximum) {
    MPTQC_UNROLL
    for (int i = 0; i < 4; ++i) vst1q_u8(to + 16 * i, codes_of(steps[i], zero_point, minimum, maximum));
  }

  static F first(int n, F a, F b) {
    float lane[16];
    store(lane, b);
    store(lane, a, n);
    return load(lane);
  }

  static F add(F a, F b) {
    return parts<F>([&](int i) { return vaddq_f32(a.part[i], b.part[i]); });
  }
  static F subtract(F a, F b) {
    return parts<F>([&](int i) { return vsubq_f32(a.part[i], b.part[i]); });
  }
  static F multiply(F a, F b) {
    return parts<F>([&](int i) { return vmulq_f32(a.part[i], b.part[i]); });
  }
  static F multiply_add(F a, F b, F c) {
    return parts<F>([&](int i) { return vfmaq_f32(c.part[i], a.part[i], b.part[i]); });
  }
  static F subtract_product(F c, F a, F b) {
    return parts<F>([&](int i) { return vfmsq_f32(c.part[i], a.part[i], b.part[i]); });
  }
  // By comparison: NEON's own minimum of a NaN is one.
  static F minimum(F a, F b) {
    return parts<F>([&](int i) { return vbslq_f32(vcltq_f32(a.part[i], b.part[i]), a.part[i], b.part[i]); });
  }
  static F maximum(F a, F b) {
    return parts<F>([&](int i) { return vbslq_f32(vcgtq_f32(a.part[i], b.part[i]), a.part[i], b.part[i]); });
  }
  static F least_magnitude(F a, F bound) {
    return minimum(parts<F>([&](int i) { return vabsq_f32(a.part[i]); }), bound);
  }
  static F add_positive(F a, F x) { return add(a, maximum(x, set(0.0f))); }
  static F look_up(const Table& table, I index) {
    return parts<F>([&](int i) {
      const uint32x4_t entry = vandq_u32(vreinterpretq_u32_s32(index.part[i]), vdupq_n_u32(15));
      const uint32x4_t four = vmlaq_n_u32(vdupq_n_u32(0x03020100), entry, 0x04040404);  // the places of its bytes
      return vreinterpretq_f32_u8(vqtbl4q_u8(table.bytes, vreinterpretq_u8_u32(four)));
    });
  }
  static I to_int(F a) {
    const F held = maximum(a, set(-4194304.0f));  // NaN would become 0
    return parts<I>([&](int i) { return vcvtnq_s32_f32(held.part[i]); });
  }
  static F to_float(I a) {
    return parts<F>([&](int i) { return vcvtq_f32_s32(a.part[i]); });
  }
  static I add(I a, I b) {
    return parts<I>([&](int i) { return vaddq_s32(a.part[i], b.part[i]); });
  }
  static I maximum(I a, I b) {
    return parts<I>([&](int i) { return vmaxq_s32(a.part[i], b.part[i]); });
  }
  static I shift_left(I a, int bits) {
    return parts<I>([&](int i) { return vshlq_s32(a.part[i], vdupq_n_s32(bits)); });
  }
  static F where_at_least(F x, F bound, F a, F b) {
    return parts<F>([&](int i) { return vbslq_f32(vcgeq_f32(x.part[i], bound.part[i]), a.part[i], b.part[i]); });
  }
  static F as_float(I a) {
    return parts<F>([&](int i) { return vreinterpretq_f32_s32(a.part[i]); });
  }
  static I as_int(F a) {
    return parts<I>([&](int i) { return vreinterpretq_s32_f32(a.part[i]); });
  }

  static float sum(F a) {
    const float32x4_t four = vaddq_f32(vaddq_f32(a.part[0], a.part[2]), vaddq_f32(a.part[1], a.part[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
  }
  static float largest(F a) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.part[0], a.part[1]), vmaxq_f32(a.part[2], a.part[3])));
  }
  static int32_t largest(I a) {
    return vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.part[0], a.part[1]), vmaxq_s32(a.part[2], a.part[3])));
  }
  static int32_t sum_codes(const uint8_t* codes, int64_t n) {
    int32_t total = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) total += vaddlvq_u8(vld1q_u8(codes + i));
    for (; i < n; ++i) total += codes[i];
    return total;
  }

  static uint32x4_t four_codes(const uint8_t* codes) {
    uint32_t four;
    std::memcpy(&four, codes, sizeof four);
    return vdupq_n_u32(four);
  }
  static Weights weights(const int8_t* block) {
    return parts<Weights>([&](int i) { return vld1q_s8(block + 16 * i); });
  }

  static void block_of_rows(const uint8_t* const rows[4], int8_t* block) {
    const uint8x16x4_t columns = {{signed_codes(rows[0]), signed_codes(rows[1]), signed_codes(rows[2]), signed_codes(rows[3])}};
    vst4q_u8(reinterpret_cast<uint8_t*>(block), columns);
  }
  static void words_of_rows(const uint8_t* const rows[4], int8_t* first_block) {
    for (int r = 0; r < 4; ++r) {
      const uint32x4_t words = vreinterpretq_u32_u8(signed_codes(rows[r]));
      uint32_t word[4];
      vst1q_u32(word, words);
      for (int w = 0; w < 4; ++w) std::memcpy(first_block + 64 * w + 4 * r, &word[w], sizeof word[w]);
    }
  }

 private:
  static uint8x16_t signed_codes(const uint8_t* codes) { return veorq_u8(vld1q_u8(codes), vdupq_n_u8(128)); }
};

}  // namespace
}  // namespace mptqc
