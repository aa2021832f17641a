// LayerNorm and quantizer, one row at a time: sum, sum of squared differences, result.
#pragma once

#include <cmath>

#include "quantizer.h"

namespace mptqc {

template <class L>
struct LayerNormTask {
  using F = typename L::F;
  const mptqc_layer_norm& a;
  Quantizer<L> quantizer;

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

  void normalize(const float* x, uint8_t* to) const {
    const float width = static_cast<float>(a.width);
    F total = L::set(0.0f);
    for (int64_t c = 0; c < a.width; c += 16) total = L::add(total, L::load(x + c, lanes(c)));
    const F mean = L::set(L::sum(total) / width);
    F squares = L::set(0.0f);
    for (int64_t c = 0; c < a.width; c += 16) {
      const F centred = L::subtract(L::load(x + c, lanes(c)), mean);
      const F kept = L::first(lanes(c), centred, L::set(0.0f));
      squares = L::multiply_add(kept, kept, squares);
    }
    const F factor = L::set(1.0f / std::sqrt(L::sum(squares) / width + a.epsilon));
    for (int64_t c = 0; c < a.width; c += 16) {
      const int n = lanes(c);
      const F normal = L::multiply(L::subtract(L::load(x + c, n), mean), factor);
      const F y = L::multiply_add(normal, L::load(a.gamma + c, n), L::load(a.beta + c, n));
      L::store_codes(to + c, quantizer.codes(y), n);
    }
  }

  int lanes(int64_t c) const { return static_cast<int>(least(16, a.width - c)); }
};

}  // namespace mptqc
