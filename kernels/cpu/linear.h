// Linear: a product, and on each tile while it is in the first cache: scale, bias, activation, residual, quantizer.
#pragma once

#include <algorithm>
#include <cmath>

#include "functions.h"
#include "product.h"
#include "quantizer.h"
#include "strip.h"

namespace mptqc {

template <class L>
struct LinearTask {
  using V = Wide<L>;
  const mptqc_linear& a;
  Output output;
  const Tail* const tail;  // of the activation; null: there is none
  const TailTables<L> tables;
  // Of the panel, on cache lines.
  alignas(64) int32_t offset[kPanel];
  alignas(64) float scale[kPanel], bias[kPanel];
  alignas(64) float factor[kPanel];  // of an activation: its multiplier, and the quantizer's inverse scale if that is next

  explicit LinearTask(const mptqc_linear& arguments)
      : a(arguments),
        output(arguments.quantizer, arguments.output),
        tail(tail_of(arguments.activation)),
        tables(tail) {}

  // What comes behind the product. Frequent ends have code of their own, that finds all it needs in registers.
  enum class End { kCodes, kFloats, kActivationCodes, kAny };

  End end() const {
    if (a.unit_heads.width != 0 || a.factor != nullptr || a.rotary.cosine != nullptr) return End::kAny;
    if (tail != nullptr) return activation_is_quantized() ? End::kActivationCodes : End::kAny;
    if (a.multiplier != nullptr) return End::kAny;
    return !output.quantized ? End::kFloats : a.residual == nullptr ? End::kCodes : End::kAny;
  }

  void run(int64_t task) {
    constexpr int columns = Product<L>::kColumns;
    const End kind = end();
    const LinearPlace place(a, task);
    load_panel(place.first_column);
    switch (kind) {
      case End::kCodes:
        if (!steps_fit()) break;
        return run_tiles<End::kCodes, columns>(place);
      case End::kFloats:
        return run_tiles<End::kFloats, columns>(place);
      case End::kActivationCodes:
        if (!can_round_by_adding()) break;
        return run_tiles<End::kActivationCodes, columns>(place);
      case End::kAny:
        break;
    }
    run_tiles<End::kAny, kPanel>(place);  // heads may be as wide as a panel
  }

  // The sums of one tile wait for their end until the next one is multiplied: the product does it in between.
  template <int Columns>
  struct Waiting {
    const Tile<Product<L>::kRows, Columns>* tile = nullptr;
    int64_t row = 0, column = 0;  // of its first sum, in the output
    int next = 0, end = 0, columns = 0;  // the rows that wait
    int strips = 0, credit = 0;  // what each part of a product adds to the credit; a strip costs as much as there are parts
  };

  template <End kEnd, int Columns>
  void run_tiles(const LinearPlace& place) {
    using Rows = Strip<L, Columns>;
    const int64_t block_bytes = ceil_divide(a.inputs, kBlockInputs) * kBlockBytes;
    const Blocks panel = {a.weight + place.first_column / kBlockOutputs * block_bytes, block_bytes};
    const int panel_blocks = static_cast<int>(ceil_divide(place.columns, kBlockOutputs));
    give_back_what_is_taken(panel, panel_blocks);
    const int64_t next_block = (place.first_column + Columns) / kBlockOutputs;
    const int64_t blocks_behind = ceil_divide(a.outputs, kBlockOutputs) - next_block;
    const bool fetch_next = blocks_behind > 0 && !Product<L>::fetches(panel_blocks * block_bytes);
    const int64_t strips = ceil_divide(place.end_row - place.first_row, Rows::kRows) * ceil_divide(place.columns, Columns);
    const int64_t fetch_blocks = fetch_next ? least(panel_blocks, blocks_behind) : 0;
    const int64_t fetch_bytes = ceil_divide(fetch_blocks * block_bytes, strips);  // with each strip
    const bool fetch_output = output_bytes() > kSecondCacheOutput;
    const int8_t* next = a.weight + next_block * block_bytes;
    const Ends<kEnd> ends(*this);
    Product<L> product(a.span);
    Tile<Product<L>::kRows, Columns> tiles[2];
    Waiting<Columns> waiting;
    const auto finish_part = [&](int parts) __attribute__((noinline)) {
      const auto own = ends;
      for (waiting.credit += waiting.strips; waiting.credit >= parts; waiting.credit -= parts) {
        const int r = waiting.next;
        Rows strip = {static_cast<int>(least(Rows::kRows, waiting.end - r)), waiting.columns, {}};
        for (int i = 0; i < Rows::kRows; ++i) {
          strip.index[i] = i < strip.rows ? target_row(waiting.row + r + i) * a.outputs + waiting.column : strip.index[0];
        }
        own.template finish<Rows>(strip, waiting.tile->sum[r], waiting.row + r, waiting.column);
        waiting.next += Rows::kRows;
        next = prefetch(next, fetch_bytes);
      }
    };
    for (int first = 0; first < place.columns; first += Columns) {
      const int columns = static_cast<int>(least(Columns, place.columns - first));
      const int blocks = static_cast<int>(ceil_divide(columns, kBlockOutputs));
      const int64_t column = place.first_column + first;
      const Blocks weight = {panel.data + first / kBlockOutputs * block_bytes, block_bytes};
      for (int64_t row = place.first_row; row < place.end_row; row += Product<L>::kRows) {
        const int rows = static_cast<int>(least(Product<L>::kRows, place.end_row - row));
        const RowWindow window(row, rows, Product<L>::window(rows), a.rows);
        const Codes input = {a.input + window.first * a.inputs, a.inputs, a.inputs};
        for (int r = 0; fetch_output && r < rows; ++r) prefetch_output(target_row(row + r) * a.outputs + column, columns);
        auto& tile = tiles[waiting.tile == tiles];
        product.multiply(window.rows, blocks, input, weight, offset + column % kPanel, tile, finish_part);
        const int above = static_cast<int>(row - window.first), strips = static_cast<int>(ceil_divide(rows, Rows::kRows));
        waiting = {&tile, window.first, column, above, above + rows, columns, strips, 0};
      }
    }
    finish_part(1);
  }

  // The panel's constants, from column `first` on.
  void load_panel(int64_t first) {
    std::memcpy(offset, a.offset + first, sizeof offset);
    std::memcpy(scale, a.scale + first, sizeof scale);
    std::memcpy(bias, a.bias + first, sizeof bias);
    for (int64_t c = 0; tail != nullptr && c < kPanel; ++c) {
      factor[c] = a.multiplier != nullptr ? a.multiplier[first + c] : 1.0f;
      if (activation_is_quantized()) factor[c] *= output.quantizer.inverse_scale;
    }
  }

  // What the lanes take off codes.
  void give_back_what_is_taken(Blocks w, int blocks) {
    if constexpr (L::kTaken == 0) return;
    int32_t sums[kPanel];
    sums_of_blocks<L>(w, blocks, w.block_bytes / kBlockBytes, sums);
    for (int c = 0; c < 16 * blocks; ++c) offset[c] += sums[c] << 7;
  }

  // Outputs larger than this are not in the second cache when they are written.
  static constexpr int64_t kSecondCacheOutput = 512 << 10;

  int64_t output_bytes() const { return a.rows * a.outputs * (output.quantized ? 1 : 4); }

  // Asks for `bytes` bytes of what is multiplied next to come into the second cache; returns their end.
  static const int8_t* prefetch(const int8_t* from, int64_t bytes) {
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + byte, 0, 2);
    return from + bytes;
  }

  // Asks for so many outputs from element `index` on, and what is added to them.
  void prefetch_output(int64_t index, int columns) const {
    const char* data = static_cast<const char*>(output.data);
    if (output.quantized) return __builtin_prefetch(data + index, 1);
    for (int64_t i = index; i < index + columns; i += 16) {
      __builtin_prefetch(data + 4 * i, 1);
      if (a.residual != nullptr) __builtin_prefetch(a.residual + i);
    }
  }

  int64_t target_row(int64_t row) const { return row_in_table(row, a.table_size, a.table); }

  // Makes the outputs of a strip of sums. A copy of what it takes: stores of codes may change anything else.
  template <End kEnd>
  struct Ends {
    const LinearTask& task;
    const Output output;
    const float* const residual;
    const Tail tail;
    const TailTables<L> tables;

    explicit Ends(const LinearTask& from)
        : task(from), output(from.output), residual(from.a.residual),
          tail(kEnd == End::kActivationCodes ? *from.tail : Tail{}), tables(from.tables) {}

    template <class Rows>
    MPTQC_INLINE void finish(const Rows& strip, const int32_t* sum, int64_t row, int64_t column) const {
      const int64_t c = column % kPanel;
      const auto sums = V::to_float(V::load(sum));
      const auto scale = Rows::of_columns(task.scale + c), bias = Rows::of_columns(task.bias + c);
      if constexpr (kEnd == End::kAny) {
        task.finish_any(strip, sums, scale, bias, row, column);
      } else if constexpr (kEnd == End::kActivationCodes) {
        const auto y = gelu<V>(tail, tables.segments, V::multiply_add(sums, scale, bias));
        const auto steps = steps_of_product<V>(output.quantizer, y, Rows::of_columns(task.factor + c));
        strip.store_codes(output.quantizer, static_cast<uint8_t*>(output.data), steps);
      } else {
        auto y = V::add(V::multiply(sums, scale), bias);
        if constexpr (kEnd == End::kCodes) {
          strip.store_codes(output.quantizer, static_cast<uint8_t*>(output.data), steps_of_unheld<V>(output.quantizer, y));
        } else {
          if (residual != nullptr) y = V::add(y, strip.load(residual));
          strip.store(static_cast<float*>(output.data), y);
        }
      }
    }
  };

  template <class Rows>
  void finish_any(
      const Rows& strip, typename V::F sums, typename V::F scale, typename V::F bias, int64_t row, int64_t column) const {
    if (tail != nullptr) return finish_activation(strip, V::multiply_add(sums, scale, bias), column % kPanel);
    auto y = V::add(V::multiply(sums, scale), bias);
    if (a.unit_heads.width != 0) y = unit_heads(y);
    if (a.multiplier != nullptr) y = V::multiply(y, Rows::of_columns(a.multiplier + column));
    if (a.factor != nullptr) y = V::multiply(y, strip.load(a.factor));
    if (a.rotary.cosine != nullptr) y = rotate(y, row, column);
    if (a.residual != nullptr) y = V::add(y, strip.load(a.residual));
    strip.write(output, y);
  }

  // A panel holds whole heads of one, two or four vectors; what is beyond the last output is 0.
  typename V::F unit_heads(typename V::F y) const {
    const int vectors = static_cast<int>(a.unit_heads.width / 16);
    for (int first = 0; first < kPanelBlocks; first += vectors) {
      auto squares = L::multiply(y.part[first], y.part[first]);
      for (int i = first + 1; i < first + vectors; ++i) squares = L::add(squares, L::multiply(y.part[i], y.part[i]));
      const auto inverse = L::set(1.0f / std::max(std::sqrt(L::sum(squares)), a.unit_heads.epsilon));
      for (int i = first; i < first + vectors; ++i) y.part[i] = L::multiply(y.part[i], inverse);
    }
    return y;
  }

  // Heads are powers of two that divide a panel: the partner of an output is half a head away, up or down.
  typename V::F rotate(typename V::F y, int64_t row, int64_t column) const {
    const int64_t entry = row % a.rotary.tokens * a.rotary.columns + column % a.rotary.columns;
    const int half = static_cast<int>(a.rotary.width / 2);
    alignas(64) float own[kPanel], partner[kPanel];
    V::store(own, y);
    if (half >= 16) {
      for (int c = 0; c < kPanel; c += 16) L::store(partner + c, L::load(own + (c ^ half)));
    } else {
      for (int c = 0; c < kPanel; ++c) partner[c] = own[c ^ half];
    }
    const auto rotated = V::multiply(V::load(partner), V::load(a.rotary.sine + entry));
    return V::add(V::multiply(y, V::load(a.rotary.cosine + entry)), rotated);
  }

  template <class Rows>
  MPTQC_INLINE void finish_activation(const Rows& strip, typename V::F x, int64_t first_factor) const {
    const auto activation = gelu<V>(*tail, tables.segments, x), factors = Rows::of_columns(factor + first_factor);
    const auto& q = output.quantizer;
    uint8_t* codes = static_cast<uint8_t*>(output.data);
    auto y = V::multiply(activation, factors);
    if (activation_is_quantized()) return strip.store_codes(q, codes, steps_of_quotient<V>(q, y));
    if (a.residual != nullptr) y = V::add(y, strip.load(a.residual));
    if (!output.quantized) return strip.store(static_cast<float*>(output.data), y);
    strip.store_codes(q, codes, steps_near<V>(q, y));
  }

  // Whether nothing but a factor comes between the activation and the quantizer.
  bool activation_is_quantized() const { return output.quantized && a.residual == nullptr; }

  // Whether the steps of all outputs fit 32 bits, whatever the codes.
  bool steps_fit() const {
    const float largest_sum = static_cast<float>(a.inputs) * (255 * 128), most = 0x1p30f * output.quantizer.scale;
    bool fit = true;
    for (int c = 0; c < kPanel; ++c) fit &= std::fabs(scale[c]) * largest_sum + std::fabs(bias[c]) < most;
    return fit;
  }

  // Whether no activation times its factor is too low for steps_of_product, which takes what is above -2^22.
  bool can_round_by_adding() const {
    constexpr float kMost = -4194304.0f / kLowestActivation;
    bool can = true;
    for (const float each : factor) can &= each >= 0.0f && each < kMost;
    return can;
  }
};

}  // namespace mptqc
