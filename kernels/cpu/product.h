// The integer product that Linear and attention share: rows of uint8 codes times blocks of int8.
#pragma once

#include <cstring>

#include "sizes.h"

namespace mptqc {

// A tile of sums: up to kMostRows rows of one panel.
struct alignas(64) Tile {
  int32_t sum[kMostRows][kPanel];
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

// The last 4 codes of a row or fewer, zeros behind them.
template <class L>
typename L::Inputs last_inputs(const uint8_t* codes, int64_t count) {
  uint8_t padded[4] = {};
  std::memcpy(padded, codes, count);
  return L::spread(padded);
}

// tile[r][c] = offset[c] + sum_k a[r][k] * w[k][c] for Rows rows and Vectors blocks of 16 columns.
template <class L, int Rows, int Vectors>
void multiply_tile(Codes a, Blocks w, const int32_t* offset, int32_t (*tile)[kPanel]) {
  typename L::I sum[Rows][Vectors];
  for (int v = 0; v < Vectors; ++v) {
    const typename L::I start = L::load(offset + 16 * v);
    for (int r = 0; r < Rows; ++r) sum[r][v] = start;
  }
  const int64_t whole = a.width / kBlockInputs, rest = a.width % kBlockInputs;
  const int8_t* block = w.data;
  for (int64_t k = 0; k < whole; ++k, block += kBlockBytes) {
    typename L::Weights weights[Vectors];
    for (int v = 0; v < Vectors; ++v) weights[v] = L::weights(block + v * w.block_bytes);
    for (int r = 0; r < Rows; ++r) {
      const typename L::Inputs inputs = L::spread(a.data + r * a.stride + k * kBlockInputs);
      for (int v = 0; v < Vectors; ++v) sum[r][v] = L::dot(sum[r][v], inputs, weights[v]);
    }
  }
  if (rest > 0) {
    for (int r = 0; r < Rows; ++r) {
      const typename L::Inputs inputs = last_inputs<L>(a.data + r * a.stride + whole * kBlockInputs, rest);
      for (int v = 0; v < Vectors; ++v)
        sum[r][v] = L::dot(sum[r][v], inputs, L::weights(block + v * w.block_bytes));
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) L::store(tile[r] + 16 * v, sum[r][v]);
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

// One panel of `blocks` <= kPanelBlocks blocks, for `rows` <= L::kRows rows.
template <class L>
void multiply(int rows, int blocks, Codes a, Blocks w, const int32_t* offset, Tile& tile) {
  for (int block = 0; block < blocks; block += L::kVectors) {
    const int vectors = blocks - block < L::kVectors ? blocks - block : L::kVectors;
    const Blocks part = {w.data + block * w.block_bytes, w.block_bytes};
    int32_t(*to)[kPanel] = reinterpret_cast<int32_t(*)[kPanel]>(&tile.sum[0][16 * block]);
    multiply_rows<L, L::kRows>(rows, vectors, a, part, offset + 16 * block, to);
  }
}

}  // namespace mptqc
