// A stage of a Linear in shared memory: where inputs and weight lie, and how they are copied there.
#pragma once

#include "linear_output.h"

namespace mptqc {
namespace {

constexpr int kDepth = 64;               // inputs of a stage
constexpr int kLeftChunks = kDepth / kChunk;

// Copies the first stages, a group each. The weight, which is constant, need not wait.
template <class T, class C>
MPTQC_DEVICE void load_first(const C& copier, int depths, uint8_t* stages) {
  MPTQC_UNROLL
  for (int stage = 0; stage < T::kStages - 1; ++stage) {
    if (stage < depths) copier.load_weight(kDepth * stage, stages + stage * T::kStageBytes);
  }
  wait_for_inputs();
  let_next_begin();
  MPTQC_UNROLL
  for (int stage = 0; stage < T::kStages - 1; ++stage) {
    if (stage < depths) copier.load_inputs(kDepth * stage, stages + stage * T::kStageBytes);
    commit_copies();
  }
}

// Copies the stage that comes kStages - 1 after `depth`, if there is one, in place of the one before it; a group either way.
template <class T, class C>
MPTQC_DEVICE void load_next(const C& copier, int depth, int depths, uint8_t* stages) {
  const int next = depth + T::kStages - 1;
  if (next < depths) {
    uint8_t* const stage = stages + next % T::kStages * T::kStageBytes;
    copier.load_weight(kDepth * next, stage);
    copier.load_inputs(kDepth * next, stage);
  }
  commit_copies();
}

template <int kRows_, int kColumns_, int kWarpRows_, int kWarpColumns_, int kStages_, int kBlocks_>
struct LinearTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;                  // of the block
  static constexpr int kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_;  // of one warp
  static constexpr int kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // that share a multiprocessor
  static constexpr int kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kThreads = kRows / kWarpRows * kWarpsAcross * kWarp;
  static constexpr int kLeftBytes = kRows * kDepth, kStageBytes = kLeftBytes + kColumns * kDepth;
  static constexpr int kWarpSumBytes = kWarpRows * kWarpColumns * 4;
  static constexpr int kRowTiles = kWarpRows / 8, kSpans = kWarpColumns / kSpan;
};
using LargeTile = LinearTile<128, 128, 64, 64, 4, 2>;
using SmallTile = LinearTile<64, 64, 32, 32, 4, 4>;

// Where codes 16 * chunk .. + 15 of a row of inputs lie, in chunks: the 8 rows of a matrix hit all banks once.
MPTQC_DEVICE int left_chunk(int row, int chunk) { return row * kLeftChunks + (chunk ^ ((row >> 1) & 3)); }

// Where the chunk of inputs 4 * group .. + 3 and outputs 4 * quad .. + 3 of the weight lies, in chunks. Lanes read half
// chunks, the first or second by their quad's parity: the sixteen that read together hit all banks once.
MPTQC_DEVICE int spread_bits(int x) { return (x & 1) << 2 | (x >> 1 & 1); }
template <class T>
MPTQC_DEVICE int weight_chunk(int group, int quad) {
  return group * (T::kColumns / 4) + (quad ^ spread_bits(group & 3));
}

// What one thread copies of each stage: the same inputs of every few rows, and of every few blocks of the weight. All that
// does not change from stage to stage is worked out once, for the tensor cores wait for every other instruction.
template <class T, int kUnit>
struct Copier {
  static constexpr int kBlockChunks = kDepth;  // 16 columns, 16 bytes a chunk: as many as there are inputs
  static constexpr int kRowsApart = T::kThreads / kLeftChunks, kRowCopies = T::kRows / kRowsApart;
  static constexpr int kBlocksApart = T::kThreads / kBlockChunks, kBlockCopies = T::kColumns / 16 / kBlocksApart;
  static_assert(kRowsApart % 8 == 0 && kBlocksApart % 2 == 0, "copies of a thread lie alike");

  const int64_t inputs, groups;
  const uint8_t* row;     // the thread's first
  const int8_t* chunk;    // of the first stage and the thread's first block
  int column, group;      // of the first stage
  int rows, blocks;       // how many of its copies there are
  int left, right;        // where its first copies go in a stage

  MPTQC_DEVICE Copier(const mptqc_linear& a, int64_t first_row, int64_t first_column)
      : inputs(a.inputs), groups((a.inputs + 3) / 4) {
    const int thread = thread_index();
    const int own_row = thread / kLeftChunks, own_chunk = thread % kLeftChunks;
    column = kChunk * own_chunk;
    rows = count(a.rows - first_row, own_row, kRowsApart);
    row = a.input + (rows > 0 ? first_row + own_row : 0) * a.inputs;
    left = left_chunk(own_row, own_chunk) * kChunk;

    const int own_block = thread / kBlockChunks, quad = thread % 4;
    group = thread % kBlockChunks / 4;
    blocks = count((a.outputs + 15) / 16 - first_column / 16, own_block, kBlocksApart);
    const int64_t block = blocks > 0 ? first_column / 16 + own_block : 0;
    chunk = a.weight + (block * groups + (group < groups ? group : 0)) * kBlockBytes + quad * kChunk;
    right = T::kLeftBytes + weight_chunk<T>(group, 4 * own_block + quad) * kChunk;
  }

  // How many of first, first + apart, ... lie below `end`.
  MPTQC_DEVICE static int count(int64_t end, int first, int apart) {
    constexpr int64_t most = 128;  // more than a thread copies
    const int64_t found = (end - first + apart - 1) / apart;
    return end <= first ? 0 : static_cast<int>(found < most ? found : most);
  }

  // Copies inputs `depth` .. + 63 of the block's rows.
  MPTQC_DEVICE void load_inputs(int depth, uint8_t* stage) const {
    MPTQC_UNROLL
    for (int i = 0; i < kRowCopies; ++i) {
      constexpr int bytes_apart = kRowsApart * kLeftChunks * kChunk;
      const bool valid = i < rows;
      const uint8_t* from = valid ? row + i * (kRowsApart * inputs) : row;
      copy_codes(stage + left + i * bytes_apart, from, depth + column, inputs, valid, kUnit);
    }
  }

  // The weight of as many inputs.
  MPTQC_DEVICE void load_weight(int depth, uint8_t* stage) const {
    const bool inside = depth / 4 + group < groups;
    const int8_t* from = inside ? chunk + depth / 4 * kBlockBytes : chunk;
    MPTQC_UNROLL
    for (int i = 0; i < kBlockCopies; ++i) {
      const bool valid = inside && i < blocks;
      const int8_t* own = valid ? from + i * (kBlocksApart * groups * kBlockBytes) : from;
      copy_async<16>(stage + right + i * (4 * kBlocksApart * kChunk), own, valid);
    }
  }
};

}  // namespace
}  // namespace mptqc
