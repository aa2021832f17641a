// Sixteen lanes in two AVX2 registers; products by the VNNI of processors without AVX-512.
#pragma once

#include "lanes_avx2.h"

namespace mptqc {

struct LanesAvxVnni : LanesAvx2 {
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
  static I dot(I sum, Inputs a, Weights w) {
    return {_mm256_dpbusd_avx_epi32(sum.low, a.codes, w.low), _mm256_dpbusd_avx_epi32(sum.high, a.codes, w.high)};
  }
};

}  // namespace mptqc
