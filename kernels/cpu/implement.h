// The table of kernels of one Lanes type.
#pragma once

#include "attention.h"
#include "implementation.h"
#include "layer_norm.h"
#include "linear.h"
#include "patches.h"
#include "trellis.h"

namespace mptqc {

template <class L>
struct Kernels {
  static void layer_norm(const mptqc_layer_norm& a, int64_t task) { LayerNormTask<L>(a).run(task); }
  static void layer_norm_add(const mptqc_layer_norm_add& a, int64_t task) { LayerNormAddTask<L>(a).run(task); }
  static void linear(const mptqc_linear& a, int64_t task) { LinearTask<L>(a).run(task); }
  static void attention(const mptqc_attention& a, int64_t task, uint8_t* scratch) {
    AttentionTask<L>(a, scratch).run(task);
  }
  static void patches(const mptqc_patches& a, int64_t task) { PatchesTask<L>(a).run(task); }
  static void trellis(const mptqc_trellis& a, int64_t task, uint8_t* scratch) { run_trellis(a, task, scratch); }

  static constexpr Implementation table() { return {layer_norm, layer_norm_add, linear, attention, patches, trellis}; }
};

}  // namespace mptqc
