// System headers come first: what they define must not be compiled for this file's instruction set.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#include "implement.h"
#include "product_avx2.h"

namespace mptqc {
namespace {

void linear_avx2(const mptqc_linear& a, int64_t task) {
  const int64_t groups = groups_in_16_bits(a.largest_weight);
  if (groups >= kLeastGroups) return LinearTask<LanesAvx2Low>(a).run(task);
  if (groups > 0) return LinearTask<LanesAvx2Narrow>(a).run(task);
  LinearTask<LanesAvx2>(a).run(task);
}

}  // namespace

const Implementation kAvx2 = {Kernels<LanesAvx2>::layer_norm, linear_avx2, Kernels<LanesAvx2>::attention,
                              Kernels<LanesAvx2>::patches, Kernels<LanesAvx2>::trellis};
}  // namespace mptqc

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
