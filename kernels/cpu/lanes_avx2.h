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
namespace {

struct LanesAvx2 {
  static constexpr int kValues = 16;
  static constexpr int kRows = 4, kVectors = 1;
  static constexpr int32_t kTaken = 0;
  static constexpr bool kLooksUpTwo = true, kBlocksWholeTiles = false;

  struct F {
    __m256 low, high;
  };
  struct I {
    __m256i low, high;
  };
  // The first bytes of all entries, then the second, third and fourth, each for both halves of a register.
  struct Table {
    __m256i bytes[4];

    Table() = default;
    explicit Table(const float (&entry)[16]) {
      const __m128i apart = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      __m128i four[4];  // entries each: word i has their bytes i
      for (int i = 0; i < 4; ++i) {
        four[i] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entry + 4 * i)), apart);
      }
      const __m128i low = _mm_unpacklo_epi32(four[0], four[1]), next_low = _mm_unpacklo_epi32(four[2], four[3]);
      const __m128i high = _mm_unpackhi_epi32(four[0], four[1]), next_high = _mm_unpackhi_epi32(four[2], four[3]);
      bytes[0] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(low, next_low));
      bytes[1] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(low, next_low));
      bytes[2] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(high, next_high));
      bytes[3] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(high, next_high));
    }
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
  static __m256i code_words(I steps, int32_t zero_point) {
    const __m256i zero = _mm256_set1_epi16(static_cast<int16_t>(zero_point));
    return _mm256_adds_epi16(_mm256_packs_epi32(steps.low, steps.high), zero);
  }
  // Packing works within halves of a register: as words, that of vectors a and b gives a0 a2 b0 b2, a1 a3 b1 b3.
  static __m256i codes_of_words(__m256i a, __m256i b, int32_t minimum, int32_t maximum) {
    const __m256i least = _mm256_set1_epi8(static_cast<int8_t>(minimum));
    const __m256i most = _mm256_set1_epi8(static_cast<int8_t>(maximum));
    const __m256i codes = _mm256_min_epu8(_mm256_max_epu8(_mm256_packus_epi16(a, b), least), most);
    return _mm256_permutevar8x32_epi32(codes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
  static void store_codes(uint8_t* to, I steps, int32_t zero_point, int32_t minimum, int32_t maximum, int n) {
    const __m256i words = code_words(steps, zero_point);
    const __m128i codes = _mm256_castsi256_si128(codes_of_words(words, words, minimum, maximum));
    if (n == 16) return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), codes);
    uint8_t code[16];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(code), codes);
    std::memcpy(to, code, n);
  }
  static void store_codes(uint8_t* to, const I (&steps)[4], int32_t zero_point, int32_t minimum, int32_t maximum) {
    for (int i = 0; i < 4; i += 2) {
      const __m256i first = code_words(steps[i], zero_point), second = code_words(steps[i + 1], zero_point);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16 * i), codes_of_words(first, second, minimum, maximum));
    }
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
  static F least_magnitude(F a, F bound) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return minimum({_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)}, bound);
  }
  static F add_positive(F a, F x) { return add(a, maximum(x, set(0.0f))); }
  static F look_up(const Table& table, I index) {
    F out, same;
    look_up(table, index, index, out, same);
    return out;
  }
  // Packed as bytes, indices find a byte of each entry at a time; unpacking, which works within halves as well, joins them.
  static void look_up(const Table& table, I first, I second, F& a, F& b) {
    const __m256i index = _mm256_packus_epi16(index_words(first), index_words(second));
    __m256i byte[4];
    for (int i = 0; i < 4; ++i) byte[i] = _mm256_shuffle_epi8(table.bytes[i], index);
    a = joined(_mm256_unpacklo_epi8(byte[0], byte[1]), _mm256_unpacklo_epi8(byte[2], byte[3]));
    b = joined(_mm256_unpackhi_epi8(byte[0], byte[1]), _mm256_unpackhi_epi8(byte[2], byte[3]));
  }
  static __m256i index_words(I index) {
    const __m256i low_bits = _mm256_set1_epi32(15);
    return _mm256_packus_epi32(_mm256_and_si256(index.low, low_bits), _mm256_and_si256(index.high, low_bits));
  }
  static F joined(__m256i low_words, __m256i high_words) {
    return {_mm256_castsi256_ps(_mm256_unpacklo_epi16(low_words, high_words)),
            _mm256_castsi256_ps(_mm256_unpackhi_epi16(low_words, high_words))};
  }
  static I to_int(F a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }
  static F to_float(I a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
  static I add(I a, I b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
  static I maximum(I a, I b) { return {_mm256_max_epi32(a.low, b.low), _mm256_max_epi32(a.high, b.high)}; }
  static I shift_left(I a, int bits) { return {_mm256_slli_epi32(a.low, bits), _mm256_slli_epi32(a.high, bits)}; }
  static F where_at_least(F x, F bound, F a, F b) {
    return {_mm256_blendv_ps(b.low, a.low, _mm256_cmp_ps(x.low, bound.low, _CMP_GE_OQ)),
            _mm256_blendv_ps(b.high, a.high, _mm256_cmp_ps(x.high, bound.high, _CMP_GE_OQ))};
  }
  static F as_float(I a) { return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }
  static I as_int(F a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }

  static float sum(F a) { return sum_halves(a.low, a.high); }
  static float largest(F a) {
    const __m256 eight = _mm256_max_ps(a.low, a.high);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  static int32_t largest(I a) {
    const __m256i eight = _mm256_max_epi32(a.low, a.high);
    const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0b1110));
    return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 1)));
  }

  static int32_t sum_codes(const uint8_t* codes, int64_t n) {
    __m256i total = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
      const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
      total = _mm256_add_epi64(total, _mm256_sad_epu8(some, _mm256_setzero_si256()));
    }
    const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    int32_t sum = _mm_extract_epi32(two, 0) + _mm_extract_epi32(two, 2);
    for (; i < n; ++i) sum += codes[i];
    return sum;
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

// For products of bytes as they are: what inherits has a `dot` for them.
struct LanesAvx2Bytes : LanesAvx2 {
  static constexpr int kRows = 6, kVectors = 1;  // 12 registers of sums, of 16

  struct Inputs {
    __m256i codes;
  };
  struct Weights {
    __m256i low, high;
  };

  static Inputs spread(const uint8_t* codes) {
    int32_t four;
    std::memcpy(&four, codes, sizeof four);
    return {_mm256_set1_epi32(four)};
  }
  static Weights weights(const int8_t* block) {
    const __m256i* vectors = reinterpret_cast<const __m256i*>(block);
    return {_mm256_loadu_si256(vectors), _mm256_loadu_si256(vectors + 1)};
  }
};

}  // namespace
}  // namespace mptqc
