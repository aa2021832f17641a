// A Linear on devices whose four warps multiply as a group, straight from shared memory: Hopper's. Inputs and weight come to
// shared memory in boxes, which one thread asks for some stages ahead.
//
// The weight is the left operand, from registers: a lane reads whole chunks of it, 4 inputs of 4 outputs, and gives two
// outputs to each of two products. So it ends up with 4 consecutive outputs of every row that is its own, and writes them
// from registers.
//
// The groups of a block share a tile of 128 outputs in one of two ways. Where there are many rows, each has rows of its own, and
// what the second cache must bring is what they share: the weight. A block makes tile after tile then, and the boxes of the
// next one come while outputs are made of this one. Where there are few rows, groups share the inputs out among them, and their
// sums meet in shared memory.
#pragma once

#include "hopper.h"
#include "linear_output.h"

namespace mptqc {
namespace {

constexpr int kGroup = 4 * kWarp;  // threads

template <int kRows_, int kGroups_, int kSlices_, int kDepth_, int kStages_, int kBlocks_, bool kHasProducers_>
struct GroupTile {
  static constexpr int kGroupRows = kRows_, kColumns = 128;
  static constexpr int kGroups = kGroups_;  // that have rows of their own
  static constexpr int kSlices = kSlices_;  // groups that share the inputs out
  static constexpr int kDepth = kDepth_;    // inputs of a stage: 64 or 128
  static constexpr int kStages = kStages_;  // of each slice
  static constexpr int kBlocks = kBlocks_;  // that share a multiprocessor
  static constexpr int kRows = kGroups * kGroupRows;
  // Whether a warp of each slice asks for its boxes and does nothing else: asking takes some hundred cycles, which a group that
  // multiplies would lose.
  static constexpr bool kHasProducers = kHasProducers_;
  static constexpr int kConsumers = kGroups * kSlices * kGroup, kProducers = kSlices == 1 ? kGroup : kSlices * kWarp;
  static constexpr int kThreads = kConsumers + kHasProducers * kProducers;
  static constexpr int kBoxes = kRows > 256 ? 2 : 1, kBoxRows = kRows / kBoxes;  // of inputs: a box has at most 256 rows
  static constexpr int kGroupBytes = kGroupRows * kDepth, kInputBytes = kGroups * kGroupBytes;
  static constexpr int kStageBytes = kInputBytes + kColumns * kDepth;
  static constexpr int kTiles = kGroupRows / 8, kOwnTiles = kTiles / kSlices;  // of 8 rows: in all; a group's to finish
  static constexpr int kSharedBytes = kSlices * kStages * (kStageBytes + 2 * static_cast<int>(sizeof(Barrier)));
  static_assert(kGroups == 1 || kSlices == 1, "groups share either rows or inputs out");
  static_assert(kBoxRows * kBoxes == kRows && kBoxRows * kDepth % 1024 == 0, "boxes lie as products read them");
  static_assert(kTiles % kSlices == 0, "slices share the rows of their outputs out evenly");
  static_assert(kSlices == 1 || kRows * kColumns * 4 <= kStages * kStageBytes, "sums take the stages' place");
};

struct GroupParameters {
  LinearParameters linear;
  BoxMap inputs, weight;
  int across, tiles;  // tiles of a row's outputs, and of all
  int blocks;
};

// Where the chunk of 4 inputs, group `group` of the stage, and outputs 4 * quad .. + 3 lies, in chunks: as a box has them.
template <int kDepth>
MPTQC_DEVICE int boxed_chunk(int group, int quad) {
  return (quad / 4 * (kDepth / 4) + group) * 4 + (quad % 4 ^ (group >> 1 & 3));
}

// Of the 8 quads of a warp, that whose outputs lane 4g + q has: neighbours are two apart, so that the lanes which read
// together hit all banks once.
MPTQC_DEVICE int quad_of(int g) { return g / 4 * 4 + (g & 1) * 2 + (g >> 1 & 1); }

// Stages of all tiles that a block makes are counted through: step n is in slot n % kStages.
template <class T>
struct GroupBlock {
  static constexpr int kSteps = T::kDepth / kStep;

  const GroupParameters& parameters;
  uint8_t* const stages;  // of this slice
  Barrier* const full;    // of each slot: its codes are there
  const int first_tile, tiles_apart;
  const int group, slice, thread;  // which rows, which part of the inputs, of 128
  const int first_depth, depths;   // the slice's part of the inputs, in stages

  // sums[i][t][2 * n + r] of lane 4g + q: row 8t + 2q + r, column 4 * quad_of(g) + 2i + n of the warp's 32.
  template <int kTiles>
  using Sums = int32_t[2][kTiles][4];

  MPTQC_DEVICE const LinearParameters& p() const { return parameters.linear; }
  MPTQC_DEVICE Barrier* empty() const { return full + T::kStages; }  // of each slot: all groups are done with its codes
  // Whether this thread asks for the slice's boxes.
  MPTQC_DEVICE bool leads() const { return thread == (T::kHasProducers ? kGroup : 0) && group == 0; }
  MPTQC_DEVICE uint8_t* slot_of(int step) const { return stages + step % T::kStages * T::kStageBytes; }

  // A step: its number, and what it multiplies.
  struct Step {
    int number, tile, depth;
  };

  MPTQC_DEVICE void advance(Step& step) const {
    ++step.number;
    if (++step.depth < depths) return;
    step.depth = 0;
    step.tile += tiles_apart;
  }

  MPTQC_DEVICE void copy_weight(const Step& step) const {
    copy_box(slot_of(step.number) + T::kInputBytes, parameters.weight, 0, (first_depth + step.depth) * (T::kDepth / 4),
             step.tile % parameters.across * (T::kColumns / 16), full + step.number % T::kStages);
  }
  MPTQC_DEVICE void copy_inputs(const Step& step) const {
    const int row = step.tile / parameters.across * T::kRows;
    MPTQC_UNROLL
    for (int i = 0; i < T::kBoxes; ++i) {
      copy_box(slot_of(step.number) + i * T::kBoxRows * T::kDepth, parameters.inputs, (first_depth + step.depth) * T::kDepth,
               row + i * T::kBoxRows, 0, full + step.number % T::kStages);
    }
  }

  // The first steps; returns the one after them. The weight, which is constant, need not wait.
  MPTQC_DEVICE Step begin() const {
    if (leads()) {
      for (int i = 0; i < T::kStages; ++i) {
        begin_barrier(full + i, 1);
        begin_barrier(empty() + i, T::kGroups);
      }
    }
    sync_threads();
    const Step first = {0, depths > 0 ? first_tile : parameters.tiles, 0};
    Step step = first;
    if (leads()) {
      for (; step.number < T::kStages && step.tile < parameters.tiles; advance(step)) {
        expect_bytes(full + step.number, T::kStageBytes);
        copy_weight(step);
      }
    }
    wait_for_inputs();
    if constexpr (T::kSlices > 1) let_next_begin();  // there is room: these tiles do not fill the device
    if (leads()) {
      for (Step each = first; each.number < step.number; advance(each)) copy_inputs(each);
    }
    return step;
  }

  // Adds the products of a step. Other groups of the multiprocessor multiply while this one waits.
  MPTQC_DEVICE void multiply(Sums<T::kTiles>& sums, int step, int weight) const {
    const uint8_t *const slot = slot_of(step), *const rows = slot + group * T::kGroupBytes;
    uint32_t left[kSteps][2][4];
    wait_for_phase(full + step % T::kStages, step / T::kStages);
    MPTQC_UNROLL
    for (int i = 0; i < kSteps * 2; ++i) {  // groups of inputs 8 * step + q and 4 more, which lie alike
      const auto words = *reinterpret_cast<const Words4*>(slot + (weight ^ i % 2 * 2 * kChunk) + i * 4 * kBlockBytes);
      MPTQC_UNROLL
      for (int k = 0; k < 4; ++k) left[i / 2][k / 2][2 * (i % 2) + k % 2] = words.word[k];
    }
    begin_products();
    MPTQC_UNROLL
    for (int i = 0; i < kSteps * 2; ++i) multiply_rows<T::kDepth>(sums[i % 2], left[i / 2][i % 2], rows + i / 2 * kStep);
    commit_products();
    wait_products<0>();
  }

  // This group is done with `step`. The leading thread, if it is one of them, gives slots that all groups are done with to the steps
  // to come; it looks at those of steps up to `last`.
  MPTQC_DEVICE void release(int step, int last, Step& next) const {
    sync_group<T::kThreads / kGroup>(group + slice);
    if (thread > 0) return;
    arrive(empty() + step % T::kStages);
    if (leads()) refill(last, next);
  }

  MPTQC_DEVICE void refill(int last, Step& next) const {
    for (; next.number - T::kStages <= last && next.tile < parameters.tiles; advance(next)) {
      const int slot = next.number % T::kStages;
      wait_for_phase(empty() + slot, next.number / T::kStages - 1);
      expect_bytes(full + slot, T::kStageBytes);
      copy_weight(next);
      copy_inputs(next);
    }
  }

  MPTQC_DEVICE void run() const {
    Step next = begin();
    if (thread < kGroup) {
      if constexpr (T::kHasProducers && T::kGroups == 3) take_registers<160>();
      consume(next);
    } else {
      if constexpr (T::kHasProducers && T::kGroups == 3) leave_registers<24>();
      if (leads()) refill(INT32_MAX, next);
    }
  }

  MPTQC_DEVICE void consume(Step next) const {
    const int warp = thread / kWarp, lane = thread % kWarp, quad = warp * 8 + quad_of(lane / 4);
    const int weight = T::kInputBytes + boxed_chunk<T::kDepth>(lane % 4, quad) * kChunk;
    int step = 0;
    MPTQC_ROLL
    for (int tile = first_tile; tile < parameters.tiles; tile += tiles_apart) {
      const int row = tile / parameters.across * T::kRows + group * T::kGroupRows;
      const int column = tile % parameters.across * T::kColumns + 4 * quad;
      const bool inside = column < p().a.outputs;
      if (p().a.residual != nullptr && slice == 0 && thread < T::kGroupRows) fetch_residual(row + thread, column - 4 * quad);
      const Ints4 offset = inside && slice == 0 ? *reinterpret_cast<const Ints4*>(p().a.offset + column) : Ints4{};
      Sums<T::kTiles> sums;
      MPTQC_UNROLL
      for (int i = 0; i < 2 * T::kTiles * 4; ++i) {
        sums[i / 4 % 2][i / 8][i % 4] = offset.value[2 * (i / 4 % 2) + i % 4 / 2];
      }
      for (int depth = 0; depth < depths; ++depth, ++step) {
        multiply(sums, step, weight);
        const bool waits = T::kGroups == 1 || depth + 1 == depths;  // for other groups, where there is time
        release(step, waits ? step : step - 1, next);
      }
      hold(sums[0]);
      hold(sums[1]);
      if (T::kSlices == 1 && tile + tiles_apart >= parameters.tiles) let_next_begin();
      if constexpr (T::kSlices == 1) {
        if (inside) finish<T::kTiles>(sums, column, row, lane);
      } else {
        Sums<T::kOwnTiles> own;
        join(own, sums);
        if (inside) finish<T::kOwnTiles>(own, column, row + 8 * slice * T::kOwnTiles, lane);
      }
    }
  }

  // The sums of all slices, of the rows whose outputs this one makes. A block of slices makes one tile, so that the stages are
  // free then.
  MPTQC_DEVICE void join(Sums<T::kOwnTiles>& own, const Sums<T::kTiles>& sums) const {
    constexpr int slice_bytes = T::kStages * T::kStageBytes, vectors_apart = kGroup * kChunk;
    uint8_t* const mine = stages + thread * kChunk;
    MPTQC_UNROLL
    for (int i = 0; i < 2 * T::kTiles; ++i) {
      const auto& s = sums[i % 2][i / 2];
      *reinterpret_cast<Ints4*>(mine + i * vectors_apart) = {{s[0], s[1], s[2], s[3]}};
    }
    sync_all<T::kConsumers>();
    const uint8_t* from = mine - slice * slice_bytes + slice * 2 * T::kOwnTiles * vectors_apart;
    MPTQC_UNROLL
    for (int i = 0; i < 2 * T::kOwnTiles; ++i) {
      Ints4 total = {};
      MPTQC_UNROLL
      for (int each = 0; each < T::kSlices; ++each) {
        const auto part = *reinterpret_cast<const Ints4*>(from + each * slice_bytes + i * vectors_apart);
        MPTQC_UNROLL
        for (int k = 0; k < 4; ++k) total.value[k] += part.value[k];
      }
      MPTQC_UNROLL
      for (int k = 0; k < 4; ++k) own[i % 2][i / 2][k] = total.value[k];
    }
  }

  // Brings what a row of the tile will add to the second cache.
  MPTQC_DEVICE void fetch_residual(int row, int column) const {
    if (row >= p().a.rows) return;
    constexpr int line = 128;
    const int size = p().type == MPTQC_FLOAT16 ? 2 : 4, left = static_cast<int>(p().a.outputs) - column;
    const int64_t index = target_row(p().a, row) * p().a.outputs + column;
    const char* const from = reinterpret_cast<const char*>(p().a.residual) + index * size;
    for (int at = 0; at < size * (left < T::kColumns ? left : T::kColumns); at += line) fetch(from + at);
  }

  // Makes outputs of the sums, some rows a pass: code for all of them would be longer than the instruction cache is.
  template <int kTiles>
  MPTQC_DEVICE void finish(Sums<kTiles>& sums, int column, int row, int lane) const {
    constexpr int pass_tiles = kTiles < 2 ? kTiles : 2, passes = kTiles / pass_tiles;
    static_assert(passes * pass_tiles == kTiles, "passes are alike");
    const LinearColumns<4> columns(p().a, column);
    MPTQC_ROLL
    for (int pass = 0; pass < passes; ++pass) {
      int32_t own[pass_tiles * 2][4];
      MPTQC_UNROLL
      for (int i = 0; i < pass_tiles * 8; ++i) own[i / 4][i % 4] = sums[i % 4 / 2][i / 8][i % 2 * 2 + i / 4 % 2];
      finish_rows(p(), columns, own, row + 8 * pass * pass_tiles + lane % 4 * 2, RowsOfLane(), column);
      MPTQC_UNROLL
      for (int i = 0; i < 2 * (kTiles - pass_tiles) * 4; ++i) {
        sums[i / 4 % 2][i / 8][i % 4] = sums[i / 4 % 2][i / 8 + pass_tiles][i % 4];
      }
    }
  }

  // Row i of a pass, from a lane's first.
  struct RowsOfLane {
    MPTQC_DEVICE constexpr int operator()(int i) const { return i / 2 * 8 + i % 2; }
  };
};

}  // namespace
}  // namespace mptqc
