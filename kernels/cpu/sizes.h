// How the operators fall into tasks, and the scratch memory that a task of an attention needs.
// Unnamed namespace: the headers of this folder are compiled once for each instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "mptqc_kernels.h"

namespace mptqc {
namespace {

constexpr int64_t kBlockOutputs = MPTQC_BLOCK_OUTPUTS, kBlockInputs = MPTQC_BLOCK_INPUTS;
constexpr int64_t kBlockBytes = kBlockOutputs * kBlockInputs;

// A panel is what one pass of the product covers: 4 blocks of outputs.
constexpr int kPanelBlocks = 4;
constexpr int64_t kPanel = MPTQC_PANEL;
static_assert(kPanel == kPanelBlocks * kBlockOutputs);

// The most query rows whose scores an attention holds at once: they and what is made of them fit the first cache.
constexpr int kMostAttentionRows = 16;

// Sums over this many products of two codes fit int32, their offsets included: one for a Linear, three in attention.
constexpr int64_t kMostLinearTerms = 32768, kMostAttentionTerms = 16384;

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_divide(a, b) * b; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Where the table of a group of `size` rows has `row`, within its own group; size 0: there is no table.
inline int64_t row_in_table(int64_t row, int64_t size, const int64_t* table) {
  return size == 0 ? row : row - row % size + table[row % size];
}

// Rows of each chunk when `rows` are shared out evenly in chunks of at most 128, whole register tiles of VNNI each.
constexpr int64_t chunk_rows(int64_t rows) {
  const int64_t chunks = rows > 0 ? ceil_divide(rows, 128) : 1;
  return round_up(rows > 0 ? ceil_divide(rows, chunks) : 1, 6);
}

// Where a task of a Linear has its outputs: a panel of one chunk of rows, or of two.
struct LinearPlace {
  int64_t first_row, end_row, first_column;
  int columns;

  LinearPlace(const mptqc_linear& a, int64_t task) {
    const int64_t height = rows_of_task(a), panels = ceil_divide(a.outputs, kPanel);
    first_row = task / panels * height;
    end_row = least(first_row + height, a.rows);
    first_column = task % panels * kPanel;
    columns = static_cast<int>(least(kPanel, a.outputs - first_column));
  }

  static int64_t tasks(const mptqc_linear& a) { return ceil_divide(a.rows, rows_of_task(a)) * ceil_divide(a.outputs, kPanel); }

 private:
  static int64_t rows_of_task(const mptqc_linear& a) { return chunk_rows(a.rows) * (a.by_rows != 0 ? 1 : 2); }
};

// How many batch entries a task of an attention takes: small windows go together.
constexpr int64_t attention_entries(int64_t rows) { return rows > 64 || rows == 0 ? 1 : 128 / rows; }

// Rows of each chunk of a head. Each makes blocks of all keys and values: where there are heads enough, two chunks are one.
constexpr int64_t attention_rows(const mptqc_attention& a) {
  return chunk_rows(a.rows) * (a.by_heads != 0 || a.batch * a.heads >= 8 ? 2 : 1);
}

// What a task of an attention computes: a chunk of one head's query rows, or all of them of some batch entries.
struct AttentionPlace {
  int64_t batch, end_batch, head, first_row, end_row;

  AttentionPlace(const mptqc_attention& a, int64_t task) {
    const int64_t chunk = attention_rows(a), chunks = ceil_divide(a.rows, chunk);
    const int64_t entries = attention_entries(a.rows);
    head = task % a.heads;
    first_row = task / a.heads % chunks * chunk;
    end_row = least(first_row + chunk, a.rows);
    batch = task / a.heads / chunks * entries;
    end_batch = least(batch + entries, a.batch);
  }

  static int64_t tasks(const mptqc_attention& a) {
    const int64_t chunks = ceil_divide(a.rows, attention_rows(a));
    return ceil_divide(a.batch, attention_entries(a.rows)) * a.heads * chunks;
  }

  // Where the head's keys and values begin.
  const uint8_t* k(const mptqc_attention& a) const { return a.k + (batch * a.columns * a.heads + head) * a.width; }
  const uint8_t* v(const mptqc_attention& a) const { return a.v + (batch * a.columns * a.heads + head) * a.value_width; }
};

// The rows of a task of a norm: some of one chunk, so that threads norm rows that they made.
struct NormPlace {
  int64_t first_row, end_row;

  NormPlace(int64_t rows, int64_t task) {
    const int64_t chunk = chunk_rows(rows), tasks = tasks_of_chunk(rows), first = task / tasks * chunk;
    const int64_t end = least(first + chunk, rows);
    first_row = least(first + task % tasks * kRows, end);
    end_row = least(first_row + kRows, end);
  }

  static int64_t tasks(int64_t rows) { return ceil_divide(rows, chunk_rows(rows)) * tasks_of_chunk(rows); }

 private:
  static constexpr int64_t kRows = 32;
  static int64_t tasks_of_chunk(int64_t rows) { return ceil_divide(least(chunk_rows(rows), rows), kRows); }
};

// Where the parts of an attention task's scratch memory begin, in bytes; each on a cache line.
struct AttentionScratch {
  int64_t padded_columns, padded_width, key_groups, value_groups;
  int64_t keys, key_offset, values, value_offset, queries, sums, scores, codes, bytes;

  explicit AttentionScratch(const mptqc_attention& a)
      : padded_columns(round_up(a.columns, kPanel)),
        padded_width(round_up(a.value_width, kPanel)),
        key_groups(even_groups(a.width)),
        value_groups(even_groups(a.columns)),
        keys(0),
        key_offset(keys + padded_columns * key_groups * kBlockInputs),
        values(key_offset + line(padded_columns * 4)),
        value_offset(values + padded_width * value_groups * kBlockInputs),
        queries(value_offset + line(padded_width * 4)),
        sums(queries + line(kMostAttentionRows * key_groups * kBlockInputs)),
        scores(sums + line(kMostAttentionRows * padded_columns * 4)),
        codes(scores + line(kMostAttentionRows * padded_columns * 4)),
        bytes(codes + line(kMostAttentionRows * padded_columns)) {}

  static int64_t line(int64_t bytes) { return round_up(bytes, 64); }

  // Groups of 4 inputs, as many in each step of AMX, which has 16 at most; those beyond the inputs are zeros.
  static int64_t even_groups(int64_t inputs) {
    const int64_t groups = ceil_divide(inputs, kBlockInputs), steps = ceil_divide(groups, 16);
    return steps == 0 ? 0 : round_up(groups, steps);
  }
};

// Costs of all states and of all groups, then the oldest code of each group at each column.
constexpr int64_t trellis_scratch_bytes(const mptqc_trellis& a) {
  const int64_t states = int64_t{1} << (a.bits * a.taps), groups = states >> a.bits;
  return (states + groups) * 4 + a.columns * groups;
}

}  // namespace
}  // namespace mptqc
