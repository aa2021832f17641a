// Linear: an integer product on the tensor cores; scale, bias, activation, residual and quantizer on the sums before
// they leave the multiprocessor.
//
// A block makes one tile of outputs. Inputs and weight stream through shared memory in stages of 64 inputs, copied in
// the background; each warp multiplies its part of the tile.
#include "../cpu/arguments.h"
#include "linear_stage.h"

namespace mptqc {
namespace {

struct LinearParameters {
  mptqc_linear a;
  DeviceOutput output;
};

template <class T, int kUnit>
struct LinearBlock {
  const mptqc_linear& a;
  const DeviceOutput& output;
  const int64_t first_row, first_column;
  uint8_t* const stages;

  // sums[t][j][p][2 * n + r] of lane 4g + q: row 8t + 2q + r, column 32j + 4g + 2h + n, where h = p, or 1 - p if g is odd.
  using Sums = int32_t[T::kRowTiles][T::kSpans][2][4];

  // Adds the products of one stage. The weight is the left operand, its columns are rows of the product: so that what a
  // lane reads of it lies in registers as the product wants it. `left` and `right` are where the lane's first codes lie;
  // the others lie a constant further, but that the second step's inputs have the other half of their chunks.
  MPTQC_DEVICE static void multiply(Sums& sums, const uint8_t* stage, int left, int right) {
    MPTQC_UNROLL
    for (int step = 0; step < kDepth / kStep; ++step) {
      uint32_t weight[T::kSpans][2][4], input[T::kRowTiles / 2][4];
      MPTQC_UNROLL
      for (int i = 0; i < T::kRowTiles / 2; ++i) {
        load_matrices(input[i], stage + (left ^ step * 2 * kChunk) + i * 16 * kDepth);
      }
      MPTQC_UNROLL
      for (int i = 0; i < T::kSpans * 2 * 2; ++i) {
        const int j = i / 4, p = i / 2 % 2, half = i % 2;
        const int chunks = (8 * step + 4 * half) * (T::kColumns / 4) + j * (kSpan / 4);
        const auto words = *reinterpret_cast<const Words2*>(stage + (right ^ p * kChunk / 2) + chunks * kChunk);
        weight[j][p][2 * half] = words.word[0];
        weight[j][p][2 * half + 1] = words.word[1];
      }
      MPTQC_UNROLL
      for (int i = 0; i < T::kRowTiles * T::kSpans * 2; ++i) {
        const int p = i % 2, j = i / 2 % T::kSpans, t = i / 2 / T::kSpans;
        const uint32_t* const codes = input[t / 2] + t % 2 * 2;
        multiply_add<true>(sums[t][j][p], weight[j][p], codes[0], codes[1]);
      }
    }
  }

  MPTQC_DEVICE int64_t target_row(int64_t row) const {
    if (a.table_size == 0) return row;
    return row - row % a.table_size + a.table[row % a.table_size];
  }

  // Where the sums of columns 4 * chunk .. + 3 of a row of the warp's tile lie, in chunks: as lanes write half chunks of
  // every other row, and read whole ones of one row or two, all banks are hit once.
  MPTQC_DEVICE static int sum_chunk(int row, int chunk) {
    return row * (T::kWarpColumns / 4) + (chunk ^ spread_bits(row >> 1 & 3) ^ (row & 1) ^ (chunk >> 3 & 1));
  }

  // Puts the sums into the warp's shared memory, row by row: from there a short loop makes outputs of them, where code
  // for every register of sums would be longer than any instruction cache.
  MPTQC_DEVICE static void spread(const Sums& sums, uint8_t* tile, int lane) {
    MPTQC_UNROLL
    for (int i = 0; i < T::kRowTiles * 2 * T::kSpans; ++i) {
      const int j = i % T::kSpans, r = i / T::kSpans % 2, t = i / T::kSpans / 2;
      const int row = 8 * t + 2 * (lane % 4) + r, quad = lane / 4;
      uint8_t* const chunk = tile + sum_chunk(row, kSpan / 4 * j + quad) * kChunk;
      MPTQC_UNROLL
      for (int p = 0; p < 2; ++p) {
        const auto& s = sums[t][j][p];
        *reinterpret_cast<Ints2*>(chunk + (p ^ (quad & 1)) * (kChunk / 2)) = {{s[r], s[2 + r]}};
      }
    }
  }

  // What the sums of eight columns need to become outputs.
  struct Columns {
    float scale[kLaneColumns], bias[kLaneColumns], multiplier[kLaneColumns];
    int32_t offset[kLaneColumns];

    MPTQC_DEVICE Columns(const mptqc_linear& a, int64_t column) {
      MPTQC_UNROLL
      for (int i = 0; i < kLaneColumns; i += 4) {
        const auto scales = *reinterpret_cast<const Floats4*>(a.scale + column + i);
        const auto biases = *reinterpret_cast<const Floats4*>(a.bias + column + i);
        const auto offsets = *reinterpret_cast<const Ints4*>(a.offset + column + i);
        Floats4 multipliers = {{1, 1, 1, 1}};
        if (a.multiplier != nullptr) multipliers = *reinterpret_cast<const Floats4*>(a.multiplier + column + i);
        MPTQC_UNROLL
        for (int k = 0; k < 4; ++k) {
          scale[i + k] = scales.value[k];
          bias[i + k] = biases.value[k];
          multiplier[i + k] = multipliers.value[k];
          offset[i + k] = offsets.value[k];
        }
      }
    }
  };

  // Makes outputs of the warp's sums: a lane has eight columns of every few rows.
  MPTQC_DEVICE void finish(const uint8_t* tile, int64_t warp_row, int64_t warp_column, int lane) const {
    constexpr int across = T::kWarpColumns / kLaneColumns, down = kWarp / across;
    const int eight = lane % across;
    const int64_t column = first_column + warp_column + kLaneColumns * eight, count = a.outputs - column;
    if (count <= 0) return;
    const Columns columns(a, column);
    MPTQC_UNROLL_TWICE
    for (int row = lane / across; row < T::kWarpRows; row += down) {
      const int64_t from = first_row + warp_row + row;
      if (from >= a.rows) continue;
      float y[kLaneColumns];
      MPTQC_UNROLL
      for (int half = 0; half < 2; ++half) {
        const auto sums = *reinterpret_cast<const Ints4*>(tile + sum_chunk(row, 2 * eight + half) * kChunk);
        MPTQC_UNROLL
        for (int k = 0; k < 4; ++k) {
          const int c = 4 * half + k;
          y[c] = static_cast<float>(sums.value[k] + columns.offset[c]) * columns.scale[c] + columns.bias[c];
        }
      }
      if (a.activation != MPTQC_NO_ACTIVATION) {
        MPTQC_UNROLL
        for (int c = 0; c < kLaneColumns; ++c) y[c] = activated(a.activation, y[c]);
      }
      if (a.multiplier != nullptr) {
        MPTQC_UNROLL
        for (int c = 0; c < kLaneColumns; ++c) y[c] *= columns.multiplier[c];
      }
      const int64_t index = target_row(from) * a.outputs + column;
      if (a.residual != nullptr) add_residual(y, index, count);
      write_eight(output, index, y, count, a.activation == MPTQC_NO_ACTIVATION);
    }
  }

  MPTQC_DEVICE void add_residual(float (&y)[kLaneColumns], int64_t index, int64_t count) const {
    if (output.type == MPTQC_FLOAT16) return add_eight(y, reinterpret_cast<const Half*>(a.residual) + index, count);
    add_eight(y, a.residual + index, count);
  }

  MPTQC_DEVICE void run() const {
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    const int warp_row = warp / T::kWarpsAcross * T::kWarpRows;
    const int warp_column = warp % T::kWarpsAcross * T::kWarpColumns;
    const int quad = lane / 4;
    const int left = left_chunk(warp_row + lane / 16 * 8 + lane % 8, lane / 8 % 2) * kChunk;
    const int right = T::kLeftBytes + weight_chunk<T>(lane % 4, warp_column / 4 + quad) * kChunk + quad % 2 * kChunk / 2;
    const int depths = static_cast<int>((a.inputs + kDepth - 1) / kDepth);
    const Copier<T, kUnit> copier(a, first_row, first_column);
    Sums sums = {};
    MPTQC_UNROLL
    for (int stage = 0; stage < T::kStages - 1; ++stage) {
      if (stage < depths) copier.load(kDepth * stage, stages + stage * T::kStageBytes);
      commit_copies();
    }
    for (int depth = 0; depth < depths; ++depth) {
      wait_copies<T::kStages - 2>();
      sync_threads();  // this stage is there, and all warps are done with the one that the next copies overwrite
      const int next = depth + T::kStages - 1;
      if (next < depths) copier.load(kDepth * next, stages + next % T::kStages * T::kStageBytes);
      commit_copies();
      multiply(sums, stages + depth % T::kStages * T::kStageBytes, left, right);
    }
    sync_threads();  // all warps are done with the stages
    uint8_t* const tile = stages + warp * T::kWarpSumBytes;
    spread(sums, tile, lane);
    sync_warp();
    finish(tile, warp_row, warp_column, lane);
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
mptqc_status start(const mptqc_linear& a, mptqc_cuda_float type, void* stream) {
  const LinearParameters parameters = {a, {Output(a.quantizer, a.output), type}};
  return launch(linear<T, kUnit>, tiles<T>(a), T::kThreads, size_t{T::kStages} * T::kStageBytes, stream, parameters);
}

bool multiple_of(const mptqc_linear& a, int bytes) {
  return a.inputs % bytes == 0 && reinterpret_cast<uintptr_t>(a.input) % bytes == 0;
}

}  // namespace
}  // namespace mptqc

using namespace mptqc;

mptqc_status mptqc_cuda_linear(const mptqc_linear* arguments, mptqc_cuda_float type, mptqc_cuda_tile tile, void* stream) {
  const mptqc_linear& a = *arguments;
  const auto is_vector = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kChunk == 0; };
  if (!is_sound(a) || a.rotary.cosine != nullptr || !is_vector(a.weight) || !is_vector(a.offset) || !is_vector(a.scale) || !is_vector(a.bias) ||
      !is_vector(a.multiplier)) {
    return MPTQC_INVALID_ARGUMENT;
  }
  const bool fills = tile == MPTQC_TILE_AUTO && tiles<LargeTile>(a) >= multiprocessors();
  if (!multiple_of(a, 4)) return start<SmallTile, 1>(a, type, stream);
  if (!multiple_of(a, 16)) return start<SmallTile, 4>(a, type, stream);
  if (fills || tile == MPTQC_TILE_128X128) return start<LargeTile, 16>(a, type, stream);
  return start<SmallTile, 16>(a, type, stream);
}
