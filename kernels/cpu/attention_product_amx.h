// The products of an attention on AMX tiles, 16 rows at a time. Keys and values have tiles of their own, each of the shape
// that suits them, so that tiles are configured once a task; codes of q stay in one where a head is at most a tile wide.
//
//   sums 0 1 2 3   codes of q 4, of P 5   keys 6   values 7
#pragma once

#include <atomic>

#include "attention_product.h"
#include "product_amx.h"

namespace mptqc {

template <>
class AttentionProduct<LanesAmx> {
 public:
  static constexpr int kRows = 16;
  static constexpr bool kWritesSums = true;  // tiles are stored while the next ones are made

  AttentionProduct(const mptqc_attention& a, const AttentionScratch& layout, uint8_t* scratch, int32_t)
      : keys_(layout.key_groups),
        values_(layout.value_groups),
        copy_(scratch + layout.queries),
        rows_until_sleep_(a.columns >= 96 && a.columns <= 288 && keys_.steps > 0 ? kValuesAwake / a.columns : 0) {
    TileConfiguration configuration;
    for (int sums = 0; sums < 4; ++sums) configuration.set(sums, kRows, kTileBytes);
    configuration.set(4, kRows, keys_.bytes);
    configuration.set(5, kRows, values_.bytes);
    configuration.set(6, keys_.bytes / 4, kTileBytes);
    configuration.set(7, values_.bytes / 4, kTileBytes);
    configuration.load();
    std::memset(copy_, 0, kRows * layout.key_groups * kBlockInputs);
  }
  AttentionProduct(const AttentionProduct&) = delete;
  AttentionProduct& operator=(const AttentionProduct&) = delete;
  ~AttentionProduct() { _tile_release(); }

  // Copied where tiles reach beyond the head or the last row, for which their loads have to wait.
  void set_queries(int rows, Codes queries) {
    if (keys_.steps == 0) return;
    const int64_t width = keys_.steps * keys_.bytes;
    queries_ = queries;
    if (rows < kRows || queries.width < width) {
      for (int r = 0; r < rows; ++r) std::memcpy(copy_ + r * width, queries.data + r * queries.stride, queries.width);
      queries_ = {copy_, width, width};
      fence();
    }
    if (keys_.steps == 1) _tile_loadd(4, queries_.data, queries_.stride);
  }

  const int32_t* scores(int blocks, Blocks keys, const int32_t* offset, int32_t* sums, int64_t stride) {
    const int64_t row_bytes = stride * static_cast<int64_t>(sizeof(int32_t));
    wake();
    load_sums(blocks, offset);
    for (int64_t step = 0; step < keys_.steps; ++step) {
      const int8_t* key = keys.data + step * keys_.bytes * kBlockOutputs;
      if (keys_.steps > 1) _tile_loadd(4, queries_.data + step * keys_.bytes, queries_.stride);
      _tile_loadd(6, key, kTileBytes);
      _tile_dpbusd(0, 4, 6);
      if (blocks > 1) {
        _tile_loadd(6, key + keys.block_bytes, kTileBytes);
        _tile_dpbusd(1, 4, 6);
      }
      if (blocks > 2) {
        _tile_loadd(6, key + 2 * keys.block_bytes, kTileBytes);
        _tile_dpbusd(2, 4, 6);
      }
      if (blocks > 3) {
        _tile_loadd(6, key + 3 * keys.block_bytes, kTileBytes);
        _tile_dpbusd(3, 4, 6);
      }
    }
    store_sums(blocks, sums, row_bytes);
    return sums;
  }

  // The unit of the tiles falls asleep 0.6 us after its last product, and it takes 0.3 us to wake it. So a product that nobody
  // reads is made now and then, in a tile whose sums were stored, unless all rows take less time, or so much that what vectors
  // gain by its sleep, one more port, outweighs that.
  void stay_awake() {
    if (--rows_awake_ != 0) return;
    _tile_dpbusd(0, 4, 6);
    wake();
  }

  const int32_t* context(int, int blocks, Codes p, Blocks values, const int32_t* offset) {
    fence();
    wake();
    load_sums(blocks, offset);
    for (int64_t step = 0; step < values_.steps; ++step) {
      const int8_t* value = values.data + step * values_.bytes * kBlockOutputs;
      _tile_loadd(5, p.data + step * values_.bytes, p.stride);
      _tile_loadd(7, value, kTileBytes);
      _tile_dpbusd(0, 5, 7);
      if (blocks > 1) {
        _tile_loadd(7, value + values.block_bytes, kTileBytes);
        _tile_dpbusd(1, 5, 7);
      }
      if (blocks > 2) {
        _tile_loadd(7, value + 2 * values.block_bytes, kTileBytes);
        _tile_dpbusd(2, 5, 7);
      }
      if (blocks > 3) {
        _tile_loadd(7, value + 3 * values.block_bytes, kTileBytes);
        _tile_dpbusd(3, 5, 7);
      }
    }
    store_sums(blocks, tile_.sum[0], sizeof tile_.sum[0]);
    return tile_.sum[0];
  }

 private:
  static constexpr int kTileBytes = 64;
  static constexpr int64_t kValuesAwake = 1700;  // of scores, that are worked on until the unit falls asleep

  void wake() { rows_awake_ = rows_until_sleep_; }

  // `groups` groups of 4 inputs in steps of one width.
  struct Steps {
    int64_t steps;
    int bytes;

    explicit Steps(int64_t groups)
        : steps(ceil_divide(groups, 16)), bytes(static_cast<int>(groups / (steps > 0 ? steps : 1) * kBlockInputs)) {}
  };

  // To the compiler, the intrinsics of tiles do not touch memory.
  static void fence() { std::atomic_signal_fence(std::memory_order_seq_cst); }

  // Every row of a tile is loaded from one place.
  static void load_sums(int blocks, const int32_t* offset) {
    _tile_loadd(0, offset, 0);
    if (blocks > 1) _tile_loadd(1, offset + 16, 0);
    if (blocks > 2) _tile_loadd(2, offset + 32, 0);
    if (blocks > 3) _tile_loadd(3, offset + 48, 0);
  }

  static void store_sums(int blocks, int32_t* sums, int64_t row_bytes) {
    _tile_stored(0, sums, row_bytes);
    if (blocks > 1) _tile_stored(1, sums + 16, row_bytes);
    if (blocks > 2) _tile_stored(2, sums + 32, row_bytes);
    if (blocks > 3) _tile_stored(3, sums + 48, row_bytes);
    fence();
  }

  const Steps keys_, values_;
  uint8_t* const copy_;
  Codes queries_ = {};
  const int64_t rows_until_sleep_;  // that can be worked on while the unit is awake; 0: it may sleep
  int64_t rows_awake_ = 0;  // that are left of them; 0 and below: it may sleep
  Tile<kRows> tile_;
};

}  // namespace mptqc
