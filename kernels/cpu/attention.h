// Attention, one head and one chunk of query rows a task: keys and values become blocks once, then a few rows at a time
// go through scores, softmax, codes of P and context, without leaving the cache.
//
// Codes of k and v are uint8 but the product wants int8, so 128 is taken off codes and zero point.
#pragma once

#include <cmath>
#include <cstring>

#include "functions.h"
#include "product.h"
#include "quantizer.h"

namespace mptqc {

template <class L>
struct AttentionTask {
  using V = Wide<L>;
  using F = typename V::F;
  static constexpr int kRows = static_cast<int>(least(Product<L>::kRows, kMostAttentionRows));

  const mptqc_attention& a;
  const AttentionScratch layout;
  int8_t *keys, *values;
  int32_t *key_offset, *value_offset;
  float* scores;   // [kRows, padded columns]
  uint8_t* codes;  // the same
  int32_t code_sum[kRows];
  float row_factor[kRows];  // what the rows of P were divided by
  float beyond[kPanel];  // added to the last vectors of a row's scores: 0 in its columns, minus infinity beyond
  // The rows of a bias or mask that belong to the task's scores; null where there is none.
  struct AddendRows {
    const float* first = nullptr;
    int64_t stride = 0;

    const float* row(int64_t t) const { return first != nullptr ? first + t * stride : nullptr; }
  };
  AddendRows bias_rows, mask_rows;
  QuantizerConstants probability;
  Output output;
  const typename L::Table roots{kRoots};
  Product<L> product;
  Tile<Product<L>::kRows> tile = {};

  // `scratch` has layout.bytes bytes; `span`: of keys and of values, less 128, as of a weight.
  AttentionTask(const mptqc_attention& arguments, uint8_t* scratch, int32_t span = 0)
      : a(arguments),
        layout(arguments),
        keys(reinterpret_cast<int8_t*>(scratch + layout.keys)),
        values(reinterpret_cast<int8_t*>(scratch + layout.values)),
        key_offset(reinterpret_cast<int32_t*>(scratch + layout.key_offset)),
        value_offset(reinterpret_cast<int32_t*>(scratch + layout.value_offset)),
        scores(reinterpret_cast<float*>(scratch + layout.scores)),
        codes(scratch + layout.codes),
        probability(arguments.probability),
        output(arguments.quantizer, arguments.output),
        product(span) {
    const int64_t last = last_column();
    for (int c = 0; c < kPanel; ++c) beyond[c] = last + c < a.columns ? 0.0f : -INFINITY;
  }

  void run(int64_t task) {
    const AttentionPlace place(a, task);
    bias_rows = rows_of(a.bias, place);
    mask_rows = rows_of(a.mask, place);
    block_keys(place.k(a));
    block_values(place.v(a));
    for (int64_t row = place.first_row; row < place.end_row; row += kRows) {
      const int rows = static_cast<int>(least(kRows, place.end_row - row));
      score_rows(place.batch, place.head, row, rows);
      write_context(place.batch, place.head, row, rows);
    }
  }

  static constexpr float kLowest = -3.40282347e38f;
  static void nothing_beside(int, int) {}

  int32_t signed_k_zero() const { return a.k_zero_point - 128; }
  int32_t signed_v_zero() const { return a.v_zero_point - 128; }

  // Four codes of one key are one word of a block: block[s / 16][d / 4][s % 16].
  void block_keys(const uint8_t* k) {
    const int64_t stride = a.heads * a.width, words = ceil_divide(a.width, kBlockInputs);
    const int64_t whole = a.width / 16 * 16;
    const int64_t blocks = ceil_divide(a.columns, kBlockOutputs);
    std::memset(keys, 0, blocks * words * kBlockBytes);
    for (int64_t s = 0; s < a.columns; s += 4) {
      const uint8_t* from = k + s * stride;
      int8_t* to = keys + s / 16 * words * kBlockBytes + s % 16 * kBlockInputs;
      const bool four = s + 4 <= a.columns;
      for (int64_t d = 0; four && d < whole; d += 16) {
        const uint8_t* const rows[4] = {from + d, from + stride + d, from + 2 * stride + d, from + 3 * stride + d};
        L::words_of_rows(rows, to + d * kBlockOutputs);
      }
      for (int64_t r = 0; r < least(4, a.columns - s); ++r)
        for (int64_t d = four ? whole : 0; d < a.width; ++d)
          to[d / 4 * kBlockBytes + r * 4 + d % 4] = static_cast<int8_t>(from[r * stride + d] - 128);
    }
    const int32_t constant = static_cast<int32_t>(a.width) * a.q_zero_point * signed_k_zero();
    offsets(keys, blocks, words, a.q_zero_point - L::kTaken, constant, key_offset);
  }

  void block_values(const uint8_t* v) {
    const int64_t stride = a.heads * a.value_width, groups = ceil_divide(a.columns, kBlockInputs);
    const int64_t blocks = ceil_divide(a.value_width, kBlockOutputs);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t wide = least(16, a.value_width - block * 16);
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t tall = least(4, a.columns - group * 4);
        const uint8_t* from = v + group * 4 * stride + block * 16;
        int8_t* to = values + (block * groups + group) * kBlockBytes;
        if (wide == 16 && tall == 4) {
          const uint8_t* const rows[4] = {from, from + stride, from + 2 * stride, from + 3 * stride};
          L::block_of_rows(rows, to);
          continue;
        }
        std::memset(to, 0, kBlockBytes);
        for (int64_t i = 0; i < wide; ++i)
          for (int64_t j = 0; j < tall; ++j) to[4 * i + j] = static_cast<int8_t>(from[j * stride + i] - 128);
      }
    }
    const int32_t p_zero = a.probability.zero_point;
    const int32_t constant = static_cast<int32_t>(a.columns) * p_zero * signed_v_zero();
    offsets(values, blocks, groups, p_zero - L::kTaken, constant, value_offset);
  }

  // offset[c] = constant - zero_point * (the sum of column c).
  static void offsets(
      const int8_t* data, int64_t blocks, int64_t groups, int32_t zero_point, int32_t constant, int32_t* offset) {
    for (int64_t block = 0; block < blocks; ++block) {
      int32_t column[16];
      L::store(column, sums_of_block<L>(data + block * groups * kBlockBytes, groups));
      for (int i = 0; i < 16; ++i) offset[16 * block + i] = constant - zero_point * column[i];
    }
  }

  // Columns go in panels; those behind the last whole panel of blocks in vectors, block by block.
  int64_t columns_in_panels() const { return ceil_divide(a.columns, kBlockOutputs) / kPanelBlocks * kPanel; }

  // Where the last panel or vector begins.
  int64_t last_column() const {
    const int64_t end = round_up(a.columns, kBlockOutputs);
    return end == columns_in_panels() ? end - kPanel : end - kBlockOutputs;
  }

  // Calls work(V or L, its first column) for all columns of a row.
  template <class Work>
  MPTQC_INLINE void for_columns(const Work& work) const {
    const int64_t panels = columns_in_panels();
    for (int64_t c = 0; c < panels; c += kPanel) work(V(), c);
    for (int64_t c = panels; c < a.columns; c += kBlockOutputs) work(L(), c);
  }

  void score_rows(int64_t batch, int64_t head, int64_t row, int rows) {
    const int64_t stride = a.heads * a.width, block_bytes = ceil_divide(a.width, kBlockInputs) * kBlockBytes;
    const Codes query = {a.q + (batch * a.rows + row) * stride + head * a.width, stride, a.width};
    int32_t row_offset[kRows];
    F largest[kRows];
    for (int r = 0; r < rows; ++r) {
      row_offset[r] = signed_k_zero() == 0 ? 0 : -signed_k_zero() * L::sum_codes(query.data + r * stride, a.width);
      largest[r] = V::set(kLowest);
    }
    for (int64_t column = 0; column < a.columns; column += kPanel) {
      const Blocks panel = {keys + column / 16 * block_bytes, block_bytes};
      const int blocks = static_cast<int>(least(kPanelBlocks, ceil_divide(a.columns - column, kBlockOutputs)));
      product.multiply(rows, blocks, query, panel, key_offset + column, tile, nothing_beside);
      for (int r = 0; r < rows; ++r) {
        const float *bias = bias_rows.row(row + r), *mask = mask_rows.row(row + r);
        const int32_t* sum = tile.sum[r];
        float* score = scores + r * layout.padded_columns;
        if (blocks == kPanelBlocks) {
          const auto panel_scores = finish_scores<V>(sum, row_offset[r], column, bias, mask, score);
          largest[r] = V::maximum(largest[r], panel_scores);
          continue;
        }
        for (int block = 0; block < blocks; ++block) {
          const int64_t c = column + block * kBlockOutputs;
          auto& part = largest[r].part[block];
          part = L::maximum(part, finish_scores<L>(sum + block * kBlockOutputs, row_offset[r], c, bias, mask, score));
        }
      }
    }
    quantize_softmax(rows, largest);
  }

  AddendRows rows_of(const mptqc_addend& added, const AttentionPlace& place) const {
    if (added.data == nullptr) return {};
    const int64_t head = added.heads == 1 ? 0 : place.head, window = place.batch % added.windows;
    return {added.data + (window * added.heads + head) * added.rows * a.columns, added.rows == 1 ? 0 : a.columns};
  }

  // Makes and stores a vector's worth (of U: V or L) of scores, from `column` on.
  template <class U>
  MPTQC_INLINE typename U::F finish_scores(
      const int32_t* from, int32_t row_offset, int64_t column, const float* bias, const float* mask, float* to) const {
    const int n = count<U>(column);
    const auto sum = U::add(U::load(from), U::set(row_offset));
    auto score = U::multiply(U::to_float(sum), U::set(a.score_scale));
    if (bias != nullptr) score = U::add(score, U::load(bias + column, n));
    if (mask != nullptr) score = U::add(score, U::load(mask + column, n));
    if (n < U::kValues) score = U::add(score, U::load(beyond));
    U::store(to + column, score);
    return score;
  }

  // Rows take each step in turn, so that they wait for their sums across lanes together.
  void quantize_softmax(int rows, const F (&largest)[kRows]) {
    float top[kRows], sum[kRows];
    F total[kRows];
    for (int r = 0; r < rows; ++r) top[r] = V::largest(largest[r]);
    for (int r = 0; r < rows; ++r) total[r] = a.row_scale ? quantize_powers(r, top[r]) : store_powers(r, top[r]);
    for (int r = 0; r < rows; ++r) sum[r] = V::sum(total[r]);  // of powers, with row_scale of powers / probability.scale
    for (int r = 0; r < rows; ++r) {
      row_factor[r] = a.row_scale ? probability.inverse_scale / sum[r] : 1.0f;
      if (!a.row_scale) quantize_quotients(r, 1.0f / (sum[r] * probability.scale));
    }
    for (int r = 0; r < rows; ++r) code_sum[r] = signed_v_zero() == 0 ? 0 : L::sum_codes(codes_of(r), a.columns);
  }

  float* scores_of(int r) const { return scores + r * layout.padded_columns; }
  uint8_t* codes_of(int r) const { return codes + r * layout.padded_columns; }

  // The largest power is 1, whatever their sum: the codes of P are made at once. Returns the sum of their quotients.
  MPTQC_INLINE F quantize_powers(int r, float top) const {
    return powers(r, top, probability.inverse_scale, [&](auto u, int64_t c, auto quotient) {
      using U = decltype(u);
      store_codes<U>(probability, codes_of(r) + c, steps_of_quotient<U>(probability, quotient), U::kValues);
    });
  }

  // Scores become powers; returns their sum.
  MPTQC_INLINE F store_powers(int r, float top) const {
    return powers(r, top, 1.0f, [&](auto u, int64_t c, auto power) { decltype(u)::store(scores_of(r) + c, power); });
  }

  // Calls work(V or L, first column, factor * e^(score - top)) for all columns of a row; returns the sum of these. Those
  // beyond the last column are 2^-124 of the largest.
  template <class Work>
  MPTQC_INLINE F powers(int r, float top, float factor, const Work& work) const {
    auto total = V::set(0.0f);
    const auto table = roots;  // here it can stay in registers, as no store may change it
    const float* score = scores_of(r);
    for_columns([&](auto u, int64_t c) {
      using U = decltype(u);
      const auto power = power_of_e<U>(table, U::subtract(U::load(score + c), U::set(top)), factor);
      add_to(total, power);
      work(u, c, power);
    });
    return total;
  }

  // The codes of quotient * power. Those beyond the last column are multiplied with values that are 0.
  MPTQC_INLINE void quantize_quotients(int r, float quotient) const {
    for_columns([&](auto u, int64_t c) {
      using U = decltype(u);
      const auto x = U::multiply(U::load(scores_of(r) + c), U::set(quotient));
      store_codes<U>(probability, codes_of(r) + c, steps_of_quotient<U>(probability, x), U::kValues);
    });
  }

  static void add_to(F& total, F x) { total = V::add(total, x); }
  static void add_to(F& total, typename L::F x) { total.part[0] = L::add(total.part[0], x); }

  // How many of the values of a U from column c on there are.
  template <class U>
  int count(int64_t c) const { return static_cast<int>(least(U::kValues, a.columns - c)); }

  void write_context(int64_t batch, int64_t head, int64_t row, int rows) {
    const int64_t block_bytes = ceil_divide(a.columns, kBlockInputs) * kBlockBytes;
    const Codes p = {codes, layout.padded_columns, round_up(a.columns, kBlockInputs)};
    for (int64_t column = 0; column < a.value_width; column += kPanel) {
      const int columns = static_cast<int>(least(kPanel, a.value_width - column));
      const Blocks panel = {values + column / 16 * block_bytes, block_bytes};
      product.multiply(rows, static_cast<int>(ceil_divide(columns, 16)), p, panel, value_offset + column, tile,
                       nothing_beside);
      for (int r = 0; r < rows; ++r) {
        const int64_t to = ((batch * a.rows + row + r) * a.heads + head) * a.value_width + column;
        if (columns == kPanel) {
          write_row<V>(tile.sum[r], r, to, columns);
          continue;
        }
        for (int c = 0; c < columns; c += kBlockOutputs) {
          write_row<L>(tile.sum[r] + c, r, to + c, static_cast<int>(least(kBlockOutputs, columns - c)));
        }
      }
    }
  }

  template <class U>
  MPTQC_INLINE void write_row(const int32_t* sum, int r, int64_t to, int columns) const {
    const auto total = U::add(U::load(sum), U::set(-signed_v_zero() * code_sum[r]));
    const auto context = U::multiply(U::to_float(total), U::set(a.context_scale));
    write<U>(output, to, U::multiply(context, U::set(row_factor[r])), columns);
  }
};

}  // namespace mptqc
