// Linear: an integer product on the tensor cores; scale, bias, activation, residual and quantizer on the sums before
// they leave the multiprocessor. Hopper's kernels are in linear_group.h, here is every other device's, and the choice.
//
// A block makes one tile of outputs. Inputs and weight stream through shared memory in stages of 64 inputs, copied in
// the background; each warp multiplies its part of the tile.
#include "../cpu/arguments.h"
#include "linear_group.h"
#include "linear_stage.h"

namespace mptqc {
namespace {

template <class T, int kUnit>
struct LinearBlock {
  static_assert(T::kThreads / kWarp * T::kWarpSumBytes <= T::kStages * T::kStageBytes, "sums take the stages' place");

  const LinearParameters& p;
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

  // Makes outputs of the warp's sums: a lane has eight columns of every few rows.
  MPTQC_DEVICE void finish(const uint8_t* tile, int64_t warp_row, int64_t warp_column, int lane) const {
    constexpr int across = T::kWarpColumns / kLaneColumns, down = kWarp / across;
    const int eight = lane % across;
    const int64_t column = first_column + warp_column + kLaneColumns * eight;
    if (column >= p.a.outputs) return;
    const LinearColumns<kLaneColumns> columns(p.a, column);
    for (int row = lane / across; row < T::kWarpRows; row += down) {
      int32_t sums[1][kLaneColumns];
      MPTQC_UNROLL
      for (int half = 0; half < 2; ++half) {
        const auto four = *reinterpret_cast<const Ints4*>(tile + sum_chunk(row, 2 * eight + half) * kChunk);
        MPTQC_UNROLL
        for (int k = 0; k < 4; ++k) sums[0][4 * half + k] = four.value[k];
      }
      finish_rows(p, columns, sums, first_row + warp_row + row, [](int) { return 0; }, column);
    }
  }

  // The sums begin with the columns' offsets.
  MPTQC_DEVICE void begin(Sums& sums, int64_t column, int quad) const {
    MPTQC_UNROLL
    for (int j = 0; j < T::kSpans; ++j) {
      const int64_t first = column + kSpan * j;
      const Ints4 offset = first < p.a.outputs ? *reinterpret_cast<const Ints4*>(p.a.offset + first) : Ints4{};
      MPTQC_UNROLL
      for (int i = 0; i < T::kRowTiles * 8; ++i) {
        const int t = i / 8, half = i / 4 % 2, n = i / 2 % 2;
        sums[t][j][half][i % 4] = quad % 2 == half ? offset.value[n] : offset.value[2 + n];
      }
    }
  }

  MPTQC_DEVICE void run() const {
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    const int warp_row = warp / T::kWarpsAcross * T::kWarpRows;
    const int warp_column = warp % T::kWarpsAcross * T::kWarpColumns;
    const int quad = lane / 4;
    const int left = left_chunk(warp_row + lane / 16 * 8 + lane % 8, lane / 8 % 2) * kChunk;
    const int right = T::kLeftBytes + weight_chunk<T>(lane % 4, warp_column / 4 + quad) * kChunk + quad % 2 * kChunk / 2;
    const int depths = static_cast<int>((p.a.inputs + kDepth - 1) / kDepth);
    const Copier<T, kUnit> copier(p.a, first_row, first_column);
    load_first<T>(copier, depths, stages);
    Sums sums;
    begin(sums, first_column + warp_column + 4 * quad, quad);
    for (int depth = 0; depth < depths; ++depth) {
      wait_copies<T::kStages - 2>();
      sync_threads();  // this stage is there, and all warps are done with the one that the next copies overwrite
      load_next<T>(copier, depth, depths, stages);
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
  LinearBlock<T, kUnit>{parameters, row, column, shared_memory()}.run();
}

template <class T>
MPTQC_KERNEL(T::kThreads, T::kBlocks)
linear_of_groups(const MPTQC_GRID_CONSTANT GroupParameters parameters) {
#if MPTQC_WARPGROUPS
  const bool consumes = thread_index() < T::kConsumers;  // else it is of the producers' warps
  const int producer = (thread_index() - T::kConsumers) / kWarp, index = consumes ? thread_index() / kGroup : producer;
  const int slice = T::kSlices == 1 ? 0 : index, group = T::kGroups == 1 ? 0 : index;
  const int thread = consumes ? thread_index() % kGroup : kGroup + thread_index() % kWarp;
  const int depths = static_cast<int>((parameters.linear.a.inputs + T::kDepth - 1) / T::kDepth);
  const int first = depths * slice / T::kSlices, end = depths * (slice + 1) / T::kSlices;
  uint8_t* const stages = shared_memory();
  Barrier* const barriers = reinterpret_cast<Barrier*>(stages + T::kSlices * T::kStages * T::kStageBytes);
  GroupBlock<T>{parameters,
                stages + slice * T::kStages * T::kStageBytes,
                barriers + slice * T::kStages * 2,
                static_cast<int>(block_index()),
                parameters.blocks,
                group,
                slice,
                thread,
                first,
                end - first}
      .run();
#endif
}

template <class T>
int64_t tiles(const mptqc_linear& a) {
  return ceil_divide(a.rows, T::kRows) * ceil_divide(a.outputs, T::kColumns);
}

template <class T, int kUnit>
mptqc_status start(const mptqc_linear& a, mptqc_cuda_float type, void* stream) {
  constexpr size_t bytes = size_t{T::kStages} * T::kStageBytes;
  return launch({tiles<T>(a), T::kThreads, bytes, stream}, linear<T, kUnit>, LinearParameters(a, type));
}

// As many blocks as there are tiles, or, if a block makes tile after tile, as the device holds at a time.
template <class T>
mptqc_status start_groups(const mptqc_linear& a, mptqc_cuda_float type, void* stream) {
  const auto inputs = static_cast<uint64_t>(a.inputs), groups = (inputs + 3) / 4;
  const auto rows = static_cast<uint64_t>(a.rows), columns = (static_cast<uint64_t>(a.outputs) + 15) / 16;
  if (rows == 0 || columns == 0) return MPTQC_OK;
  const int64_t count = tiles<T>(a), held = int64_t{T::kBlocks} * multiprocessors();
  if (count > INT32_MAX) return MPTQC_INVALID_ARGUMENT;
  const int64_t blocks = T::kGroups > 1 ? least(count, held) : count;
  GroupParameters parameters = {LinearParameters(a, type), {}, {}, static_cast<int>(ceil_divide(a.outputs, T::kColumns)),
                                static_cast<int>(count), static_cast<int>(blocks)};
  const BoxShape input_box = {{inputs, rows, 1}, {inputs, inputs * rows}, {T::kDepth, T::kBoxRows, 1}};
  const BoxShape weight_box = {{kBlockBytes, groups, columns},
                               {kBlockBytes, groups * kBlockBytes},
                               {kBlockBytes, T::kDepth / 4, T::kColumns / kBlockOutputs}};
  mptqc_status status = map_box(&parameters.inputs, a.input, input_box);
  if (status == MPTQC_OK) status = map_box(&parameters.weight, a.weight, weight_box);
  if (status != MPTQC_OK) return status;
  return launch({blocks, T::kThreads, T::kSharedBytes, stream}, linear_of_groups<T>, parameters);
}

using ManyRows = GroupTile<96, 3, 1, 128, 4, 1, true>;
using SomeRows = GroupTile<64, 1, 2, 64, 4, 2, false>;
using FewRows = GroupTile<32, 1, 4, 64, 4, 1, true>;

// Whether the current device runs the kernels of groups.
bool has_groups() {
  static DeviceFact fact;
  return fact.holds([] { return has_code(reinterpret_cast<const void*>(linear_of_groups<ManyRows>)); });
}

// How long the device takes for all tiles, in halves of what it takes for one of FewRows on each multiprocessor; measured on an
// H200 for 768 and for 3072 inputs.
template <class T>
int64_t cost(const mptqc_linear& a, int64_t of_round) {
  return ceil_divide(tiles<T>(a), T::kBlocks * int64_t{multiprocessors()}) * of_round;
}

mptqc_cuda_tile best_group(const mptqc_linear& a) {
  const int64_t few = cost<FewRows>(a, 2), some = cost<SomeRows>(a, 4), many = cost<ManyRows>(a, 7);
  if (many <= some && many <= few) return MPTQC_TILE_288X128;
  return some <= few ? MPTQC_TILE_64X128 : MPTQC_TILE_32X128;
}

mptqc_cuda_tile best_tile(const mptqc_linear& a) {
  return tiles<LargeTile>(a) >= multiprocessors() ? MPTQC_TILE_128X128 : MPTQC_TILE_64X64;
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
  const bool has_vectors = is_vector(a.weight) && is_vector(a.offset) && is_vector(a.scale) && is_vector(a.bias) &&
                           is_vector(a.multiplier);
  const bool is_countable = a.table_size == 0 || a.rows <= UINT32_MAX;  // target_row
  if (!is_sound(a) || !has_vectors || !is_countable || a.rotary.cosine != nullptr || a.factor != nullptr || a.unit_heads.width != 0) {
    return MPTQC_INVALID_ARGUMENT;
  }
  const bool fits_boxes = multiple_of(a, 16) && a.inputs > 0 && a.rows <= INT32_MAX / 2 && a.outputs <= INT32_MAX / 2;
  const bool grouped = fits_boxes && has_groups();
  if (tile == MPTQC_TILE_AUTO) tile = grouped ? best_group(a) : best_tile(a);
  switch (tile) {
    case MPTQC_TILE_288X128: return grouped ? start_groups<ManyRows>(a, type, stream) : MPTQC_INVALID_ARGUMENT;
    case MPTQC_TILE_64X128: return grouped ? start_groups<SomeRows>(a, type, stream) : MPTQC_INVALID_ARGUMENT;
    case MPTQC_TILE_32X128: return grouped ? start_groups<FewRows>(a, type, stream) : MPTQC_INVALID_ARGUMENT;
    default: break;
  }
  if (!multiple_of(a, 4)) return start<SmallTile, 1>(a, type, stream);
  if (!multiple_of(a, 16)) return start<SmallTile, 4>(a, type, stream);
  if (tile == MPTQC_TILE_128X128) return start<LargeTile, 16>(a, type, stream);
  return start<SmallTile, 16>(a, type, stream);
}
