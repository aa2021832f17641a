// Products with small weights (a Linear's, keys, values) on AVX2, whose vpmaddubsw adds two products in saturating 16 bits:
// no pair of a uint8 code and a weight of 7 bits leaves them. Of smaller weights the sums of a span of several groups of 4
// inputs stay there too (mptqc_linear_span), so that they are widened to 32 bits once a span.
#pragma once

#include "lanes_avx2.h"
#include "product.h"

namespace mptqc {
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

// One span at a time.
struct LanesAvx2Spans : LanesAvx2Narrow {};

}  // namespace

// The span of weights of which no more is known than the largest.
constexpr int32_t span_of_largest(int32_t largest) {
  const int32_t groups = largest > 0 ? 32767 / (2 * 255 * largest) : 16;
  return groups >= 16 ? 16 : groups >= 8 ? 8 : groups >= 6 ? 6 : groups < 5 ? groups : 4;
}

// sum += x, here and in place: GCC 12 else makes all pairs of a span first and has no registers left for their sums.
MPTQC_INLINE void add_words(__m256i& sum, __m256i x) { asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(x)); }

// sum[r] += sum_k a[r][k] * w[k] over one span.
template <int Rows, int Span>
MPTQC_INLINE void add_span(LanesAvx2Spans::I (&sum)[Rows], const uint8_t* a, int64_t stride, const int8_t* block) {
  using L = LanesAvx2Spans;
  __m256i low[Rows], high[Rows];
  MPTQC_UNROLL
  for (int k = 0; k < Span; ++k) {
    const L::Weights weights = L::weights(block + k * kBlockBytes);
    MPTQC_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const __m256i codes = L::spread(a + r * stride + k * kBlockInputs).codes;
      if (k == 0) {
        low[r] = L::pairs(codes, weights.low);
        high[r] = L::pairs(codes, weights.high);
      } else {
        add_words(low[r], L::pairs(codes, weights.low));
        add_words(high[r], L::pairs(codes, weights.high));
      }
    }
  }
  MPTQC_UNROLL
  for (int r = 0; r < Rows; ++r) sum[r] = L::add(sum[r], L::I{L::widen(low[r]), L::widen(high[r])});
}

// As multiply_tile, for one block.
template <int Rows, int Span>
MPTQC_INLINE void multiply_spans(Codes a, Blocks w, const int32_t* offset, int32_t (*tile)[kPanel]) {
  using L = LanesAvx2Spans;
  L::I sum[Rows];
  MPTQC_UNROLL
  for (int r = 0; r < Rows; ++r) sum[r] = L::load(offset);
  const int64_t groups = a.width / kBlockInputs, rest = a.width % kBlockInputs;
  int64_t k = 0;
  for (; k + Span <= groups; k += Span) {
    add_span<Rows, Span>(sum, a.data + k * kBlockInputs, a.stride, w.data + k * kBlockBytes);
  }
  for (; k < groups; ++k) add_span<Rows, 1>(sum, a.data + k * kBlockInputs, a.stride, w.data + k * kBlockBytes);
  if (rest > 0) {
    uint8_t last[Rows][kBlockInputs] = {};
    for (int r = 0; r < Rows; ++r) std::memcpy(last[r], a.data + r * a.stride + groups * kBlockInputs, rest);
    add_span<Rows, 1>(sum, last[0], kBlockInputs, w.data + groups * kBlockBytes);
  }
  MPTQC_UNROLL
  for (int r = 0; r < Rows; ++r) L::store(tile[r], sum[r]);
}

template <>
struct Product<LanesAvx2Spans> {
  static constexpr int kRows = LanesAvx2Spans::kRows, kColumns = kPanel, kWaiting = 1;

  static constexpr int window(int rows) { return rows; }

  explicit Product(int32_t span) : multiply_panel(function_of(span)) {}

  static bool fetches(int64_t) { return false; }

  template <class Beside>
  void multiply(
      int rows, int blocks, Codes a, Blocks w, const int32_t* offset, Tile<kRows>& tile, const Beside& beside) {
    beside(1);
    multiply_panel(rows, blocks, a, w, offset, tile);
  }

 private:
  using Function = void (*)(int rows, int blocks, Codes, Blocks, const int32_t* offset, Tile<kRows>&);

  // Three rows have 6 registers for sums of 16 bits and 6 for those of 32. The block is in the first cache for the next three.
  template <int Span>
  static void multiply_threes(int rows, int blocks, Codes a, Blocks w, const int32_t* offset, Tile<kRows>& tile) {
    for_blocks(blocks, w, tile, [&](int block, Blocks part, int32_t(*to)[kPanel]) {
      Codes some = a;
      int left = rows;
      for (; left >= 3; left -= 3, some.data += 3 * a.stride, to += 3) {
        multiply_spans<3, Span>(some, part, offset + 16 * block, to);
      }
      if (left == 2) multiply_spans<2, Span>(some, part, offset + 16 * block, to);
      if (left == 1) multiply_spans<1, Span>(some, part, offset + 16 * block, to);
    });
  }

  static void multiply_sixes(int rows, int blocks, Codes a, Blocks w, const int32_t* offset, Tile<kRows>& tile) {
    for_blocks(blocks, w, tile, [&](int block, Blocks part, int32_t(*to)[kPanel]) {
      multiply_rows<LanesAvx2Narrow, kRows>(rows, 1, a, part, offset + 16 * block, to);
    });
  }

  template <class Work>
  MPTQC_INLINE static void for_blocks(int blocks, Blocks w, Tile<kRows>& tile, const Work& work) {
    for (int block = 0; block < blocks; ++block) {
      const Blocks part = {w.data + block * w.block_bytes, w.block_bytes};
      work(block, part, reinterpret_cast<int32_t(*)[kPanel]>(&tile.sum[0][16 * block]));
    }
  }

  static Function function_of(int32_t span) {
    return span == 16  ? multiply_threes<16>
           : span == 8 ? multiply_threes<8>
           : span == 6 ? multiply_threes<6>
           : span == 4 ? multiply_threes<4>
           : span == 3 ? multiply_threes<3>
           : span == 2 ? multiply_threes<2>
                       : multiply_sixes;
  }

  Function multiply_panel;
};

}  // namespace mptqc
