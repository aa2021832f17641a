// AMX in plain C++, for processors that lack it: the intrinsics that kernels/cpu/product_amx.h uses, on eight tiles of the
// calling thread. What the processor would fault on, and tiles that a thread leaves behind, end the program.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated_amx {

constexpr int kTiles = 8, kMostRows = 16, kMostBytes = 64;

inline void require(bool holds, const char* fault) {
  if (holds) return;
  std::fprintf(stderr, "AMX: %s\n", fault);
  std::abort();
}

struct Tiles {
  bool configured = false;
  int rows[kTiles] = {}, row_bytes[kTiles] = {};
  uint8_t data[kTiles][kMostRows][kMostBytes] = {};

  ~Tiles() { require(!configured, "a thread ended without releasing its tiles"); }
};

inline Tiles& tiles() {
  thread_local Tiles own;
  return own;
}

// The tiles, for an instruction that uses tile number `tile`.
inline Tiles& with(int tile) {
  Tiles& all = tiles();
  require(all.configured && tile < kTiles && all.rows[tile] > 0, "a tile is used that is not configured");
  return all;
}

inline void load_configuration(const void* from) {
  uint8_t byte[64];
  std::memcpy(byte, from, sizeof byte);
  require(byte[0] == 1 && byte[1] == 0, "only palette 1, from row 0 on, is emulated");
  for (int i = 2; i < 16; ++i) require(byte[i] == 0, "a reserved byte is set");
  Tiles& all = tiles();
  std::memset(all.data, 0, sizeof all.data);
  all.configured = true;
  for (int tile = 0; tile < 16; ++tile) {
    const int rows = byte[48 + tile], row_bytes = byte[16 + 2 * tile] + 256 * byte[17 + 2 * tile];
    require(rows <= kMostRows && row_bytes <= kMostBytes, "a tile is too large");
    require((rows == 0) == (row_bytes == 0), "a tile has rows without bytes, or bytes without rows");
    require(tile < kTiles || rows == 0, "there are 8 tiles");
    if (tile < kTiles) {
      all.rows[tile] = rows;
      all.row_bytes[tile] = row_bytes;
    }
  }
}

inline void release() { tiles().configured = false; }

inline void load(int tile, const void* base, int64_t stride) {
  Tiles& all = with(tile);
  std::memset(all.data[tile], 0, sizeof all.data[tile]);
  const char* from = static_cast<const char*>(base);
  for (int r = 0; r < all.rows[tile]; ++r) std::memcpy(all.data[tile][r], from + r * stride, all.row_bytes[tile]);
}

inline void store(int tile, void* base, int64_t stride) {
  Tiles& all = with(tile);
  char* to = static_cast<char*>(base);
  for (int r = 0; r < all.rows[tile]; ++r) std::memcpy(to + r * stride, all.data[tile][r], all.row_bytes[tile]);
}

// sum[m][n] += a[m][4k..4k+3] * b[k][4n..4n+3], unsigned times signed bytes, wrapping.
inline void multiply(int sum, int a, int b) {
  Tiles& all = with(sum);
  with(a);
  with(b);
  require(all.rows[sum] == all.rows[a] && all.row_bytes[sum] == all.row_bytes[b] &&
              all.row_bytes[a] == 4 * all.rows[b],
          "the shapes of a product do not fit");
  require(sum != a && sum != b && a != b, "the tiles of a product are not three");
  for (int m = 0; m < all.rows[sum]; ++m) {
    for (int n = 0; n < all.row_bytes[sum] / 4; ++n) {
      uint32_t total;
      std::memcpy(&total, &all.data[sum][m][4 * n], sizeof total);
      for (int k = 0; k < all.rows[b]; ++k) {
        for (int i = 0; i < 4; ++i) {
          total += static_cast<uint32_t>(all.data[a][m][4 * k + i] * static_cast<int8_t>(all.data[b][k][4 * n + i]));
        }
      }
      std::memcpy(&all.data[sum][m][4 * n], &total, sizeof total);
    }
  }
}

}  // namespace emulated_amx

// Stands in for what processor.cpp says. One source file alone includes this header.
namespace mptqc {
bool amx_is_permitted();
bool amx_is_permitted() { return true; }
}  // namespace mptqc

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbusd
#define _tile_loadconfig emulated_amx::load_configuration
#define _tile_release emulated_amx::release
#define _tile_loadd emulated_amx::load
#define _tile_stored emulated_amx::store
#define _tile_dpbusd emulated_amx::multiply
