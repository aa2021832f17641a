// The integer product on AMX tiles; all else is done by the AVX-512 lanes.
//
// A tile is up to 16 rows of up to 64 bytes. A block of weights is one as it lies in memory: a row of it is a group of 4
// inputs for 16 outputs. Two tiles of codes times two of weights add to four of sums, each tile read twice from registers.
//
//   sums 0 1   codes 4   weights 6 7
//        2 3         5
#pragma once

#include <atomic>

#include "lanes_avx512_vnni.h"
#include "product.h"

namespace mptqc {

namespace {

struct LanesAmx : LanesAvx512Vnni {};

// What LDTILECFG reads: row and byte counts of 8 tiles, of 16 that there is room for.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int tile_rows, int bytes) {
    const bool some = tile_rows > 0 && bytes > 0;
    rows[tile] = static_cast<uint8_t>(some ? tile_rows : 0);
    row_bytes[tile] = static_cast<uint16_t>(some ? bytes : 0);
  }
  // What tiles hold is lost, and some 200 cycles.
  void load() const {
    std::atomic_signal_fence(std::memory_order_seq_cst);
    _tile_loadconfig(this);
  }
};
static_assert(sizeof(TileConfiguration) == 64);

}  // namespace

template <>
class Product<LanesAmx> {
 public:
  static constexpr int kRows = 32, kColumns = 32, kWaiting = 2;

  // Another number of rows would have tiles configured anew.
  static constexpr int window(int rows) { return rows <= kTileRows ? kTileRows : kRows; }

  // Tiles are read from the second cache as fast as they are multiplied.
  static bool fetches(int64_t) { return false; }

  explicit Product(int32_t = 0) {}
  Product(const Product&) = delete;
  Product& operator=(const Product&) = delete;

  // A thread that goes on to other work must leave no tiles behind: their state would be saved at each of its switches.
  ~Product() {
    if (rows_ > 0) _tile_release();
  }

  // As the generic one. The tiles' unit works on a step's products for some 64 cycles: vectors are free to do their own.
  template <int Columns, class Beside>
  MPTQC_INLINE void multiply(
      int rows, int blocks, Codes a, Blocks w, const int32_t* offset, Tile<kRows, Columns>& tile, const Beside& beside) {
    const Steps steps(a.width);
    const int steps_of_pair = static_cast<int>(steps.whole) + (steps.rest > 0), parts = (blocks + 1) / 2 * steps_of_pair;
    configure(rows, steps.width);
    if (steps.rest > 0) copy_rest(rows, blocks, steps, a, w);
    if (parts == 0) beside(1);
    // To the compiler, the intrinsics that load tiles do not read memory: stores must not be put off beyond them.
    std::atomic_signal_fence(std::memory_order_seq_cst);
    for (int block = 0; block < blocks; block += 2) {
      const bool below = rows > kTileRows, right = block + 1 < blocks;
      load_sums(offset + 16 * block, below, right);
      const int8_t* weights = w.data + block * w.block_bytes;
      for (int64_t step = 0; step < steps.whole; ++step) {
        const int64_t k = step * steps.width;
        add_step(a.data + k, a.stride, weights + k * kBlockOutputs, w.block_bytes, below, right);
        beside(parts);
      }
      if (steps.rest > 0) {
        add_step(rest_codes_[0], kTileBytes, rest_weights_[block][0], sizeof rest_weights_[0], below, right);
        beside(parts);
      }
      store_sums<Columns>(&tile.sum[0][16 * block], below, right);
    }
  }

 private:
  static constexpr int kTileRows = 16, kTileBytes = 64;

  // How the inputs fall into steps, each a tile wide: `whole` ones, and `rest` inputs more. Where the groups of 4 cannot
  // be shared out evenly, a step is as wide as can be.
  struct Steps {
    int64_t whole;
    int width, rest;

    explicit Steps(int64_t inputs) {
      const int64_t groups = ceil_divide(inputs, kBlockInputs), fewest = ceil_divide(groups, kTileRows);
      const bool even = groups > 0 && groups % fewest == 0;
      width = static_cast<int>((even ? groups / fewest : kTileRows) * kBlockInputs);
      whole = inputs / width;
      rest = static_cast<int>(inputs % width);
    }
  };

  // Tiles for `rows` rows and steps of `width` inputs, unless they are so already; the lower ones may be left aside.
  void configure(int rows, int width) {
    if (width == width_ && (rows == rows_ || (rows == kTileRows && rows_ > rows))) return;
    rows_ = rows;
    width_ = width;
    const int upper = rows < kTileRows ? rows : kTileRows, lower = rows - upper, groups = width / 4;
    TileConfiguration configuration;
    for (int column = 0; column < 2; ++column) {
      configuration.set(column, upper, kTileBytes);
      configuration.set(2 + column, lower, kTileBytes);
      configuration.set(6 + column, groups, kTileBytes);
    }
    configuration.set(4, upper, width);
    configuration.set(5, lower, width);
    configuration.load();
  }

  // The last inputs, fewer than a step: read in place, a step would reach beyond the codes, and beyond the weights.
  // Codes are 0 behind them; what is left there of other weights does not count.
  void copy_rest(int rows, int blocks, const Steps& steps, Codes a, Blocks w) {
    const int64_t first = steps.whole * steps.width, bytes = ceil_divide(steps.rest, kBlockInputs) * kBlockBytes;
    const __mmask64 mask = (uint64_t{1} << steps.rest) - 1;
    for (int r = 0; r < rows; ++r) {
      _mm512_store_si512(rest_codes_[r], _mm512_maskz_loadu_epi8(mask, a.data + r * a.stride + first));
    }
    for (int block = 0; block < blocks; ++block) {
      std::memcpy(rest_weights_[block], w.data + block * w.block_bytes + first * kBlockOutputs, bytes);
    }
  }

  // Every row of a tile is loaded from one place.
  static void load_sums(const int32_t* offset, bool below, bool right) {
    _tile_loadd(0, offset, 0);
    if (right) _tile_loadd(1, offset + 16, 0);
    if (below) _tile_loadd(2, offset, 0);
    if (below && right) _tile_loadd(3, offset + 16, 0);
  }

  MPTQC_INLINE static void add_step(
      const uint8_t* codes, int64_t stride, const int8_t* weights, int64_t block_bytes, bool below, bool right) {
    _tile_loadd(4, codes, stride);
    _tile_loadd(6, weights, kTileBytes);
    _tile_dpbusd(0, 4, 6);
    if (right) {
      _tile_loadd(7, weights + block_bytes, kTileBytes);
      _tile_dpbusd(1, 4, 7);
    }
    if (below) {
      _tile_loadd(5, codes + kTileRows * stride, stride);
      _tile_dpbusd(2, 5, 6);
      if (right) _tile_dpbusd(3, 5, 7);
    }
  }

  template <int Columns>
  static void store_sums(int32_t* sums, bool below, bool right) {
    constexpr int64_t stride = Columns * sizeof(int32_t);
    int32_t* lower = sums + kTileRows * Columns;
    _tile_stored(0, sums, stride);
    if (right) _tile_stored(1, sums + 16, stride);
    if (below) _tile_stored(2, lower, stride);
    if (below && right) _tile_stored(3, lower + 16, stride);
  }

  int rows_ = 0, width_ = 0;
  alignas(64) uint8_t rest_codes_[kRows][kTileBytes];
  alignas(64) int8_t rest_weights_[kPanelBlocks][kTileRows][kTileBytes];
};

}  // namespace mptqc
