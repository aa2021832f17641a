// What the AVX2 and the AVX-512 lanes share. Unnamed namespace: each is compiled for its own instruction set.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace mptqc {
namespace {

inline float sum_halves(__m256 low, __m256 high) {
  const __m256 eight = _mm256_add_ps(low, high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

inline void block_of_rows_sse2(const uint8_t* const rows[4], int8_t* block) {
  const __m128i row0 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[0]));
  const __m128i row1 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[1]));
  const __m128i row2 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[2]));
  const __m128i row3 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[3]));
  const __m128i low01 = _mm_unpacklo_epi8(row0, row1), high01 = _mm_unpackhi_epi8(row0, row1);
  const __m128i low23 = _mm_unpacklo_epi8(row2, row3), high23 = _mm_unpackhi_epi8(row2, row3);
  const __m128i sign = _mm_set1_epi8(-128);
  __m128i* to = reinterpret_cast<__m128i*>(block);
  _mm_storeu_si128(to + 0, _mm_xor_si128(sign, _mm_unpacklo_epi16(low01, low23)));
  _mm_storeu_si128(to + 1, _mm_xor_si128(sign, _mm_unpackhi_epi16(low01, low23)));
  _mm_storeu_si128(to + 2, _mm_xor_si128(sign, _mm_unpacklo_epi16(high01, high23)));
  _mm_storeu_si128(to + 3, _mm_xor_si128(sign, _mm_unpackhi_epi16(high01, high23)));
}

// Four words of four rows, each word to its own block: word w of row r becomes word r of block w.
inline void words_of_rows_sse2(const uint8_t* const rows[4], int8_t* first_block) {
  const __m128i row0 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[0]));
  const __m128i row1 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[1]));
  const __m128i row2 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[2]));
  const __m128i row3 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[3]));
  const __m128i low01 = _mm_unpacklo_epi32(row0, row1), high01 = _mm_unpackhi_epi32(row0, row1);
  const __m128i low23 = _mm_unpacklo_epi32(row2, row3), high23 = _mm_unpackhi_epi32(row2, row3);
  const __m128i sign = _mm_set1_epi8(-128);
  __m128i* to = reinterpret_cast<__m128i*>(first_block);  // a block is four of these
  _mm_storeu_si128(to + 0, _mm_xor_si128(sign, _mm_unpacklo_epi64(low01, low23)));
  _mm_storeu_si128(to + 4, _mm_xor_si128(sign, _mm_unpackhi_epi64(low01, low23)));
  _mm_storeu_si128(to + 8, _mm_xor_si128(sign, _mm_unpacklo_epi64(high01, high23)));
  _mm_storeu_si128(to + 12, _mm_xor_si128(sign, _mm_unpackhi_epi64(high01, high23)));
}

}  // namespace
}  // namespace mptqc
