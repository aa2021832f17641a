// Products with small weights (a Linear's, keys, values) on AVX2, whose vpmaddubsw adds two products in saturating 16 bits:
// no pair of a uint8 code and a weight of 7 bits leaves them, and of fewer bits many pairs can be added there before the sum
// is widened to 32.
#pragma once

#include "lanes_avx2.h"
#include "product.h"

namespace mptqc {

// Groups of 4 inputs whose pairs of products fit 16 bits together; 0: not even one, or not known.
constexpr int64_t groups_in_16_bits(int32_t largest_weight) {
  return largest_weight > 0 ? 32767 / (2 * 255 * largest_weight) : 0;
}

namespace {

// One group at a time.
struct LanesAvx2Narrow : LanesAvx2Bytes {
  static __m256i pairs(__m256i codes, __m256i weights) { return _mm256_maddubs_epi16(codes, weights); }
  static __m256i widen(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
  static I dot(I sum, Inputs a, Weights w) {
    sum.low = _mm256_add_epi32(sum.low, widen(pairs(a.codes, w.low)));
    sum.high = _mm256_add_epi32(sum.high, widen(pairs(a.codes, w.high)));
    return sum;
  }
};

// Several groups at a time: sums of 16 bits in registers, those of 32 in the tile.
struct LanesAvx2Low : LanesAvx2Narrow {};

}  // namespace

// Fewer are not worth the way through the tile.
constexpr int64_t kLeastGroups = 4;

// Makes the compiler finish this value here: GCC 12 else makes all pairs first and has no registers left for their sums.
MPTQC_INLINE __m256i in_place(__m256i x) {
  asm("" : "+x"(x));
  return x;
}

// tile[r] += sum_k a[r][k] * w[k] over `groups` groups of 4 inputs, whose pairs of products fit 16 bits together.
template <int Rows>
MPTQC_INLINE void add_groups(
    const uint8_t* a, int64_t stride, const int8_t* block, int64_t groups, int32_t (*tile)[kPanel]) {
  using L = LanesAvx2Low;
  __m256i low[Rows], high[Rows];
  MPTQC_UNROLL
  for (int r = 0; r < Rows; ++r) low[r] = high[r] = _mm256_setzero_si256();
  for (int64_t k = 0; k < groups; ++k) {
    const L::Weights weights = L::weights(block + k * kBlockBytes);
    MPTQC_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const __m256i codes = L::spread(a + r * stride + k * kBlockInputs).codes;
      low[r] = in_place(_mm256_add_epi16(low[r], L::pairs(codes, weights.low)));
      high[r] = in_place(_mm256_add_epi16(high[r], L::pairs(codes, weights.high)));
    }
  }
  MPTQC_UNROLL
  for (int r = 0; r < Rows; ++r) {
    L::store(tile[r], L::add(L::load(tile[r]), L::I{L::widen(low[r]), L::widen(high[r])}));
  }
}

// As multiply_tile, for one block.
template <int Rows>
void multiply_low(Codes a, Blocks w, int64_t most_groups, const int32_t* offset, int32_t (*tile)[kPanel]) {
  for (int r = 0; r < Rows; ++r) std::memcpy(tile[r], offset, kBlockOutputs * sizeof(int32_t));
  const int64_t groups = a.width / kBlockInputs, rest = a.width % kBlockInputs;
  for (int64_t k = 0; k < groups; k += most_groups) {
    const int64_t some = least(most_groups, groups - k);
    add_groups<Rows>(a.data + k * kBlockInputs, a.stride, w.data + k * kBlockBytes, some, tile);
  }
  if (rest == 0) return;
  uint8_t last[Rows][kBlockInputs] = {};
  for (int r = 0; r < Rows; ++r) std::memcpy(last[r], a.data + r * a.stride + groups * kBlockInputs, rest);
  add_groups<Rows>(last[0], kBlockInputs, w.data + groups * kBlockBytes, 1, tile);
}

template <int Rows>
void multiply_low_rows(
    int rows, Codes a, Blocks w, int64_t most_groups, const int32_t* offset, int32_t (*tile)[kPanel]) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return multiply_low_rows<Rows - 1>(rows, a, w, most_groups, offset, tile);
  }
  multiply_low<Rows>(a, w, most_groups, offset, tile);
}

template <>
struct Product<LanesAvx2Low> {
  static constexpr int kRows = LanesAvx2Low::kRows;

  explicit Product(int32_t largest_weight) : most_groups(groups_in_16_bits(largest_weight)) {}

  static bool fetches(int64_t) { return false; }

  template <class Beside>
  void multiply(
      int rows, int blocks, Codes a, Blocks w, const int32_t* offset, Tile<kRows>& tile, const Beside& beside) {
    beside(0, 1);
    for (int block = 0; block < blocks; ++block) {
      const Blocks part = {w.data + block * w.block_bytes, w.block_bytes};
      int32_t(*to)[kPanel] = reinterpret_cast<int32_t(*)[kPanel]>(&tile.sum[0][16 * block]);
      multiply_low_rows<kRows>(rows, a, part, most_groups, offset + 16 * block, to);
    }
  }

  int64_t most_groups;
};

}  // namespace mptqc
