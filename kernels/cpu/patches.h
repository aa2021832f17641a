// Quantizer and disjoint patches: one row of patches of one image a task.
#pragma once

#include "quantizer.h"

namespace mptqc {

template <class L>
struct PatchesTask {
  const mptqc_patches& a;
  QuantizerConstants quantizer;

  explicit PatchesTask(const mptqc_patches& arguments) : a(arguments), quantizer(arguments.quantizer) {}

  void run(int64_t task) const {
    const int64_t down = a.height / a.patch_height, across = a.width / a.patch_width;
    const int64_t image = task / down, i = task % down;
    const int64_t patch_size = a.channels * a.patch_height * a.patch_width;
    for (int64_t c = 0; c < a.channels; ++c) {
      for (int64_t p = 0; p < a.patch_height; ++p) {
        const float* x = a.input + ((image * a.channels + c) * a.height + i * a.patch_height + p) * a.width;
        uint8_t* to = a.output + task * across * patch_size + (c * a.patch_height + p) * a.patch_width;
        for (int64_t j = 0; j < across; ++j) quantize_run(x + j * a.patch_width, to + j * patch_size);
      }
    }
  }

  // A patch is rarely wider than a vector: Wide would waste most of its work.
  void quantize_run(const float* x, uint8_t* to) const {
    for (int64_t q = 0; q < a.patch_width; q += 16) {
      const int n = static_cast<int>(least(16, a.patch_width - q));
      store_codes<L>(quantizer, to + q, steps_of<L>(quantizer, L::load(x + q, n)), n);
    }
  }
};

}  // namespace mptqc
