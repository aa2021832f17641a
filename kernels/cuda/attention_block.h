// What the kernels of an attention have in common: a block takes rows of one head and up to 64 columns of its context, a warp
// 16 of the rows at a time.
//
// The codes of P never leave the registers: the scores of a lane, two by two from four products, are its part of the left
// operand of the context once the values are laid out in the same order (value_row).
//
// All products are of unsigned codes; zero points are taken off the sums:
//   sum (a - z)(b - y) = sum ab - y sum a - z sum b + n z y
#pragma once

#include "attention_layout.h"

namespace mptqc {
namespace {

// Inputs 4 * group + i of the context's right operand are value rows value_row(group, i): quad q of the lanes has the
// scores of columns 2q, 2q + 1, 8 + 2q and 9 + 2q of each 16.
MPTQC_DEVICE int value_row(int group, int i) { return group / 4 * 16 + group % 4 * 2 + i % 2 + i / 2 * 8; }

// kSteps: steps of the head's width, or 0 if not known here. kSpans: spans of the context's columns.
template <int kSteps, int kSpans>
struct AttentionBlock {
  static_assert(kSteps * kStep * 255 * 255 < 1 << 22, "small_to_float takes the scores");
  static constexpr int kColumns = kSpans * kSpan;

  const AttentionParameters& p;
  const int first_row, first_column, head, batch;
  uint8_t* const shared;
  const int warp, lane;

  MPTQC_DEVICE const mptqc_attention& a() const { return p.a; }
  MPTQC_DEVICE int steps() const { return kSteps > 0 ? kSteps : p.layout.depth / kStep; }

  MPTQC_DEVICE int stride() const { return kSteps > 0 ? kSteps * kStep + kChunk : p.layout.stride; }

  // Rows `first` .. of the head's queries or keys, zeros beyond the last. A thread copies the same chunk of every few rows.
  MPTQC_DEVICE void load_rows(const uint8_t* from, int64_t rows, int64_t first, int count, int unit, uint8_t* to) const {
    const int chunks = steps() * (kStep / kChunk), left = static_cast<int>(rows - first < count ? rows - first : count);
    const int64_t apart = a().heads * a().width;
    const uint8_t* const start = from + first * apart;
    if (kSteps > 0 && unit == kChunk && a().width == kSteps * kStep) {
      constexpr int across = kSteps > 0 ? kSteps * kStep / kChunk : 1, rows_apart = kThreads / across;
      int row = thread_index() / across;
      const int column = thread_index() % across * kChunk;
      const uint8_t* source = start + row * apart + column;
      uint8_t* own = to + row * stride() + column;
      for (; row < count; row += rows_apart, source += rows_apart * apart, own += rows_apart * stride()) {
        copy_async<kChunk>(own, row < left ? source : from, row < left);
      }
      return;
    }
    for (int i = thread_index(); i < count * chunks; i += kThreads) {
      const int row = i / chunks, column = i % chunks * kChunk;
      const bool valid = row < left;
      copy_codes(to + row * stride() + column, valid ? start + row * apart : from, column, a().width, valid, unit);
    }
  }

  MPTQC_DEVICE const uint8_t* queries() const { return a().q + (batch * a().rows * a().heads + head) * a().width; }

  MPTQC_DEVICE void load_keys(int64_t first) const {
    const uint8_t* from = a().k + (batch * a().columns * a().heads + head) * a().width;
    load_rows(from, a().columns, first, p.layout.columns, p.key_unit, shared + p.layout.keys);
  }

  // The first `count` of four codes, zeros for the others.
  MPTQC_DEVICE static uint32_t load_four(const uint8_t* codes, int count) {
    uint32_t four = 0;
    MPTQC_UNROLL
    for (int k = 0; k < 4; ++k)
      if (k < count) four |= static_cast<uint32_t>(codes[k]) << (8 * k);
    return four;
  }

  // Four value rows by four columns become a chunk, transposed. A thread makes chunks of the same columns and every few rows,
  // and reads some of them before it writes them.
  MPTQC_DEVICE void load_values(int64_t first) const {
    constexpr int quads = kColumns / 4, groups_apart = kThreads / quads, rows_apart = 4 * groups_apart, together = 4;
    static_assert(groups_apart % 4 == 0, "a thread's rows are evenly apart");
    const int64_t apart = a().heads * a().value_width;
    const int left = static_cast<int>(a().columns - first < p.layout.columns ? a().columns - first : p.layout.columns);
    const int quad = thread_index() % quads, across = static_cast<int>(a().value_width - first_column) - 4 * quad;
    int group = thread_index() / quads, row = value_row(group, 0);
    const uint8_t* from =
        a().v + ((batch * a().columns + first + row) * a().heads + head) * a().value_width + first_column + 4 * quad;
    const bool words = apart % 4 == 0 && is_aligned(from, 4) && across >= 4;
    while (4 * group < p.layout.columns) {
      uint32_t four[together][4];
      MPTQC_UNROLL
      for (int i = 0; i < together * 4; ++i) {
        constexpr int rows[] = {0, 1, 8, 9};  // value_row
        const int own = i / 4 * rows_apart + rows[i % 4];
        const uint8_t* const codes = from + own * apart;
        const bool there = row + own < left;
        if (words) {
          four[i / 4][i % 4] = there ? *reinterpret_cast<const uint32_t*>(codes) : 0;
        } else {
          four[i / 4][i % 4] = there ? load_four(codes, across) : 0;
        }
      }
      MPTQC_UNROLL
      for (int i = 0; i < together; ++i) {
        if (4 * group >= p.layout.columns) break;
        const uint32_t(&r)[4] = four[i];
        const uint32_t low01 = pick_bytes(r[0], r[1], 0x5140), high01 = pick_bytes(r[0], r[1], 0x7362);
        const uint32_t low23 = pick_bytes(r[2], r[3], 0x5140), high23 = pick_bytes(r[2], r[3], 0x7362);
        uint8_t* const to = shared + p.layout.values + right_chunk<kColumns>(group, quad) * kChunk;
        *reinterpret_cast<Words4*>(to) = {{pick_bytes(low01, low23, 0x5410), pick_bytes(low01, low23, 0x7632),
                                           pick_bytes(high01, high23, 0x5410), pick_bytes(high01, high23, 0x7632)}};
        group += groups_apart;
      }
      row += together * rows_apart;
      from += together * rows_apart * apart;
    }
  }

  // offset[r] = constant - zero_point * (the sum of row r of codes).
  MPTQC_DEVICE void offsets(const uint8_t* codes, int rows, int32_t zero_point, int32_t constant, int to) const {
    for (int row = thread_index(); row < rows; row += kThreads) {
      uint32_t sum = 0;
      for (int chunk = 0; chunk < steps() * (kStep / kChunk); ++chunk) {
        const Words4 words = *reinterpret_cast<const Words4*>(codes + row * stride() + chunk * kChunk);
        MPTQC_UNROLL
        for (int i = 0; i < 4; ++i) sum = add_codes(words.word[i], sum);
      }
      reinterpret_cast<int32_t*>(shared + to)[row] = constant - zero_point * static_cast<int32_t>(sum);
    }
  }

  MPTQC_DEVICE void key_offsets() const {
    const int32_t constant = static_cast<int32_t>(a().width) * a().q_zero_point * a().k_zero_point;
    offsets(shared + p.layout.keys, p.layout.columns, a().q_zero_point, constant, p.layout.key_offset);
  }

  using Left = uint32_t[kSteps > 0 ? kSteps : 1][4];

  // Rows `row` .. + 15 of the keys for one step: those of two products.
  MPTQC_DEVICE void load_keys_of(uint32_t (&key)[4], int row, int step) const {
    const int own = row + lane / 16 * 8 + lane % 8, chunk = 2 * step + lane / 8 % 2;
    load_matrices(key, shared + p.layout.keys + own * stride() + chunk * kChunk);
  }

  // The first rows of bias and mask that are the head's, counted from their first.
  struct Addends {
    uint32_t bias, mask;
  };

  MPTQC_DEVICE uint32_t addend_row(const mptqc_addend& added) const {
    if (added.data == nullptr) return 0;
    const auto window = static_cast<uint32_t>(batch) % static_cast<uint32_t>(added.windows);
    const auto heads = static_cast<uint32_t>(added.heads), own = added.heads == 1 ? 0 : static_cast<uint32_t>(head);
    return (window * heads + own) * static_cast<uint32_t>(added.rows);
  }

  MPTQC_DEVICE Addends addends() const { return {addend_row(a().bias), addend_row(a().mask)}; }

  // How many of the 32 columns from `column` on there are.
  MPTQC_DEVICE int count_from(int64_t column) const {
    return a().columns - column < kSpan ? static_cast<int>(a().columns - column) : kSpan;
  }

  // Of 32, that of score[t][i].
  MPTQC_DEVICE int column_of(int t, int i) const { return 8 * t + 2 * (lane % 4) + i % 2; }

  // Adds to `count` scores of rows `row` and row + 8 and the 32 columns from `column` on.
  MPTQC_DEVICE void add(float (&score)[kSpanProducts][4], const Addends& added, int row, int64_t column, int count) const {
    add(score, a().bias, added.bias, row, column, count);
    add(score, a().mask, added.mask, row, column, count);
  }

  MPTQC_DEVICE void add(float (&score)[kSpanProducts][4], const mptqc_addend& added, uint32_t first, int row,
                        int64_t column, int count) const {
    if (added.data == nullptr) return;
    MPTQC_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t own = row + 8 * half, last = added.rows - 1;
      const float* const from = added.data + (first + (own < last ? own : last)) * a().columns + column + column_of(0, 0);
      MPTQC_UNROLL
      for (int t = 0; t < kSpanProducts; ++t)
        MPTQC_UNROLL
        for (int i = 0; i < 2; ++i)
          if (column_of(t, i) < count) score[t][2 * half + i] += from[8 * t + i];
    }
  }

  MPTQC_DEVICE static float power(float score, float largest) {
    return power_of_two((score - largest) * kInverseLn2);
  }

  using Context = int32_t[kSpans][kSpanProducts][4];

  // Makes outputs of the context's sums, whose zero points are taken off; of rows `row` and row + 8.
  MPTQC_DEVICE void write(const Context& context, const float (&factor)[2], int row) const {
    MPTQC_UNROLL
    for (int j = 0; j < kSpans; ++j) {
      const int64_t column = first_column + kSpan * j + kLaneColumns * (lane % 4);
      MPTQC_UNROLL
      for (int half = 0; half < 2; ++half) {
        if (column >= a().value_width || row + 8 * half >= a().rows) continue;
        float y[kLaneColumns];
        MPTQC_UNROLL
        for (int c = 0; c < kLaneColumns; ++c) {
          y[c] = static_cast<float>(context[j][c % 4][2 * half + c / 4]) * a().context_scale * factor[half];
        }
        const int64_t at = ((batch * a().rows + row + 8 * half) * a().heads + head) * a().value_width + column;
        write_outputs(p.output, at, y, a().value_width - column);
      }
    }
  }
};

}  // namespace
}  // namespace mptqc
