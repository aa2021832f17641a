// What a Wide covers of a tile: one row of a panel, or two rows of half a panel.
#pragma once

#include <cstring>

#include "quantizer.h"

namespace mptqc {

template <class L, int Columns>
struct Strip {
  using V = Wide<L>;
  static constexpr int kRows = static_cast<int>(kPanel) / Columns, kRowParts = Columns / 16;

  int rows, columns;     // how many there are
  int64_t index[kRows];  // of the first output of each row; that of a row which is not there is another's

  // One value for each column.
  static typename V::F of_columns(const float* values) {
    typename V::F out;
    MPTQC_UNROLL
    for (int i = 0; i < V::kParts; ++i) out.part[i] = L::load(values + 16 * (i % kRowParts));
    return out;
  }

  typename V::F load(const float* from) const {
    if constexpr (kRows == 1) return V::load(from + index[0], columns);
    typename V::F out;
    MPTQC_UNROLL
    for (int i = 0; i < V::kParts; ++i) {
      const float* row = from + index[i / kRowParts];
      const int c = 16 * (i % kRowParts);
      out.part[i] = columns == Columns ? L::load(row + c)
                    : columns > c      ? L::load(row + c, V::lanes(columns - c, 0))
                                       : L::set(0.0f);
    }
    return out;
  }

  void store(float* to, typename V::F y) const {
    if constexpr (kRows == 1) return V::store(to + index[0], y, columns);
    MPTQC_UNROLL
    for (int i = 0; i < V::kParts; ++i) {
      float* row = to + index[i / kRowParts];
      const int c = 16 * (i % kRowParts);
      if (i / kRowParts >= rows) return;
      if (columns == Columns) {
        L::store(row + c, y.part[i]);
      } else if (columns > c) {
        L::store(row + c, y.part[i], V::lanes(columns - c, 0));
      }
    }
  }

  void store_codes(const QuantizerConstants& q, uint8_t* to, typename V::I steps) const {
    if constexpr (kRows == 1) return mptqc::store_codes<V>(q, to + index[0], steps, columns);
    alignas(64) uint8_t codes[kPanel];
    mptqc::store_codes<V>(q, codes, steps, kPanel);
    for (int r = 0; r < rows; ++r) {
      if (columns == Columns) {
        std::memcpy(to + index[r], codes + Columns * r, Columns);
      } else {
        std::memcpy(to + index[r], codes + Columns * r, columns);
      }
    }
  }

  void write(const Output& output, typename V::F y) const {
    if (!output.quantized) return store(static_cast<float*>(output.data), y);
    store_codes(output.quantizer, static_cast<uint8_t*>(output.data), steps_of<V>(output.quantizer, y));
  }
};

}  // namespace mptqc
