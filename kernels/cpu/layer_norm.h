// LayerNorm and quantizer, one row at a time: sum, sum of squared differences, result.
#pragma once

#include <cmath>

#include "quantizer.h"

namespace mptqc {

template <class L>
struct LayerNormTask {
  using V = Wide<L>;
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

  void normalize(const float* x, uint8_t* to) const {
    const float width = static_cast<float>(a.width);
    auto total = V::set(0.0f);
    for (int64_t c = 0; c < a.width; c += kPanel) total = V::add(total, V::load(x + c, count(c)));
    const auto mean = V::set(V::sum(total) / width);
    auto squares = V::set(0.0f);
    for (int64_t c = 0; c < a.width; c += kPanel) {
      const auto centred = V::subtract(V::load(x + c, count(c)), mean);
      const auto kept = V::first(count(c), centred, V::set(0.0f));
      squares = V::multiply_add(kept, kept, squares);
    }
    const auto factor = V::set(1.0f / std::sqrt(V::sum(squares) / width + a.epsilon));
    for (int64_t c = 0; c < a.width; c += kPanel) {
      const int n = count(c);
      const auto normal = V::multiply(V::subtract(V::load(x + c, n), mean), factor);
      const auto y = V::multiply_add(normal, V::load(a.gamma + c, n), V::load(a.beta + c, n));
      store_codes<V>(quantizer, to + c, steps_near<V>(quantizer, y), n);
    }
  }

  // How many of the kPanel channels from c on there are.
  int count(int64_t c) const { return static_cast<int>(least(kPanel, a.width - c)); }
};

}  // namespace mptqc
