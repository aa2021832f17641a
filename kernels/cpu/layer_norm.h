// LayerNorm and quantizer, a few rows at a time: sum, sum of squared differences, result.
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
    for (int64_t row = first; row < end; row += kTogether) {
      normalize(row, static_cast<int>(least(kTogether, end - row)));
    }
  }

  // Rows take each step in turn, so that they wait for their sums across lanes together.
  static constexpr int kTogether = 4;

  void normalize(int64_t row, int rows) const {
    const float width = static_cast<float>(a.width);
    const float* x[kTogether];
    typename V::F total[kTogether];
    float mean[kTogether], factor[kTogether];
    for (int r = 0; r < rows; ++r) x[r] = a.input + source_row(row + r) * a.width;
    for (int r = 0; r < rows; ++r) total[r] = sum(x[r]);
    for (int r = 0; r < rows; ++r) mean[r] = V::sum(total[r]) / width;
    for (int r = 0; r < rows; ++r) total[r] = sum_of_squares(x[r], mean[r]);
    for (int r = 0; r < rows; ++r) factor[r] = 1.0f / std::sqrt(V::sum(total[r]) / width + a.epsilon);
    for (int r = 0; r < rows; ++r) write(x[r], mean[r], factor[r], a.output + (row + r) * a.width);
  }

  int64_t source_row(int64_t row) const {
    if (a.table_size == 0) return row;
    return row - row % a.table_size + a.table[row % a.table_size];
  }

  typename V::F sum(const float* x) const {
    auto total = V::set(0.0f);
    for (int64_t c = 0; c < a.width; c += kPanel) total = V::add(total, V::load(x + c, count(c)));
    return total;
  }

  typename V::F sum_of_squares(const float* x, float mean) const {
    auto total = V::set(0.0f);
    for (int64_t c = 0; c < a.width; c += kPanel) {
      const auto centred = V::subtract(V::load(x + c, count(c)), V::set(mean));
      const auto kept = V::first(count(c), centred, V::set(0.0f));
      total = V::multiply_add(kept, kept, total);
    }
    return total;
  }

  void write(const float* x, float mean, float factor, uint8_t* to) const {
    for (int64_t c = 0; c < a.width; c += kPanel) {
      const int n = count(c);
      const auto normal = V::multiply(V::subtract(V::load(x + c, n), V::set(mean)), V::set(factor));
      const auto y = V::multiply_add(normal, V::load(a.gamma + c, n), V::load(a.beta + c, n));
      store_codes<V>(quantizer, to + c, steps_near<V>(quantizer, y), n);
    }
  }

  // How many of the kPanel channels from c on there are.
  int count(int64_t c) const { return static_cast<int>(least(kPanel, a.width - c)); }
};

}  // namespace mptqc
