// Sixteen lanes in two AVX2 registers. See lanes_portable.h for what each member means.
//
// vpmaddubsw would add pairs of products in saturating 16 bits, so codes are widened to 16 bits first: even and odd
// bytes apart, each pair of products then summed in 32 bits by vpmaddwd, exactly.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "x86.h"

namespace mptqc {

struct LanesAvx2 {
  static constexpr int kValues = 16;
  static constexpr int kRows = 4, kVectors = 1;

  struct F {
    __m256 low, high;
  };
  struct I {
    __m256i low, high;
  };
  struct Inputs {
    __m256i even, odd;
  };
  struct Weights {
    __m256i low_even, low_odd, high_even, high_odd;
  };

  static F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static I set(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  static F load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
  static I load(const int32_t* from) {
    const __m256i* vectors = reinterpret_cast<const __m256i*>(from);
    return {_mm256_loadu_si256(vectors), _mm256_loadu_si256(vectors + 1)};
  }
  static F load(const float* from, int n) {
    if (n == 16) return load(from);
    float lane[16] = {};
    std::memcpy(lane, from, sizeof(float) * n);
    return load(lane);
  }
  static void store(float* to, F a) {
    _mm256_storeu_ps(to, a.low);
    _mm256_storeu_ps(to + 8, a.high);
  }
  static void store(float* to, F a, int n) {
    if (n == 16) return store(to, a);
    float lane[16];
    store(lane, a);
    std::memcpy(to, lane, sizeof(float) * n);
  }
  static void store(int32_t* to, I a) {
    __m256i* vectors = reinterpret_cast<__m256i*>(to);
    _mm256_storeu_si256(vectors, a.low);
    _mm256_storeu_si256(vectors + 1, a.high);
  }
  static void store_codes(uint8_t* to, I a, int n) {
    const __m256i low_bytes = _mm256_set1_epi32(255);
    const __m256i words = _mm256_packus_epi32(_mm256_and_si256(a.low, low_bytes), _mm256_and_si256(a.high, low_bytes));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
    const __m128i codes = _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    if (n == 16) return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), codes);
    uint8_t code[16];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(code), codes);
    std::memcpy(to, code, n);
  }
  static void store_codes(uint8_t* to, const I (&a)[4]) {
    for (int i = 0; i < 4; ++i) store_codes(to + 16 * i, a[i], 16);
  }
  static I mask(int n) {
    const __m256i bound = _mm256_set1_epi32(n);
    return {_mm256_cmpgt_epi32(bound, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
            _mm256_cmpgt_epi32(bound, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15))};
  }
  static F first(int n, F a, F b) {
    const F keep = as_float(mask(n));
    return {_mm256_blendv_ps(b.low, a.low, keep.low), _mm256_blendv_ps(b.high, a.high, keep.high)};
  }
  static I first(int n, I a, I b) {
    const I keep = mask(n);
    return {_mm256_blendv_epi8(b.low, a.low, keep.low), _mm256_blendv_epi8(b.high, a.high, keep.high)};
  }

  static F add(F a, F b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  static F subtract(F a, F b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
  static F multiply(F a, F b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
  static F multiply_add(F a, F b, F c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  static F subtract_product(F c, F a, F b) {
    return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
  }
  static F minimum(F a, F b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
  static F maximum(F a, F b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
  static I to_int(F a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }
  static F to_float(I a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
  static I add(I a, I b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
  static I subtract(I a, I b) { return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)}; }
  static I shift_left(I a, int bits) { return {_mm256_slli_epi32(a.low, bits), _mm256_slli_epi32(a.high, bits)}; }
  static I shift_left(I a, I bits) {
    return {_mm256_sllv_epi32(a.low, bits.low), _mm256_sllv_epi32(a.high, bits.high)};
  }
  static I shift_right(I a, int bits) { return {_mm256_srli_epi32(a.low, bits), _mm256_srli_epi32(a.high, bits)}; }
  static I where_at_least(F x, F bound, I a, I b) {
    const __m256i low = _mm256_castps_si256(_mm256_cmp_ps(x.low, bound.low, _CMP_GE_OQ));
    const __m256i high = _mm256_castps_si256(_mm256_cmp_ps(x.high, bound.high, _CMP_GE_OQ));
    return {_mm256_blendv_epi8(b.low, a.low, low), _mm256_blendv_epi8(b.high, a.high, high)};
  }
  static F as_float(I a) { return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }
  static I as_int(F a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }

  static float sum(F a) { return sum_halves(a.low, a.high); }
  static int32_t sum(I a) {
    int32_t lane[16], total = 0;
    store(lane, a);
    for (int32_t x : lane) total += x;
    return total;
  }
  static float largest(F a) {
    const __m256 eight = _mm256_max_ps(a.low, a.high);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
  }

  static Inputs spread(const uint8_t* codes) {
    int32_t four;
    std::memcpy(&four, codes, sizeof four);
    const __m256i all = _mm256_set1_epi32(four);
    return {_mm256_and_si256(all, _mm256_set1_epi16(255)), _mm256_srli_epi16(all, 8)};
  }
  static Weights weights(const int8_t* block) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 32));
    return {_mm256_srai_epi16(_mm256_slli_epi16(low, 8), 8), _mm256_srai_epi16(low, 8),
            _mm256_srai_epi16(_mm256_slli_epi16(high, 8), 8), _mm256_srai_epi16(high, 8)};
  }
  static I dot(I sum, Inputs a, Weights w) {
    sum.low = _mm256_add_epi32(sum.low, _mm256_madd_epi16(a.even, w.low_even));
    sum.high = _mm256_add_epi32(sum.high, _mm256_madd_epi16(a.even, w.high_even));
    sum.low = _mm256_add_epi32(sum.low, _mm256_madd_epi16(a.odd, w.low_odd));
    sum.high = _mm256_add_epi32(sum.high, _mm256_madd_epi16(a.odd, w.high_odd));
    return sum;
  }

  static void block_of_rows(const uint8_t* const rows[4], int8_t* block) { block_of_rows_sse2(rows, block); }
  static void words_of_rows(const uint8_t* const rows[4], int8_t* first_block) { words_of_rows_sse2(rows, first_block); }
};

}  // namespace mptqc
