// Linear: an integer product on the tensor cores; scale, bias, activation, residual and quantizer on the sums while they
// are in registers.
//
// A block makes one tile of outputs. Inputs and weight stream through shared memory in stages of 64 inputs, copied in
// the background; each warp multiplies its part of the tile.
#include "../cpu/arguments.h"
#include "tiles.h"

namespace mptqc {
namespace {

constexpr int kDepth = 64;               // inputs of a stage
constexpr int kLeftChunks = kDepth / kChunk;

template <int kRows_, int kColumns_, int kWarpRows_, int kWarpColumns_, int kStages_, int kBlocks_>
struct LinearTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;                  // of the block
  static constexpr int kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_;  // of one warp
  static constexpr int kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // that share a multiprocessor
  static constexpr int kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kThreads = kRows / kWarpRows * kWarpsAcross * kWarp;
  static constexpr int kLeftBytes = kRows * kDepth, kStageBytes = kLeftBytes + kColumns * kDepth;
  static constexpr int kProductRows = kWarpRows / 16, kSpans = kWarpColumns / kSpan;
};
using LargeTile = LinearTile<128, 128, 64, 64, 4, 2>;
using SmallTile = LinearTile<64, 64, 32, 32, 4, 4>;

struct LinearParameters {
  mptqc_linear a;
  Output output;
};

// Where codes 16 * chunk .. + 15 of a row of inputs lie, in chunks: the 8 rows of a matrix hit all banks once.
MPTQC_DEVICE int left_chunk(int row, int chunk) { return row * kLeftChunks + (chunk ^ ((row >> 1) & 3)); }

template <class T, int kUnit>
struct LinearBlock {
  const mptqc_linear& a;
  const Output& output;
  const int64_t first_row, first_column;
  uint8_t* const stages;

  // Copies inputs `depth` .. + 63 of the block's rows and columns.
  MPTQC_DEVICE void load(int64_t depth, uint8_t* stage) const {
    MPTQC_UNROLL
    for (int i = thread_index(); i < T::kRows * kLeftChunks; i += T::kThreads) {
      const int row = i / kLeftChunks, chunk = i % kLeftChunks;
      const bool valid = first_row + row < a.rows;
      const uint8_t* from = a.input + (valid ? first_row + row : 0) * a.inputs;
      copy_codes(stage + left_chunk(row, chunk) * kChunk, from, depth + chunk * kChunk, a.inputs, valid, kUnit);
    }
    const int64_t groups = (a.inputs + 3) / 4, blocks = (a.outputs + 15) / 16;
    uint8_t* const right = stage + T::kLeftBytes;
    constexpr int stage_groups = kDepth / 4, block_chunks = 4 * stage_groups;
    MPTQC_UNROLL
    for (int i = thread_index(); i < T::kColumns / 16 * block_chunks; i += T::kThreads) {
      const int block = i / block_chunks, group = i % block_chunks / 4, quad = i % 4;
      const int64_t weight_block = first_column / 16 + block, weight_group = depth / 4 + group;
      const bool valid = weight_block < blocks && weight_group < groups;
      const int64_t at = valid ? (weight_block * groups + weight_group) * 64 + quad * kChunk : 0;
      copy_async<16>(right + right_chunk<T::kColumns>(group, 4 * block + quad) * kChunk, a.weight + at, valid);
    }
  }

  using Sums = int32_t[T::kProductRows][T::kSpans][kSpanProducts][4];

  // Adds the products of one stage.
  MPTQC_DEVICE static void multiply(Sums& sums, const uint8_t* stage, int warp_row, int warp_column, int lane) {
    MPTQC_UNROLL
    for (int step = 0; step < kDepth / kStep; ++step) {
      uint32_t left[T::kProductRows][4];
      Words4 right[T::kSpans][2];
      MPTQC_UNROLL
      for (int i = 0; i < T::kProductRows; ++i) {
        const int row = warp_row + 16 * i + lane % 16, chunk = 2 * step + lane / 16;
        load_matrices(left[i], stage + left_chunk(row, chunk) * kChunk);
      }
      MPTQC_UNROLL
      for (int j = 0; j < T::kSpans; ++j) {
        load_right<T::kColumns>(right[j], stage + T::kLeftBytes, step, warp_column / kSpan + j, lane);
      }
      MPTQC_UNROLL
      for (int j = 0; j < T::kSpans; ++j)
        MPTQC_UNROLL
        for (int p = 0; p < kSpanProducts; ++p)
          MPTQC_UNROLL
          for (int i = 0; i < T::kProductRows; ++i)
            multiply_add<true>(sums[i][j][p], left[i], right[j][0].word[p], right[j][1].word[p]);
    }
  }

  MPTQC_DEVICE int64_t target_row(int64_t row) const {
    if (a.table_size == 0) return row;
    return row - row % a.table_size + a.table[row % a.table_size];
  }

  // Columns `column` .. + 7 of the warp's rows.
  MPTQC_DEVICE void finish(const Sums& sums, int j, int64_t row, int64_t column) const {
    float scale[kLaneColumns], bias[kLaneColumns], multiplier[kLaneColumns];
    int32_t offset[kLaneColumns];
    MPTQC_UNROLL
    for (int half = 0; half < 2; ++half) {
      const auto scales = reinterpret_cast<const Floats4*>(a.scale + column)[half];
      const auto biases = reinterpret_cast<const Floats4*>(a.bias + column)[half];
      const auto offsets = reinterpret_cast<const Ints4*>(a.offset + column)[half];
      const auto multipliers = a.multiplier == nullptr
                                   ? Floats4{{1, 1, 1, 1}}
                                   : reinterpret_cast<const Floats4*>(a.multiplier + column)[half];
      MPTQC_UNROLL
      for (int i = 0; i < 4; ++i) {
        scale[4 * half + i] = scales.value[i];
        bias[4 * half + i] = biases.value[i];
        offset[4 * half + i] = offsets.value[i];
        multiplier[4 * half + i] = multipliers.value[i];
      }
    }
    MPTQC_UNROLL
    for (int i = 0; i < 2 * T::kProductRows; ++i) {
      const int64_t from = row + 8 * i;
      if (from >= a.rows) continue;
      float y[kLaneColumns];
      MPTQC_UNROLL
      for (int c = 0; c < kLaneColumns; ++c) {
        const int32_t sum = sums[i / 2][j][c % 4][2 * (i % 2) + c / 4];
        y[c] = static_cast<float>(sum + offset[c]) * scale[c] + bias[c];
        if (a.activation == MPTQC_GELU) y[c] = gelu<Lane>(y[c]);
        y[c] *= multiplier[c];
      }
      const int64_t index = target_row(from) * a.outputs + column, count = a.outputs - column;
      if (a.residual != nullptr) add_residual(y, a.residual + index, count);
      write_eight(output, index, y, count);
    }
  }

  MPTQC_DEVICE static void add_residual(float (&y)[kLaneColumns], const float* residual, int64_t count) {
    if (count >= kLaneColumns && is_aligned(residual, 16)) {
      MPTQC_UNROLL
      for (int half = 0; half < 2; ++half) {
        const auto added = reinterpret_cast<const Floats4*>(residual)[half];
        MPTQC_UNROLL
        for (int i = 0; i < 4; ++i) y[4 * half + i] += added.value[i];
      }
      return;
    }
    MPTQC_UNROLL
    for (int i = 0; i < kLaneColumns; ++i)
      if (i < count) y[i] += residual[i];
  }

  MPTQC_DEVICE void run() const {
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    const int warp_row = warp / T::kWarpsAcross * T::kWarpRows;
    const int warp_column = warp % T::kWarpsAcross * T::kWarpColumns;
    const int64_t depths = (a.inputs + kDepth - 1) / kDepth;
    Sums sums = {};
    MPTQC_UNROLL
    for (int stage = 0; stage < T::kStages - 1; ++stage) {
      if (stage < depths) load(int64_t{kDepth} * stage, stages + stage * T::kStageBytes);
      commit_copies();
    }
    for (int64_t depth = 0; depth < depths; ++depth) {
      wait_copies<T::kStages - 2>();
      sync_threads();  // this stage is there, and all warps are done with the one that the next copies overwrite
      const int64_t next = depth + T::kStages - 1;
      if (next < depths) load(kDepth * next, stages + next % T::kStages * T::kStageBytes);
      commit_copies();
      multiply(sums, stages + depth % T::kStages * T::kStageBytes, warp_row, warp_column, lane);
    }
    MPTQC_UNROLL
    for (int j = 0; j < T::kSpans; ++j) {
      const int64_t column = first_column + warp_column + kSpan * j + kLaneColumns * (lane % 4);
      if (column < a.outputs) finish(sums, j, first_row + warp_row + lane / 4, column);
    }
  }
};

// Blocks go along a row of tiles first, so that those which run together share inputs.
template <class T, int kUnit>
MPTQC_KERNEL(T::kThreads, T::kBlocks)
linear(const LinearParameters parameters) {
  const int64_t across = (parameters.a.outputs + T::kColumns - 1) / T::kColumns;
  const int64_t row = block_index() / across * T::kRows, column = block_index() % across * T::kColumns;
  LinearBlock<T, kUnit>{parameters.a, parameters.output, row, column, shared_memory()}.run();
}

template <class T>
int64_t tiles(const mptqc_linear& a) {
  return ceil_divide(a.rows, T::kRows) * ceil_divide(a.outputs, T::kColumns);
}

template <class T, int kUnit>
mptqc_status start(const mptqc_linear& a, void* stream) {
  const LinearParameters parameters = {a, Output(a.quantizer, a.output)};
  return launch(linear<T, kUnit>, tiles<T>(a), T::kThreads, size_t{T::kStages} * T::kStageBytes, stream, parameters);
}

bool multiple_of(const mptqc_linear& a, int bytes) {
  return a.inputs % bytes == 0 && reinterpret_cast<uintptr_t>(a.input) % bytes == 0;
}

}  // namespace
}  // namespace mptqc

using namespace mptqc;

mptqc_status mptqc_cuda_linear(const mptqc_linear* arguments, mptqc_cuda_tile tile, void* stream) {
  const mptqc_linear& a = *arguments;
  const auto is_vector = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kChunk == 0; };
  if (!is_sound(a) || !is_vector(a.weight) || !is_vector(a.offset) || !is_vector(a.scale) || !is_vector(a.bias) ||
      !is_vector(a.multiplier)) {
    return MPTQC_INVALID_ARGUMENT;
  }
  const bool fills = tile == MPTQC_TILE_AUTO && tiles<LargeTile>(a) >= multiprocessors();
  if (!multiple_of(a, 4)) return start<SmallTile, 1>(a, stream);
  if (!multiple_of(a, 16)) return start<SmallTile, 4>(a, stream);
  if (fills || tile == MPTQC_TILE_128X128) return start<LargeTile, 16>(a, stream);
  return start<SmallTile, 16>(a, stream);
}
