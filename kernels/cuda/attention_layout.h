// What a block of an attention is given, and how it divides its shared memory.
#pragma once

#include "tiles.h"

namespace mptqc {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp, kWarpRows = 16, kBlockRows = kWarps * kWarpRows;
constexpr int64_t kMostColumns = 9 * kSpan;  // of keys and values in shared memory
constexpr int64_t kMostWidth = 512;    // of a head: 32 columns of it must fit
constexpr int kSharedBytes = 96 * 1024;
constexpr float kLowest = -3.40282347e38f, kInverseLn2 = 1.44269504f;

// Where the parts of a block's shared memory begin, in bytes.
struct AttentionLayout {
  int depth;    // width of a head, whole steps
  int stride;   // of a row of queries or keys: one chunk more, so that 8 rows of a matrix hit all banks once
  int columns;  // of a part
  int keys, values, key_offset, row_offset, bytes;

  AttentionLayout(const mptqc_attention& a, int context_columns)
      : depth(static_cast<int>(round_up(a.width, kStep))), stride(depth + kChunk) {
    const int column_bytes = stride + context_columns + 4;
    const int fit = (kSharedBytes - kBlockRows * (stride + 4)) / column_bytes / kSpan * kSpan;
    columns = static_cast<int>(least(least(fit, kMostColumns), round_up(a.columns, kSpan)));
    keys = kBlockRows * stride;
    values = keys + columns * stride;
    key_offset = values + columns * context_columns;
    row_offset = key_offset + columns * 4;
    bytes = row_offset + kBlockRows * 4;
  }
};

struct AttentionParameters {
  mptqc_attention a;
  AttentionLayout layout;
  QuantizerConstants probability;
  Output output;
  int query_unit, key_unit;  // of copy_codes
  int64_t block_rows;
};

}  // namespace
}  // namespace mptqc
