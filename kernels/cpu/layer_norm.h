// LayerNorm and what an operator makes of it, a few rows at a time: sum, sum of squared differences, result.
#pragma once

#include <cmath>

#include "quantizer.h"

namespace mptqc {

// The part that both operators have; A is the record of one.
template <class L, class A>
struct LayerNormRows {
  using V = Wide<L>;
  const A& a;

  // Calls write(x, mean, factor, row) for each output row of a task: `value` then gives what the norm makes of x.
  template <class Write>
  void run(int64_t task, const Write& write) const {
    const NormPlace place(a.rows, task);
    for (int64_t row = place.first_row; row < place.end_row; row += kTogether) {
      normalize(row, static_cast<int>(least(kTogether, place.end_row - row)), write);
    }
  }

  // Rows take each step in turn, so that they wait for their sums across lanes together.
  static constexpr int kTogether = 8;

  template <class Write>
  void normalize(int64_t row, int rows, const Write& write) const {
    const float width = static_cast<float>(a.width);
    const float* x[kTogether];
    typename V::F total[kTogether];
    float mean[kTogether], factor[kTogether];
    for (int r = 0; r < rows; ++r) x[r] = a.input + row_in_table(row + r, a.table_size, a.table) * a.width;
    for (int r = 0; r < rows; ++r) total[r] = sum(x[r]);
    for (int r = 0; r < rows; ++r) mean[r] = V::sum(total[r]) / width;
    for (int r = 0; r < rows; ++r) total[r] = sum_of_squares(x[r], mean[r]);
    for (int r = 0; r < rows; ++r) factor[r] = 1.0f / std::sqrt(V::sum(total[r]) / width + a.epsilon);
    for (int r = 0; r < rows; ++r) write(x[r], mean[r], factor[r], row + r);
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

  // Of the channels from c on.
  typename V::F value(const float* x, float mean, float factor, int64_t c) const {
    const int n = count(c);
    const auto normal = V::multiply(V::subtract(V::load(x + c, n), V::set(mean)), V::set(factor));
    return V::multiply_add(normal, V::load(a.gamma + c, n), V::load(a.beta + c, n));
  }

  // How many of the kPanel channels from c on there are.
  int count(int64_t c) const { return static_cast<int>(least(kPanel, a.width - c)); }
};

template <class L>
struct LayerNormTask {
  using V = Wide<L>;
  const mptqc_layer_norm& a;
  const LayerNormRows<L, mptqc_layer_norm> norm;
  const QuantizerConstants quantizer;

  explicit LayerNormTask(const mptqc_layer_norm& arguments)
      : a(arguments), norm{arguments}, quantizer(arguments.quantizer) {}

  void run(int64_t task) const {
    norm.run(task, [this](const float* x, float mean, float factor, int64_t row) {
      uint8_t* to = a.output + row * a.width;
      for (int64_t c = 0; c < a.width; c += kPanel) {
        store_codes<V>(quantizer, to + c, steps_near<V>(quantizer, norm.value(x, mean, factor, c)), norm.count(c));
      }
    });
  }
};

// The codes are exactly those of the float32 sum that is written.
template <class L>
struct LayerNormAddTask {
  using V = Wide<L>;
  const mptqc_layer_norm_add& a;
  const LayerNormRows<L, mptqc_layer_norm_add> norm;
  const Output codes;

  explicit LayerNormAddTask(const mptqc_layer_norm_add& arguments)
      : a(arguments), norm{arguments}, codes(arguments.quantizer, arguments.codes) {}

  void run(int64_t task) const {
    norm.run(task, [this](const float* x, float mean, float factor, int64_t row) {
      const int64_t first = row * a.width, first_code = row_in_table(row, a.code_table_size, a.code_table) * a.width;
      for (int64_t c = 0; c < a.width; c += kPanel) {
        const int n = norm.count(c);
        auto y = norm.value(x, mean, factor, c);
        if (a.residual != nullptr) y = V::add(y, V::load(a.residual + first + c, n));
        V::store(a.output + first + c, y, n);
        if (codes.quantized) write<V>(codes, first_code + c, y, n);
      }
    });
  }
};

}  // namespace mptqc
