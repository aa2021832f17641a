// The VNNI of processors without AVX-512, in AVX2: a stand-in for the intrinsic that kernels/cpu/lanes_avx_vnni.h uses.
#pragma once

#include <immintrin.h>

namespace emulated_avx_vnni {

// sum[i] += a[4i..4i+3] * b[4i..4i+3], unsigned times signed bytes, exact but for wrapping: even and odd bytes apart.
inline __m256i dot(__m256i sum, __m256i a, __m256i b) {
  const __m256i even = _mm256_and_si256(a, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(a, 8);
  const __m256i even_b = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8), odd_b = _mm256_srai_epi16(b, 8);
  const __m256i evens = _mm256_madd_epi16(even, even_b), odds = _mm256_madd_epi16(odd, odd_b);
  return _mm256_add_epi32(sum, _mm256_add_epi32(evens, odds));
}

}  // namespace emulated_avx_vnni

// Stands in for what processor.cpp says. One source file alone includes this header.
namespace mptqc {
bool has_avx_vnni();
bool has_avx_vnni() { return true; }
}  // namespace mptqc

#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32 emulated_avx_vnni::dot
