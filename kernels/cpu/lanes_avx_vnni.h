// Sixteen lanes in two AVX2 registers; products by the VNNI of processors without AVX-512.
#pragma once

#include "lanes_avx2.h"

namespace mptqc {
namespace {

struct LanesAvxVnni : LanesAvx2Bytes {
  static I dot(I sum, Inputs a, Weights w) {
    return {_mm256_dpbusd_avx_epi32(sum.low, a.codes, w.low), _mm256_dpbusd_avx_epi32(sum.high, a.codes, w.high)};
  }
};

}  // namespace
}  // namespace mptqc
