// Linear: a product, and on each tile while it is in the first cache: scale, bias, activation, residual, quantizer.
#pragma once

#include "functions.h"
#include "product.h"
#include "quantizer.h"

namespace mptqc {

template <class L>
struct LinearTask {
  using V = Wide<L>;
  const mptqc_linear& a;
  Output output;

  explicit LinearTask(const mptqc_linear& arguments) : a(arguments), output(arguments.quantizer, arguments.output) {}

  void run(int64_t task) const {
    const int64_t panels = ceil_divide(a.outputs, kPanel), chunk = chunk_rows(a.rows);
    const int64_t first_column = task % panels * kPanel, first_row = task / panels * chunk;
    const int64_t end_row = least(first_row + chunk, a.rows);
    const int columns = static_cast<int>(least(kPanel, a.outputs - first_column));
    const int blocks = static_cast<int>(ceil_divide(columns, kBlockOutputs));
    const int64_t block_bytes = ceil_divide(a.inputs, kBlockInputs) * kBlockBytes;
    const Blocks weight = {a.weight + first_column / kBlockOutputs * block_bytes, block_bytes};
    const int64_t panel_bytes = kPanelBlocks * block_bytes;
    // A panel that does not stay in the first cache is asked for by the product itself.
    const bool fetch_next = first_column + kPanel < a.outputs && panel_bytes <= kFirstCachePanel;
    const bool fetch_output = output_bytes() > kSecondCacheOutput;
    const int8_t* next = weight.data + panel_bytes;
    Product<L> product;
    Tile<Product<L>::kRows> tile = {};
    for (int64_t row = first_row; row < end_row; row += Product<L>::kRows) {
      const int rows = static_cast<int>(least(Product<L>::kRows, end_row - row));
      const Codes input = {a.input + row * a.inputs, a.inputs, a.inputs};
      if (fetch_next) next = prefetch(next, panel_bytes * Product<L>::kRows / chunk);
      for (int r = 0; fetch_output && r < rows; ++r) prefetch_output(target_row(row + r) * a.outputs + first_column);
      product.multiply(rows, blocks, input, weight, a.offset + first_column, tile);
      for (int r = 0; r < rows; ++r) finish(tile.sum[r], target_row(row + r), first_column, columns);
    }
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

  int64_t target_row(int64_t row) const {
    if (a.table_size == 0) return row;
    return row - row % a.table_size + a.table[row % a.table_size];
  }

  void finish(const int32_t* sum, int64_t row, int64_t column, int columns) const {
    const int64_t index = row * a.outputs + column;
    auto y = V::multiply(V::to_float(V::load(sum)), V::load(a.scale + column));
    y = V::add(y, V::load(a.bias + column));
    if (a.activation == MPTQC_GELU) y = gelu<V>(y);
    if (a.multiplier != nullptr) y = V::multiply(y, V::load(a.multiplier + column));
    if (a.residual != nullptr) y = V::add(y, V::load(a.residual + index, columns));
    write<V>(output, index, y, columns);
  }
};

}  // namespace mptqc
