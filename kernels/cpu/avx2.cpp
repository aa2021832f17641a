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
  if (a.span > 0) return LinearTask<LanesAvx2Spans>(a).run(task);
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

// Keys and values of 7 bits and fewer are small weights. Looking at them is a hundredth of the work.
void attention_avx2(const mptqc_attention& a, int64_t task, uint8_t* scratch) {
  int32_t largest = 0;
  for (AttentionPlace place(a, task); place.batch < place.end_batch; ++place.batch) {
    const int32_t largest_key = largest_of(place.k(a), a.columns, a.heads * a.width, a.width);
    const int32_t largest_value = largest_of(place.v(a), a.columns, a.heads * a.value_width, a.value_width);
    largest = largest_key > largest ? largest_key : largest;
    largest = largest_value > largest ? largest_value : largest;
  }
  const int32_t span = span_of_largest(largest);
  if (span > 0) return AttentionTask<LanesAvx2Spans>(a, scratch, span).run(task);
  AttentionTask<LanesAvx2>(a, scratch).run(task);
}

}  // namespace

const Implementation kAvx2 = {Kernels<LanesAvx2>::layer_norm, Kernels<LanesAvx2>::layer_norm_add, linear_avx2,
                              attention_avx2, Kernels<LanesAvx2>::patches, Kernels<LanesAvx2>::trellis};
}  // namespace mptqc

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
