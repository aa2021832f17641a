// Sixteen lanes in one AVX-512 register; products by VNNI. See lanes_portable.h for what each member means.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "wide.h"
#include "x86.h"

namespace mptqc {
namespace {

struct LanesAvx512Vnni {
  static constexpr int kValues = 16;
  static constexpr int kRows = 6, kVectors = 4;
  static constexpr int32_t kTaken = 0;
  static constexpr bool kLooksUpTwo = false, kBlocksWholeTiles = true;

  using F = __m512;
  using I = __m512i;
  struct Table {
    __m512 entry;

    Table() = default;
    explicit Table(const float (&entries)[16]) : entry(_mm512_loadu_ps(entries)) {}
  };
  struct Inputs {
    __m512i codes;
  };
  struct Weights {
    __m512i codes;
  };

  static constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

  static constexpr int kLeastMagnitude = 0b1010;  // of VRANGEPS: the absolute minimum, without its sign

  static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1); }

  static F set(float x) { return _mm512_set1_ps(x); }
  static I set(int32_t x) { return _mm512_set1_epi32(x); }
  static F load(const float* from) { return _mm512_loadu_ps(from); }
  static I load(const int32_t* from) { return _mm512_loadu_si512(from); }
  static F load(const float* from, int n) { return _mm512_maskz_loadu_ps(mask(n), from); }
  static void store(float* to, F a) { _mm512_storeu_ps(to, a); }
  static void store(float* to, F a, int n) { _mm512_mask_storeu_ps(to, mask(n), a); }
  static void store(int32_t* to, I a) { _mm512_storeu_si512(to, a); }
  static void store_codes(uint8_t* to, I steps, int32_t zero_point, int32_t minimum, int32_t maximum, int n) {
    const __m512i codes = _mm512_max_epi32(_mm512_add_epi32(steps, set(zero_point)), set(minimum));
    _mm_mask_storeu_epi8(to, mask(n), _mm512_cvtepi32_epi8(_mm512_min_epi32(codes, set(maximum))));
  }
  static void store_codes(uint8_t* to, const I (&steps)[4], int32_t zero_point, int32_t minimum, int32_t maximum) {
    const __m512i zero = _mm512_set1_epi16(static_cast<int16_t>(zero_point));
    const __m512i words01 = _mm512_adds_epi16(_mm512_packs_epi32(steps[0], steps[1]), zero);
    const __m512i words23 = _mm512_adds_epi16(_mm512_packs_epi32(steps[2], steps[3]), zero);
    const __m512i least = _mm512_set1_epi8(static_cast<int8_t>(minimum)), most = _mm512_set1_epi8(static_cast<int8_t>(maximum));
    const __m512i codes = _mm512_min_epu8(_mm512_max_epu8(_mm512_packus_epi16(words01, words23), least), most);
    // Packing works within quarters of a register: word 4q + v holds vector v's part of quarter q.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, codes));
  }
  static F first(int n, F a, F b) { return _mm512_mask_mov_ps(b, mask(n), a); }

  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F subtract(F a, F b) { return _mm512_sub_ps(a, b); }
  static F multiply(F a, F b) { return _mm512_mul_ps(a, b); }
  static F multiply_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F subtract_product(F c, F a, F b) { return _mm512_fnmadd_ps(a, b, c); }
  static F minimum(F a, F b) { return _mm512_min_ps(a, b); }
  static F maximum(F a, F b) { return _mm512_max_ps(a, b); }
  static F least_magnitude(F a, F bound) { return _mm512_range_ps(a, bound, kLeastMagnitude); }
  // By a mask: a maximum would wait for the one port that multiplications take while tiles are in use.
  static F add_positive(F a, F x) {
    return _mm512_mask_add_ps(a, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), a, x);
  }
  static F look_up(const Table& table, I index) { return _mm512_permutexvar_ps(index, table.entry); }
  static I to_int(F a) { return _mm512_cvt_roundps_epi32(a, kNearest); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I maximum(I a, I b) { return _mm512_max_epi32(a, b); }
  static I shift_left(I a, int bits) { return _mm512_slli_epi32(a, bits); }
  static F where_at_least(F x, F bound, F a, F b) {
    return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(x, bound, _CMP_GE_OQ), a);
  }
  static F as_float(I a) { return _mm512_castsi512_ps(a); }
  static I as_int(F a) { return _mm512_castps_si512(a); }

  static float sum(F a) { return sum_halves(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)); }
  static float largest(F a) { return _mm512_reduce_max_ps(a); }
  static int32_t largest(I a) { return _mm512_reduce_max_epi32(a); }

  static int32_t sum_codes(const uint8_t* codes, int64_t n) {
    I total = _mm512_setzero_si512();
    const I ones = _mm512_set1_epi8(1);
    for (int64_t i = 0; i < n; i += 64) {
      const __mmask64 some = n - i < 64 ? (uint64_t{1} << (n - i)) - 1 : ~uint64_t{0};
      total = _mm512_dpbusd_epi32(total, _mm512_maskz_loadu_epi8(some, codes + i), ones);
    }
    return _mm512_reduce_add_epi32(total);
  }

  static Inputs spread(const uint8_t* codes) {
    int32_t four;
    std::memcpy(&four, codes, sizeof four);
    return {_mm512_set1_epi32(four)};
  }
  static Weights weights(const int8_t* block) { return {_mm512_loadu_si512(block)}; }
  static I dot(I sum, Inputs a, Weights w) { return _mm512_dpbusd_epi32(sum, a.codes, w.codes); }

  // The first n codes of a row that is there, each minus 128; zeros else.
  static I signed_codes(const uint8_t* row, bool is_there, int n) {
    const __mmask64 some = !is_there ? 0 : n < 64 ? (uint64_t{1} << n) - 1 : ~uint64_t{0};
    return _mm512_maskz_sub_epi8(some, _mm512_maskz_loadu_epi8(some, row), _mm512_set1_epi8(-128));
  }

  // Four rows of codes, of which `rows` are there, of n <= 64 columns: blocks of 16 columns.
  static void blocks_of_values(const uint8_t* from, int64_t stride, int rows, int n, int8_t* to, int64_t block_bytes) {
    I row[4], pair[4];
    for (int r = 0; r < 4; ++r) row[r] = signed_codes(from + r * stride, r < rows, n);
    pair[0] = _mm512_unpacklo_epi8(row[0], row[1]);
    pair[1] = _mm512_unpackhi_epi8(row[0], row[1]);
    pair[2] = _mm512_unpacklo_epi8(row[2], row[3]);
    pair[3] = _mm512_unpackhi_epi8(row[2], row[3]);
    row[0] = _mm512_unpacklo_epi16(pair[0], pair[2]);
    row[1] = _mm512_unpackhi_epi16(pair[0], pair[2]);
    row[2] = _mm512_unpacklo_epi16(pair[1], pair[3]);
    row[3] = _mm512_unpackhi_epi16(pair[1], pair[3]);
    turn_quarters(row);
    for (int block = 0; 16 * block < n; ++block) _mm512_storeu_si512(to + block * block_bytes, row[block]);
  }

  // Sixteen rows of codes, of which `rows` are there, of n <= 64 columns: the w-th four codes of row r become word r of the
  // w-th 64 bytes.
  static void blocks_of_keys(const uint8_t* from, int64_t stride, int rows, int n, int8_t* to) {
    I word[16], turned[16];
    MPTQC_UNROLL
    for (int r = 0; r < 16; ++r) word[r] = signed_codes(from + r * stride, r < rows, n);
    MPTQC_UNROLL
    for (int r = 0; r < 16; r += 4) {  // of rows r to r + 3, word w of each quarter
      const I low01 = _mm512_unpacklo_epi32(word[r], word[r + 1]), low23 = _mm512_unpacklo_epi32(word[r + 2], word[r + 3]);
      const I high01 = _mm512_unpackhi_epi32(word[r], word[r + 1]), high23 = _mm512_unpackhi_epi32(word[r + 2], word[r + 3]);
      turned[r] = _mm512_unpacklo_epi64(low01, low23);
      turned[r + 1] = _mm512_unpackhi_epi64(low01, low23);
      turned[r + 2] = _mm512_unpacklo_epi64(high01, high23);
      turned[r + 3] = _mm512_unpackhi_epi64(high01, high23);
    }
    MPTQC_UNROLL
    for (int w = 0; w < 4; ++w) {
      I rows_of_word[4] = {turned[w], turned[w + 4], turned[w + 8], turned[w + 12]};
      turn_quarters(rows_of_word);
      for (int quarter = 0; quarter < 4; ++quarter) {
        if (16 * quarter + 4 * w < n) _mm512_storeu_si512(to + 64 * (4 * quarter + w), rows_of_word[quarter]);
      }
    }
  }

  // Quarter j of vector i becomes quarter i of vector j.
  static void turn_quarters(I (&a)[4]) {
    const I even01 = _mm512_shuffle_i32x4(a[0], a[1], 0b10001000), odd01 = _mm512_shuffle_i32x4(a[0], a[1], 0b11011101);
    const I even23 = _mm512_shuffle_i32x4(a[2], a[3], 0b10001000), odd23 = _mm512_shuffle_i32x4(a[2], a[3], 0b11011101);
    a[0] = _mm512_shuffle_i32x4(even01, even23, 0b10001000);
    a[1] = _mm512_shuffle_i32x4(odd01, odd23, 0b10001000);
    a[2] = _mm512_shuffle_i32x4(even01, even23, 0b11011101);
    a[3] = _mm512_shuffle_i32x4(odd01, odd23, 0b11011101);
  }
};

}  // namespace
}  // namespace mptqc
