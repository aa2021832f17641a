// The integer product that Linear and attention share: rows of uint8 codes times blocks of int8.
#pragma once

#include <cstring>

#include "wide.h"

namespace mptqc {

// A tile of sums: up to Rows rows of Columns columns, kPanel or half of it.
template <int Rows, int Columns = kPanel>
struct alignas(64) Tile {
  int32_t sum[Rows + (Columns < kPanel)][Columns];  // a panel of sums can be read from any row on
};

// The rows that are multiplied where `wanted` rows from `row` on are: `best` rows among `all`, if there are so many.
struct RowWindow {
  int64_t first;
  int rows;

  RowWindow(int64_t row, int wanted, int best, int64_t all)
      : first(best <= all ? least(row, all - best) : row), rows(best <= all ? best : wanted) {}
};

// Rows of codes: row r begins at data + r * stride and holds `width` codes.
struct Codes {
  const uint8_t* data;
  int64_t stride, width;
};

// Blocks of outputs: [blocks][ceil(width / 4)][16][4].
struct Blocks {
  const int8_t* data;
  int64_t block_bytes;
};

// sum[r][v] += a[r] * w[v] over one group of 4 inputs.
template <class L, int Rows, int Vectors>
MPTQC_INLINE void add_group(
    typename L::I (&sum)[Rows][Vectors], const uint8_t* a, int64_t stride, const int8_t* block, int64_t block_bytes) {
  typename L::Weights weights[Vectors];
  MPTQC_UNROLL
  for (int v = 0; v < Vectors; ++v) weights[v] = L::weights(block + v * block_bytes);
  MPTQC_UNROLL
  for (int r = 0; r < Rows; ++r) {
    const typename L::Inputs inputs = L::spread(a + r * stride);
    MPTQC_UNROLL
    for (int v = 0; v < Vectors; ++v) sum[r][v] = L::dot(sum[r][v], inputs, weights[v]);
  }
}

// The sum of each output's weights in up to kPanelBlocks blocks, over `groups` groups of 4 inputs.
template <class L>
void sums_of_blocks(Blocks w, int blocks, int64_t groups, int32_t* sums) {
  constexpr uint8_t one = 1 + L::kTaken, ones[kBlockInputs] = {one, one, one, one};
  const auto all_ones = L::spread(ones);
  typename L::I sum[kPanelBlocks];
  MPTQC_UNROLL
  for (int v = 0; v < kPanelBlocks; ++v) sum[v] = L::set(int32_t{0});
  const int8_t* at[kPanelBlocks];  // blocks that are not there are the last once more
  for (int v = 0; v < kPanelBlocks; ++v) at[v] = w.data + least(v, blocks - 1) * w.block_bytes;
  for (int64_t group = 0; group < groups; ++group) {
    MPTQC_UNROLL
    for (int v = 0; v < kPanelBlocks; ++v) sum[v] = L::dot(sum[v], all_ones, L::weights(at[v] + group * kBlockBytes));
  }
  for (int v = 0; v < blocks; ++v) L::store(sums + 16 * v, sum[v]);
}

// Weights wider than this do not stay in the first cache beside the codes: each pass fetches them again from the second, and
// asks for them this many bytes ahead, since the processor does not see four streams that cross pages coming.
constexpr int64_t kFirstCachePanel = 32 << 10, kAhead = 16 * kBlockBytes;

// tile[r][c] = offset[c] + sum_k a[r][k] * w[k][c] for Rows rows and Vectors blocks of 16 columns.
template <class L, int Rows, int Vectors>
void multiply_tile(Codes a, Blocks w, const int32_t* offset, int32_t (*tile)[kPanel]) {
  typename L::I sum[Rows][Vectors];
  MPTQC_UNROLL
  for (int v = 0; v < Vectors; ++v) {
    MPTQC_UNROLL
    for (int r = 0; r < Rows; ++r) sum[r][v] = L::load(offset + 16 * v);
  }
  const int64_t groups = a.width / kBlockInputs, rest = a.width % kBlockInputs;
  const bool streams = Vectors * w.block_bytes > kFirstCachePanel;
  for (int64_t k = 0; k < groups; ++k) {
    if (streams) {
      MPTQC_UNROLL
      for (int v = 0; v < Vectors; ++v) __builtin_prefetch(w.data + v * w.block_bytes + k * kBlockBytes + kAhead);
    }
    add_group<L, Rows, Vectors>(sum, a.data + k * kBlockInputs, a.stride, w.data + k * kBlockBytes, w.block_bytes);
  }
  if (rest > 0) {
    uint8_t last[Rows][kBlockInputs] = {};
    for (int r = 0; r < Rows; ++r) std::memcpy(last[r], a.data + r * a.stride + groups * kBlockInputs, rest);
    add_group<L, Rows, Vectors>(sum, last[0], kBlockInputs, w.data + groups * kBlockBytes, w.block_bytes);
  }
  MPTQC_UNROLL
  for (int r = 0; r < Rows; ++r) {
    MPTQC_UNROLL
    for (int v = 0; v < Vectors; ++v) L::store(tile[r] + 16 * v, sum[r][v]);
  }
}

template <class L, int Rows, int Vectors>
void multiply_vectors(int vectors, Codes a, Blocks w, const int32_t* offset, int32_t (*tile)[kPanel]) {
  if constexpr (Vectors > 1) {
    if (vectors < Vectors) return multiply_vectors<L, Rows, Vectors - 1>(vectors, a, w, offset, tile);
  }
  multiply_tile<L, Rows, Vectors>(a, w, offset, tile);
}

template <class L, int Rows>
void multiply_rows(int rows, int vectors, Codes a, Blocks w, const int32_t* offset, int32_t (*tile)[kPanel]) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return multiply_rows<L, Rows - 1>(rows, vectors, a, w, offset, tile);
  }
  multiply_vectors<L, Rows, L::kVectors>(vectors, a, w, offset, tile);
}

// What a task multiplies with. AMX has its own, in product_amx.h.
template <class L>
struct Product {
  static constexpr int kRows = L::kRows;
  static constexpr int kColumns = kPanel;  // of the tiles that a Linear is made of
  static constexpr int kWaiting = 1;  // of these

  // How many rows to multiply at best where so many are wanted.
  static constexpr int window(int rows) { return rows; }

  // Takes a weight's span; product_avx2.h has use for it.
  explicit Product(int32_t) {}

  // Whether a panel of so many bytes is asked for ahead, since it does not stay in the first cache.
  static bool fetches(int64_t panel_bytes) { return panel_bytes > kFirstCachePanel; }

  // The sums of `blocks` blocks, at most a tile's columns, for `rows` <= kRows rows. `beside` is work on vectors that can be
  // done in between: it is called `parts` times, with the number of parts, to do one of them.
  template <class Beside>
  void multiply(
      int rows, int blocks, Codes a, Blocks w, const int32_t* offset, Tile<kRows>& tile, const Beside& beside) {
    beside(1);
    for (int block = 0; block < blocks; block += L::kVectors) {
      const int vectors = blocks - block < L::kVectors ? blocks - block : L::kVectors;
      const Blocks part = {w.data + block * w.block_bytes, w.block_bytes};
      int32_t(*to)[kPanel] = reinterpret_cast<int32_t(*)[kPanel]>(&tile.sum[0][16 * block]);
      multiply_rows<L, L::kRows>(rows, vectors, a, part, offset + 16 * block, to);
    }
  }
};

}  // namespace mptqc
