// Linear: a product, and on each tile while it is in the first cache: scale, bias, activation, residual, quantizer.
#pragma once

#include <algorithm>
#include <cmath>

#include "functions.h"
#include "product.h"
#include "quantizer.h"

namespace mptqc {

template <class L>
struct LinearTask {
  using V = Wide<L>;
  const mptqc_linear& a;
  Output output;
  const Tail* const tail;  // of the activation; null: there is none
  const TailTables<L> tables;
  float gelu_factor[kPanel];
  int32_t own_offset[kPanel];

  explicit LinearTask(const mptqc_linear& arguments)
      : a(arguments),
        output(arguments.quantizer, arguments.output),
        tail(tail_of(arguments.activation)),
        tables(tail) {}

  void run(int64_t task) {
    const int64_t panels = ceil_divide(a.outputs, kPanel), chunk = chunk_rows(a.rows);
    const int64_t first_column = task % panels * kPanel, first_row = task / panels * chunk;
    const int64_t end_row = least(first_row + chunk, a.rows);
    const int columns = static_cast<int>(least(kPanel, a.outputs - first_column));
    const int blocks = static_cast<int>(ceil_divide(columns, kBlockOutputs));
    const int64_t block_bytes = ceil_divide(a.inputs, kBlockInputs) * kBlockBytes;
    const Blocks weight = {a.weight + first_column / kBlockOutputs * block_bytes, block_bytes};
    const int64_t panel_bytes = kPanelBlocks * block_bytes;
    const bool fetch_next = first_column + kPanel < a.outputs && !Product<L>::fetches(panel_bytes);
    const int64_t fetch_bytes = fetch_next ? ceil_divide(panel_bytes, chunk) : 0;  // with each row
    const bool fetch_output = output_bytes() > kSecondCacheOutput;
    const int8_t* next = weight.data + panel_bytes;
    if (tail != nullptr) make_gelu_factor(first_column);
    const int32_t* offset = offset_of(weight, blocks, first_column);
    // The sums of one tile wait for their end until the next one is multiplied: the product does it in between.
    Product<L> product(a.span);
    Tile<Product<L>::kRows> tiles[2] = {};
    const Tile<Product<L>::kRows>* waiting = nullptr;
    int64_t waiting_row = 0;
    int waiting_rows = 0;
    const auto finish_part = [&](int part, int parts) {
      for (int r = waiting_rows * part / parts; r < waiting_rows * (part + 1) / parts; ++r) {
        finish(waiting->sum[r], target_row(waiting_row + r), first_column, columns);
        next = prefetch(next, fetch_bytes);
      }
    };
    for (int64_t row = first_row; row < end_row; row += Product<L>::kRows) {
      const int rows = static_cast<int>(least(Product<L>::kRows, end_row - row));
      const Codes input = {a.input + row * a.inputs, a.inputs, a.inputs};
      for (int r = 0; fetch_output && r < rows; ++r) prefetch_output(target_row(row + r) * a.outputs + first_column);
      auto& tile = tiles[waiting == tiles];
      product.multiply(rows, blocks, input, weight, offset, tile, finish_part);
      waiting = &tile;
      waiting_row = row;
      waiting_rows = rows;
    }
    finish_part(0, 1);
  }

  // The panel's offsets, with what the lanes take off codes given back.
  const int32_t* offset_of(Blocks w, int blocks, int64_t first_column) {
    if constexpr (L::kTaken == 0) return a.offset + first_column;
    for (int block = 0; block < blocks; ++block) {
      const auto sum = sums_of_block<L>(w.data + block * w.block_bytes, w.block_bytes / kBlockBytes);
      const auto offset = L::load(a.offset + first_column + 16 * block);
      L::store(own_offset + 16 * block, L::add(offset, L::shift_left(sum, 7)));
    }
    return own_offset;
  }

  // Outputs larger than this are not in the second cache when they are written.
  static constexpr int64_t kSecondCacheOutput = 512 << 10;

  int64_t output_bytes() const { return a.rows * a.outputs * (output.quantized ? 1 : 4); }

  // Asks for `bytes` bytes of the next panel to come into the second cache while this one is multiplied; returns their end.
  static const int8_t* prefetch(const int8_t* from, int64_t bytes) {
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + byte, 0, 2);
    return from + bytes;
  }

  // Asks for the kPanel outputs from element `index` on, and what is added to them.
  void prefetch_output(int64_t index) const {
    const char* data = static_cast<const char*>(output.data);
    if (output.quantized) return __builtin_prefetch(data + index, 1);
    for (int64_t i = index; i < index + kPanel; i += 16) {
      __builtin_prefetch(data + 4 * i, 1);
      if (a.residual != nullptr) __builtin_prefetch(a.residual + i);
    }
  }

  int64_t target_row(int64_t row) const { return row_in_table(row, a.table_size, a.table); }

  void finish(const int32_t* sum, int64_t row, int64_t column, int columns) const {
    const int64_t index = row * a.outputs + column;
    const auto sums = V::to_float(V::load(sum)), scale = V::load(a.scale + column), bias = V::load(a.bias + column);
    if (tail != nullptr) return finish_gelu(V::multiply_add(sums, scale, bias), index, columns);
    auto y = V::add(V::multiply(sums, scale), bias);
    if (a.unit_heads.width != 0) y = unit_heads(y);
    if (a.multiplier != nullptr) y = V::multiply(y, V::load(a.multiplier + column));
    if (a.factor != nullptr) y = V::multiply(y, V::load(a.factor + index, columns));
    if (a.rotary.cosine != nullptr) y = rotate(y, row, column);
    if (a.residual != nullptr) y = V::add(y, V::load(a.residual + index, columns));
    write<V>(output, index, y, columns);
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

  MPTQC_INLINE void finish_gelu(typename V::F x, int64_t index, int columns) const {
    auto y = V::multiply(gelu<V>(*tail, tables.segments, x), V::load(gelu_factor));
    if (a.residual != nullptr) y = V::add(y, V::load(a.residual + index, columns));
    if (!output.quantized) return V::store(static_cast<float*>(output.data) + index, y, columns);
    const auto& q = output.quantizer;
    const auto steps = gelu_is_quantized() ? steps_of_quotient<V>(q, y) : steps_near<V>(q, y);
    store_codes<V>(q, static_cast<uint8_t*>(output.data) + index, steps, columns);
  }

  // Whether nothing but a factor comes between GELU and the quantizer.
  bool gelu_is_quantized() const { return output.quantized && a.residual == nullptr; }

  // What is multiplied with GELU: its multiplier, and the quantizer's inverse scale if that comes next.
  void make_gelu_factor(int64_t first_column) {
    for (int64_t c = 0; c < kPanel; ++c) {
      gelu_factor[c] = a.multiplier != nullptr ? a.multiplier[first_column + c] : 1.0f;
      if (gelu_is_quantized()) gelu_factor[c] *= output.quantizer.inverse_scale;
    }
  }
};

}  // namespace mptqc
