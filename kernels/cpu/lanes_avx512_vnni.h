// Sixteen lanes in one AVX-512 register; products by VNNI. See lanes_portable.h for what each member means.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "x86.h"

namespace mptqc {
namespace {

struct LanesAvx512Vnni {
  static constexpr int kValues = 16;
  static constexpr int kRows = 6, kVectors = 4;
  static constexpr int32_t kTaken = 0;
  static constexpr bool kLooksUpTwo = false;

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

  static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1); }

  static F set(float x) { return _mm512_set1_ps(x); }
  static I set(int32_t x) { return _mm512_set1_epi32(x); }
  static F load(const float* from) { return _mm512_loadu_ps(from); }
  static I load(const int32_t* from) { return _mm512_loadu_si512(from); }
  static F load(const float* from, int n) { return _mm512_maskz_loadu_ps(mask(n), from); }
  static void store(float* to, F a) { _mm512_storeu_ps(to, a); }
  static void store(float* to, F a, int n) { _mm512_mask_storeu_ps(to, mask(n), a); }
  static void store(int32_t* to, I a) { _mm512_storeu_si512(to, a); }
  static void store_codes(uint8_t* to, I steps, int32_t zero_point, int32_t minimum, int n) {
    const __m512i codes = _mm512_max_epi32(_mm512_add_epi32(steps, set(zero_point)), set(minimum));
    _mm_mask_storeu_epi8(to, mask(n), _mm512_cvtusepi32_epi8(codes));
  }
  static void store_codes(uint8_t* to, const I (&steps)[4], int32_t zero_point, int32_t minimum) {
    const __m512i zero = _mm512_set1_epi16(static_cast<int16_t>(zero_point));
    const __m512i words01 = _mm512_adds_epi16(_mm512_packs_epi32(steps[0], steps[1]), zero);
    const __m512i words23 = _mm512_adds_epi16(_mm512_packs_epi32(steps[2], steps[3]), zero);
    const __m512i least = _mm512_set1_epi8(static_cast<int8_t>(minimum));
    const __m512i codes = _mm512_max_epu8(_mm512_packus_epi16(words01, words23), least);
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
  static F absolute(F a) { return _mm512_abs_ps(a); }
  static F look_up(const Table& table, I index) { return _mm512_permutexvar_ps(index, table.entry); }
  static I to_int(F a) { return _mm512_cvt_roundps_epi32(a, kNearest); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I shift_left(I a, int bits) { return _mm512_slli_epi32(a, bits); }
  static F where_at_least(F x, F bound, F a, F b) {
    return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(x, bound, _CMP_GE_OQ), a);
  }
  static F as_float(I a) { return _mm512_castsi512_ps(a); }
  static I as_int(F a) { return _mm512_castps_si512(a); }

  static float sum(F a) { return sum_halves(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)); }
  static float largest(F a) { return _mm512_reduce_max_ps(a); }

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

  static void block_of_rows(const uint8_t* const rows[4], int8_t* block) { block_of_rows_sse2(rows, block); }
  static void words_of_rows(const uint8_t* const rows[4], int8_t* first_block) { words_of_rows_sse2(rows, first_block); }
};

}  // namespace
}  // namespace mptqc
