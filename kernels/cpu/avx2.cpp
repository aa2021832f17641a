// System headers come first: what they define must not be compiled for this file's instruction set.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#include "implement.h"
#include "product_avx2.h"

namespace mptqc {
namespace {

void linear_avx2(const mptqc_linear& a, int64_t task) {
  const int64_t groups = groups_in_16_bits(a.largest_weight);
  if (groups >= kLeastGroups) return LinearTask<LanesAvx2Low>(a).run(task);
  if (groups > 0) return LinearTask<LanesAvx2Narrow>(a).run(task);
  LinearTask<LanesAvx2>(a).run(task);
}

// The largest distance of one head's codes from 128, which the product takes off.
int32_t largest_of(const uint8_t* codes, int64_t rows, int64_t stride, int64_t width) {
  __m256i lows = _mm256_set1_epi8(-128), highs = lows;
  const auto take = [&](__m256i these) {
    lows = _mm256_min_epu8(lows, these);
    highs = _mm256_max_epu8(highs, these);
  };
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* row = codes + r * stride;
    int64_t i = 0;
    for (; i + 32 <= width; i += 32) take(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i)));
    for (; i < width; ++i) take(_mm256_set1_epi8(static_cast<char>(row[i])));
  }
  uint8_t low[32], high[32];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), lows);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), highs);
  int32_t largest = 0;
  for (int i = 0; i < 32; ++i) {
    largest = 128 - low[i] > largest ? 128 - low[i] : largest;
    largest = high[i] - 128 > largest ? high[i] - 128 : largest;
  }
  return largest;
}

// Keys and values of 7 bits are small weights. Looking at them is a hundredth of the work.
void attention_avx2(const mptqc_attention& a, int64_t task, uint8_t* scratch) {
  const AttentionPlace place(a, task);
  const auto small = [&](const uint8_t* codes, int64_t width) {
    return groups_in_16_bits(largest_of(codes, a.columns, a.heads * width, width)) > 0;
  };
  if (small(place.k(a), a.width) && small(place.v(a), a.value_width)) {
    return AttentionTask<LanesAvx2Narrow>(a, scratch).run(task);
  }
  AttentionTask<LanesAvx2>(a, scratch).run(task);
}

}  // namespace

const Implementation kAvx2 = {Kernels<LanesAvx2>::layer_norm, linear_avx2, attention_avx2,
                              Kernels<LanesAvx2>::patches, Kernels<LanesAvx2>::trellis};
}  // namespace mptqc

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
