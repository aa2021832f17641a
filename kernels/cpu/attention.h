// Attention, one head and one chunk of query rows a task: keys and values become blocks once, then a few rows at a time
// go through scores, softmax, codes of P and context, without leaving the cache.
//
// Codes of k and v are uint8 but the product wants int8, so 128 is taken off codes and zero point.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "attention_product.h"
#include "functions.h"
#include "quantizer.h"

namespace mptqc {

template <class L>
struct AttentionTask {
  using V = Wide<L>;
  using F = typename V::F;
  using I = typename V::I;
  using Product = AttentionProduct<L>;
  static constexpr int kRows = Product::kRows;

  const mptqc_attention& a;
  const AttentionScratch layout;
  int8_t *keys, *values;
  int32_t *key_offset, *value_offset;
  int32_t* sums;  // of q times keys, [kRows, padded columns]
  float* scores;  // the same; they are not made where they are but sums times a factor
  uint8_t* codes;  // the same
  int32_t row_offset[kRows];  // of a row's sums
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
  Product product;

  // `scratch` has layout.bytes bytes; `span`: of keys and of values, less 128, as of a weight.
  AttentionTask(const mptqc_attention& arguments, uint8_t* scratch, int32_t span = 0)
      : a(arguments),
        layout(arguments),
        keys(reinterpret_cast<int8_t*>(scratch + layout.keys)),
        values(reinterpret_cast<int8_t*>(scratch + layout.values)),
        key_offset(reinterpret_cast<int32_t*>(scratch + layout.key_offset)),
        value_offset(reinterpret_cast<int32_t*>(scratch + layout.value_offset)),
        sums(reinterpret_cast<int32_t*>(scratch + layout.sums)),
        scores(reinterpret_cast<float*>(scratch + layout.scores)),
        codes(scratch + layout.codes),
        probability(arguments.probability),
        output(arguments.quantizer, arguments.output),
        product(arguments, layout, scratch, span) {
    const int64_t last = last_column();
    for (int c = 0; c < kPanel; ++c) beyond[c] = last + c < a.columns ? 0.0f : -INFINITY;
  }

  void run(int64_t task) {
    AttentionPlace place(a, task);
    for (; place.batch < place.end_batch; ++place.batch) run_head(place);
  }

  void run_head(const AttentionPlace& place) {
    bias_rows = rows_of(a.bias, place);
    mask_rows = rows_of(a.mask, place);
    block_keys(place.k(a));
    block_values(place.v(a));
    int before = 0;  // rows whose codes of P wait to be multiplied: tiles are not loaded right behind the stores of their rows
    for (int64_t row = place.first_row; row < place.end_row; row += kRows) {
      const int rows = static_cast<int>(least(kRows, place.end_row - row));
      scores_are_sums() ? make_p<true>(place, row, rows, before) : make_p<false>(place, row, rows, before);
      if (Product::kWritesSums) {
        before = rows;
      } else {
        write_context(place.batch, place.head, row, rows);
      }
    }
    if (Product::kWritesSums && before > 0) write_context(place.batch, place.head, place.end_row - before, before);
  }

  static constexpr float kLowest = -3.40282347e38f;
  static constexpr int64_t kMostProduct = 2 * 255 * 128;  // of two codes less their zero points, offsets included
  static constexpr int32_t kNoSum = -(1 << 30);  // of no key: below all sums, which are of kMostAttentionTerms at most
  static_assert(kMostProduct * kMostAttentionTerms < 1 << 30);

  int32_t signed_k_zero() const { return a.k_zero_point - 128; }
  int32_t signed_v_zero() const { return a.v_zero_point - 128; }

  // Four codes of one key are one word of a block: block[s / 16][d / 4][s % 16].
  void block_keys(const uint8_t* k) {
    const int64_t stride = a.heads * a.width, words = layout.key_groups, blocks = ceil_divide(a.columns, kBlockOutputs);
    const bool has_more_words = words > ceil_divide(a.width, kBlockInputs);
    if (!L::kBlocksWholeTiles || has_more_words) std::memset(keys, 0, blocks * words * kBlockBytes);
    if constexpr (L::kBlocksWholeTiles) {
      for (int64_t s = 0; s < a.columns; s += 16) {
        const int rows = static_cast<int>(least(16, a.columns - s));
        for (int64_t d = 0; d < a.width; d += 64) {
          int8_t* to = keys + s / 16 * words * kBlockBytes + d * kBlockOutputs;
          L::blocks_of_keys(k + s * stride + d, stride, rows, static_cast<int>(least(64, a.width - d)), to);
        }
      }
    } else {
      const int64_t whole = a.width / 16 * 16;
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
    }
    const int32_t constant = static_cast<int32_t>(a.width) * a.q_zero_point * signed_k_zero();
    offsets(keys, blocks, words, a.q_zero_point - L::kTaken, constant, key_offset);
    for (int64_t c = a.columns; c < 16 * blocks; ++c) key_offset[c] = kNoSum;
  }

  void block_values(const uint8_t* v) {
    const int64_t stride = a.heads * a.value_width, groups = layout.value_groups;
    const int64_t blocks = ceil_divide(a.value_width, kBlockOutputs);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t tall = group * 4 < a.columns ? least(4, a.columns - group * 4) : 0;
      const uint8_t* row = v + group * 4 * stride;
      int8_t* first = values + group * kBlockBytes;
      if constexpr (L::kBlocksWholeTiles) {
        for (int64_t c = 0; c < a.value_width; c += 64) {
          const int columns = static_cast<int>(least(64, a.value_width - c));
          int8_t* to = first + c * groups * kBlockInputs;
          L::blocks_of_values(row + c, stride, static_cast<int>(tall), columns, to, groups * kBlockBytes);
        }
      } else {
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t wide = least(16, a.value_width - block * 16);
          const uint8_t* from = row + block * 16;
          int8_t* to = first + block * groups * kBlockBytes;
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
    }
    const int32_t p_zero = a.probability.zero_point;
    const int32_t constant = static_cast<int32_t>(a.columns) * p_zero * signed_v_zero();
    offsets(values, blocks, groups, p_zero - L::kTaken, constant, value_offset);
  }

  // offset[c] = constant - zero_point * (the sum of column c).
  static void offsets(
      const int8_t* data, int64_t blocks, int64_t groups, int32_t zero_point, int32_t constant, int32_t* offset) {
    for (int64_t block = 0; block < blocks; block += kPanelBlocks) {
      const int some = static_cast<int>(least(kPanelBlocks, blocks - block));
      int32_t column[kPanel];
      sums_of_blocks<L>({data + block * groups * kBlockBytes, groups * kBlockBytes}, some, groups, column);
      for (int i = 0; i < 16 * some; ++i) offset[16 * block + i] = constant - zero_point * column[i];
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

  // Whether nothing is added to scores, and that of no key is 87 or more below all others: its power does not count then.
  bool scores_are_sums() const {
    const float least_gap = static_cast<float>(-int64_t{kNoSum} - kMostProduct * a.width);
    return a.bias.data == nullptr && a.mask.data == nullptr && a.score_scale * least_gap >= 87.0f;
  }

  // Codes of P. Where scores are sums times a factor (`of_sums`), softmax takes the sums' differences as they are. The codes of
  // so many rows `before` are multiplied in between.
  template <bool of_sums>
  __attribute__((noinline)) void make_p(const AttentionPlace& place, int64_t row, int rows, int before) {
    const int64_t stride = a.heads * a.width;
    const Codes query = {a.q + (place.batch * a.rows + row) * stride + place.head * a.width, stride, a.width};
    for (int r = 0; !of_sums && r < rows; ++r) {
      row_offset[r] = signed_k_zero() == 0 ? 0 : -signed_k_zero() * L::sum_codes(query.data + r * stride, a.width);
    }
    std::conditional_t<of_sums, I, F> largest[kRows];
    for (auto& each : largest) start_largest(each);
    product.set_queries(rows, query);
    for (int64_t column = 0; column < a.columns; column += kPanel) {
      const int32_t* from = multiply_keys(column);
      for (int r = 0; !Product::kWritesSums && r < rows; ++r, from += kPanel) {
        if (a.columns - column > kPanel - kBlockOutputs) {
          take_sums<V>(from, row, r, column, largest[r]);
          continue;
        }
        for (int64_t c = column; c < a.columns; c += kBlockOutputs) take_sums<L>(from + (c - column), row, r, c, largest[r]);
      }
    }
    if (Product::kWritesSums && before > 0) write_context(place.batch, place.head, row - before, before);
    for (int r = 0; Product::kWritesSums && r < rows; ++r) {
      auto most = largest[r];
      if (!of_sums) product.stay_awake();
      for_columns([&](auto u, int64_t c) { take_sums<decltype(u)>(sums_of(r) + c, row, r, c, most); });
      largest[r] = most;
    }
    std::conditional_t<of_sums, int32_t, float> top[kRows];
    for (int r = 0; r < rows; ++r) top[r] = V::largest(largest[r]);
    quantize_softmax(rows, top);
  }

  const int32_t* multiply_keys(int64_t column) {
    const int64_t block_bytes = layout.key_groups * kBlockBytes;
    const Blocks panel = {keys + column / 16 * block_bytes, block_bytes};
    const int blocks = static_cast<int>(least(kPanelBlocks, ceil_divide(a.columns - column, kBlockOutputs)));
    return product.scores(blocks, panel, key_offset + column, sums + column, layout.padded_columns);
  }

  // Keeps sums, from column c on, or makes scores of them.
  template <class U, class Most>
  MPTQC_INLINE void take_sums(const int32_t* from, int64_t row, int r, int64_t c, Most& largest) const {
    const auto sum = U::load(from);
    if constexpr (std::is_same_v<Most, I>) {
      if constexpr (!Product::kWritesSums) U::store(sums_of(r) + c, sum);
      keep_largest(largest, sum);
    } else {
      const float *bias = bias_rows.row(row + r), *mask = mask_rows.row(row + r);
      const int n = count<U>(c);
      auto score = score_of<U>(sum, r);
      if (bias != nullptr) score = U::add(score, U::load(bias + c, n));
      if (mask != nullptr) score = U::add(score, U::load(mask + c, n));
      if (n < U::kValues) score = U::add(score, U::load(beyond));
      U::store(scores_of(r) + c, score);
      keep_largest(largest, score);
    }
  }

  template <class U>
  MPTQC_INLINE typename U::F score_of(typename U::I sum, int r) const {
    if (signed_k_zero() != 0) sum = U::add(sum, U::set(row_offset[r]));
    return U::multiply(U::to_float(sum), U::set(a.score_scale));
  }

  AddendRows rows_of(const mptqc_addend& added, const AttentionPlace& place) const {
    if (added.data == nullptr) return {};
    const int64_t head = added.heads == 1 ? 0 : place.head, window = place.batch % added.windows;
    return {added.data + (window * added.heads + head) * added.rows * a.columns, added.rows == 1 ? 0 : a.columns};
  }

  static void start_largest(F& largest) { largest = V::set(kLowest); }
  static void start_largest(I& largest) { largest = V::set(INT32_MIN); }
  static void keep_largest(F& largest, F x) { largest = V::maximum(largest, x); }
  static void keep_largest(F& largest, typename L::F x) { largest.part[0] = L::maximum(largest.part[0], x); }
  static void keep_largest(I& largest, I x) { largest = V::maximum(largest, x); }
  static void keep_largest(I& largest, typename L::I x) { largest.part[0] = L::maximum(largest.part[0], x); }

  // A function of its own: the compiler keeps fewer vectors in registers in a larger one. Rows take each step in turn, so that
  // they wait for their sums across lanes together.
  template <class Top>
  __attribute__((noinline)) void quantize_softmax(int rows, const Top (&top)[kRows]) {
    float sum[kRows];
    F total[kRows];
    for (int r = 0; r < rows; ++r) {
      product.stay_awake();
      total[r] = a.row_scale ? quantize_powers(r, top[r]) : store_powers(r, top[r]);
    }
    for (int r = 0; r < rows; ++r) sum[r] = V::sum(total[r]);  // of powers, with row_scale of powers / probability.scale
    for (int r = 0; r < rows; ++r) {
      row_factor[r] = a.row_scale ? probability.inverse_scale / sum[r] : 1.0f;
      if (a.row_scale) continue;
      product.stay_awake();
      quantize_quotients(r, 1.0f / (sum[r] * probability.scale));
    }
    for (int r = 0; r < rows; ++r) code_sum[r] = signed_v_zero() == 0 ? 0 : L::sum_codes(codes_of(r), a.columns);
  }

  int32_t* sums_of(int r) const { return sums + r * layout.padded_columns; }
  float* scores_of(int r) const { return scores + r * layout.padded_columns; }
  uint8_t* codes_of(int r) const { return codes + r * layout.padded_columns; }

  // The largest power is 1, whatever their sum: the codes of P are made at once. Returns the sum of their quotients.
  template <class Top>
  MPTQC_INLINE F quantize_powers(int r, Top top) const {
    const auto q = probability;  // stores of codes cannot change a copy
    return powers(r, top, q.inverse_scale, [&](auto u, int64_t c, const auto& power) {
      using U = decltype(u);
      store_codes<U>(q, codes_of(r) + c, steps_of_product<U>(q, power.of_part, power.of_rest), U::kValues);
    });
  }

  // Scores become powers; returns their sum.
  template <class Top>
  MPTQC_INLINE F store_powers(int r, Top top) const {
    return powers(r, top, 1.0f, [&](auto u, int64_t c, const auto& power) {
      using U = decltype(u);
      U::store(scores_of(r) + c, U::multiply(power.of_part, power.of_rest));
    });
  }

  // Calls work(V or L, first column, factor * e^(score - top)) for all columns of a row; returns the sum of these. Those
  // beyond the last column are 2^-124 of the largest.
  template <class Top, class Work>
  MPTQC_INLINE F powers(int r, Top top, float factor, const Work& work) const {
    auto total = V::set(0.0f);
    const auto table = roots;  // here it can stay in registers, as no store may change it
    const float unit = std::is_same_v<Top, int32_t> ? a.score_scale : 1.0f;
    for_columns([&](auto u, int64_t c) {
      using U = decltype(u);
      const PowerOfE<U> power(table, below<U>(r, c, top), unit, factor);
      add_product(total, power.of_part, power.of_rest);
      work(u, c, power);
    });
    return total;
  }

  // The codes of quotient * power. Those beyond the last column are multiplied with values that are 0.
  MPTQC_INLINE void quantize_quotients(int r, float quotient) const {
    const auto q = probability;
    for_columns([&](auto u, int64_t c) {
      using U = decltype(u);
      const auto steps = steps_of_product<U>(q, U::load(scores_of(r) + c), U::set(quotient));
      store_codes<U>(q, codes_of(r) + c, steps, U::kValues);
    });
  }

  // How far scores, or sums, are from the largest of their row. What all sums of a row have in common does not count.
  template <class U>
  MPTQC_INLINE typename U::F below(int r, int64_t c, float top) const {
    return U::subtract(U::load(scores_of(r) + c), U::set(top));
  }
  template <class U>
  MPTQC_INLINE typename U::F below(int r, int64_t c, int32_t top) const {
    return U::to_float(U::add(U::load(sums_of(r) + c), U::set(-top)));
  }

  static void add_product(F& total, F x, F y) { total = V::multiply_add(x, y, total); }
  static void add_product(F& total, typename L::F x, typename L::F y) { total.part[0] = L::multiply_add(x, y, total.part[0]); }

  // How many of the values of a U from column c on there are.
  template <class U>
  int count(int64_t c) const { return static_cast<int>(least(U::kValues, a.columns - c)); }

  void write_context(int64_t batch, int64_t head, int64_t row, int rows) {
    const int64_t block_bytes = layout.value_groups * kBlockBytes;
    const Codes p = {codes, layout.padded_columns, round_up(a.columns, kBlockInputs)};
    for (int64_t column = 0; column < a.value_width; column += kPanel) {
      const int columns = static_cast<int>(least(kPanel, a.value_width - column));
      const int blocks = static_cast<int>(ceil_divide(columns, kBlockOutputs));
      const Blocks panel = {values + column / 16 * block_bytes, block_bytes};
      const int32_t* sum = product.context(rows, blocks, p, panel, value_offset + column);
      for (int r = 0; r < rows; ++r, sum += kPanel) {
        const int64_t to = ((batch * a.rows + row + r) * a.heads + head) * a.value_width + column;
        if (columns == kPanel) {
          write_row<V>(sum, r, to, columns);
          continue;
        }
        for (int c = 0; c < columns; c += kBlockOutputs) {
          write_row<L>(sum + c, r, to + c, static_cast<int>(least(kBlockOutputs, columns - c)));
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
