// LayerNorm and quantizer, one row at a time: sum, sum of squared differences, result.
#pragma once

#include <cmath>

#include "quantizer.h"

namespace mptqc {

template <class L>
struct LayerNormTask {
  using F = typename L::F;
  const mptqc_layer_norm& a;
  QuantizerConstants quantizer;

  explicit LayerNormTask(const mptqc_layer_norm& arguments) : a(arguments), quantizer(arguments.quantizer) {}

  void run(int64_t task) const {
    const int64_t first = task * kLayerNormRows, end = least(first + kLayerNormRows, a.rows);
    for (int64_t row = first; row < end; ++row) {
      normalize(a.input + source_row(row) * a.width, a.output + row * a.width);
    }
  }

  int64_t source_row(int64_t row) const {
    if (a.table_size == 0) return row;
    return row - row % a.table_size + a.table[row % a.table_size];
  }

  // Sums are taken in four vectors, whose order does not depend on the instruction set.
  void normalize(const float* x, uint8_t* to) const {
    const float width = static_cast<float>(a.width);
    F total[kPanelBlocks], squares[kPanelBlocks];
    MPTQC_UNROLL
    for (int i = 0; i < kPanelBlocks; ++i) total[i] = squares[i] = L::set(0.0f);
    for (int64_t c = 0; c < a.width; c += kPanel) {
      MPTQC_UNROLL
      for (int i = 0; i < kPanelBlocks; ++i) {
        if (c + 16 * i < a.width) total[i] = L::add(total[i], part(x, c + 16 * i));
      }
    }
    const float mean = sum(total) / width;
    for (int64_t c = 0; c < a.width; c += kPanel) {
      MPTQC_UNROLL
      for (int i = 0; i < kPanelBlocks; ++i) {
        if (c + 16 * i >= a.width) break;
        const F centred = L::subtract(part(x, c + 16 * i), L::set(mean));
        const F kept = L::first(lanes(c + 16 * i), centred, L::set(0.0f));
        squares[i] = L::multiply_add(kept, kept, squares[i]);
      }
    }
    const float factor = 1.0f / std::sqrt(sum(squares) / width + a.epsilon);
    int64_t c = 0;
    for (; c + kPanel <= a.width; c += kPanel) {
      using W = Wide<L>;
      const auto normal = W::multiply(W::subtract(W::load(x + c), W::set(mean)), W::set(factor));
      const auto y = W::multiply_add(normal, W::load(a.gamma + c), W::load(a.beta + c));
      W::store_codes(to + c, codes_of<W>(quantizer, y));
    }
    for (; c < a.width; c += 16) {
      const F normal = L::multiply(L::subtract(part(x, c), L::set(mean)), L::set(factor));
      const F y = L::multiply_add(normal, part(a.gamma, c), part(a.beta, c));
      L::store_codes(to + c, codes_of<L>(quantizer, y), lanes(c));
    }
  }

  int lanes(int64_t c) const { return static_cast<int>(least(16, a.width - c)); }
  F part(const float* x, int64_t c) const { return L::load(x + c, lanes(c)); }

  static float sum(const F (&parts)[kPanelBlocks]) {
    return L::sum(L::add(L::add(parts[0], parts[1]), L::add(parts[2], parts[3])));
  }
};

}  // namespace mptqc
